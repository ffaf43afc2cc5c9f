"""Whole experiments: a folder that can be resumed, seeds side by side, the loop of fit, imagine, judge, refit."""

from learneddyn.runs.folder import RunExists, RunFolder
from learneddyn.runs.rounds import RoundsConfig, read_rounds, run_rounds
from learneddyn.runs.seeds import Notify, for_each_seed, silent

__all__ = ["Notify", "RoundsConfig", "RunExists", "RunFolder", "for_each_seed", "read_rounds", "run_rounds", "silent"]
