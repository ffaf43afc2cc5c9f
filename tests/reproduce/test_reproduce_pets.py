"""The PETS experiment in small: it runs, goes on after a kill, and judges what it measured."""

import copy
import json
from contextlib import suppress

import pytest

from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import ICEM
from learneddyn.reproduce import pets


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pets, "STEPS", 12)
    monkeypatch.setattr(pets, "TRIALS", 3)
    monkeypatch.setattr(pets, "planner", lambda: ICEM(horizon=2, candidates=6, elites=3, iterations=1))
    model = {"hidden": [8], "angles": [1], "max_epochs": 2}
    monkeypatch.setattr(pets, "model", lambda: ProbabilisticEnsemble(2, 2, **model))


def silent(message, share):
    pass


def test_a_killed_seed_goes_on_to_the_same_figures(small, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = pets.measure(0, tmp_path / "whole", silent)
    assert len(whole["returns"]) == len(whole["trials"]) == 3

    class Killed(Exception):
        pass

    def killed(message, share):
        if share > 0.5:
            raise Killed

    (tmp_path / "killed").mkdir()
    with suppress(Killed):
        pets.measure(0, tmp_path / "killed", killed)
    kept = json.loads((tmp_path / "killed" / "agent" / "pets.json").read_text())
    assert len(kept["returns"]) == 2
    assert pets.measure(0, tmp_path / "killed", silent)["returns"] == whole["returns"]
    assert pets.draw({0: whole}).axes[0].get_xlabel() == "real steps"
    assert {finding.holds for finding in pets.findings({0: whole})} == {False, None}


def test_verdicts_follow_the_figures():
    trial = dict.fromkeys(("model/break_even", "imagined/return", "real/return", "time/plan_share"), 1.0)
    good = {"oracle": 180.0, "returns": [1.0] * 8 + [160.0] * 4, "trials": [{}] * 11 + [trial]}
    bad = copy.deepcopy(good) | {"returns": [1.0] * 12}
    judged = [finding.holds for finding in pets.findings({0: good, 1: good, 2: bad})]
    assert judged[:3] == [True, True, None]
    assert [finding.measured.value for finding in pets.findings({0: good, 1: good, 2: bad})][2] == 1800
    judged = [finding.holds for finding in pets.findings({0: good, 1: bad, 2: bad})]
    assert judged[:2] == [True, False]
    assert pets.findings({0: bad})[2].measured.value == 2600
