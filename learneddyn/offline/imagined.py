"""Imagined experience as a Minari data set that says where it comes from.

What `OfflineMBPO` imagined last is in its pool, packed for sampling. `imagined_log` unpacks it into episodes in the
environment's units, `save_imagined` writes it, and `learneddyn.data.read_provenance` tells of such a data set:

    kind            "imagined"
    model           class, and the SHA-256 of its weights (the one in the ``model.json`` of a saved model)
    source          the log that rollouts began in
    sampler         what chose the next states
    filter          of a dynamics reward (MOREC): its class and the SHA-256 of its weights, temperature, draws per elite
                    and the limit of candidates; null without one
    halt            what ended rollouts besides the task (MOREC, MOReL): the rule, its threshold, what asked for it, and
                    the reward that such a step pays, "kept" for its own; null where nothing did
    horizon         most steps of a rollout; a rollout that is cut there is truncated, not terminated
    penalty, penalty_weight, penalty_rule       what has been subtracted from the rewards, in the log's units
    policy, updates, seed                       who acted: the learner's class, after how many updates at most
"""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import minari
import torch

import learneddyn
from learneddyn.core import DataError, Json, Transitions
from learneddyn.data.minari import save
from learneddyn.evaluation.stats import plain
from learneddyn.models import AbstractModel
from learneddyn.offline.halting import Halting
from learneddyn.offline.model_based import OfflineMBPO
from learneddyn.offline.transition_filter import TransitionFilter
from learneddyn.world import World


def imagined_log(agent: OfflineMBPO) -> Transitions:
    """Return the rows of an agent's pool, the oldest first, as episodes in the environment's units.

    Rewards are those that the agent learned from: the penalty is subtracted, its own shift and scale are undone.

    Raises:
        DataError: the agent has not imagined yet. A loaded one has not, unless `learneddyn.runs.offline.restored` gave
            its rows back.
    """
    if agent.replay is None or not len(agent.imagined):
        raise DataError(f"this {type(agent).__name__} has imagined nothing yet: let it learn first")
    batch = agent.imagined.unpack(agent.imagined.rows())
    ended = batch.terminated > 0.5
    follows = torch.zeros_like(ended)
    follows[1:] = (batch.next_obs[:-1] == batch.obs[1:]).all(1) & ~ended[:-1]
    rows = Transitions(
        obs=batch.obs,
        action=agent._unscaled(batch.action),
        reward=batch.reward / agent.reward_factor - agent.reward_shift,
        next_obs=batch.next_obs,
        terminated=ended,
        episode=(~follows).cumsum(0),
        spaces=agent.rows.spaces,
        source=f"imagined by {type(agent).__name__}",
    )
    # A rollout may begin exactly where the last one was cut, in a plant with few states: the horizon tells them apart.
    begins = ~follows | (rows.positions() % agent.horizon == 0)
    return replace(rows, episode=begins.cumsum(0) - 1)


def provenance(agent: OfflineMBPO) -> Json:
    """Return where an agent's imagined rows come from, as plain JSON; the module's docstring lists the entries."""
    model, world = agent.model, agent.world or agent.make_world()
    weights = {"sha256": model.digest()} if isinstance(model, AbstractModel) else {}
    filtered = isinstance(world.sampler, TransitionFilter)
    return {
        "kind": "imagined",
        "model": {"class": _named(type(model))} | weights,
        "source": agent.rows.source,
        "sampler": agent.sampler if isinstance(agent.sampler, str) and not filtered else _named(world.sampler),
        "filter": _filter_card(world),
        "halt": _halt_card(agent, world),
        "horizon": agent.horizon,
        "penalty": agent.penalty if isinstance(agent.penalty, str) else _named(agent.penalty),
        "penalty_weight": world.penalty_weight,
        "penalty_rule": str(agent.penalty_weight),
        "policy": type(agent).__name__,
        "updates": agent._n_updates,
        "seed": agent.seed,
        "learneddyn": learneddyn.__version__,
    }


def save_imagined(agent: OfflineMBPO, dataset_id: str, *, overwrite: bool = False) -> minari.MinariDataset:
    """Write an agent's imagined rows as a Minari data set with its provenance.

    The environment that Minari recovers for evaluation is the real one, where it has an id.

    Args:
        agent: that has learned.
        dataset_id: ``(namespace/)name-v0``.
        overwrite: replace a data set of the same id.

    Raises:
        DataError: the agent has not imagined yet.
        DatasetExists: the id is taken and ``overwrite`` is False.
        ValueError: a malformed id.
    """
    rows, card = imagined_log(agent), provenance(agent)
    real = None if agent.task is None else agent.task.real_id
    return save(
        rows,
        dataset_id,
        eval_env=real if real in gym.registry else None,
        algorithm=f"{card['policy']} in {card['model']['class'].rpartition('.')[2]}",
        description=f"imagined from {card['source'] or 'a log'}, rollouts of at most {agent.horizon} steps",
        provenance=card,
        overwrite=overwrite,
    )


def _filter_card(world: World) -> Json | None:
    choose = world.sampler
    if not isinstance(choose, TransitionFilter):
        return None
    judge = choose.dynamics_reward
    weights = {"sha256": judge.digest()} if isinstance(judge, AbstractModel) else {}
    return {
        "dynamics_reward": {"class": _named(judge)} | weights,
        "temperature": plain(choose.temperature),
        "draws": choose.draws,
        "limit": plain(choose.limit),
    }


def _halt_card(agent: OfflineMBPO, world: World) -> Json | None:
    if not isinstance(world.trust, Halting):
        return None
    filtered = isinstance(world.sampler, TransitionFilter)
    asked = {"least_dynamics_reward": agent.least_dynamics_reward} if filtered else {"pessimism": agent.pessimism}
    return {"rule": world.trust.rule, "threshold": world.trust.threshold, "reward": world.halt_reward} | asked


def _named(part: Any) -> str:
    """Return the dotted path of a class or function, of an object that of its class."""
    kind = part if hasattr(part, "__qualname__") else type(part)
    return f"{kind.__module__}.{kind.__qualname__}"
