"""Learned dynamics: p(next_obs, reward, terminated | obs, action)."""

from learneddyn.models.base import AbstractDynamics, FitReport, ModelFileError, blueprint, from_blueprint
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.models.hybrid import Hybrid
from learneddyn.models.koopman import Koopman
from learneddyn.models.plrnn import PLRNN
from learneddyn.models.sindy import SINDy
from learneddyn.models.weighting import distance_weights, value_weights

__all__ = [
    "PLRNN",
    "AbstractDynamics",
    "FitReport",
    "Hybrid",
    "Koopman",
    "ModelFileError",
    "ProbabilisticEnsemble",
    "SINDy",
    "blueprint",
    "distance_weights",
    "from_blueprint",
    "value_weights",
]
