"""Observation <-> simulator state where the observation is a list of joint positions and velocities.

No codec keeps the solver's warm start (MuJoCo's ``qacc_warmstart``): two states equal in ``qpos`` and ``qvel`` can
differ in it, and contacts then differ within the solver's tolerance.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def rows(real_id: str, obs: Float[Tensor, "b o"], columns: int) -> np.ndarray:
    """Return observations as float64 NumPy rows.

    Raises:
        ValueError: not ``columns`` columns.
    """
    if obs.ndim != 2 or obs.shape[1] != columns:
        raise ValueError(f"observations of {real_id} have shape (b, {columns}), got {tuple(obs.shape)}")
    return obs.detach().cpu().numpy().astype(np.float64)


def flat(*columns: np.ndarray, dtype: torch.dtype) -> Float[Tensor, "b o"]:
    """Return arrays of shape [b, ...] side by side as one tensor."""
    return torch.as_tensor(np.concatenate(columns, axis=1), dtype=dtype)


@dataclass(eq=False)
class JointCodec:
    """``obs = (qpos[skipped:], qvel, derived columns)``.

    Args:
        real_id: the environment, for error messages.
        positions: nq of the simulator.
        velocities: nv of the simulator.
        skipped: leading entries of qpos (position in the plane) that the observation leaves out; they come back as 0.
        clip: the observation holds velocities clipped to plus or minus this.
        derived: trailing observation columns (inertias, forces) that are more than functions of qpos and qvel.
        lost: what the observation does not hold, in words.
    """

    real_id: str
    positions: int
    velocities: int
    lost: str
    skipped: int = 0
    clip: float = np.inf
    derived: int = 0

    @property
    def exact(self) -> tuple[int, ...]:
        """Observation columns that the environment gives back unchanged when set to ``to_simulator(obs)``."""
        return tuple(range(self.positions - self.skipped + self.velocities))

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, nq]`` and ``qvel [b, nv]``, float64; skipped positions are 0.

        Raises:
            ValueError: wrong number of columns.
        """
        array = rows(self.real_id, obs, len(self.exact) + self.derived)
        seen = self.positions - self.skipped
        qpos = np.concatenate([np.zeros((len(array), self.skipped)), array[:, :seen]], axis=1)
        return qpos, array[:, seen : seen + self.velocities].copy()

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b o"] | None:
        """Return the observation on the CPU, or None where it has derived columns."""
        if self.derived:
            return None
        return flat(qpos[:, self.skipped :], np.clip(qvel, -self.clip, self.clip), dtype=dtype)
