"""Learned dynamics: p(next_obs, reward, terminated | obs, action); and inverse dynamics, p(action | states)."""

from learneddyn.models.base import AbstractDynamics, AbstractModel, FitReport, ModelFileError, blueprint, from_blueprint
from learneddyn.models.component import ComponentLaw
from learneddyn.models.continual import AbstractContinual
from learneddyn.models.ensemble import ProbabilisticEnsemble
from learneddyn.models.hybrid import Hybrid
from learneddyn.models.hypercrl import HyperCRL
from learneddyn.models.inverse import InverseDynamics
from learneddyn.models.kinematic import KinematicBicycle
from learneddyn.models.koopman import Koopman
from learneddyn.models.mixture import MixER
from learneddyn.models.multi_head import MultiHead
from learneddyn.models.neural_ode import NeuralODE
from learneddyn.models.plrnn import PLRNN
from learneddyn.models.recurrent import RecurrentDynamics
from learneddyn.models.sindy import SINDy
from learneddyn.models.sparse_relu import SparseReLU
from learneddyn.models.weighting import distance_weights, value_weights

__all__ = [
    "PLRNN",
    "AbstractContinual",
    "AbstractDynamics",
    "AbstractModel",
    "ComponentLaw",
    "FitReport",
    "Hybrid",
    "HyperCRL",
    "InverseDynamics",
    "KinematicBicycle",
    "Koopman",
    "MixER",
    "ModelFileError",
    "MultiHead",
    "NeuralODE",
    "ProbabilisticEnsemble",
    "RecurrentDynamics",
    "SINDy",
    "SparseReLU",
    "blueprint",
    "distance_weights",
    "from_blueprint",
    "value_weights",
]
