"""The SINDy-RL experiment in small: it runs, a finished run is not played again, and it judges what it measured."""

import copy

import gymnasium as gym
import pytest
from stable_baselines3 import PPO, SAC

from learneddyn.agents import SINDyRL, SparsePolicy
from learneddyn.models import SINDy
from learneddyn.reproduce import sindy_rl


def made(kind, seed, env):
    net = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu"}  # not shared: Stable-Baselines3 writes into it
    if kind == "ppo":
        return PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, seed=seed, **net)
    off = {"learning_starts": 60, "batch_size": 16, "gradient_steps": 1, "seed": seed, **net}
    if kind == "sac":
        return SAC("MlpPolicy", env, **off)
    model = SINDy(bootstraps=2, target="change", angles=[1])
    return SINDyRL("MlpPolicy", env, model=model, refit_every=50, rollout_batch=20, **off)


@pytest.fixture
def small(monkeypatch):
    for name, value in (("STEPS", 120), ("EPISODES", 1), ("make", made)):
        monkeypatch.setattr(sindy_rl, name, value)
    quick = {"degree": 1, "angles": [1], "thresholds": [1e-3], "ridges": [1e-5], "bootstraps": 2}
    monkeypatch.setattr(sindy_rl, "student", lambda kind: SparsePolicy(**quick))


def silent(message, share):
    pass


def test_a_seed_is_measured_and_not_learned_again(small, tmp_path):
    figures = sindy_rl.measure(0, tmp_path, silent)
    assert [marks[-1]["steps"] for marks in figures["curves"].values()] == [120, 120, 128]
    assert figures["formulas"]["clip"]["formula"].startswith("u0 = clip(")
    assert len(figures["equations"]) == 4
    again = sindy_rl.distilled(tmp_path / "sindy", 0)
    assert again["equations"] == figures["equations"]
    assert sindy_rl.draw({0: figures}).axes[0].get_xlabel() == "real steps"
    assert figures["formulas"]["short"]["formula"] in sindy_rl.table({0: figures})


def test_the_agents_and_students_are_those_of_the_setting():
    agent = sindy_rl.make("sindy", 0, gym.make(sindy_rl.ENV))
    assert agent.rollout_length == 20
    assert agent.dynamics.domain == [(0, -2.0, 2.0)]
    assert [sindy_rl.student(kind).squash for kind in sindy_rl.STUDENTS] == ["clip", "tanh", "tanh"]


def test_verdicts_follow_the_figures():
    formula = {"formula": "u0 = 0", "terms": 3, "return": 100.0}
    curves = {kind: [{"steps": 1, "return": value}] for kind, value in (("sindy", 150.0), ("sac", 50.0), ("ppo", 1.0))}
    good = {"curves": curves, "terms": 9, "formulas": dict.fromkeys(sindy_rl.STUDENTS, formula)}
    bad = copy.deepcopy(good)
    bad["curves"]["sindy"][0]["return"] = 2.0
    judged = [finding.holds for finding in sindy_rl.findings({0: good, 1: good, 2: good})]
    assert [holds for holds in judged if holds is not None] == [True, True]
    judged = [finding.holds for finding in sindy_rl.findings({0: good, 1: bad, 2: bad})]
    assert [holds for holds in judged if holds is not None] == [False, True]
