"""Learned dynamics: p(next_obs, reward, terminated | obs, action); and inverse dynamics, p(action | states)."""

from learneddyn.models.base import AbstractDynamics, AbstractModel, FitReport, ModelFileError, blueprint, from_blueprint
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.models.hybrid import Hybrid
from learneddyn.models.inverse import InverseDynamics
from learneddyn.models.koopman import Koopman
from learneddyn.models.plrnn import PLRNN
from learneddyn.models.sindy import SINDy
from learneddyn.models.weighting import distance_weights, value_weights

__all__ = [
    "PLRNN",
    "AbstractDynamics",
    "AbstractModel",
    "FitReport",
    "Hybrid",
    "InverseDynamics",
    "Koopman",
    "ModelFileError",
    "ProbabilisticEnsemble",
    "SINDy",
    "blueprint",
    "distance_weights",
    "from_blueprint",
    "value_weights",
]
