"""Gymnasium and Stable-Baselines3 views of a World: one lane, many lanes, and worlds on disk by name or folder."""

from learneddyn.envs.interface import InvalidAction
from learneddyn.envs.learned import LearnedEnv, make_env
from learneddyn.envs.sb3 import LearnedVecEnv
from learneddyn.envs.start import first_observations
from learneddyn.envs.vector import LearnedVectorEnv, make_vector_env
from learneddyn.envs.worlds import LoadedWorld, WorldFileError, check_settings, load_world, save_world, world_names

__all__ = [
    "InvalidAction",
    "LearnedEnv",
    "LearnedVecEnv",
    "LearnedVectorEnv",
    "LoadedWorld",
    "WorldFileError",
    "check_settings",
    "first_observations",
    "load_world",
    "make_env",
    "make_vector_env",
    "save_world",
    "world_names",
]
