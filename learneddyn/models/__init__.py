"""Learned dynamics: p(next_obs, reward, terminated | obs, action)."""

from learneddyn.models.base import AbstractDynamics, FitReport, ModelFileError
from learneddyn.models.ensemble import ProbabilisticEnsemble

__all__ = ["AbstractDynamics", "FitReport", "ModelFileError", "ProbabilisticEnsemble"]
