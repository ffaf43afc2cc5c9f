"""The table of offline methods, in small: its cells are kept, failures are shown, the best is judged."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import minari
import pytest
import torch
from matplotlib.figure import Figure

from learneddyn.core import Json, Transitions
from learneddyn.data.grades import GradeNotReached
from learneddyn.offline import MOPO
from learneddyn.reproduce import offline_table, offline_table_hopper
from learneddyn.runs.cells import FAILED
from learneddyn.runs.claims import run_claim
from learneddyn.runs.seeds import silent


@pytest.fixture
def small(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    part = offline_table.PARTS["Reacher"]
    tiny: Json = {"shared": part.shared | {"policy_kwargs": {"net_arch": [8]}, "batch_size": 16}, "rows": 600}
    tiny |= {"imagined": part.imagined | {"rollout_batch": 10, "rollout_every": 10}, "episodes": 2}
    tiny |= {"model": part.model | {"max_epochs": 1, "hidden": [8]}, "training": (5000, 1000), "medium": -1000.0}
    tiny |= {"behaviour": {"algorithm": "PPO", "kwargs": {"n_steps": 50, "batch_size": 50, "n_epochs": 1}}}
    reward = part.own["MOREC"]["dynamics_reward"] | {"updates": 10, "hidden": [8]}
    own = part.own | {"MOREC": part.own["MOREC"] | {"rollout_batch": 4, "horizon": 3, "dynamics_reward": reward}}
    tiny |= {"own": own, "updates": dict.fromkeys(part.updates, 12), "grades": ("replay", "expert")}
    monkeypatch.setattr(offline_table, "PARTS", {"Reacher": replace(part, **tiny)})
    yield tmp_path
    torch.set_num_threads(before)


def ages(home: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (home / "cells").glob("*.json")}


def test_every_cell_is_played_kept_and_shown(small, monkeypatch):
    figures = offline_table.measure(0, small, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert list(figures["Reacher"]) == ["replay", "expert"]
    for grade in figures["Reacher"].values():
        assert all(-120 < grade[method]["return"] < 0 for method in offline_table.METHODS)
        assert -120 < grade["behaviour"] < 0
        assert -20 < grade["idle"] < -5
    assert minari.load_dataset("learneddyn-table/reacher-expert-0-v0").total_steps == 600
    before = ages(small)
    assert len(before) == 3 + 2 * (1 + 8)
    assert offline_table.measure(0, small, silent) == figures
    assert ages(small) == before

    part = offline_table.PARTS["Reacher"]
    changed = replace(part, updates=part.updates | {"MOPO": 11})
    monkeypatch.setattr(offline_table, "PARTS", {"Reacher": changed})
    monkeypatch.setattr(offline_table.offline, "MOREC", None)
    again = offline_table.measure(0, small, silent)
    assert {name for name, age in ages(small).items() if age != before[name]} == {
        f"reacher-{grade}-mopo.json" for grade in part.grades
    }
    assert again["Reacher"]["replay"]["MOREC"] == {FAILED: "not part of the package yet"}

    table = offline_table.table(offline_table.PARTS, {0: figures, 1: again})
    assert table.count("\n") == 3
    assert "**failed** 1x" in table
    assert isinstance(offline_table.draw(offline_table.PARTS, {0: figures, 1: again}), Figure)
    minari.delete_dataset("learneddyn-table/reacher-medium-0-v0")
    offline_table.measure(0, small, silent)
    assert "learneddyn-table/reacher-medium-0-v0" in minari.list_local_datasets()


def test_what_a_method_refuses_is_shown_as_failed(small, monkeypatch):
    def diverged(self: MOPO, *_: object, **__: object) -> None:
        raise ArithmeticError("MOPO diverged")

    monkeypatch.setattr(MOPO, "learn", diverged)
    part = offline_table.PARTS["Reacher"]
    monkeypatch.setattr(offline_table, "PARTS", {"Reacher": replace(part, grades=("random",), updates={"MOPO": 5})})
    found = offline_table.measure(0, small, silent)["Reacher"]["random"]["MOPO"]
    assert found == {FAILED: "ArithmeticError: MOPO diverged"}


def names(home: Path) -> list[str]:
    """Cells in the order in which they were played."""
    return sorted(ages(home), key=ages(home).__getitem__)


def test_a_grade_that_is_not_reached_is_shown_as_failed_and_not_tried_again(small, monkeypatch):
    def weak(*_: object, **__: object) -> None:
        raise GradeNotReached("PPO reached a mean return of -60")

    monkeypatch.setattr(offline_table, "train", weak)
    part = replace(offline_table.PARTS["Reacher"], updates={"BC": 5, "IQL": 5})
    monkeypatch.setattr(offline_table, "PARTS", {"Reacher": replace(part, grades=("random", "replay"))})
    parts = offline_table.PARTS
    figures = offline_table.measure(0, small, silent)["Reacher"]
    reason = "GradeNotReached: PPO reached a mean return of -60"
    assert figures["replay"] == {FAILED: reason} | {method: {FAILED: reason} for method in part.updates}
    assert "return" in figures["random"]["BC"]
    before = ages(small)
    assert offline_table.measure(0, small, silent)["Reacher"] == figures
    assert ages(small) == before
    seeds = {0: {"Reacher": figures}}
    last = offline_table.table(parts, seeds).splitlines()[-1]
    assert last.startswith("| Reacher replay |  |  |  | **failed** 1x |")
    for judged, held in (((), None), (("Reacher replay",), False)):
        first, *_ = (row for row in offline_table.findings(parts, judged, seeds) if "replay: seeds without" in row.what)
        assert reason in first.what
        assert first.measured.value == 1
        assert first.holds is held
    assert isinstance(offline_table.draw(parts, seeds), Figure)


def test_a_run_that_was_stopped_is_shown_and_goes_on(small, monkeypatch, tmp_path):
    """Killed in the second grade: the first is whole and judged, the rest "not played yet", and no cell is touched."""
    part = replace(offline_table.PARTS["Reacher"], grades=("random", "medium"), updates={"BC": 5, "MOPO": 5})
    parts = {"Reacher": part}
    monkeypatch.setattr(offline_table, "PARTS", parts)
    claim = offline_table.claim_of(
        "offline_table", parts, offline_table.measure, ("Reacher medium", "Reacher random"), "", ""
    )
    out, home = tmp_path / "out", tmp_path / "out" / "offline_table" / "seed-0"
    learn = MOPO.learn
    killed = {"medium": 0}

    def once(self: MOPO, *args: object, **kwargs: object) -> MOPO:
        killed["medium"] += 1
        if killed["medium"] > 1:
            raise KeyboardInterrupt
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(MOPO, "learn", once)
    with pytest.raises(KeyboardInterrupt):
        run_claim(claim, out, seeds=[0], progress=False)
    medium = ["medium-data", "medium-model", "medium-bc", "medium-mopo"]
    played = ["no-action", *medium, "random-data", "random-model", "random-bc"]
    assert names(home) == [f"reacher-{cell}.json" for cell in played]
    before = ages(home)
    found = offline_table.show(claim, parts, out, seeds=[0])
    assert ages(home) == before
    judged = [finding.what for finding in found if finding.holds is not None]
    assert judged == ["Reacher medium: score of the best model-based method, MOPO"]
    result = json.loads((home.parent / "result.json").read_text())
    random, medium = result["table"].splitlines()[2:]
    assert "not played yet 1x" in random
    assert "not played" not in medium
    assert (home.parent / "result.png").exists()
    monkeypatch.setattr(MOPO, "learn", learn)
    whole = run_claim(claim, out, seeds=[0], resume=True, progress=False)
    assert sum(finding.holds is not None for finding in whole) == 2
    assert set(before.items()) < set(ages(home).items())


def entry(light: float, cloned: float, behaviour: float) -> Json:
    """Figures of one seed: every model-based method earns ``light``."""

    def cell(part: offline_table.Part) -> Json:
        scores = {
            method: {"return": light if method in offline_table.MODEL_BASED else cloned} for method in part.updates
        }
        return scores | {"behaviour": behaviour, "idle": -11.0, "rows": 10}

    return {name: {grade: cell(part) for grade in part.grades} for name, part in offline_table.PARTS.items()}


def judged(figures: dict[int, Json]) -> list[bool]:
    return [finding.holds for finding in offline_table.CLAIM.findings(figures) if finding.holds is not None]


def test_the_best_method_must_clear_clone_and_behaviour_on_medium_and_replay():
    good = {seed: entry(-5.0 - seed / 10, -9.0, -20.0) for seed in range(3)}
    assert judged(good) == [True, True]
    assert isinstance(offline_table.CLAIM.draw(good), Figure)
    worse = copy.deepcopy(good)
    worse[1]["Reacher"]["replay"]["BC"]["return"] = -4.0
    assert judged(worse) == [True, False]
    idle = copy.deepcopy(good)
    idle[0]["Reacher"]["medium"]["idle"] = -4.9
    assert judged(idle) == [False, True]
    for method in offline_table.MODEL_BASED:
        worse[2]["Reacher"]["medium"][method]["return"] = -9.5
    assert judged(worse) == [False, False]


def test_hopper_is_reported_not_judged():
    scores = {method: {"return": 900.0} for method in offline_table_hopper.PARTS["Hopper"].updates}
    cell = scores | {"behaviour": 500.0, "idle": 90.0, "rows": 9}
    figures = {seed: {"Hopper": {"medium": cell, "replay": cell}} for seed in range(3)}
    found = offline_table_hopper.CLAIM.findings(figures)
    assert all(finding.holds is None for finding in found)
    assert any("model-based method, MOPO" in finding.what for finding in found)
    assert isinstance(offline_table_hopper.CLAIM.draw(figures), Figure)
    assert offline_table_hopper.CLAIM.table(figures).count("\n") == 3


def test_only_whole_episodes_count_for_the_behaviour():
    episode = torch.tensor([0] * 50 + [1] * 50 + [2] * 20)
    zeros = torch.zeros(120, 1)
    data = Transitions(zeros, zeros, torch.arange(120.0), zeros, episode < 0, episode)
    task = offline_table.PARTS["Reacher"].task
    assert offline_table.mean_return(data, task) == pytest.approx(sum(range(100)) / 2)
    ended = replace(data, terminated=torch.arange(120) == 119)
    assert offline_table.mean_return(ended, task) == pytest.approx(sum(range(120)) / 3)
