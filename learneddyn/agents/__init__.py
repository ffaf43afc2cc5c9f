"""Learners that act: a fast, file-compatible SAC and its replay on the device, and planning in a world."""

from learneddyn.agents.buffer import DeviceReplayBuffer
from learneddyn.agents.mpc import MPC
from learneddyn.agents.sac import FastSAC

__all__ = ["MPC", "DeviceReplayBuffer", "FastSAC"]
