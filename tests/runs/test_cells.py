"""The cells of a table: kept beside their settings, failures too; an experiment made of them may grow."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from learneddyn.core import Json
from learneddyn.evaluation import Estimate
from learneddyn.runs import Notify
from learneddyn.runs.cells import FAILED, UNPLAYED, Cells, spent
from learneddyn.runs.claims import Claim, Finding, panels, publish, run_claim
from learneddyn.runs.seeds import silent

PLAYED: list[str] = []


def count(name: str) -> Json:
    PLAYED.append(name)
    return {"value": len(name)}


@pytest.fixture(autouse=True)
def fresh():
    PLAYED.clear()


def test_a_cell_is_played_once_per_setting(tmp_path: Path) -> None:
    cells = Cells(tmp_path, silent, 4)
    for settings in ({"updates": 5}, {"updates": 5}, {"updates": 6}):
        assert cells.play("medium, TD3+BC", settings, lambda: count("one")) == {"value": 3}
    assert PLAYED == ["one", "one"]
    cells.play("medium, TD3+BC", {"updates": 6}, lambda: count("two"), anew=True)
    assert PLAYED == ["one", "one", "two"]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["medium-td3+bc.json"]
    assert set(spent(tmp_path)) == {"wall", "cpu"}


@pytest.mark.parametrize("error", [ValueError("rewards all equal"), FloatingPointError("loss is not finite")])
def test_what_a_method_cannot_do_is_a_result(tmp_path: Path, error: Exception) -> None:
    def work() -> Json:
        PLAYED.append("")
        raise error

    for _ in range(2):
        result = Cells(tmp_path, silent, 1).play("a", {}, work)
        assert result == {FAILED: f"{type(error).__name__}: {error}"}
    assert PLAYED == [""]


def test_frozen_cells_are_read_and_never_played(tmp_path: Path) -> None:
    Cells(tmp_path, silent, 2).play("a", {"updates": 5}, lambda: count("a"))
    frozen = Cells(tmp_path, silent, 2, frozen=True)
    assert frozen.play("a", {"updates": 5}, lambda: count("a")) == {"value": 1}
    for name, settings, anew in (("a", {"updates": 6}, False), ("a", {"updates": 5}, True), ("b", {}, False)):
        assert frozen.play(name, settings, lambda: count("b"), anew=anew) == {FAILED: UNPLAYED}
    assert PLAYED == ["a"]
    assert [path.name for path in (tmp_path / "cells").iterdir()] == ["a.json"]


def test_two_cells_cannot_share_a_file(tmp_path: Path) -> None:
    cells = Cells(tmp_path, silent, 2)
    cells.play("Hopper, GRU", {}, lambda: count("a"))
    cells.play("Hopper, GRU", {}, lambda: count("a"))
    with pytest.raises(ValueError, match=r"'Hopper, GRU' and 'hopper gru' would share the file hopper-gru\.json"):
        cells.play("hopper gru", {}, lambda: count("b"))
    assert PLAYED == ["a"]
    assert Cells(tmp_path, silent, 1).play("Hopper: GRU", {}, lambda: count("b")) == {"value": 1}, "a cell renamed"


def test_a_kill_leaves_no_cell(tmp_path: Path) -> None:
    def killed() -> Json:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path, silent, 1).play("a", {}, killed)
    assert Cells(tmp_path, silent, 1).play("a", {}, lambda: count("a")) == {"value": 1}


def test_figures_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Cells(tmp_path, silent, 1).play("a", {}, lambda: {"value": float("nan")})
    assert not list((tmp_path / "cells").iterdir())


METHODS = ["a", "bb"]


def measure(seed: int, home: Path, notify: Notify) -> Json:
    cells = Cells(home, notify, len(METHODS))
    return {name: cells.play(name, {"seed": seed}, lambda name=name: count(name))["value"] for name in METHODS}


def findings(figures: dict[int, Json]) -> list[Finding]:
    return [Finding("methods", Estimate(float(len(figures[0])), 0.0, 9.0), "", None)]


def draw(figures: dict[int, Json]) -> Figure:
    return panels()[0]


def told(figures: dict[int, Json]) -> str:
    return "| a table |"


def test_an_experiment_of_cells_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim("small", "", "", "", measure, findings, draw, table=told, cells=True)
    run = {"seeds": [0, 1], "workers": 1, "progress": False}
    run_claim(claim, tmp_path / "runs", **run)
    assert PLAYED == ["a", "bb", "a", "bb"]
    monkeypatch.setattr(f"{__name__}.METHODS", ["a", "bb", "ccc"])
    found = run_claim(claim, tmp_path / "runs", **run, resume=True)
    assert PLAYED[4:] == ["ccc", "ccc"]
    assert found[0].measured.value == 3
    result = json.loads((tmp_path / "runs/small/result.json").read_text())
    assert result["figures"]["1"] == {"a": 1, "bb": 2, "ccc": 3}
    assert "\n| a table |\n" in publish(tmp_path / "runs", tmp_path).read_text()
