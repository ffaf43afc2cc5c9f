"""The judge: true returns, fidelity of imagination, calibration, and the report that shows them."""

from learneddyn.evaluation.returns import (
    Gap,
    Imagined,
    Mismatch,
    Returns,
    evaluate,
    imagined,
    objective_mismatch,
    real_vs_imagined,
    unpenalised,
)
from learneddyn.evaluation.stats import (
    Estimate,
    bootstrap_difference,
    bootstrap_interval,
    correlation,
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)

__all__ = [
    "Estimate",
    "Gap",
    "Imagined",
    "Mismatch",
    "Returns",
    "bootstrap_difference",
    "bootstrap_interval",
    "correlation",
    "evaluate",
    "imagined",
    "interquartile_mean",
    "objective_mismatch",
    "probability_of_improvement",
    "real_vs_imagined",
    "stratified_interval",
    "unpenalised",
]
