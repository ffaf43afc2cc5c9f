"""Trials of PETS as a run: a folder that can be gone on with."""

import json
from dataclasses import replace

import gymnasium as gym
import pytest
import yaml

from learneddyn import tasks
from learneddyn.agents import PETS
from learneddyn.cli import main
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import ICEM
from learneddyn.runs.trials import learn_trials
from learneddyn.tasks import registry

ENV, STEPS = "test/ShortPendulum-v0", 15


@pytest.fixture(autouse=True, scope="module")
def _registered():
    gym.register(ENV, "gymnasium.envs.classic_control.pendulum:PendulumEnv", max_episode_steps=STEPS)
    tasks.register(replace(tasks.get("Pendulum-v1"), real_id=ENV))
    yield
    del gym.registry[ENV]
    del registry._registered[ENV]


def agent(env):
    model = ProbabilisticEnsemble(2, 2, hidden=[8], max_epochs=2)
    planner = ICEM(horizon=2, candidates=6, elites=3, iterations=1)
    return PETS(env, model, planner, particles=2, seed=1, device="cpu")


def run(folder, steps, **changes):
    return learn_trials(agent, ENV, folder, steps=steps, env_kwargs={"g": 9.0}, **changes)


def test_a_run_cut_short_goes_on_to_the_same_trials(tmp_path):
    whole = run(tmp_path / "whole", 3 * STEPS)
    assert [trial.real_steps for trial in whole] == [STEPS, 2 * STEPS, 3 * STEPS]
    told = []
    first = run(tmp_path / "cut", 2 * STEPS, notify=lambda what, share: told.append((what, share)))
    assert [trial.earned for trial in first] == [trial.earned for trial in whole[:2]]
    assert [share for _, share in told] == [0.5, 1.0]
    rest = run(tmp_path / "cut", 3 * STEPS)
    assert [trial.earned for trial in rest] == [trial.earned for trial in whole]
    assert "model/break_even" in rest[-1].figures
    assert (tmp_path / "cut" / f"log-{2 * STEPS}" / "progress.csv").exists()
    assert [trial.earned for trial in run(tmp_path / "cut", 3 * STEPS)] == [trial.earned for trial in whole]


def test_the_command_learns_and_goes_on(tmp_path, capsys):
    settings = {
        "env_id": ENV,
        "steps": STEPS,
        "model": {
            "class_path": "learneddyn.models.ProbabilisticEnsemble",
            "init_args": {"num_members": 2, "num_elites": 2, "hidden": [8], "max_epochs": 2},
        },
        "planner": {"class_path": "learneddyn.planners.RandomShooting", "init_args": {"horizon": 2, "candidates": 3}},
        "particles": 2,
    }
    (tmp_path / "pets.yaml").write_text(yaml.safe_dump(settings))
    words = ["pets", "--config", str(tmp_path / "pets.yaml"), "--out", str(tmp_path / "run")]
    words += ["--seeds", "[0, 1]", "--workers", "1", "--progress", "false"]
    main(words)
    before = [(tmp_path / "run" / f"seed-{seed}" / "agent" / "pets.json").read_text() for seed in (0, 1)]
    assert [json.loads(card)["entropy"] for card in before] == [0, 1]
    assert json.loads(before[0])["planner"]["class"].endswith("RandomShooting")
    main([*words, "--resume", "true"])
    after = [(tmp_path / "run" / f"seed-{seed}" / "agent" / "pets.json").read_text() for seed in (0, 1)]
    assert after == before
    told = capsys.readouterr().out
    assert f"PETS in {ENV}" in told
    assert f"{json.loads(before[1])['returns'][0]:.1f}" in told
