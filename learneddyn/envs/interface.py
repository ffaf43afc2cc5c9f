"""The border between an agent's arrays (elements of Gymnasium spaces) and a world's tensors (flat float32 columns)."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces as gs
from jaxtyping import Float, Float32
from torch import Tensor

from learneddyn.core import State
from learneddyn.spaces import Spaces, decode, encode, flat_dim
from learneddyn.world import Row

TOLERANCE = 1e-5
"""Share of an action's range by which it may leave its bounds: rounding of rescaled float32 actions, nothing more."""


_FEW = 32  # entries that Python compares faster than NumPy


class InvalidAction(gym.error.InvalidAction, ValueError):
    """An action with the wrong shape, a NaN, or a value out of its bounds."""


class Interface:
    """Translate batches for the lanes of one environment, checking what comes in.

    Args:
        spaces: the spaces of one lane.
        lanes: number of lanes, at least 1.
        device: where the world's tensors live.
    """

    def __init__(self, spaces: Spaces, lanes: int, device: torch.device) -> None:
        if lanes < 1:
            raise ValueError(f"num_envs must be at least 1, got {lanes}")
        self.observation, self.action = spaces
        self.lanes, self.device, self._on_cpu = lanes, device, device.type == "cpu"
        low, high = _bounds(self.action, 0.0, 1.0)
        slack = np.where(np.isfinite(high - low), TOLERANCE * (high - low), 0.0).astype(np.float32)
        self._action_low, self._action_high = low - slack, high + slack
        self._actions_shape = (lanes, *self.action.shape) if isinstance(self.action, gs.Box) else ()
        # One comparison of the extremes is several times cheaper than one per entry, and bounds are mostly uniform.
        self._uniform = bool((low == low[0]).all() and (high == high[0]).all()) if len(low) else False
        low, high = _bounds(self.observation, -np.inf, np.inf)
        self._obs_low, self._obs_high = torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)
        self._row_bounds = low, high
        self._bounded = bool(np.isfinite(low).any() or np.isfinite(high).any())

    def to_world(self, actions: Any) -> Float[Tensor, "b a"]:
        """Return a batch of actions (arrays or tensors) as columns on the world's device.

        Raises:
            InvalidAction: wrong shape, NaN, or out of bounds.
        """
        if isinstance(actions, Tensor):
            columns = self._tensor_columns(actions)
            low, high = (float(bound) for bound in columns.aminmax()) if self._uniform else (np.nan, np.nan)
            self._check_bounds(low, high, columns)
            return columns
        columns = torch.from_numpy(self._checked_array(actions))
        return columns if self._on_cpu else columns.to(self.device)

    def one_to_array(self, action: Any) -> Float32[np.ndarray, "1 a"]:
        """Return a single action as one row.

        Raises:
            InvalidAction: wrong shape, NaN, or out of bounds.
        """
        if isinstance(self.action, gs.Box):
            return self._checked_array(np.asarray(action)[None])
        return self._checked_array(batch_of_one(self.action, action))

    def start_to_world(self, obs: Any) -> Float[Tensor, "b o"]:
        """Return a batch of observations to start from as columns on the world's device.

        Raises:
            ValueError: wrong shape, NaN, or out of the observation space's bounds.
        """
        columns = torch.from_numpy(np.array(encode(self.observation, obs))).to(self.device)
        if len(columns) != self.lanes:
            raise ValueError(f"options['obs'] must hold one observation per lane ({self.lanes}), got {len(columns)}")
        inside = columns.isfinite() & (columns >= self._obs_low) & (columns <= self._obs_high)
        if not inside.all():
            lane = int((~inside).any(dim=1).nonzero()[0])
            raise ValueError(
                f"options['obs'] of lane {lane} is {columns[lane].tolist()}, which is not in {self.observation}"
            )
        return columns

    def confine(self, state: State) -> State:
        """Return an imagined state clamped to the bounds of the observation space, as a simulator keeps to them."""
        return state._replace(obs=state.obs.clamp(self._obs_low, self._obs_high)) if self._bounded else state

    def confine_row(self, row: Row) -> Row:
        """Return a single imagined state clamped as `confine` does."""
        return row._replace(obs=np.clip(row.obs, *self._row_bounds)) if self._bounded else row

    def to_agent(self, obs: Float[Tensor, "b o"]) -> Any:
        """Return columns as a batch of elements of the observation space, in fresh NumPy memory."""
        flat = (obs if self._on_cpu else obs.cpu()).numpy()
        if isinstance(self.observation, gs.Box):
            batch = np.array(flat, self.observation.dtype)
            return batch if len(self.observation.shape) == 1 else batch.reshape(len(flat), *self.observation.shape)
        return decode(self.observation, flat.copy())

    def one_to_agent(self, obs: Float32[np.ndarray, " o"]) -> Any:
        """Return one row as an element of the observation space, in fresh memory."""
        if isinstance(self.observation, gs.Box):
            return np.array(obs, self.observation.dtype).reshape(self.observation.shape)
        return row(self.observation, decode(self.observation, obs[None].copy()), 0)

    def _checked_array(self, actions: Any) -> Float32[np.ndarray, "b a"]:
        array = self._array_columns(actions)
        if not array.size:  # a system that takes no action
            return array
        if array.size <= _FEW:
            entries = array.ravel().tolist()
            # Python's extremes pass over a NaN, and its sum does not.
            low, high = (min(entries), max(entries)) if math.isfinite(sum(entries)) else (np.nan, np.nan)
        else:
            low, high = float(np.minimum.reduce(array, axis=None)), float(np.maximum.reduce(array, axis=None))
        self._check_bounds(low, high, array)
        return array

    def _array_columns(self, actions: Any) -> np.ndarray:
        space = self.action
        if isinstance(space, gs.Box):
            array = np.ascontiguousarray(actions, np.float32)
            if array.shape != self._actions_shape:
                raise InvalidAction(f"actions for {space} must have shape {self._actions_shape}, got {array.shape}")
            array = array if array.ndim == 2 else array.reshape(self.lanes, -1)
        else:
            if isinstance(space, gs.Discrete | gs.MultiDiscrete) and np.asarray(actions).dtype.kind not in "iu":
                raise InvalidAction(f"actions for {space} must be integers, got dtype {np.asarray(actions).dtype}")
            try:
                array = encode(space, actions)
            except (KeyError, ValueError) as error:
                raise InvalidAction(f"actions are not elements of {space}: {error}") from error
            if len(array) != self.lanes:
                raise InvalidAction(f"there must be one action per lane ({self.lanes}), got {len(array)}")
        return array if array.flags.writeable else array.copy()

    def _tensor_columns(self, actions: Tensor) -> Tensor:
        if not isinstance(self.action, gs.Box):
            return torch.from_numpy(self._array_columns(actions.cpu().numpy())).to(self.device)
        if actions.shape != self._actions_shape:
            raise InvalidAction(
                f"actions for {self.action} must have shape {self._actions_shape}, got {tuple(actions.shape)}"
            )
        return actions.detach().to(self.device, torch.float32).reshape(self.lanes, -1)

    def _check_bounds(self, low: float, high: float, columns: Tensor | np.ndarray) -> None:
        """Refuse actions out of bounds, given their extremes, which settle most cases."""
        if self._uniform and low >= self._action_low[0] and high <= self._action_high[0]:
            return
        array = columns.cpu().numpy() if isinstance(columns, Tensor) else columns
        inside = (array >= self._action_low) & (array <= self._action_high)
        if not inside.all():
            lane, column = np.argwhere(~inside)[0]
            raise InvalidAction(
                f"action {array[lane].tolist()} of lane {lane} is not in {self.action}: entry {column} is "
                f"{array[lane, column]}, allowed are {self._action_low[column]} to {self._action_high[column]}"
            )


