"""Logged experience: Minari data sets, your own logs, and a fast collector for real environments."""

from learneddyn.data.collect import collect
from learneddyn.data.minari import DatasetExists, DatasetNotFound, load, save

__all__ = ["DatasetExists", "DatasetNotFound", "collect", "load", "save"]
