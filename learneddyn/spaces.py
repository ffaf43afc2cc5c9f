"""Gymnasium spaces as flat float32 columns: what every model, world and planner computes with.

A Box keeps its numbers, a Discrete becomes one-hot, MultiBinary becomes zeros and ones, MultiDiscrete becomes one
one-hot per entry, Dict and Tuple are their parts side by side, those of a Dict sorted by key: two Dicts that differ in
the order of their keys are equal to Gymnasium, so they must have the same columns. `encode` and `decode` are
batched and inverse to each other (`decode` takes the largest entry of a one-hot block, so it also reads a softmax).
"""

import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Spaces(NamedTuple):
    """The observation and action space that a data set, model, world or policy speaks."""

    observation: gym.Space[Any]
    action: gym.Space[Any]

    @property
    def obs_dim(self) -> int:
        """Columns of the flat observation."""
        return flat_dim(self.observation)

    @property
    def action_dim(self) -> int:
        """Columns of the flat action."""
        return flat_dim(self.action)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dictionary that `from_json` reads back."""
        from minari.serialization import serialize_space

        return {name: serialize_space(space, to_string=False) for name, space in self._asdict().items()}

    @classmethod
    def from_json(cls, text: dict[str, Any]) -> "Spaces":
        """Read what `to_json` wrote."""
        from minari.serialization import deserialize_space

        return cls(deserialize_space(text["observation"]), deserialize_space(text["action"]))


def flat_dim(space: gym.Space[Any]) -> int:
    """Return the number of float32 columns of one element of ``space``.

    Raises:
        TypeError: the space has no fixed-size numeric form (Text, Graph, Sequence, OneOf).
    """
    match space:
        case spaces.Box() | spaces.MultiBinary():
            return math.prod(space.shape)
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.Dict():
            return sum(flat_dim(part) for part in space.spaces.values())
        case spaces.Tuple():
            return sum(flat_dim(part) for part in space.spaces)
    raise TypeError(
        f"{space} cannot be written as float columns; allowed are Box, Discrete, MultiBinary, MultiDiscrete, Dict and "
        "Tuple. Wrap the environment so that it uses one of them."
    )


def encode(space: gym.Space[Any], batch: Any) -> np.ndarray:
    """Flatten a batch of elements of ``space`` into float32 columns.

    Args:
        space: the space of one element.
        batch: elements with one leading batch axis; for Dict a dictionary of such arrays, for Tuple a tuple of them.

    Returns:
        Array of shape ``[n, flat_dim(space)]``, float32.

    Raises:
        ValueError: the batch does not have the shape the space asks for, or an index lies outside a Discrete space.
    """
    match space:
        case spaces.Dict():
            return np.concatenate([encode(space[key], batch[key]) for key in sorted(space.spaces)], axis=1)
        case spaces.Tuple():
            return np.concatenate([encode(part, item) for part, item in zip(space.spaces, batch, strict=True)], axis=1)
        case spaces.Discrete():
            return _one_hot(np.asarray(batch).reshape(-1) - space.start, int(space.n), space)
        case spaces.MultiDiscrete():
            index = np.asarray(batch).reshape(-1, space.nvec.size) - space.start.reshape(-1)
            return np.concatenate(
                [_one_hot(column, int(n), space) for column, n in zip(index.T, space.nvec.reshape(-1), strict=True)],
                axis=1,
            )
    columns, rows = flat_dim(space), np.asarray(batch)
    if space.shape is not None and rows.shape[1:] != space.shape:
        raise ValueError(f"a batch for {space} must have shape (n, *{space.shape}), got {rows.shape}")
    return rows.reshape(len(rows), columns).astype(np.float32, copy=False)


def decode(space: gym.Space[Any], flat: np.ndarray) -> Any:
    """Turn flat columns ``[n, flat_dim(space)]`` back into a batch of elements of ``space``, with the space's dtype."""
    match space:
        case spaces.Box():
            return flat.reshape(len(flat), *space.shape).astype(space.dtype, copy=False)
        case spaces.MultiBinary():
            return (flat.reshape(len(flat), *space.shape) > 0.5).astype(space.dtype)
        case spaces.Discrete():
            return flat.argmax(axis=1) + space.start
        case spaces.MultiDiscrete():
            blocks = np.split(flat, np.cumsum(space.nvec.reshape(-1))[:-1], axis=1)
            index = np.stack([block.argmax(axis=1) for block in blocks], axis=1).reshape(len(flat), *space.shape)
            return (index + space.start).astype(space.dtype)
        case spaces.Dict():
            keys = sorted(space.spaces)
            parts = _split(flat, [space[key] for key in keys])
            return {key: decode(space[key], block) for key, block in zip(keys, parts, strict=True)}
        case spaces.Tuple():
            blocks = _split(flat, space.spaces)
            return tuple(decode(part, block) for part, block in zip(space.spaces, blocks, strict=True))
    raise TypeError(f"{space} cannot be read from float columns")


def _split(flat: np.ndarray, parts: Any) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([flat_dim(part) for part in parts])[:-1], axis=1)


def _one_hot(index: np.ndarray, n: int, space: gym.Space[Any]) -> np.ndarray:
    if len(index) and (index.min() < 0 or index.max() >= n):
        wrong = index[(index < 0) | (index >= n)][0]
        raise ValueError(f"{space} got the entry {wrong} (counted from its start), allowed are 0 to {n - 1}")
    return np.eye(n, dtype=np.float32)[index.astype(np.int64)]
