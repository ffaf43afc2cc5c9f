"""Learners that act: a fast, file-compatible SAC, its replay on the device, and model-based agents around them."""

from learneddyn.agents.buffer import DeviceReplayBuffer
from learneddyn.agents.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learneddyn.agents.coplanner import UPMPC, COPlanner
from learneddyn.agents.dyna import Dyna
from learneddyn.agents.him import HIMCallback, HIMExtractor, PrivilegedHistory
from learneddyn.agents.iwocs import IWOCS, RobustPolicy
from learneddyn.agents.lipschitz import AdversarialNoise, CriticRegulariser, GradientPenalty, SpectralCap
from learneddyn.agents.mbpo import MBPO, DynaCrossQ, DynaTD3, DynaTQC
from learneddyn.agents.mpc import MPC
from learneddyn.agents.pets import PETS
from learneddyn.agents.sac import FastSAC
from learneddyn.agents.sindy_rl import SINDyRL
from learneddyn.agents.sparse_policy import SparsePolicy, distil

__all__ = [
    "IWOCS",
    "MBPO",
    "MPC",
    "PETS",
    "UPMPC",
    "AdversarialNoise",
    "COPlanner",
    "CheckpointError",
    "CriticRegulariser",
    "DeviceReplayBuffer",
    "Dyna",
    "DynaCrossQ",
    "DynaTD3",
    "DynaTQC",
    "FastSAC",
    "GradientPenalty",
    "HIMCallback",
    "HIMExtractor",
    "PrivilegedHistory",
    "RobustPolicy",
    "SINDyRL",
    "SparsePolicy",
    "SpectralCap",
    "distil",
    "load_checkpoint",
    "save_checkpoint",
]
