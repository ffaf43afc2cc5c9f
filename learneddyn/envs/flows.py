"""Chaotic flows as Gymnasium environments: to be watched, or to be held at a state by pushes.

    gym.make("learneddyn/Lorenz63-v0")                                   # forecast: no actions, Box of shape (0,)
    gym.make("learneddyn/Lorenz63Held-v0")                               # stay at the fixed point that orbits leave
    gym.make("learneddyn/Flow-v0", flow="Rossler", forced=[0])           # any flow of dysts, pushed along x
    gym.make_vec("learneddyn/Flow-v0", num_envs=512, flow="Thomas", output="torch")

An environment is a World of the flow itself (`learneddyn.plants.chaos.FlowDynamics`), so that observations, rewards and
options are those of `LearnedEnv` and `LearnedVectorEnv`; states are kept in float32. Tasks come by an id that names
this module, so that worlds and commands find them in any process: "learneddyn.envs.flows:learneddyn/Lorenz63-v0".
`register_flow` gives another flow an id of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from jaxtyping import Float
from torch import Tensor

from learneddyn import tasks
from learneddyn.core import InitialFn, Task, generator
from learneddyn.envs.learned import DEFAULT_HORIZON, LearnedEnv
from learneddyn.envs.vector import LearnedVectorEnv
from learneddyn.plants.chaos import FlowDynamics
from learneddyn.tasks import chaos
from learneddyn.world import World

_STARTS = 1000
"""States on the attractor that episodes begin at, drawn once: the way there takes as long as an episode."""


def flow_world(
    flow: str = "Lorenz63",
    *,
    dt: float | None = None,
    substeps: int = 4,
    forced: Sequence[int] = (),
    push: float = 1.0,
    target: Sequence[float] | None = None,
    effort: float = 0.01,
    device: str = "cpu",
) -> World:
    """Return the world of a flow.

    Args:
        flow: "Lorenz63", or the name of one of dysts.
        dt: time a step lasts; None is a hundredth of the flow's period.
        substeps: Runge-Kutta steps of order 4 per step.
        forced: coordinates that actions push; () has no action columns.
        push: strength of the actions, in standard deviations per unit of time.
        target: standardised state to be held, see `learneddyn.tasks.chaos.held`; None asks for nothing.
        effort: price of the squared actions where there is a target.
        device: where to compute.

    Raises:
        ValueError: an argument that `FlowDynamics` refuses, or a target of another number of columns.
        ImportError: a flow of dysts, which is not installed.
    """
    truth, initial = _truth(flow, dt, substeps, tuple(forced), push, device)
    columns = len(truth.flow.mean)
    if target is not None and len(target) != columns:
        raise ValueError(f"target must have the {columns} columns of {flow}, got {len(target)}")
    if target is None:
        task = chaos.watched(flow, initial=initial)
    else:
        task = chaos.held(flow, target, effort=effort, initial=initial)
    return World(truth, replace(task, max_episode_steps=DEFAULT_HORIZON))


def make_flow(flow: str = "Lorenz63", *, horizon: int | None = None, **how: Any) -> LearnedEnv:
    """Return what ``gym.make("learneddyn/Flow-v0", ...)`` makes.

    Args:
        flow: see `flow_world`.
        horizon: steps until truncation; None is 1000.
        **how: other arguments of `flow_world`.
    """
    return LearnedEnv(flow_world(flow, **how), horizon=horizon)


def make_flow_vector(
    num_envs: int = 1,
    flow: str = "Lorenz63",
    *,
    horizon: int | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    output: str = "numpy",
    **how: Any,
) -> LearnedVectorEnv:
    """Return what ``gym.make_vec("learneddyn/Flow-v0", ...)`` makes.

    Args:
        num_envs: lanes.
        flow: see `flow_world`.
        horizon: steps until truncation; None is 1000.
        autoreset_mode: see `LearnedVectorEnv`.
        output: ``"numpy"`` or ``"torch"``.
        **how: other arguments of `flow_world`.
    """
    world = flow_world(flow, **how)
    return LearnedVectorEnv(world, num_envs, horizon=horizon, autoreset_mode=autoreset_mode, output=output)


def register_flow(env_id: str, **how: Any) -> Task:
    """Give a flow an id with Gymnasium and its task the same id; an id can be given anew.

    Args:
        env_id: Gymnasium's; worlds and commands find the task in another process where it names the module that calls
            this: register "my_flows:mine/Rossler-v0" in my_flows.py.
        **how: arguments of `flow_world`.

    Raises:
        ValueError: see `flow_world`.
        ImportError: see `flow_world`.
    """
    task = replace(flow_world(**how).task, real_id=env_id)
    bare = env_id.partition(":")[2] or env_id
    gym.registry.pop(bare, None)
    entry = f"{__name__}:{make_flow.__name__}"
    gym.register(bare, entry, vector_entry_point=f"{__name__}:{make_flow_vector.__name__}", kwargs=how)
    tasks.register(task, overwrite=True)
    return task


@cache
def _truth(
    flow: str, dt: float | None, substeps: int, forced: tuple[int, ...], push: float, device: str
) -> tuple[FlowDynamics, InitialFn]:
    """Return a flow and what draws its start states; the same for the same arguments."""
    truth = FlowDynamics(flow, dt=dt, substeps=substeps, forced=forced, push=push, device=device)

    @cache
    def table() -> Float[Tensor, "n o"]:
        return truth.start(_STARTS, generator(0, device))

    def initial(lanes: int, rng: torch.Generator) -> Float[Tensor, "b o"]:
        if lanes < 1:
            raise ValueError(f"the number of lanes must be at least 1, got {lanes}")
        rows = torch.randint(_STARTS, (lanes,), generator=rng, device=rng.device)
        return table()[rows.to(truth.device)]

    return truth, initial


def _shipped() -> None:
    """Register the tasks of the ids that ``import learneddyn`` registers."""
    for env_id in ("learneddyn/Lorenz63-v0", "learneddyn/Lorenz63Held-v0"):
        task = flow_world(**gym.spec(env_id).kwargs).task
        tasks.register(replace(task, real_id=f"{__name__}:{env_id}"), overwrite=True)


_shipped()