def row(space: gym.Space[Any], batch: Any, lane: int) -> Any:
    """Return element ``lane`` of a batch of elements of ``space``, in memory of its own."""
    match space:
        case gs.Dict():
            return {key: row(part, batch[key], lane) for key, part in space.spaces.items()}
        case gs.Tuple():
            return tuple(row(part, item, lane) for part, item in zip(space.spaces, batch, strict=True))
        case gs.Discrete():
            return batch[lane]
    return np.array(batch[lane])


def batch_of_one(space: gym.Space[Any], element: Any) -> Any:
    """Return one element of ``space`` as a batch of one."""
    match space:
        case gs.Dict():
            return {key: batch_of_one(part, element[key]) for key, part in space.spaces.items()}
        case gs.Tuple():
            return tuple(batch_of_one(part, item) for part, item in zip(space.spaces, element, strict=True))
    return np.asarray(element)[None]


def _bounds(space: gym.Space[Any], lowest: float, highest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of the flat columns, float32, rounded into the space; columns of no Box get the two given."""
    match space:
        case gs.Box():
            low, high = space.low.reshape(-1), space.high.reshape(-1)
            with np.errstate(over="ignore"):
                low32, high32 = low.astype(np.float32), high.astype(np.float32)
            low32 = np.where(low32 < low, np.nextafter(low32, np.float32(np.inf)), low32)
            return low32, np.where(high32 > high, np.nextafter(high32, np.float32(-np.inf)), high32)
        case gs.Dict():
            # In the order of the columns, see `learneddyn.spaces`.
            parts = [_bounds(space[key], lowest, highest) for key in sorted(space.spaces)]
        case gs.Tuple():
            parts = [_bounds(part, lowest, highest) for part in space.spaces]
        case _:
            columns = flat_dim(space)
            return np.full(columns, lowest, np.float32), np.full(columns, highest, np.float32)
    return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])
