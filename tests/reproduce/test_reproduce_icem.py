"""The iCEM experiment in small: its pendulum is the real one, it runs, and it judges what it measured."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from learneddyn.core import generator
from learneddyn.planners import ICEM, GradientPlanner
from learneddyn.reproduce import icem


def test_the_equations_are_the_environments():
    env, truth, rng = gym.make(icem.ENV).unwrapped, icem.TruePendulum(), np.random.default_rng(0)
    env.reset(seed=0)
    for angle, velocity, torque in rng.uniform([-3.1, -8, -2.5], [3.1, 8, 2.5], (200, 3)):
        env.state = np.array([angle, velocity])
        obs = torch.tensor([[np.cos(angle), np.sin(angle), velocity]], dtype=torch.float32)
        action = np.array([torque], np.float32)
        want, *_ = env.step(action)
        got = truth.sample(obs, torch.as_tensor(action)[None], torch.zeros(1, dtype=torch.long), generator(0))
        np.testing.assert_allclose(got.next_obs[0], want, atol=2e-5)
        np.testing.assert_allclose(truth.predict(obs, torch.as_tensor(action)[None]).mean[0], got.next_obs)


def test_it_runs_in_small(monkeypatch, tmp_path):
    planners = {name: lambda horizon: ICEM(horizon, 6, elites=3, iterations=1) for name in icem.PLANNERS}
    planners["gradient, 50 and backward"] = lambda horizon: GradientPlanner(horizon, 2, 1)
    for name, value in (("STEPS", 2), ("HORIZONS", (15, 30)), ("PLANNERS", planners)):
        monkeypatch.setattr(icem, name, value)
    figures = icem.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    assert len(figures) == 2 * len(planners)
    # Two steps at rest, hanging: the angle alone costs about pi squared a step.
    assert figures["iCEM, 100, H15"]["hanging"] == pytest.approx(-2 * np.pi**2, rel=0.1)
    assert isinstance(icem.draw({0: figures, 1: figures}), Figure)


def test_findings_judge_the_returns():
    seed = {
        f"{name}, H{horizon}": {"hanging": -380.0 if "iCEM" in name or horizon == 30 else -700.0, "random": -150.0}
        for name in icem.PLANNERS
        for horizon in icem.HORIZONS
    }
    found = icem.findings({0: seed, 1: seed, 2: seed})
    assert [finding.holds for finding in found if finding.holds is not None] == [True] * 5
    close = copy.deepcopy(seed)
    close["CEM, 100, executes mean, H15"]["hanging"] = -500.0
    assert [finding.holds for finding in icem.findings({0: close, 1: close})][:3] == [True, False, True]
    bad = copy.deepcopy(seed)
    bad["iCEM, 100, H15"]["hanging"] = -600.0
    assert [finding.holds for finding in icem.findings({0: bad, 1: bad})][:3] == [False, False, False]
