"""A robot's own simulator with other parameters: the physics prior of whoever knows the robot, but not exactly.

    Hybrid("learneddyn.world.prior.simulated", {"task": "Hopper-v5", "bodies": {"torso": {"mass": 1.3}}}, dt=0.008)

`learneddyn.models.Hybrid` finds it by that path, so that model files hold the parameters and no simulator.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn import tasks

_NUDGE = 1e-6
"""Step of the finite differences, in units of the observation and the action; the simulator computes in float64."""
_LARGEST = 1e9
"""Where MuJoCo no longer simulates a state."""
_BEGIN = 1.0
"""Time at which rows begin, s. MuJoCo resets what becomes unstable, and time to 0 with it."""
_ROWS = 32
"""Rows for which another thread pays."""


def simulated(
    obs: Float[Tensor, "b o"],
    action: Float[Tensor, "b a"],
    *,
    task: str,
    bodies: Mapping[str, Mapping[str, float]] | None = None,
    gravity: float | None = None,
) -> Float[Tensor, "b o"]:
    """Return the next observation, as the task's MuJoCo environment with changed parameters has it.

    All rows go through one ``mujoco.rollout`` on the CPU, on as many threads as `torch.get_num_threads` says, and come
    back on the device they came from. What an observation does not hold is neutral (see the task's codec); the solver
    starts cold, so that contacts may differ from a running environment's within its tolerance. A row that MuJoCo cannot
    simulate (not finite, beyond 1e9, or so unstable that MuJoCo would reset it) is answered with NaN.

    Gradients are finite differences, one more row per column of observation and action: meant for planning and short
    fits. They are not differentiable again.

    Args:
        obs: observations.
        action: actions.
        task: id of a task whose observation is a function of positions and velocities, such as "Hopper-v5".
        bodies: changes by body, see `learneddyn.plants.variants.make_variant`.
        gravity: downwards, m/s2; None keeps the environment's.

    Raises:
        ValueError: such a change is refused, or the observation holds more than positions and velocities.
        learneddyn.tasks.UnknownTask: no task has this id.
    """
    step = _simulator(task, json.dumps(bodies or {}, sort_keys=True), gravity)
    out: Tensor = _Differences.apply(obs, action, step)  # type: ignore[no-untyped-call]
    return out


class _Simulator:
    """A MuJoCo model and the codec of its observations."""

    def __init__(self, task: str, bodies: Mapping[str, Mapping[str, float]], gravity: float | None) -> None:
        import mujoco

        from learneddyn.plants.variants import make_variant

        known = tasks.get(task)
        env = make_variant(known.real_id, bodies, gravity)
        shape = env.observation_space.shape
        self.model, self.skip, codec = env.model, env.frame_skip, known.codec
        env.close()  # type: ignore[no-untyped-call]
        if codec is None or len(codec.exact) != (shape or (0,))[0]:
            raise ValueError(f"the observation of {task} is no function of positions and velocities alone: no prior")
        self.codec = codec
        self.size = mujoco.mj_stateSize(self.model, int(mujoco.mjtState.mjSTATE_FULLPHYSICS))
        self.data = [mujoco.MjData(self.model)]

    def __call__(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b o"]:
        """Step every row; float64 on the CPU."""
        from mujoco import MjData, rollout

        nq, nv, rows = self.model.nq, self.model.nv, len(obs)
        if not rows:  # of which mujoco.rollout crashes the process
            return obs
        inputs = torch.cat([obs, action], dim=1)
        lost = ~(inputs.isfinite() & (inputs.abs() < _LARGEST)).all(dim=1)
        qpos, qvel = self.codec.to_simulator(torch.where(lost[:, None], 0.0, obs))
        state = np.zeros((rows, self.size))
        state[:, 0] = _BEGIN
        state[:, 1 : 1 + nq], state[:, 1 + nq : 1 + nq + nv] = qpos, qvel
        control = torch.where(lost[:, None], 0.0, action).numpy()[:, None].repeat(self.skip, axis=1)
        threads = max(1, min(torch.get_num_threads(), rows // _ROWS))
        datas = [*self.data, *(MjData(self.model) for _ in range(threads - 1))]
        after = rollout.rollout(self.model, datas, state, control)[0][:, -1]
        joints = after[:, 1 : 1 + nq], after[:, 1 + nq : 1 + nq + nv]
        next_obs = self.codec.from_simulator(*joints, dtype=torch.float64)
        assert next_obs is not None
        lost = lost | torch.as_tensor(after[:, 0] < _BEGIN)
        return torch.where(lost[:, None], torch.nan, next_obs)


@lru_cache(maxsize=8)
def _simulator(task: str, bodies: str, gravity: float | None) -> _Simulator:
    return _Simulator(task, json.loads(bodies), gravity)


class _Differences(torch.autograd.Function):
    """A step whose gradient is taken by finite differences."""

    @staticmethod
    def forward(ctx: Any, obs: Tensor, action: Tensor, step: _Simulator) -> Tensor:
        rows = obs.detach().cpu().double(), action.detach().cpu().double()
        after = step(*rows)
        ctx.save_for_backward(obs, action, after)
        ctx.step = step
        return after.to(obs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        obs, action, after = ctx.saved_tensors
        o, rows = obs.shape[1], torch.cat([obs, action], dim=1).cpu().double()
        b, columns = rows.shape
        nudged = rows[None] + _NUDGE * torch.eye(columns, dtype=rows.dtype)[:, None]
        reached = ctx.step(nudged[..., :o].reshape(columns * b, o), nudged[..., o:].reshape(columns * b, columns - o))
        slopes = (reached.view(columns, b, o) - after) / _NUDGE
        found = torch.einsum("cbo,bo->bc", slopes, gradient.cpu().double()).to(obs)
        return found[:, :o], found[:, o:], None
