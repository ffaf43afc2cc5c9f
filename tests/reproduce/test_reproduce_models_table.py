"""The table of model classes, in small: its logs are what they say, and every log comes to a finding."""

import pytest
import torch

from learneddyn import models
from learneddyn.core import generator
from learneddyn.models import ComponentLaw, Hybrid, KinematicBicycle
from learneddyn.reproduce import models_table
from learneddyn.runs import comparison
from learneddyn.runs.claims import run_claim
from learneddyn.runs.seeds import silent


@pytest.fixture(scope="module")
def made():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models_table, "CANDIDATES", 2)
        patch.setattr(models_table, "STARTS", 1)
        logs = models_table.logs(0, 600)
        patch.setattr(models_table, "logs", lambda seed: logs)
        yield logs
    torch.set_num_threads(before)


def test_physics_are_right_but_for_one_thing(monkeypatch):
    x = models_table.lorenz(400, 0)
    wrong = models_table.wrong_lorenz(x.obs, x.action)
    assert float((wrong - x.next_obs).norm()) > 1.0
    monkeypatch.setattr(models_table, "WRONG_RHO", 28.0)
    torch.testing.assert_close(models_table.wrong_lorenz(x.obs, x.action), x.next_obs, atol=1e-5, rtol=0)

    def energy(state):
        return 0.5 * state[:, 1] ** 2 - models_table.GRAVITY * state[:, 0].cos()

    state = torch.randn(64, 2, generator=generator(0))
    free, slowed, none = state, state, torch.zeros(64, 1)
    for _ in range(50):
        free = models_table.swing(free, none)
        slowed = models_table.swing(slowed, none, models_table.bearing)
    assert float((energy(free) - energy(state)).abs().max()) < 0.7
    assert bool((energy(slowed) < energy(state) + 0.5).all())
    assert float(energy(slowed).mean()) < float(energy(state).mean()) - 0.5


def test_logs_are_long_enough_and_their_physics_can_be_had(made):
    names = [log.name for log in made]
    assert names == [
        "InvertedPendulum",
        "Hopper",
        "HalfCheetah random",
        "HalfCheetah medium",
        "Lorenz",
        "noisy pendulum",
        "bicycle",
    ]
    for log in made:
        assert len(log.train) + len(log.held_out) == 600
    for log in made[:-1]:
        rows = torch.cat([log.train.next_obs[:8], log.held_out.next_obs[:8]])
        prior = Hybrid(**log.known["Hybrid"])
        obs = torch.cat([log.train.obs[:8], log.held_out.obs[:8]])
        action = torch.cat([log.train.action[:8], log.held_out.action[:8]])
        near = prior._prior(obs, action, **prior.prior_arguments)
        assert float((near - rows).norm()) < float((obs - rows).norm()), log.name
        assert float((near - rows).norm()) > 1e-3, log.name
    ComponentLaw(**made[-2].known["ComponentLaw"])
    KinematicBicycle(**made[-1].known["KinematicBicycle"])


def test_a_policy_that_balances_is_told_from_a_random_one(made):
    balanced = models_table._real("InvertedPendulum-v5", models_table.balance(), 0.3, 200, 0)
    assert len(balanced.episode.unique()) == 1
    hopper = models_table._real("Hopper-v5", models_table.stand(), 0.5, 400, 0)
    random = models_table._real("Hopper-v5", "random", 0.0, 400, 0)
    assert len(hopper.episode.unique()) < len(random.episode.unique())


def test_every_log_comes_to_a_finding(made, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "__all__", ["Koopman", "MixER"])
    monkeypatch.setattr(comparison, "SETTINGS", {"Koopman": {"linear": {"degree": 1}}})
    monkeypatch.setattr(comparison, "SPEED_SECONDS", 0.01)
    found = run_claim(models_table.CLAIM, tmp_path, seeds=[0], workers=1, progress=False)
    assert found[0].holds
    assert [finding.what.partition(":")[0] for finding in found[1::2]] == [log.name for log in made]
    cells = sorted((tmp_path / "models_table" / "seed-0" / "cells").glob("*.json"))
    assert len(cells) == 7
    times = [path.stat().st_mtime_ns for path in cells]
    models_table.measure(0, tmp_path / "models_table" / "seed-0", silent)
    assert [path.stat().st_mtime_ns for path in cells] == times
