"""Every exported dynamics class and how to make a small one, for the tests that walk all of them."""

import inspect
from collections.abc import Callable
from typing import Any

import learneddyn.models
from learneddyn.models import (
    PLRNN,
    AbstractContinual,
    AbstractDynamics,
    Hybrid,
    KinematicBicycle,
    Koopman,
    SINDy,
)
from learneddyn.reproduce import kinematic


def exported(kind: type) -> list[Any]:
    """Return the classes of a kind that can be made."""
    every = (getattr(learneddyn.models, name) for name in learneddyn.models.__all__)
    return [one for one in every if isinstance(one, type) and issubclass(one, kind) and not inspect.isabstract(one)]


MODELS = exported(AbstractDynamics)
CONTINUAL = exported(AbstractContinual)
QUICK = {"max_epochs": 2, "num_members": 3, "num_elites": 2, "updates": 30}
"""Arguments that keep a fit short, for the models that take them."""
FITTING = {KinematicBicycle: kinematic.log(20, 12, 0)}
"""Data that a model can learn from, where it cannot learn from any columns."""
VARIANTS: dict[str, Callable[[], AbstractDynamics]] = {
    "Koopman learned": lambda: Koopman("learned", centres=4, hidden=8, epochs=2, learn_reward=True),
    "Koopman rbf": lambda: Koopman("rbf", centres=8),
    "Koopman linear for good": lambda: Koopman(degree=2, control="linear", relift=False),
    "Koopman delays": lambda: Koopman("linear", delays=3, learn_reward=True),
    "Hybrid neural": lambda: Hybrid(residual="neural", hidden=[8], epochs=2, learn_reward=True),
    "PLRNN hidden units": lambda: PLRNN("almost-linear", latent=5, window=4, updates=10, learn_reward=True),
    "SINDy members": lambda: SINDy(aggregate=None, bootstraps=3),
}
"""Ways of a model that its defaults do not take."""
HEADS = {"learn_reward": True, "learn_termination": True}


def taken(model: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a class or function knows."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(model).parameters}
