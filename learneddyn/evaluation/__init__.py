"""The judge: true returns, fidelity of imagination, calibration, and the report that shows them."""

from learneddyn.evaluation.calibration import Calibration, cloud_calibration, one_step_calibration
from learneddyn.evaluation.fidelity import (
    Confusion,
    Fidelity,
    StepAccuracy,
    fidelity_of_log,
    fidelity_of_plans,
    longest_window,
    open_loop,
    step_accuracy,
)
from learneddyn.evaluation.mismatch import (
    Adversary,
    LikelihoodStudy,
    adversarial_model,
    likelihood_study,
    log_likelihood,
)
from learneddyn.evaluation.render import side_by_side
from learneddyn.evaluation.report import Headline, Round, Verdict, judge, write_report
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
    "Adversary",
    "Calibration",
    "Confusion",
    "Estimate",
    "Fidelity",
    "Gap",
    "Headline",
    "Imagined",
    "LikelihoodStudy",
    "Mismatch",
    "Returns",
    "Round",
    "StepAccuracy",
    "Verdict",
    "adversarial_model",
    "bootstrap_difference",
    "bootstrap_interval",
    "cloud_calibration",
    "correlation",
    "evaluate",
    "fidelity_of_log",
    "fidelity_of_plans",
    "imagined",
    "interquartile_mean",
    "judge",
    "likelihood_study",
    "log_likelihood",
    "longest_window",
    "objective_mismatch",
    "one_step_calibration",
    "open_loop",
    "probability_of_improvement",
    "real_vs_imagined",
    "side_by_side",
    "step_accuracy",
    "stratified_interval",
    "unpenalised",
    "write_report",
]
