"""Recurrent dynamics: windows equal steps, the observation given is used, memory helps where observations lack."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Task, Transitions, generator
from learneddyn.models import AbstractDynamics, RecurrentDynamics
from learneddyn.models.recurrent import CELLS, _Sequences
from learneddyn.spaces import Spaces
from learneddyn.testing import check_dynamics, example_transitions
from learneddyn.world import World

QUICK = {"updates": 6, "window": 8, "width": 8, "order": 4}
HEADS = {"learn_reward": True, "learn_termination": True}


def oscillator(episodes=200, length=25, seed=0):
    """Positions alone of x'' = -x + u, 0.3 s a step: the next position needs the velocity."""
    rng = generator(seed)
    turn = torch.tensor(0.3)
    matrix = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
    state, columns = torch.randn(episodes, 2, generator=rng), ([], [], [])
    for _ in range(length):
        push = torch.randn(episodes, 1, generator=rng)
        then = state @ matrix.T + 0.3 * push * torch.tensor([0.0, 1.0])
        for column, value in zip(columns, (state[:, :1], push, then[:, :1]), strict=True):
            column.append(value)
        state = then
    obs, action, after = (torch.stack(column, dim=1).flatten(0, 1) for column in columns)
    box = gym.spaces.Box
    spaces = Spaces(*(box(-np.inf, np.inf, (1,), np.float32) for _ in range(2)))
    rows = episodes * length
    episode = torch.arange(episodes).repeat_interleave(length)
    return Transitions(obs, action, after[:, 0], after, torch.zeros(rows).bool(), episode, spaces, "positions")


@pytest.fixture(scope="module", params=CELLS)
def model(request):
    built = RecurrentDynamics(request.param, layers=2, **QUICK, **HEADS)
    built.fit(example_transitions(), rng=generator(0))
    return built


@pytest.mark.parametrize("cell", CELLS[1:])
def test_contract(cell):
    """The default cell is checked with all public models."""
    check_dynamics(lambda: RecurrentDynamics(cell, **QUICK, **HEADS))


def test_a_window_at_once_is_its_steps(model):
    data = example_transitions()[:12]
    x = model._inputs(data.obs, data.action).view(1, 12, -1)
    whole, memory = model.core(x)[0], model.begin(data.obs[:1])
    for row, now in enumerate(x[0]):
        hidden, memory = model.core.step(now[None], memory)
        assert torch.allclose(hidden[0], whole[row], atol=1e-5)


def test_the_observation_given_is_used_whatever_is_remembered(model):
    data = example_transitions()[:5]
    memory = model.predict(data.obs, data.action).memory
    here, there = (model.predict(obs, data.action, memory).mean for obs in (data.obs, data.obs + 0.5))
    assert not torch.allclose(here + 0.5, there, atol=1e-4)


def test_logged_rows_get_the_memory_of_their_episode(model):
    data = example_transitions()[:30]
    memory = model.remembered(data)
    now = model.begin(data.obs[:1])
    position = data.positions()
    for row in range(len(data)):
        now = model.begin(data.obs[:1]) if position[row] == 0 else now
        assert torch.allclose(memory[row], now[0], atol=1e-6)
        now = model.predict(data.obs[row : row + 1], data.action[row : row + 1], now).memory


def test_a_world_carries_the_memory(model):
    data = example_transitions()[:6]
    world = World(model, Task("X-v0"), sampler="mean")
    rows = world.rollout(data.obs, lambda obs: obs[:, :2].tanh(), 5, generator(0))
    first = rows[rows.episode == 0]
    one = model.predict(first.obs[:1], first.action[:1])
    two = model.predict(first.obs[1:2], first.action[1:2], one.memory)
    assert torch.allclose(first.next_obs[1], two.mean[0, 0], atol=1e-5)


@pytest.fixture(scope="module", params=CELLS)
def trained(request):
    """A model of positions alone, and its log."""
    data = oscillator()
    model = RecurrentDynamics(request.param, updates=100, width=16, order=8, window=25, learning_rate=1e-2)
    model.fit(data, rng=generator(0))
    return model, data


def test_memory_makes_up_for_hidden_velocities(trained):
    model, data = trained
    test = data[-200:]
    late = test.positions() >= 5
    errors = []
    for memory in (model.remembered(test), None):
        said = model.predict(test.obs, test.action, memory).mean[0].detach()
        errors.append(float((said - test.next_obs).square()[late].mean()))
    assert errors[0] < 0.5 * errors[1]


def test_episodes_begin_uncertain(trained):
    model, data = trained
    std = model.predict(data.obs, data.action, model.remembered(data)).std[0, :, 0].detach()
    assert std[data.positions() == 0].mean() > 1.5 * std[data.positions() >= 5].mean()


def test_a_second_fit_goes_on(model):
    copy = RecurrentDynamics(**model.config())
    data = example_transitions()
    copy.fit(data, rng=generator(0))
    first = {name: parameter.detach().clone() for name, parameter in copy.named_parameters()}
    copy.fit(data, rng=generator(1))
    moved = [float((p.detach() - first[name]).abs().max()) for name, p in copy.named_parameters()]
    assert 0 < max(moved) < 0.2, "steps of at most the learning rate from where the first fit ended"


def shifted(data):
    """The same rows in other units: scales of inputs and targets change."""
    return replace(data, obs=3 * data.obs + 2, next_obs=3 * data.next_obs + 2, action=0.5 * data.action)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("rate", [1e-12, 5.0], ids=["no step", "a bad step"])
def test_a_second_fit_keeps_what_it_cannot_better_in_new_scales(cell, rate):
    data = example_transitions()
    model = RecurrentDynamics(cell, **QUICK, **HEADS)
    model.fit(data, rng=generator(0))
    other = shifted(data)
    memory = model.remembered(other[:30])
    before = model.predict(other.obs[:30], other.action[:30], memory).mean.detach()
    scales, wide = model.input_std.clone(), model.outer.bias.detach()[: len(model.target_std)].clone()
    model.learning_rate, model.updates = rate, 1
    model.fit(other, rng=generator(1))
    assert not torch.allclose(model.input_std, scales)
    assert not torch.allclose(model.outer.bias[: len(wide)], wide)
    after = model.predict(other.obs[:30], other.action[:30], model.remembered(other[:30])).mean.detach()
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-3)


def test_a_failed_second_fit_leaves_the_model(model):
    copy = RecurrentDynamics(**model.config())
    copy.fit(example_transitions(), rng=generator(0))
    before = {name: tensor.clone() for name, tensor in copy.state_dict().items()}
    copy.learning_rate = float("inf")
    with pytest.raises(FloatingPointError, match="no finite loss"):
        copy.fit(shifted(example_transitions()), rng=generator(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.state_dict().items())


@pytest.mark.parametrize("cell", CELLS)
def test_intervals_hold_beyond_the_window_that_was_trained_on(cell):
    data, test = oscillator(40, 100), oscillator(8, 200, seed=1)
    model = RecurrentDynamics(cell, updates=60, width=16, order=8, window=8, learning_rate=1e-2)
    report = model.fit(data, rng=generator(0))
    said = model.predict(test.obs, test.action, model.remembered(test))
    error = ((test.next_obs - said.mean[0]) / said.std[0]).detach()[test.positions() >= 8]
    assert 0.8 < float((error.abs() < 1.645).float().mean()) < 1.0
    assert model.widening.min() >= 1
    held = data[-int(0.2 * len(data)) :]
    said = model.predict(held.obs, held.action, model.remembered(held))
    assert report.metrics["holdout_mse"] == pytest.approx(
        float((said.mean[0] - held.next_obs).detach().square().mean()), rel=1e-3
    )


def test_modes_forget_within_a_window():
    model = RecurrentDynamics("s4d", width=8, order=4, window=16, updates=1)
    model.fit(example_transitions(), rng=generator(0))
    (layer,) = model.core.layers
    kept = (layer.eigenvalues().real * layer.log_dt.exp()[:, None] * 16).exp()
    assert kept.max() < np.exp(-2) * 1.05


def test_windows_stay_in_their_episode_and_cover_short_ones():
    data = example_transitions()
    sequences = _Sequences(data)
    row = torch.arange(len(data))
    index, inside = sequences.windows(row, 8)
    assert (data.episode[index] == data.episode[row][:, None]).all()
    assert ((index == row[:, None]) & inside).any(dim=1).all(), "every row is in its window"
    length = torch.bincount(data.episode)[data.episode]
    assert torch.equal(inside.sum(dim=1), length.clamp_max(8))
    index, inside = sequences.tiles(8)
    assert torch.equal(index[inside].sort().values, row), "tiles hold every row once"
    index, inside = sequences.stretches(len(data) * 100)
    assert torch.equal(index[inside].sort().values, row), "stretches too"
    assert torch.equal(inside.sum(dim=1), torch.bincount(data.episode).sort(descending=True).values)
    assert sequences.stretches(1)[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("lengths", "begins", "cells"),
    [
        ([3, 12, 12], [3, 15], [12, 12]),
        ([3, 9, 9, 5], [3, 12, 21], [9, 9, 5]),
        ([2, 50], [2], [20]),
        ([1, 16, *[1] * 90], [1, 0, 17, 18, 19], [16, 1, 1, 1, 1]),
    ],
)
def test_the_longest_stretches_measure_the_noise(lengths, begins, cells):
    """Of 20 rows: uneven lengths, a stretch that is longer, and short ones that would be padding beside a long one."""
    row = torch.arange(sum(lengths))[:, None].float()
    episode = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    nothing = torch.zeros(len(row))
    log = Transitions(row, row, nothing, row + 1, nothing.bool(), episode, None, "rows")
    index, inside = _Sequences(log).stretches(20)
    assert index[:, 0].tolist() == begins
    assert inside.sum(dim=1).tolist() == cells
    assert index.shape[1] == cells[0]
    for place, (begin, cell) in enumerate(zip(begins, cells, strict=True)):
        assert index[place][inside[place]].tolist() == list(range(begin, begin + cell))


def test_files(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = AbstractDynamics.load(tmp_path / "model")
    data = example_transitions()[:4]
    memory = model.remembered(data)
    assert torch.equal(
        model.predict(data.obs, data.action, memory).mean, loaded.predict(data.obs, data.action, memory).mean
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match="cell must be one of"):
        RecurrentDynamics("lstm")
    with pytest.raises(ValueError, match="order must be even"):
        RecurrentDynamics(order=3)
    with pytest.raises(ValueError, match="holdout_ratio must be between 0 and 1"):
        RecurrentDynamics(holdout_ratio=1.0)
