"""The experiments with regularised critics and with plans, in small: they run, and judge what they measured."""

import copy
import json

import pytest
from matplotlib.figure import Figure

from learneddyn.models import ProbabilisticEnsemble
from learneddyn.reproduce import coplanner, lipschitz
from learneddyn.reproduce.mbpo import settings


def small(env_id: str, seed: int) -> dict:
    return settings(env_id, seed) | {"learning_starts": 60, "gradient_steps": 1, "policy_kwargs": {"net_arch": [8]}}


def tiny(members: int = 3) -> ProbabilisticEnsemble:
    return ProbabilisticEnsemble(members, 1, hidden=[8], weight_decay=1e-5, max_epochs=2, batch_size=32)


@pytest.mark.parametrize("experiment", [lipschitz, coplanner])
def test_a_seed_is_measured_and_drawn(experiment, monkeypatch, tmp_path) -> None:
    for name, value in (
        ("STEPS", 80),
        ("JUDGE_EVERY", 40),
        ("EPISODES", 1),
        ("settings", small),
        ("light_model", tiny),
    ):
        monkeypatch.setattr(experiment, name, value)
    figures = experiment.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    for run in figures.values():
        assert run["steps"] == [40, 80]
        assert len(run["returns"]) == 2
    assert experiment.findings({0: figures, 1: figures})
    assert isinstance(experiment.draw({0: figures}), Figure)
    if experiment is coplanner:
        again = figures["MBPO"]
        assert again["fitted"] == [80]
        assert again["mine"] == pytest.approx(again["plain"], rel=0.2)  # other draws of one policy


def lipschitz_figures() -> dict:
    def run(last: float, slope: float) -> dict:
        return {
            "steps": [lipschitz.STEPS],
            "returns": [last],
            "cpu_seconds": 10.0,
            "lipschitz": slope,
            "slope": slope / 4,
        }

    entry = {variant: run(-150.0, 200.0 - 50 * index) for index, variant in enumerate(lipschitz.VARIANTS)}
    return {seed: copy.deepcopy(entry) for seed in range(3)}


def judged(findings) -> list[bool]:
    return [finding.holds for finding in findings if finding.holds is not None]


def test_the_single_model_is_judged_beside_the_ensemble() -> None:
    figures = lipschitz_figures()
    assert judged(lipschitz.findings(figures)) == [True, True, True]
    for entry in figures.values():
        entry[lipschitz.MAIN]["returns"] = [-300.0]
    assert judged(lipschitz.findings(figures)) == [False, True, True]
    for entry in figures.values():  # nobody has learned: their ratio says nothing
        for run in entry.values():
            run["returns"] = [-1300.0]
    assert judged(lipschitz.findings(figures)) == [False, True, True]


def test_slopes_must_fall_with_every_weight() -> None:
    figures = lipschitz_figures()
    for entry in figures.values():
        entry[lipschitz.MAIN]["lipschitz"] = 1000.0
    assert judged(lipschitz.findings(figures)) == [True, False, True]


def coplanner_figures() -> dict:
    def run(last: float, mine: float) -> dict:
        return {
            "steps": [coplanner.STEPS],
            "returns": [last],
            "cpu_seconds": 10.0,
            "fitted": [250],
            "mine": [mine],
            "plain": [0.05],
        }

    return {seed: {"MBPO": run(-150.0 - seed, 0.05), "COPlanner": run(-140.0, 0.04)} for seed in range(3)}


def test_plans_must_lower_the_uncertainty_and_keep_the_return() -> None:
    figures = coplanner_figures()
    assert judged(coplanner.findings(figures)) == [True, True]
    figures[1]["COPlanner"]["mine"] = [0.09]
    assert judged(coplanner.findings(figures)) == [False, True]
    figures[2]["COPlanner"]["returns"] = [-900.0]  # one seed lost tells nothing
    assert judged(coplanner.findings(figures)) == [False, True]
    for entry in figures.values():
        entry["COPlanner"]["returns"] = [-200.0]
    assert judged(coplanner.findings(figures)) == [False, False]
