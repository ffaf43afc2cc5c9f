"""Learners that act: a fast, file-compatible SAC and its replay on the device."""

from learneddyn.agents.buffer import DeviceReplayBuffer
from learneddyn.agents.sac import FastSAC

__all__ = ["DeviceReplayBuffer", "FastSAC"]
