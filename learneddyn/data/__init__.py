"""Logged experience: Minari data sets, your own logs, and a fast collector for real environments."""

from learneddyn.data.collect import collect
from learneddyn.data.grades import GradeNotReached, algorithm_class, collect_grade, load_agent
from learneddyn.data.logs import decimate, from_arrays, from_csv, from_parquet
from learneddyn.data.minari import (
    DatasetExists,
    DatasetNotFound,
    load,
    load_action_free,
    read_provenance,
    save,
    without_actions,
)
from learneddyn.data.partial import HideColumns, velocity_columns, without_columns

__all__ = [
    "DatasetExists",
    "DatasetNotFound",
    "GradeNotReached",
    "HideColumns",
    "algorithm_class",
    "collect",
    "collect_grade",
    "decimate",
    "from_arrays",
    "from_csv",
    "from_parquet",
    "load",
    "load_action_free",
    "load_agent",
    "read_provenance",
    "save",
    "velocity_columns",
    "without_actions",
    "without_columns",
]
