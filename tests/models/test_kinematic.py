"""KinematicBicycle: moments are exact, the full covariance is the Jacobians', what is learned does not know places."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from learneddyn.core import Task, generator
from learneddyn.models import KinematicBicycle
from learneddyn.models.kinematic import Belief, LowLevel, certain, displacement, drive, propagate
from learneddyn.reproduce import kinematic
from learneddyn.testing import example_transitions
from learneddyn.world import World
from learneddyn.world.bounds import Bounded

CAR = {"dt": 0.1, "wheelbase": 2.8}


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def fitted():
    model = KinematicBicycle(updates=400)
    model.fit(kinematic.log(400, 6, 0), rng=generator(0))
    return model


@pytest.mark.parametrize("std", [1e-3, 0.2, 1.0])
def test_displacements_have_the_moments_of_the_integral(std):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    v = 7 + 1.5 * doubles(*nodes)[:, None]
    h = 0.4 + std * doubles(*nodes)[None]
    share = doubles(*weights)[:, None] * doubles(*weights)[None] / weights.sum() ** 2
    found = displacement(doubles(7), doubles(1.5**2), doubles(0.4), doubles(std**2))
    for column, value in enumerate((v * h.cos(), v * h.sin())):
        mean = (share * value).sum()
        assert torch.allclose(found.mean[0, column], mean, rtol=1e-9)
        assert torch.allclose(found.variance[0, column], (share * (value - mean) ** 2).sum(), rtol=1e-6)


def test_the_full_covariance_is_that_of_the_jacobians():
    rng = generator(0)
    obs = torch.randn(1, 4, generator=rng, dtype=torch.float64) + doubles(0, 0, 9, 0)
    root = 0.01 * torch.randn(4, 4, generator=rng, dtype=torch.float64)
    inputs = LowLevel(doubles(0.5, 0.1)[None], doubles(0.7, 0.02)[None])
    after = propagate(Belief(obs, (root @ root.T)[None]), inputs, cov="full", **CAR)
    f = torch.func.jacrev(lambda x: drive(x[None], inputs.mean, **CAR)[0])(obs[0])
    g = torch.func.jacrev(lambda u: drive(obs, u[None], **CAR)[0])(inputs.mean[0])
    wanted = f @ root @ root.T @ f.T + g @ torch.diag(inputs.std[0] ** 2) @ g.T
    assert torch.allclose(after.covariance[0], wanted, rtol=1e-9, atol=1e-15)


def test_both_recursions_agree_on_the_first_step_from_a_known_pose():
    obs, inputs = doubles(1, 2, 9, 0.3)[None], LowLevel(doubles(0.5, 0.1)[None], doubles(0.7, 0.02)[None])
    one, two = (propagate(certain(obs), inputs, cov=cov, **CAR) for cov in ("full", "independent"))
    assert torch.allclose(one.std, two.std, rtol=1e-9)
    assert torch.allclose(one.mean, two.mean)
    assert torch.allclose(one.mean, drive(obs, inputs.mean, **CAR))


def test_twenty_steps_match_monte_carlo_and_the_independent_recursion_falls_short():
    figures = kinematic.spread(0)
    drawn, full, alone = (np.array(figures[name]) for name in ("drawn", "full", "independent"))
    assert np.abs(full / drawn - 1).max() < 0.01
    assert (drawn[:, :2] > 2 * alone[:, :2]).any()


def test_moving_and_turning_the_vehicle_moves_and_turns_its_prediction(fitted):
    obs, action = torch.tensor([[3.0, -2.0, 8.0, 0.4]]), torch.tensor([[0.3, -0.5]])
    angle = 1.1
    turned = obs + torch.tensor([[10.0, 5.0, 0.0, angle]])
    one, two = (fitted.predict(pose, action).mean[0] - pose for pose in (obs, turned))
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, s], [-s, c]])
    assert torch.allclose(one[:, :2] @ turn, two[:, :2], atol=1e-4)
    assert torch.allclose(one[:, 2:], two[:, 2:], atol=1e-4)


def test_the_head_finds_the_vehicles_inputs(fitted):
    data = kinematic.log(200, 2, 1)
    with torch.no_grad():
        said, truth = fitted.low_level(data.obs, data.action), kinematic.commanded(data.action)
    assert (said.mean - truth.mean)[:, 0].square().mean().sqrt() < 0.6
    assert (said.mean - truth.mean)[:, 1].square().mean().sqrt() < 0.02
    assert (said.std / truth.std).log().abs().mean() < 0.3


def test_gradients_flow_through_a_forecast(fitted):
    actions = torch.zeros(2, 6, 2, requires_grad=True)
    belief = fitted.forecast(torch.tensor([[0.0, 0.0, 8.0, 0.3]]).expand(2, -1), actions)[-1]
    (gradient,) = torch.autograd.grad(belief.covariance.sum() + belief.mean.sum(), actions)
    assert gradient.isfinite().all()
    assert (gradient[:, 0] != 0).all()


def test_unrolled_training_with_the_independent_recursion_stays_finite():
    model = KinematicBicycle(cov="independent", horizon=5, updates=40)
    report = model.fit(kinematic.log(20, 10, 0), rng=generator(0))
    assert math.isfinite(report.metrics["holdout_nll"])


def test_a_log_that_wraps_headings_teaches_the_same():
    """Headings from 0 to 2 pi, and the same ones within [-pi, pi): the seam is not an event."""
    whole = kinematic.log(150, 6, 0)
    seam = dataclasses.replace(whole, obs=wrapped(whole.obs), next_obs=wrapped(whole.next_obs))
    assert ((seam.next_obs - seam.obs)[:, 3].abs() > 6).sum() >= 5, "some steps cross the seam"
    metrics = [
        KinematicBicycle(updates=60).fit(data, rng=generator(0)).metrics["holdout_nll"] for data in (whole, seam)
    ]
    assert metrics[1] == pytest.approx(metrics[0], abs=0.02)


def wrapped(obs):
    turned = obs.clone()
    turned[:, 3] = (obs[:, 3] + math.pi).remainder(2 * math.pi) - math.pi
    return turned


def test_it_plays_in_a_world(fitted):
    task = Task("Bicycle-v0", lambda obs, action, after: -after[:, 1].abs(), lambda after: after[:, 2] < 0)
    data = kinematic.log(5, 2, 2)
    imagined = World(fitted, task).rollout(data.obs, lambda obs: torch.zeros(len(obs), 2), 5, generator(0))
    assert len(imagined) == 50
    assert imagined.next_obs.isfinite().all()


def test_a_world_that_wraps_goes_on_the_same_way(fitted):
    """A vehicle that turns across the seam: the wrapped world and the other one differ by whole turns only."""
    obs, turn = torch.tensor([[0.0, 0.0, 8.0, 3.1]]), torch.tensor([[0.0, 1.0]])
    task = Task("Bicycle-v0", lambda obs, action, after: after[:, 0], lambda after: after[:, 2] < 0)
    worlds = [World(fitted, task, sampler=sampler) for sampler in ("mean", Bounded("mean", angles=[3]))]
    plain, home = (world.rollout(obs, lambda obs: turn.expand(len(obs), 2), 8, generator(0)) for world in worlds)
    assert plain.next_obs[-1, 3] > math.pi
    assert (home.next_obs[:, 3].abs() <= math.pi).all()
    assert torch.allclose(home.next_obs[:, :3], plain.next_obs[:, :3], atol=1e-4)
    assert torch.allclose(home.next_obs[:, 3].sin(), plain.next_obs[:, 3].sin(), atol=1e-4)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="cov must be one of"):
        KinematicBicycle(cov="half")
    with pytest.raises(ValueError, match="steering must be between"):
        KinematicBicycle(steering=2.0)
    with pytest.raises(ValueError, match=r"4 observation columns \(x, y, speed, heading\), got 3"):
        KinematicBicycle().fit(example_transitions(), rng=generator(0))
    with pytest.raises(ValueError, match="cov must be one of"):
        propagate(certain(torch.zeros(1, 4)), LowLevel(torch.zeros(1, 2), torch.ones(1, 2)), cov="half", **CAR)
