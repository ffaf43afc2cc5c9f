"""Whole experiments: a folder that can be resumed, seeds side by side, the loop of fit, imagine, judge, refit."""

from learneddyn.runs.folder import RunExists, RunFolder
from learneddyn.runs.rounds import RoundsConfig, check_real_spaces, judge_agent, read_rounds, run_rounds, train_in_world
from learneddyn.runs.seeds import Notify, for_each_seed, silent

__all__ = [
    "Notify",
    "RoundsConfig",
    "RunExists",
    "RunFolder",
    "check_real_spaces",
    "for_each_seed",
    "judge_agent",
    "read_rounds",
    "run_rounds",
    "silent",
    "train_in_world",
]
