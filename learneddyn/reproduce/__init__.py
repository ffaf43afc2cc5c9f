"""One file per paper: its central claim as a small honest experiment, run by ``learneddyn reproduce NAME``."""

import importlib
import pkgutil

from learneddyn.runs.claims import Claim


def names() -> list[str]:
    """Return the names of all experiments: the files of this room."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Claim:
    """Return an experiment.

    Raises:
        LookupError: there is none of that name.
    """
    if name not in names():
        raise LookupError(f"there is no experiment {name!r}, allowed are {names()}")
    return importlib.import_module(f"{__name__}.{name}").CLAIM
