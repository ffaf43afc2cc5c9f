"""Autonomous flows as torch functions of batches: Lorenz-63, and by name those of the package dysts.

dysts writes its equations with NumPy, for one state at a time. They are read as they stand, with ``np`` meaning torch:
differentiable, in the dtype and on the device of the state. Equations in one argument per coordinate take whole
columns, those in one vector go through `torch.vmap`.

Of the 135 flows of its release 0.96, 108 are here. Refused are 6 with a delay, 16 that depend on time (Torus does so
without being marked), 4 whose published statistics are of coordinates that dysts changes after integration, and
BelousovZhabotinsky, whose equations branch on the state.

Source: Gilpin, "Chaos as an interpretable benchmark for forecasting and data-driven modelling" (2021); the system of
`lorenz63`: Lorenz, "Deterministic nonperiodic flow" (1963).
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.integrate import Slope


class Flow(NamedTuple):
    """An autonomous system ds/dt = slope(s) in units of its own."""

    name: str
    slope: Slope
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Statistics of its attractor, which states are standardised with."""
    start: tuple[float, ...]
    """A state in the attractor's basin."""
    period: float
    """Its dominant time scale."""
    lyapunov: float
    """Its largest Lyapunov exponent, per unit of time."""


def lorenz63() -> Flow:
    """Return Lorenz's convection: sigma = 10, rho = 28, beta = 8 / 3."""

    def slope(state: Tensor) -> Tensor:
        x, y, z = state.unbind(dim=1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], dim=1)

    mean, std = (0.0, 0.0, 23.55), (7.925, 9.01, 8.62)
    return Flow("Lorenz63", slope, mean, std, (1.0, 1.0, 20.0), 1.5, 0.906)


def dysts_flow(name: str) -> Flow:
    """Return a flow of the package dysts by its name there, for example "Rossler".

    Raises:
        ImportError: dysts is not installed (names the extra).
        ValueError: no flow has this name, it has a delay or depends on time, its statistics are of other coordinates
            than its equations, or these take no batches of tensors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that numba is missing, which could not compile for tensors anyway
        try:
            from dysts import base, flows
        except ImportError as error:
            raise ImportError("flows of dysts need it: pip install 'learneddyn[dysts]'") from error
    kind: Any = getattr(flows, name, None)
    known = isinstance(kind, type) and issubclass(kind, base.DynSys) and kind is not base.DynSys
    if not known:
        raise ValueError(f"dysts has no flow without delay called {name!r}; names are in dysts.systems")
    system: Any = _translated(kind, base.DynSys)()
    facts, start = system.metadata, tuple(np.atleast_2d(np.asarray(system.ic, np.float64))[0].tolist())
    timed = ValueError(f"{name} depends on time; a state that does not hold the time cannot be stepped")
    if facts["nonautonomous"]:
        raise timed
    if hasattr(kind, "_postprocessing"):
        raise ValueError(f"dysts changes the coordinates of {name} after integration; its statistics are of those")
    slope = _slope(system, vector=kind.rhs is not base.DynSys.rhs)
    rows = torch.tensor([start, start], dtype=torch.float64, requires_grad=True)
    try:
        now, later = slope(rows, 0.0), slope(rows, 0.5)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the equations of {name} take no batches of tensors ({error})") from error
    if not torch.equal(now, later):
        raise timed
    mean, std = (tuple(float(number) for number in facts[key]) for key in ("mean", "std"))
    return Flow(name, slope, mean, std, start, float(facts["period"]), float(facts["maximum_lyapunov_estimated"]))


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers as a tensor of the dtype and on the device of another, made once for each."""
    return _constants(tuple(values), like.dtype, like.device)


@cache
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what inference makes cannot be differentiated through later
        return torch.tensor(values, dtype=dtype, device=device)


def _slope(system: Any, vector: bool) -> Callable[..., Tensor]:
    """Return the right-hand side of a translated system for rows ``[b d]`` and, for those that look at it, a time."""

    @cache
    def placed(dtype: torch.dtype, device: torch.device) -> tuple[Any, list[Any]]:
        """Return the system and its parameters with tensors for arrays."""
        here = copy.copy(system)
        with torch.inference_mode(False):
            for key, value in system.params.items():
                if isinstance(value, np.ndarray):
                    setattr(here, key, torch.as_tensor(value).to(device, dtype))
        return here, [getattr(here, key) for key in sorted(system.params)]

    def slope(state: Float[Tensor, "b d"], time: float = 0.0) -> Float[Tensor, "b d"]:
        here, parameters = placed(state.dtype, state.device)

        def together(parts: Any, like: Tensor) -> Tensor:
            if isinstance(parts, Tensor):
                return parts
            tensors = [part if isinstance(part, Tensor) else torch.full_like(like, float(part)) for part in parts]
            return torch.stack(tensors, dim=-1)

        if vector:
            return torch.vmap(lambda row: together(here.rhs(row, time), row[0]))(state)
        return together(here._rhs(*state.unbind(dim=1), time, *parameters), state[:, 0])

    return slope


def _translated(kind: Any, root: type) -> Any:
    """Return a class of dysts whose methods find torch under the name np; the package itself stays as it is."""
    members: dict[str, Any] = {}
    for parent in reversed(kind.__mro__[: kind.__mro__.index(root)]):
        for name, member in vars(parent).items():
            plain = getattr(member, "__func__", member)
            plain = getattr(plain, "py_func", plain)  # numba, where it is installed, wraps them
            if isinstance(plain, FunctionType):
                names = plain.__globals__ | {"np": _NumPy()}
                again = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
                members[name] = staticmethod(again) if isinstance(member, staticmethod) else again
    return type(kind.__name__, (kind,), members)


class _NumPy:
    """What translated equations find under the name np: torch's functions for tensors, NumPy's for numbers."""

    pi = math.pi

    def __getattr__(self, name: str) -> Any:
        if name not in _IN_TORCH:
            raise AttributeError(f"np.{name} has no translation")

        def either(*arguments: Any, **options: Any) -> Any:
            given = arguments[0] if isinstance(arguments[0], list) else arguments
            of_tensors = any(isinstance(argument, Tensor) for argument in given)
            return (_IN_TORCH[name] if of_tensors else getattr(np, name))(*arguments, **options)

        return either


def _heaviside(x: Tensor, at_zero: int) -> Tensor:
    return torch.where(x == 0, at_zero, (x > 0).to(x))


_IN_TORCH: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name)
    for name in ("abs", "cos", "cosh", "exp", "hstack", "matmul", "sign", "sin", "sqrt", "tanh", "zeros_like")
} | {"heaviside": _heaviside, "min": torch.amin}
