"""Sweeps: they find the best settings of a known function, and a kill loses no finished trial."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from learneddyn.core import Json
from learneddyn.runs.sweep import importances, open_study, run_sweep, trials_of, write_summary

SPACE: dict[str, Any] = {"a.x": {"low": -3.0, "high": 3.0}, "a.kind": ["near", "far"], "n": {"low": 1, "high": 9}}
RUN: dict[str, Any] = {"workers": 1, "progress": False}


def hill(settings: Json, folder: Path) -> float:
    """Highest at x = 1, kind near; n plays no part. Counts its plays in the folder."""
    with (folder / "plays").open("a") as file:
        file.write("x")
    return -((settings["a.x"] - 1.0) ** 2) - 4.0 * (settings["a.kind"] == "far")


def steep(settings: Json, folder: Path) -> float:
    """A hill with a hole."""
    if settings["a.x"] < 0:
        raise ValueError("no model there")
    return float("inf") if settings["a.x"] > 2 else hill(settings, folder)


def test_the_best_settings_are_found_and_explained(tmp_path):
    found = run_sweep(SPACE, hill, tmp_path, trials=25, **RUN)
    assert [trial.number for trial in found] == list(range(25))
    best = max(found, key=lambda trial: trial.value)
    assert best.value > -0.1
    assert best.settings["a.kind"] == "near"
    assert abs(best.settings["a.x"] - 1) < 0.4
    assert isinstance(best.settings["n"], int)
    weights = importances(open_study(tmp_path))
    assert max(weights, key=weights.get) == "a.x"
    assert weights["n"] < 0.3
    text = write_summary(tmp_path, "A hill", ["Judged by its height."]).read_text()
    assert text.index(f"| {best.number} |") < 400
    assert "25 trials, 0 of them failed" in text
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert len(json.loads((tmp_path / "trials.json").read_text())) == 25


def test_bayesian_optimisation_needs_few_trials(tmp_path):
    found = run_sweep({"a.x": SPACE["a.x"], "a.kind": ["near"]}, hill, tmp_path, trials=13, sampler="gp", **RUN)
    assert max(trial.value for trial in found[10:]) > max(trial.value for trial in found[:10]), "10 are random"


def test_a_killed_sweep_goes_on_with_what_it_was_playing(tmp_path):
    def killed(settings: Json, folder: Path) -> float:
        if folder.name == "trial-4":
            raise KeyboardInterrupt
        return hill(settings, folder)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(SPACE, killed, tmp_path, trials=8, **RUN)
    before = trials_of(open_study(tmp_path))
    given = [trial.params for trial in open_study(tmp_path).trials]
    assert [trial.number for trial in before] == [0, 1, 2, 3]
    assert len(given) == 5
    found = run_sweep(SPACE, hill, tmp_path, trials=8, **RUN)
    assert found[:4] == before
    assert found[4].settings == given[4]
    assert [(tmp_path / f"trial-{number}" / "plays").read_text() for number in range(8)] == ["x"] * 8
    assert len({trial.settings["a.x"] for trial in found}) == 8, "a sampler that starts anew must not repeat itself"
    assert run_sweep(SPACE, hill, tmp_path, trials=8, **RUN) == found


def test_a_line_torn_by_a_kill_is_dropped(tmp_path):
    found = run_sweep(SPACE, hill, tmp_path, trials=3, **RUN)
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"ab')
    assert run_sweep(SPACE, hill, tmp_path, trials=4, **RUN)[:3] == found
    assert len(trials_of(open_study(tmp_path))) == 4


def test_trials_that_fail_say_why_and_count(tmp_path):
    found = run_sweep({"a.x": SPACE["a.x"], "a.kind": ["near"]}, steep, tmp_path, trials=12, sampler="random", **RUN)
    reasons = {trial.failed for trial in found if trial.value is None}
    assert reasons == {"ValueError: no model there", "the value is inf"}
    assert all(0 <= trial.settings["a.x"] <= 2 for trial in found if trial.value is not None)
    assert "ValueError: no model there" in write_summary(tmp_path, "", []).read_text()


def test_processes_share_the_trials(tmp_path):
    found = run_sweep(SPACE, hill, tmp_path, trials=4, workers=2, progress=False)
    assert [trial.number for trial in found] == [0, 1, 2, 3]
    assert all((tmp_path / f"trial-{number}" / "plays").read_text() == "x" for number in range(4))


@pytest.mark.parametrize(
    ("space", "given", "message"),
    [
        ({}, {}, "must hold at least one setting"),
        ({"x": []}, {}, "x must be a list of choices, or low and high"),
        ({"x": {"low": 1}}, {}, "x must be a list of choices, or low and high"),
        ({"x": {"low": 2.0, "high": 1.0}}, {}, "x: "),
        ({"x": {"low": "1", "high": 2}}, {}, "x: low must be a finite number, got '1'"),
        ({"x": [1]}, {"sampler": "grid"}, "sampler must be one of tpe, gp, random, got 'grid'"),
        ({"x": [1]}, {"trials": 0}, "must be at least 1, got trials=0"),
    ],
)
def test_mistakes_are_named(tmp_path, space, given, message):
    with pytest.raises(ValueError, match=message):
        run_sweep(space, hill, tmp_path, **{"trials": 2} | RUN | given)


@pytest.mark.parametrize(("module", "extra", "ray"), [("optuna", "sweep", False), ("ray.tune", "ray", True)])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, extra, ray):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'learneddyn\[{extra}\]'"):
        run_sweep({"x": [1, 2]}, hill, tmp_path, trials=1, ray=ray, **RUN)


def test_ray_plays_the_same_study(tmp_path):
    """In a process without pytest's import hook, whose wrapped functions Ray cannot pickle."""
    pytest.importorskip("ray.tune")
    (tmp_path / "trial.py").write_text(
        "def play(settings, folder):\n"
        "    (folder / 'plays').open('a').write('x')\n"
        "    return -(settings['x'] - 1.0) ** 2\n"
    )
    (tmp_path / "main.py").write_text(
        "from pathlib import Path\n"
        "from trial import play\n"
        "from learneddyn.runs.sweep import run_sweep\n"
        "space, home = {'x': {'low': -3.0, 'high': 3.0}}, Path('sweep')\n"
        "first = run_sweep(space, play, home, trials=3, ray=True, workers=2, progress=False)\n"
        "again = run_sweep(space, play, home, trials=4, ray=True, workers=2, progress=False)\n"
        "assert again[:3] == first and len(again) == 4, again\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, check=True, timeout=300)
    assert [(tmp_path / "sweep" / f"trial-{number}" / "plays").read_text() for number in range(4)] == ["x"] * 4
    assert len(trials_of(open_study(tmp_path / "sweep"))) == 4
