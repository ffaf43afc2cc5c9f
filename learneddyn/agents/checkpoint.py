"""Save a whole run of a `Dyna` agent, and go on with it bit-equal: the same actions, batches and weights to come.

A checkpoint is a folder: SB3's own ``agent.zip`` (policy, optimisers, arguments, dynamics model), the real and imagined
rows, the states of all random generators, and what the running episodes of the environment need to be played again
(`learneddyn.agents.episodes`). Only SB3's zip unpickles; open none of strangers.

Not saved: the state of callbacks, and that of an Ornstein-Uhlenbeck action noise, which SB3 begins anew in ``learn``.
"""

import json
import random
import warnings
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from learneddyn.agents.dyna import Dyna
from learneddyn.agents.episodes import Episodes
from learneddyn.core import Json
from learneddyn.files import replaced_folder, surviving_folder, write_file

Agent = TypeVar("Agent", bound=Dyna)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: missing, incomplete or truncated."""


def save_checkpoint(agent: Dyna, folder: str | Path) -> None:
    """Write a checkpoint between two steps: in a callback's ``_on_rollout_start``, or when ``learn`` has returned.

    A kill at any moment leaves the last checkpoint or this one.
    """
    assert agent.env is not None
    episodes, actions = agent.episodes.state() if agent.episodes is not None else ({}, {})
    generators, tensors = _generators(agent)
    with replaced_folder(Path(folder)) as fresh:
        agent.save(fresh / "agent.zip")
        agent.replay_buffer.save(fresh / "replay")
        write_file(fresh / "state.safetensors", save_tensors(tensors | actions))
        write_file(fresh / "state.json", json.dumps({"episodes": episodes, "generators": generators}).encode())


def load_checkpoint(
    kind: type[Agent], folder: str | Path, env: Any, device: torch.device | str = "auto", **kwargs: Any
) -> Agent:
    """Return the agent of a checkpoint; ``learn(steps_left, reset_num_timesteps=False)`` goes on.

    Args:
        kind: class of the agent.
        folder: written by `save_checkpoint`.
        env: a new environment of the same kind. Its running episodes are played again; where that does not lead to the
            observation that the agent saw last (the environment draws random numbers in its steps), new episodes begin
            after a warning, and the run goes on otherwise than it would have.
        device: of agent and model.
        **kwargs: for SB3's ``load``.

    Raises:
        CheckpointError: missing, incomplete or truncated.
    """
    source = surviving_folder(Path(folder))
    try:
        state = json.loads((source / "state.json").read_text())
        tensors = load_file(source / "state.safetensors")
        agent = kind.load(source / "agent.zip", env=env, device=device, force_reset=False, **kwargs)
        agent.replay_buffer.restore(source / "replay")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{source} is no readable checkpoint of {kind.__name__}: {error}") from error
    if state["episodes"] and agent._last_obs is not None:
        assert agent.env is not None
        assert isinstance(agent._last_obs, np.ndarray)
        agent.episodes = Episodes(agent.env)
        if not agent.episodes.restore(state["episodes"], tensors, agent._last_obs):
            warnings.warn(
                "the environment's running episodes cannot be played again (it draws random numbers in its steps, or "
                "is another one): new episodes begin, and the run does not go on bit-equal",
                stacklevel=2,
            )
            agent._last_obs = agent.episodes = None
    _restore_generators(agent, state["generators"], tensors)
    return agent


def _generators(agent: Dyna) -> tuple[Json, dict[str, Tensor]]:
    """Return the states of all generators that the agent draws from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (what SB3 draws from)
    plain = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "action_space": agent.action_space.np_random.bit_generator.state,
    }
    tensors = {"rng.torch": torch.get_rng_state(), "rng.agent": agent.rng.get_state()}
    if agent.device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(agent.device)
    return plain, tensors


def _restore_generators(agent: Dyna, plain: Json, tensors: dict[str, Tensor]) -> None:
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    agent.action_space.np_random.bit_generator.state = plain["action_space"]
    torch.set_rng_state(tensors["rng.torch"])
    agent.rng.set_state(tensors["rng.agent"])
    if agent.device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], agent.device)
