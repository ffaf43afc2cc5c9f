"""Measured logs from files to a Minari data set, and the comparison of model classes on it."""

import minari
import numpy as np
import pytest
import torch

from learneddyn import models
from learneddyn.cli import main
from learneddyn.data import load
from learneddyn.runs import comparison


@pytest.fixture
def home(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    torch.set_num_threads(before)


def record(path, rows=241, step=0.005, seed=0):
    """Write a recording of a damped mass that is pushed: x' = v, v' = u - v."""
    rng, x, v, lines = np.random.default_rng(seed), 0.0, 1.0, ["t,x,v,u"]
    for row in range(rows):
        u = rng.normal()
        lines.append(f"{row * step:.4f},{x:.6f},{v:.6f},{u:.6f}")
        x, v = x + step * v, v + step * (u - v)
    path.write_text("\n".join(lines) + "\n")


NAMED = ["--obs", "[x, v]", "--action", "[u]", "--time", "t"]


def test_recordings_become_a_data_set_and_models_are_compared_on_it(home, capsys, monkeypatch):
    (home / "logs").mkdir()
    for number in (0, 1):
        record(home / "logs" / f"run-{number}.csv", seed=number)
    main(["import", "[logs]", "mine/mass-v0", *NAMED, "--every", "2", "--episode_steps", "30"])
    assert "mine/mass-v0: 240 steps, 8 episodes, 2 columns of observation, 1 of action" in capsys.readouterr().out
    data = load("mine/mass-v0")
    assert data.episode.bincount().tolist() == [30] * 8
    assert torch.allclose(data.next_obs[:, 0] - data.obs[:, 0], 0.01 * data.obs[:, 1], atol=1e-3)
    assert "run-1.csv" in minari.load_dataset("mine/mass-v0").storage.metadata["description"]

    monkeypatch.setattr(models, "__all__", ["Koopman", "KinematicBicycle"])
    monkeypatch.setattr(comparison, "SETTINGS", {})
    monkeypatch.setattr(comparison, "SPEED_SECONDS", 0.01)
    words = ["compare", "[mine/mass-v0]", "--seeds", "[0, 1]", "--workers", "1", "--out", "compared"]
    main([*words, "--angles", "[0]", "--progress", "false"])
    assert "mine/mass-v0, 1 step: Koopman" in capsys.readouterr().out
    text = (home / "compared" / "comparison.md").read_text()
    assert "- KinematicBicycle: holds the equations of a vehicle" in text
    kept = (home / "compared" / "seed-1" / "cells").glob("*.json")
    times = {path: path.stat().st_mtime_ns for path in kept}
    main([*words, "--angles", "[0]", "--progress", "false", "--resume", "true"])
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_system_without_actions_goes_through_minari(home):
    record(home / "log.csv")
    main(["import", "[log.csv]", "mine/free-v0", "--obs", "[x, v]", "--episode_steps", "60"])
    assert load("mine/free-v0").action.shape == (240, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["[log.csv]", "a-v0", "--obs", "[x, speed]", "--action", "[u]"],
            "no column 'speed'; it has 't', 'x', 'v', 'u'",
        ),
        (["[log.csv, log.parquet]", "a-v0", *NAMED], "files must be all CSV or all Parquet"),
        (["[]", "a-v0", *NAMED], "files must be all CSV or all Parquet"),
        (["[late.csv]", "a-v0", *NAMED], "time steps differ by more than 5% from the median, 0.005"),
        (["[log.csv]", "a-v0", *NAMED, "--every", "0"], "every must be at least 1, got 0"),
        (["[log.csv]", "a-v0", *NAMED, "--episode_steps", "1"], "episode_steps must be null or at least 2, got 1"),
        (["[gone.csv]", "a-v0", *NAMED], "gone.csv"),
    ],
)
def test_mistakes_in_logs_are_named(home, capsys, words, message):
    record(home / "log.csv", rows=9)
    lines = (home / "log.csv").read_text().splitlines()
    (home / "late.csv").write_text("\n".join([*lines[:4], *lines[5:]]))
    with pytest.raises(SystemExit) as stopped:
        main(["import", *words])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not minari.list_local_datasets()


def test_mistakes_cost_no_comparison(home, capsys):
    record(home / "log.csv")
    main(["import", "[log.csv]", "mine/mass-v0", *NAMED])
    for words, message in (
        (["[mine/mass-v0]"], "hold 1 episodes, three are needed: raise max_rows"),
        (["[gone/log-v0]"], "gone/log-v0"),
        (["[mine/mass-v0, mine-mass-v0]"], "must differ in more than case and punctuation"),
        (["[mine/mass-v0]", "--known", "{SINDy: {degree: 2}}"], "known may hold arguments of"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *words])
        assert stopped.value.code == 1
        assert message in capsys.readouterr().err
    assert not (home / "runs").exists()
