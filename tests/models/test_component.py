"""ComponentLaw: whatever is learned resists and is odd; a known resistance is found through its equations."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import Transitions, generator
from learneddyn.models import AbstractDynamics, ComponentLaw
from learneddyn.spaces import Spaces

PATH = f"{__name__}.sled"


def sled(obs, action, law, mass=1.0):
    """Place and speed of a sled, in two steps of 0.05 s that ask for the law anew."""
    place, speed = obs[:, :1], obs[:, 1:]
    for _ in range(2):
        speed = speed + 0.05 / mass * (action + law(speed))
        place = place + 0.05 * speed
    return torch.cat([place, speed], dim=1)


def resistance(speed):
    return -0.8 * speed - 0.5 * speed * speed.abs()


def log(law=resistance, episodes=40, steps=10, unit=1.0, seed=0):
    rng = generator(seed)
    obs, columns = torch.randn(episodes, 2, generator=rng), ([], [], [])
    for _ in range(steps):
        action = 4 * torch.rand(episodes, 1, generator=rng) - 2
        after = sled(obs, action, law)
        for column, part in zip(columns, (unit * obs, unit * action, unit * after), strict=True):
            column.append(part)
        obs = after
    obs, action, after = (torch.stack(column, dim=1).flatten(0, 1) for column in columns)
    box = gym.spaces.Box
    spaces = Spaces(*(box(-np.inf, np.inf, (part.shape[1],), np.float32) for part in (obs, action)))
    nothing, episode = torch.zeros(len(obs)), torch.arange(episodes).repeat_interleave(steps)
    return Transitions(obs, action, nothing, after, nothing.bool(), episode, spaces, "sled")


@pytest.fixture(scope="module")
def fitted():
    model = ComponentLaw(PATH, horizon=3, updates=100)
    model.fit(log(), rng=generator(0))
    return model


@torch.no_grad()
def test_any_law_is_odd_zero_at_rest_and_takes_energy_out():
    model = ComponentLaw(PATH, joints=3)
    model._build(log().spaces)
    for tensor in model.parameters():
        tensor.copy_(3 * torch.randn(tensor.shape, generator=generator(tensor.numel())))
    speeds = 10 * torch.randn(200, 3, generator=generator(1))
    torques = model.law(speeds)
    assert (torques * speeds <= 0).all()
    assert (torques * speeds < 0).any(dim=0).all()
    assert torch.equal(model.law(-speeds), -torques)
    assert torch.equal(model.law(torch.zeros(1, 3)), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="law is of 3 joints, the equations ask about 2"):
        model.law(speeds[:, :2])


@torch.no_grad()
def test_the_resistance_is_found_where_there_are_data(fitted):
    data = log()
    speeds = torch.linspace(-1, 1, 41)[:, None] * data.obs[:, 1].abs().quantile(0.9)
    off = (fitted.law(speeds) - resistance(speeds)).abs().max()
    assert off < 0.05 * resistance(speeds).abs().max()


@torch.no_grad()
def test_rollouts_follow_the_plant_and_files_keep_the_law(fitted, tmp_path):
    fitted.save(tmp_path / "model")
    model = AbstractDynamics.load(tmp_path / "model")
    obs = real = torch.tensor([[0.0, 1.5]])
    for step in range(50):
        action = torch.tensor([[math.sin(0.3 * step)]])
        obs, real = model.predict(obs, action).mean[0], sled(real, action, resistance)
    assert torch.allclose(obs, real, atol=0.05)


def test_units_do_not_matter(fitted):
    """The same sled with places and forces a thousand times as large: its law keeps its coefficient, scaled."""
    data = log(lambda speed: -0.8 * speed, unit=1000.0)
    model = ComponentLaw(PATH, horizon=2, updates=60)
    model.fit(data, rng=generator(0))
    heavy = ComponentLaw(PATH, {"mass": 1000.0}, horizon=2, updates=60)
    heavy.fit(dataclasses.replace(data, action=1000 * data.action), rng=generator(0))
    with torch.no_grad():
        speeds = torch.linspace(-1000, 1000, 21)[:, None]
        assert torch.allclose(model.law(speeds), -0.8 * speeds, atol=30)
        assert torch.allclose(heavy.law(speeds), -800 * speeds, atol=30_000)


def test_a_plant_without_resistance_gets_hardly_any():
    model = ComponentLaw(PATH, horizon=2, updates=30)
    model.fit(log(lambda speed: 0 * speed), rng=generator(0))
    with torch.no_grad():
        assert model.law(torch.tensor([[2.0]])).abs().item() < 1e-3


def test_bad_arguments_are_named():
    for argument, value in (("joints", 0), ("horizon", 0), ("hidden", []), ("holdout_ratio", 1.0)):
        with pytest.raises(ValueError, match=f"{argument} must be"):
            ComponentLaw(PATH, **{argument: value})
    with pytest.raises(ValueError, match="equations must be the dotted path of a function, got 'nowhere'"):
        ComponentLaw("nowhere")
    with pytest.raises(ValueError, match="angles must name"):
        ComponentLaw(PATH, angles=[5]).fit(log(), rng=generator(0))
