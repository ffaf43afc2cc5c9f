"""The experiments on one-step flows and on refined plans, in small: they run, and judge what they measured."""

import copy
import json
import math

import pytest
import torch
from matplotlib.figure import Figure

from learneddyn.core import generator
from learneddyn.reproduce import ofql, trajectory_diffuser


def judged(findings) -> list[bool]:
    return [finding.holds for finding in findings if finding.holds is not None]


def silent(what: str, share: float) -> None:
    pass


def test_ofql_runs_in_small(monkeypatch, tmp_path):
    for name, value in (("UPDATES", 2), ("BATCH", 16), ("HIDDEN", (8,)), ("SAMPLES", 50), ("SHOWN", 5)):
        monkeypatch.setattr(ofql, name, value)
    for name, value in (("DECISIONS", 10), ("ROUNDS", 1), ("DENOISING", (5,))):
        monkeypatch.setattr(ofql, name, value)
    figures = ofql.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert ofql.findings({0: figures, 1: copy.deepcopy(figures)})
    assert isinstance(ofql.draw({0: figures}), Figure)


def test_what_learning_begins_and_ends_with_is_not_timed(monkeypatch):
    """A second before the first update, a tenth for each, a minute of log within the last."""
    clock = iter([])

    class Agent(ofql.OFQL):
        def __init__(self):
            pass

        def learn(self, total, callback, reset_num_timesteps):
            nonlocal clock
            clock = iter([1 + 0.1 * (update + 1) + 60 * (update + 1 == total) for update in range(total)])
            assert all(callback._on_step() for _ in range(total))

    monkeypatch.setattr(ofql.time, "process_time", lambda: next(clock))
    assert ofql.seconds_per_update(Agent()) == pytest.approx(0.1)


def test_sliced_distances():
    """A shift by d is a distance of d / sqrt(2): the mean square of its projections in the plane is d² / 2."""
    points = ofql.eight(500, generator(0))
    assert ofql.sliced_w2(points, points[torch.randperm(500, generator=generator(1))]) < 1e-5
    assert ofql.sliced_w2(points, points + torch.tensor([0.3, 0.4])) == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    assert ofql.on_a_mode(points) > 0.99
    assert ofql.on_a_mode(torch.zeros(3, 2)) == 0


def test_ofql_is_judged_on_every_seed():
    entry = {
        "distance": {"average, 1": 0.15, "data": 0.03, "plain, 1": 0.96} | {f"plain, {k}": 0.1 for k in (2, 5, 10)},
        "share": {"average, 1": 0.6, "plain, 1": 0.0, "plain, 10": 0.8},
        "decide": {"OFQL": 1.0, "DQL-5": 4.0, "DQL-10": 8.0, "DQL-20": 16.0},
        "update": {"OFQL": 1.0, "DQL-5": 2.0},
    }
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert judged(ofql.findings(figures)) == [True, True, True]
    figures[1]["distance"] |= {"average, 1": 0.5, "plain, 1": 0.3}
    figures[2]["decide"]["DQL-5"] = 1.5
    assert judged(ofql.findings(figures)) == [False, False, False]


def test_trajectory_diffuser_runs_in_small(monkeypatch, tmp_path):
    small = (("PROPOSER_UPDATES", 2), ("DIFFUSION_UPDATES", 2), ("BATCH", 8), ("DRAWN", 4), ("TIMINGS", 1))
    for name, value in small:
        monkeypatch.setattr(trajectory_diffuser, name, value)
    figures = trajectory_diffuser.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert len(figures["shown"]["full"]) == 64
    assert trajectory_diffuser.findings({0: figures, 1: copy.deepcopy(figures)})
    assert isinstance(trajectory_diffuser.draw({0: figures}), Figure)


def test_signals_are_their_modes_and_noise():
    drawn = trajectory_diffuser.signals(400, generator(0))
    assert trajectory_diffuser.error(drawn) == pytest.approx(0.1, abs=0.005)
    assert trajectory_diffuser.error(trajectory_diffuser.modes()[..., None]) == 0
    nearest = (drawn[:, None, :, 0] - trajectory_diffuser.modes()).square().mean(2).argmin(1)
    assert float(nearest.float().mean()) == pytest.approx(0.2, abs=0.06)


def test_trajectory_diffuser_is_judged_on_every_seed():
    names = ("data", "proposal", "refined, 5", "refined, 20", "refined, 50", "full")
    entry = {
        "error": dict(zip(names, (0.1, 0.205, 0.191, 0.176, 0.141, 0.159), strict=True)),
        "seconds": dict(zip(names, (0.0, 0.02, 0.36, 0.88, 2.3, 4.2), strict=True)),
    }
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert judged(trajectory_diffuser.findings(figures)) == [True, True, True]
    figures[0]["seconds"]["full"] = 1.0
    figures[1]["error"]["refined, 5"] = 0.3
    figures[2]["error"]["refined, 50"] = 0.18
    assert judged(trajectory_diffuser.findings(figures)) == [False, False, False]
