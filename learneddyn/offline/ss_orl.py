"""Offline learning where few trajectories carry actions: label the rest, then learn as if all had been labelled.

    data = Transitions.cat([labelled, load_action_free("mine/videos-v0")])
    agent = TD3BC("MlpPolicy", semi_supervised(data, rng=generator(0)).data).learn(100_000)

An inverse dynamics model learns from the rows that hold an action which one leads from state to state, the others get
its mean as their label, and any learner of this room takes the union. Rewards and states of all rows are the log's own.

Source: Zheng, Henaff, Amos, Grover, "Semi-Supervised Offline Reinforcement Learning with Action-Free Trajectories",
2023. As there, labels are not filtered by their uncertainty, which is reported.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import DataError, Transitions
from learneddyn.data.minari import load_action_free
from learneddyn.models import FitReport, InverseDynamics
from learneddyn.offline.dataset import Data, episode_returns


class ProxyLabelled(NamedTuple):
    """A log whose missing actions have been filled in; the rows and their order are those of the log.

    ``std`` is the model's deviation per row and action column, 0 where the action is logged. ``report`` is what the fit
    of the inverse dynamics said, None where the model came fitted.
    """

    data: Transitions
    std: Float[Tensor, "n a"]
    model: InverseDynamics
    report: FitReport | None


def semi_supervised(data: Data, *, rng: torch.Generator, model: InverseDynamics | None = None) -> ProxyLabelled:
    """Fill in the actions that a log lacks.

    Args:
        data: transitions, some without an action (see `Transitions.labelled`), or ids of Minari data sets.
        rng: of the model's fit, on the data's device.
        model: inverse dynamics; fitted on the labelled rows in place if it is not fitted. None takes the defaults.

    Raises:
        DataError: no row without an action, no more than one trajectory with actions, NaN or infinite rows.
        ValueError: the model was fitted on other spaces, or the actions are no bounded Box.
    """
    rows = data if isinstance(data, Transitions) else load_action_free(data)
    known = ~unlabelled(rows)
    model = InverseDynamics() if model is None else model
    report = model.fit(rows, rng=rng) if model.spaces is None else None
    belief = model.predict(rows)
    action = torch.where(known[:, None], rows.action, belief.mean.to(rows.device))
    std = belief.std.to(rows.device) * ~known[:, None]
    return ProxyLabelled(replace(rows, action=action), std, model, report)


def unlabelled(data: Transitions) -> Bool[Tensor, " n"]:
    """Return which rows hold no action.

    Raises:
        DataError: each holds one.
    """
    known = data.labelled()
    if bool(known.all()):
        name = f"data set {data.source!r}" if data.source else "the data"
        raise DataError(f"every row of {name} holds an action: there is nothing to label, learn from it as it is")
    return ~known


def hide_actions(data: Transitions, *, rng: torch.Generator, share: float = 0.1, below: float = 0.5) -> Transitions:
    """Return the same rows with actions in a few trajectories of low return only: the source's benchmark.

    Args:
        data: a log with all its actions.
        rng: of the choice, on the data's device.
        share: labelled trajectories, as a share of all.
        below: they are drawn from this share of all trajectories, those of the lowest return.

    Raises:
        ValueError: not ``0 < share <= below <= 1``, or fewer than two labelled trajectories.
    """
    if not 0 < share <= below <= 1:
        raise ValueError(f"share and below must be 0 < share <= below <= 1, got share={share}, below={below}")
    number, returns = episode_returns(data)
    count, pool = round(share * len(returns)), round(below * len(returns))
    if count < 2:
        raise ValueError(f"share={share} labels {count} of {len(returns)} trajectories, at least 2 are needed")
    poor = returns.argsort()[:pool]
    chosen = poor[torch.randperm(pool, generator=rng, device=rng.device)[:count]]
    kept = torch.isin(number, chosen)
    return replace(data, action=torch.where(kept[:, None], data.action, torch.nan))
