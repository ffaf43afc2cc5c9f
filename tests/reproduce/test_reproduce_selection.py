"""The experiment on choosing policies, in small: it runs, and judges what it measured."""

import copy
import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from learneddyn.reproduce import policy_selection as selection


def test_it_runs_in_small(monkeypatch, tmp_path):
    quick = {"gamma": 0.9, "members": 2, "hidden": (8,), "updates": 5, "starts": 2, "horizon": 3}
    for name, value in (
        ("STEPS", 1600),
        ("HELD_OUT", 3),
        ("CHECKPOINTS", (2, 4)),
        ("EPISODES", 1),
        ("FQE", quick),
        ("MODEL", selection.MODEL | {"hidden": (8,), "max_epochs": 1}),
        ("METHODS", {name: selection.METHODS[name] for name in ("BC", "TD3")}),
    ):
        monkeypatch.setattr(selection, name, value)
    figures = selection.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    assert sorted(figures) == ["BC, 2", "BC, 4", "TD3, 2", "TD3, 4"]
    assert figures["BC, 2"]["real"] != figures["TD3, 4"]["real"]
    assert len({figure["fqe"]["value"] for figure in figures.values()}) == 4  # four policies, not one four times
    assert selection.findings({0: figures, 1: figures})
    assert isinstance(selection.draw({0: figures}), Figure)


def test_judges_are_judged():
    def row(real: float, value: float, inside: float, error: float | None) -> dict:
        return {"real": real, "fqe": {"value": value}, "in_model": {"value": inside}, "model_error": error}

    entry = {"a": row(-900, -60, -800, None), "b": row(-500, -30, -850, 0.3), "c": row(-200, -20, -300, 0.1)}
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert selection.agreement(entry, selection.JUDGES[0]) == pytest.approx(1.0)
    assert selection.agreement(entry, selection.JUDGES[1]) == pytest.approx(0.5)
    assert selection.regret(entry, selection.JUDGES[0]) == 0
    assert np.allclose(selection.judged_by(entry, selection.JUDGES[2]), [-0.6, -0.3, -0.1])
    holds = [finding.holds for finding in selection.findings(figures) if finding.holds is not None]
    assert holds == [True, True, False, True]
    figures[1]["b"]["fqe"]["value"] = 0.0
    assert selection.regret(figures[1], selection.JUDGES[0]) == pytest.approx(300 / 700)
    holds = [finding.holds for finding in selection.findings(figures) if finding.holds is not None]
    assert holds == [False, False, False, True]
