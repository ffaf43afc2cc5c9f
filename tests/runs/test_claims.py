"""The frame of experiments: seeds are kept, results are written, the table is rewritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from learneddyn import reproduce
from learneddyn.core import Json
from learneddyn.evaluation import Estimate, bootstrap_interval
from learneddyn.runs import Notify, RunExists
from learneddyn.runs.claims import Claim, Finding, panels, publish, run_claim, verdict


def measure(seed: int, home: Path, notify: Notify) -> Json:
    (home / "played").write_text((home / "played").read_text() + "x" if (home / "played").exists() else "x")
    return {"value": float(seed)}


def findings(figures: dict[int, Json]) -> list[Finding]:
    mean = bootstrap_interval([entry["value"] for entry in figures.values()])
    return [Finding("mean", mean, ">= 1", np.float64(mean.value) >= 1), Finding("again", mean, "", None)]


def draw(figures: dict[int, Json]) -> Figure:
    figure, [axes] = panels()
    axes.plot(list(figures))
    return figure


def broken(seed: int, home: Path, notify: Notify) -> Json:
    return {"value": float("nan")}


CLAIM = Claim("small", "Nobody, Nothing, 2026", "one is one", "as here", measure, findings, draw)


def test_run_writes_result_picture_and_table(tmp_path: Path) -> None:
    found = run_claim(CLAIM, tmp_path / "runs", seeds=[1, 2, 3], workers=1, progress=False)
    assert found[0].measured.value == 2.0
    assert verdict(found) == "holds"
    result = json.loads((tmp_path / "runs/small/result.json").read_text())
    assert result["figures"] == {"1": {"value": 1.0}, "2": {"value": 2.0}, "3": {"value": 3.0}}
    assert (tmp_path / "runs/small/result.png").read_bytes().startswith(b"\x89PNG")
    text = publish(tmp_path / "runs", tmp_path).read_text()
    assert "| [small](#small) | mean | 2 [1, 3] | >= 1 | holds |" in text
    assert (tmp_path / "reproduce/small.png").exists()


def test_resume_keeps_the_seeds_that_are_there(tmp_path: Path) -> None:
    run_claim(CLAIM, tmp_path, seeds=[0, 1], workers=1, progress=False)
    (tmp_path / "small/seed-1/figures.json").unlink()
    with pytest.raises(RunExists, match="--resume"):
        run_claim(CLAIM, tmp_path, seeds=[0, 1], workers=1, progress=False)
    run_claim(CLAIM, tmp_path, seeds=[0, 1], workers=1, progress=False, resume=True)
    assert (tmp_path / "small/seed-0/played").read_text() == "x"
    assert (tmp_path / "small/seed-1/played").read_text() == "xx"
    with pytest.raises(RunExists, match="seeds"):
        run_claim(CLAIM, tmp_path, seeds=[0, 2], workers=1, progress=False, resume=True)


def test_figures_must_be_finite(tmp_path: Path) -> None:
    claim = Claim("small", "", "", "", broken, findings, draw)
    with pytest.raises(ValueError, match="JSON"):
        run_claim(claim, tmp_path, seeds=[0], workers=1, progress=False)


def test_verdict() -> None:
    one = Estimate(1.0, 0.0, 2.0)
    assert verdict([Finding("", one, "", True), Finding("", one, "", False)]) == "fails"
    assert verdict([Finding("", one, "", None)]) == "reported"


def test_every_experiment_is_complete() -> None:
    for name in reproduce.names():
        claim = reproduce.get(name)
        assert claim.name == name
        assert len(claim.seeds) >= 3 or "one seed" in claim.setting, "three seeds, or the setting says one seed"
        assert claim.paper
        assert claim.claim
        assert claim.setting
    with pytest.raises(LookupError, match="no experiment 'nothing'"):
        reproduce.get("nothing")
