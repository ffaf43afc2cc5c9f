"""Inverse dynamics: what they recover, what they are blind to, and that their best weights are the ones they keep."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, Transitions, generator
from learneddyn.data import collect, without_actions
from learneddyn.models import AbstractDynamics, AbstractModel, InverseDynamics, ModelFileError
from learneddyn.models.inverse import r_squared
from learneddyn.reproduce.ss_orl import hidden_velocity
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions

QUICK = {"hidden": (32,), "updates": 60, "check_every": 20, "batch_size": 64}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def log() -> Transitions:
    return example_transitions(400)


@pytest.fixture(scope="module")
def fitted(log):
    model = InverseDynamics(num_members=2, **QUICK)
    model.fit(log, rng=generator(0))
    return model


@pytest.mark.parametrize(("past", "low", "high"), [(0, -0.3, 0.2), (1, 0.9, 1.0)])
def test_past_states_reveal_a_velocity_that_nobody_sees(past, low, high):
    model = InverseDynamics(past=past, hidden=(64, 64), learning_rate=2e-3, updates=300, check_every=100)
    model.fit(hidden_velocity(8, 0), rng=generator(0))
    for gain in (0.0, 0.3):  # in distribution, and of a controller that the labels have not seen
        other = hidden_velocity(20, 1, gain)
        assert low <= r_squared(model.predict(other).mean, other.action) <= high


def test_pendulum_torques_follow_from_two_states():
    train, test = (collect("Pendulum-v1", steps=rows, lanes=5, seed=seed, progress=False)
                   for seed, rows in enumerate((5000, 2000)))  # fmt: skip
    model = InverseDynamics(past=0, hidden=(64, 64), learning_rate=1e-3, dropout=0.0, updates=600)
    report = model.fit(train, rng=generator(0))
    belief = model.predict(test)
    assert r_squared(belief.mean, test.action) > 0.9
    assert report.metrics["holdout_r2"] > 0.9
    error = (belief.mean - test.action).abs()
    assert error[belief.std < belief.std.median()].mean() < error[belief.std >= belief.std.median()].mean()


def test_moments_are_those_of_the_action(fitted, log):
    """The quadrature against draws from the mixture."""
    few = log[:5]
    mean, log_std = fitted._networks(fitted._windows(log)[:5])
    noise = torch.randn(2, 5, 2, 40_000, generator=generator(1))
    draws = (mean[..., None] + log_std.exp()[..., None] * noise).tanh().transpose(0, 2).flatten(2)  # [a, b, e * draws]
    belief = fitted.predict(few)
    assert bool((log_std > -5).all() and (log_std < 2).all())
    torch.testing.assert_close(belief.mean, draws.mean(2).T, rtol=0, atol=0.01)
    torch.testing.assert_close(belief.std, draws.std(2).T, rtol=0, atol=0.01)


def test_windows_stay_inside_their_episode(log):
    model = InverseDynamics(past=2, **QUICK)
    model.fit(log, rng=generator(0))
    windows = model._windows(log)
    o = log.obs.shape[1]
    change = log.next_obs - log.obs
    inner = log.positions()[1:] > 0
    torch.testing.assert_close(model.bend_scale, (change[1:] - change[:-1])[inner].std(0, correction=0))
    for row in range(60):
        for back in (1, 2):
            inside = row - back >= 0 and log.episode[row - back] == log.episode[row]
            bend = change[row - back + 1] - change[row - back]
            wanted = (bend - model.bend_mean) / model.bend_scale if inside else torch.zeros(o)
            torch.testing.assert_close(windows[row, (1 + back) * o : (2 + back) * o], wanted)
    # A row that was dropped breaks the past of those behind it as the start of an episode does.
    rows = torch.arange(400) != 1
    assert bool((model._windows(log)[2:5, 2 * o :] != 0).any(1).all())
    cut = model._windows(log[rows])
    assert bool((cut[1, 2 * o :] == 0).all())
    assert torch.equal(cut[2, 2 * o : 3 * o], windows[3, 2 * o : 3 * o])
    assert bool((cut[2, 3 * o :] == 0).all())
    # The last row of an episode knows its successor, and a row knows nothing that comes later.
    last = int((log.episode == log.episode[0]).nonzero().max())
    moved = replace(log, next_obs=log.next_obs + (torch.arange(400) == last)[:, None])
    changed = (model._windows(moved) != windows).any(1).nonzero().flatten()
    assert changed.tolist() == [last]


def test_the_units_of_states_and_actions_do_not_matter(log):
    """Scaled and shifted states and a wider box: the same model, its answers in the other units."""
    stretch, move = torch.tensor([4.0, 0.25, 8.0]), torch.tensor([1.0, -2.0, 0.5])
    box = gym.spaces.Box(np.array([0, -3], np.float32), np.array([4, 1], np.float32))
    other = replace(
        log,
        obs=log.obs * stretch + move,
        next_obs=log.next_obs * stretch + move,
        action=(log.action + 1) * 2 + torch.tensor([0.0, -3.0]),
        spaces=Spaces(log.spaces.observation, box),
    )
    beliefs = []
    for data in (log, other):
        model = InverseDynamics(**QUICK)
        model.fit(data, rng=generator(0))
        beliefs.append(model.predict(data))
    plain, boxed = beliefs
    torch.testing.assert_close((plain.mean + 1) * 2 + torch.tensor([0.0, -3.0]), boxed.mean, rtol=0, atol=2e-2)
    torch.testing.assert_close(plain.std * 2, boxed.std, rtol=0, atol=2e-2)
    assert bool((boxed.mean >= torch.tensor([0.0, -3.0])).all() and (boxed.mean <= torch.tensor([4.0, 1.0])).all())


def test_the_best_weights_are_kept_not_the_last(log):
    """Labels of noise: the held-out loss rises as the networks learn the training rows by heart."""
    noise = replace(log, action=2 * torch.rand(400, 2, generator=generator(0)) - 1)
    model = InverseDynamics(num_members=2, hidden=(64, 64), dropout=0.0, learning_rate=5e-3, batch_size=128,
                            updates=400, check_every=40, patience=100)  # fmt: skip
    report = model.fit(noise, rng=generator(0))
    curve = [entry["holdout_nll"] for entry in report.history]
    assert curve[-1] > min(curve) + 0.1
    assert report.metrics["holdout_nll"] <= min(curve) + 1e-4
    patient = InverseDynamics(hidden=(64, 64), dropout=0.0, learning_rate=5e-3, updates=400, check_every=40,
                              patience=2)  # fmt: skip
    assert patient.fit(noise, rng=generator(0)).epochs < 10


def test_rows_without_actions_give_scales_only(log):
    labelled = log.episode < log.episode.unique()[5]
    free = replace(log, action=torch.where(labelled[:, None], log.action, torch.nan))
    model = InverseDynamics(**QUICK)
    report = model.fit(free, rng=generator(0))
    assert report.metrics["train_rows"] + report.metrics["holdout_rows"] == int(labelled.sum())
    torch.testing.assert_close(model.obs_mean, log.obs.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.predict(free).mean, model.predict(without_actions(log)).mean)


def test_saturated_actions_stay_finite(log):
    bang = replace(log, action=log.obs[:, :2].sign())
    model = InverseDynamics(**QUICK | {"updates": 200})
    report = model.fit(bang, rng=generator(0))
    assert np.isfinite(report.metrics["holdout_nll"])
    assert bool((model.predict(bang).mean.abs() <= 1).all())


def test_one_seed_one_model_and_files(fitted, log, tmp_path):
    again = InverseDynamics(num_members=2, **QUICK)
    before = torch.get_rng_state()
    again.fit(log, rng=generator(0))
    assert torch.equal(before, torch.get_rng_state())
    assert again.digest() == fitted.digest()
    fitted.save(tmp_path / "model")
    loaded = AbstractModel.load(tmp_path / "model")
    assert isinstance(loaded, InverseDynamics)
    assert torch.equal(loaded.predict(log).mean, fitted.predict(log).mean)
    assert loaded.digest() == fitted.digest()
    with pytest.raises(ModelFileError, match=r"holds a .*InverseDynamics, not a AbstractDynamics"):
        AbstractDynamics.load(tmp_path / "model")
    loaded.fit(log, rng=generator(1))  # a warm start
    assert loaded.digest() != fitted.digest()


def test_bad_data_is_named(fitted, log):
    model = InverseDynamics(**QUICK)
    with pytest.raises(DataError, match="got 0 rows with actions in 0 of"):
        model.fit(without_actions(log), rng=generator(0))
    one = replace(log, action=torch.where((log.episode == log.episode[0])[:, None], log.action, torch.nan))
    with pytest.raises(DataError, match="at least two trajectories"):
        model.fit(one, rng=generator(0))
    with pytest.raises(DataError, match="NaN or infinity in 'next_obs'"):
        model.fit(replace(log, next_obs=log.next_obs / 0), rng=generator(0))
    with pytest.raises(ValueError, match=r"bounded Box as action space, got Discrete\(2\)"):
        model.fit(replace(log, spaces=Spaces(log.spaces[0], gym.spaces.Discrete(2))), rng=generator(0))
    with pytest.raises(ValueError, match="has not been fitted"):
        InverseDynamics().predict(log)
    with pytest.raises(DataError, match="400 of 400 actions lie outside their box"):
        fitted.fit(replace(log, action=log.action + 5), rng=generator(0))
    wide = Spaces(gym.spaces.Box(-9.0, 9.0, (3,), np.float32), log.spaces.action)
    with pytest.raises(ValueError, match="this model was fitted on"):
        fitted.predict(replace(log, spaces=wide))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        InverseDynamics(dropout=1.0)


def test_a_fit_that_fails_leaves_the_model_as_it_was(fitted, log):
    before, rate = fitted.digest(), fitted.learning_rate
    fitted.learning_rate = 1e30
    try:
        with pytest.raises(FloatingPointError, match="lower learning_rate"):
            fitted.fit(log, rng=generator(0))
    finally:
        fitted.learning_rate = rate
    assert fitted.digest() == before


def test_r_squared():
    true = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert r_squared(true, true) == 1.0
    assert r_squared(true.mean(0).expand(2, 2), true) == 0.0
    assert np.isnan(r_squared(true[:, 1:], true[:, 1:]))
