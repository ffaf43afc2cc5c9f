"""What the checks are written in: a contract in words, whether it holds, and what was seen."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from learneddyn.spaces import Spaces, encode


class ContractError(AssertionError):
    """A contract is broken. The message says by whom, which one, and what was seen."""


class Contracts:
    """The contracts of one object, named ``who`` in messages."""

    def __init__(self, who: str) -> None:
        self.who = who

    def holds(self, ok: bool | Tensor, contract: str, seen: object) -> None:
        """Raise ContractError unless ``ok``."""
        if not bool(ok):
            raise ContractError(f"{self.who} breaks the contract: {contract}. Seen: {seen}")

    def refuses(self, kind: type[Exception], call: Callable[[], object], contract: str) -> None:
        """Raise ContractError unless ``call()`` raises ``kind``."""
        try:
            call()
        except kind:
            return
        except Exception as error:
            message = f"{self.who} breaks the contract: {contract}. Seen: {type(error).__name__}: {error}"
            raise ContractError(message) from error
        self.holds(False, contract, f"no error, where {kind.__name__} is due")

    def column(self, name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
        """Check the form of a tensor of numbers against the observations ``like``."""
        self.holds(tuple(value.shape) == shape, f"{name} has shape {shape}", tuple(value.shape))
        self.holds(value.dtype == like.dtype, f"{name} has the dtype of the observations", value.dtype)
        self.holds(value.device == like.device, f"{name} is on the device of the observations", value.device)
        self.holds(value.isfinite().all(), f"{name} is finite", value)

    def flags(self, name: str, value: Tensor, lanes: int) -> None:
        """Check the form of a tensor of truths."""
        right = value.dtype == torch.bool and value.shape == (lanes,)
        self.holds(right, f"{name} is bool [b]", f"{value.dtype} {tuple(value.shape)}")


def global_draws() -> tuple[object, ...]:
    """Return the states of the generators that belong to nobody: PyTorch's, one per CUDA device too, and NumPy's.

    Python's own is left out: beartype draws from it at every call that it checks.
    """
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    torchs = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return *(each.tolist() for each in torchs), state["state"]["key"].tolist(), state["state"]["pos"]


def equal(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    """Return whether two tuples of tensors (or None) are equal bit for bit."""
    pairs = zip(one, two, strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def close(one: Tensor, two: Tensor) -> bool:
    """Return whether two tensors agree up to the rounding that another batch size brings."""
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def random_batch(space: gym.Space[Any], count: int) -> Any:
    """Return a batch of random elements, the same ones at every call."""
    own = deepcopy(space)
    own.seed(0)
    out: Any = create_empty_array(own, n=count)
    return concatenate(own, [own.sample() for _ in range(count)], out)


def random_rows(spaces: Spaces, count: int) -> tuple[Tensor, Tensor]:
    """Return flat random observations and actions, the same ones at every call."""
    obs, action = (torch.as_tensor(encode(space, random_batch(space, count))) for space in spaces)
    return obs, action
