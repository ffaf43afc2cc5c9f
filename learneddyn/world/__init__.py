"""A learned model and a task, put together: start, step, rollout, returns."""

from learneddyn.world.bounds import Bounded
from learneddyn.world.penalties import PENALTIES, require_members
from learneddyn.world.row import Row, RowStep, step_row, steps_rows
from learneddyn.world.sampling import SAMPLERS, Sampler, elite, mean, ts1, tsinf
from learneddyn.world.sentinel import Divergence, ModelDiverged, Sentinel, strict
from learneddyn.world.trust import Trust, all_trusted, penalty_below, within_box, within_data
from learneddyn.world.world import World

__all__ = [
    "PENALTIES",
    "SAMPLERS",
    "Bounded",
    "Divergence",
    "ModelDiverged",
    "Row",
    "RowStep",
    "Sampler",
    "Sentinel",
    "Trust",
    "World",
    "all_trusted",
    "elite",
    "mean",
    "penalty_below",
    "require_members",
    "step_row",
    "steps_rows",
    "strict",
    "ts1",
    "tsinf",
    "within_box",
    "within_data",
]
