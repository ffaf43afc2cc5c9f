"""Koopman: closed systems are exact, spurious modes are flagged, memory and pairs do what they say."""

from itertools import combinations_with_replacement

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, Task, Transitions, generator
from learneddyn.evaluation.koopman import pseudospectrum, spectrum, verified_spectrum
from learneddyn.models import Koopman, koopman
from learneddyn.models.koopman import solve, triangle
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions
from learneddyn.world import World


def logged(obs, next_obs, action=None, episode=None):
    rows, o = obs.shape
    action = torch.zeros(rows, 1) if action is None else action
    box = gym.spaces.Box
    spaces = Spaces(box(-np.inf, np.inf, (o,), np.float32), box(-np.inf, np.inf, (action.shape[1],), np.float32))
    episode = torch.arange(rows) if episode is None else episode
    return Transitions(
        obs, action, torch.zeros(rows), next_obs, torch.zeros(rows, dtype=torch.bool), episode, spaces, "closed"
    )


@pytest.fixture(scope="module")
def closed():
    """x' = 0.9 x, y' = 0.5 y + (0.81 - 0.5) x^2: its monomials of degree <= 3 hold six eigenfunctions."""
    obs = 2 * torch.rand(2000, 2, generator=generator(0)) - 1
    x, y = obs.T
    return logged(obs, torch.stack([0.9 * x, 0.5 * y + 0.31 * x**2], dim=1))


def monomials(obs, degree):
    x, y = obs.double().T
    return torch.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)], dim=1)


def test_six_of_ten_modes_of_the_closed_system_are_verified(closed):
    x, y = closed.obs.double().T
    after = torch.stack([0.9 * x, 0.5 * y + 0.31 * x**2], dim=1)
    found = spectrum([(monomials(closed.obs, 3), monomials(after, 3))])
    assert int(found.verified(1e-8).sum()) == 6
    expected = torch.tensor([0.45, 0.5, 0.729, 0.81, 0.9, 1.0], dtype=torch.float64)
    assert torch.allclose(found.eigenvalues[:6].real.sort().values, expected, atol=1e-8)
    assert (found.residuals[6:] > 1e-2).all(), "the spurious modes are flagged"


def test_the_pseudospectrum_vanishes_at_eigenvalues_and_bounds_them(closed):
    x, y = closed.obs.double().T
    after = torch.stack([0.9 * x, 0.5 * y + 0.31 * x**2], dim=1)
    pairs = [(monomials(closed.obs, 3), monomials(after, 3))]
    points = torch.tensor([0.9, 0.5, 0.3 + 0.4j], dtype=torch.complex128)
    residual = pseudospectrum(pairs, points)
    assert (residual[:2] < 1e-6).all()
    assert residual[2] > 0.05


KNOWN = [0.45, 0.5, 0.729, 0.81, 0.9, 1.0]
"""What x, x^2, x^3, 1 and y - x^2, alone and times x, are multiplied by at a step of the closed system."""


def test_verified_points_are_the_eigenvalues_of_the_closed_system_and_no_others(closed):
    x, y = closed.obs.double().T
    after = torch.stack([0.9 * x, 0.5 * y + 0.31 * x**2], dim=1)
    pairs = [(monomials(closed.obs, 3), monomials(after, 3))]
    kept, certificates = verified_spectrum(pairs, spacing=0.05, below=0.01)
    distance = (kept[:, None] - torch.tensor(KNOWN, dtype=torch.float64)).abs()
    assert len(kept) == len(certificates) == 6
    assert (distance.amin(dim=1) <= 0.025).all(), "every point kept lies within half a grid step of an eigenvalue"
    assert (distance.amin(dim=0) <= 0.025).all(), "every eigenvalue is met"
    on_grid = distance.amin(dim=1) < 1e-9
    assert int(on_grid.sum()) == 4
    assert (certificates[on_grid] < 1e-6).all()


def test_of_a_system_that_preserves_its_measure_certificates_bound_the_distance_to_the_spectrum():
    """Waves on a circle of 50 places, turned by three: wave k is multiplied by exp(i k turn)."""
    turn, angle, waves = 6 * torch.pi / 50, 2 * torch.pi * torch.arange(50.0) / 50, torch.arange(4.0)
    lifted = [
        torch.cat([(waves * a[:, None]).cos(), (waves[1:] * a[:, None]).sin()], dim=1) for a in (angle, angle + turn)
    ]
    kept, certificates = verified_spectrum([tuple(lifted)], spacing=0.1)
    known = torch.polar(torch.ones(7), torch.arange(-3.0, 4.0) * turn)
    distance = (kept[:, None] - known).abs()
    torch.testing.assert_close(certificates, distance.amin(dim=1), atol=1e-5, rtol=0)
    assert (certificates < 0.1).all(), "no point is kept that a neighbour on the grid is better than"
    assert (distance.amin(dim=0) <= 0.1 / 2**0.5).all(), "every eigenvalue has a point in its grid cell"


def test_least_squares_leaves_out_what_the_data_does_not_tell_apart():
    x = torch.randn(50, 2, generator=generator(0), dtype=torch.float64)
    twice = torch.cat([x, x[:, :1]], dim=1)
    solution = solve(triangle([torch.cat([twice, x[:, :1]], dim=1)]), 3, 1e-9)
    assert torch.allclose(twice @ solution, x[:, :1], atol=1e-9)
    assert torch.allclose(solution[0], solution[2]), "the minimum-norm solution shares alike"


@pytest.mark.parametrize("rows", [2, 4, 6, 300])
def test_blocks_of_rows_give_the_least_squares_of_all_rows(rows):
    x, y = (torch.randn(rows, width, generator=generator(0), dtype=torch.float64) for width in (5, 3))
    together = torch.cat([x, y], dim=1)
    r = triangle(iter(together.split(7)))
    assert r.shape[0] <= 8
    assert torch.allclose(r.T @ r, together.T @ together)
    assert torch.allclose(solve(r, 5, 1e-12), torch.linalg.pinv(x) @ y)
    with pytest.raises(ValueError, match="at least one block"):
        triangle([])


def test_a_fit_does_not_depend_on_the_size_of_its_blocks(closed, monkeypatch):
    whole, parts = Koopman(degree=2), Koopman(degree=2)
    whole.fit(closed, rng=generator(0))
    monkeypatch.setattr(koopman, "_BLOCK", 1000)
    parts.fit(closed, rng=generator(0))
    assert torch.allclose(whole.advance, parts.advance, atol=1e-10)
    blocks = list(parts.lifted_pairs(closed))
    assert len(blocks) > 10
    assert max(len(psi) for psi, _ in blocks) * 19 <= 1000
    monkeypatch.undo()
    assert torch.allclose(spectrum(blocks).residuals, spectrum(parts.lifted_pairs(closed)).residuals, atol=1e-10)


def test_a_fitted_model_verifies_the_same_six_modes():
    """The dictionary of degree 3 spans the ten monomials, however the data is shifted and scaled."""
    obs = 2 * torch.rand(2000, 2, generator=generator(0), dtype=torch.float64) - 1
    x, y = obs.T
    data = logged(obs, torch.stack([0.9 * x, 0.5 * y + 0.31 * x**2], dim=1))
    model = Koopman(degree=3, control="linear")
    model.fit(data, rng=generator(0))
    found = spectrum(model.lifted_pairs(data))
    assert int(found.verified(1e-8).sum()) == 6
    assert (found.residuals[6:] > 1e-2).all()


def test_monomials_are_products_of_columns():
    model = Koopman(degree=4, delays=2)
    model.fit(example_transitions(), rng=generator(0))
    x = torch.randn(5, 6, generator=generator(1), dtype=torch.float64)
    found = model.lifted(x)
    expected = [torch.ones(5, dtype=torch.float64), *x.T]
    for degree in (2, 3, 4):
        expected += [x[:, list(each)].prod(dim=1) for each in combinations_with_replacement(range(6), degree)]
    assert torch.allclose(found, torch.stack(expected, dim=1))


@pytest.mark.parametrize("relift", [True, False])
def test_a_closed_system_is_exact_over_a_long_horizon(closed, relift):
    model = Koopman(degree=2, relift=relift)
    model.fit(closed, rng=generator(0))
    world = World(model, Task("Closed-v0", lambda s, a, n: n[:, 0], lambda n: torch.zeros(len(n), dtype=torch.bool)))
    state, truth, rng = world.start(closed.obs[:5], generator(0)), closed.obs[:5], generator(0)
    for _ in range(20):
        state, _ = world.step(state, torch.zeros(5, 1), rng)
        truth = torch.stack([0.9 * truth[:, 0], 0.5 * truth[:, 1] + 0.31 * truth[:, 0] ** 2], dim=1)
    assert torch.allclose(state.obs, truth, atol=1e-3)
    assert (state.memory is None) == relift


def test_bilinear_inputs_learn_a_product_that_linear_inputs_cannot():
    obs = 2 * torch.rand(1500, 1, generator=generator(1)) - 1
    action = 2 * torch.rand(1500, 1, generator=generator(2)) - 1
    data = logged(obs, 0.8 * obs + 0.5 * action * obs, action)
    errors = {}
    for control in ("linear", "bilinear"):
        model = Koopman(lift="linear", control=control)
        errors[control] = model.fit(data, rng=generator(0)).metrics["holdout_mse"]
    assert errors["bilinear"] < 1e-9
    assert errors["linear"] > 1e-3


def test_delays_recover_a_velocity_that_one_observation_hides():
    time = torch.arange(40.0)
    phases = 6.28 * torch.rand(60, generator=generator(3))
    waves = torch.sin(0.3 * time[None] + phases[:, None])
    obs, next_obs = waves[:, :-1].reshape(-1, 1), waves[:, 1:].reshape(-1, 1)
    data = logged(obs, next_obs, episode=torch.arange(60).repeat_interleave(39))
    errors = {}
    for delays in (1, 3):
        model = Koopman(lift="linear", delays=delays)
        model.fit(data, rng=generator(0))
        memory = None
        for row in range(5):
            answer = model.predict(data.obs[row : row + 1], data.action[:1], memory)
            memory = answer.memory
        errors[delays] = float((answer.mean[0] - data.next_obs[4]).abs().max())
    assert errors[1] > 0.01
    assert errors[3] < 0.05 * errors[1]


def test_angles_continue_and_pairs_stay_on_the_circle():
    angle = 6.2 * torch.rand(800, generator=generator(4)) - 3.1
    pair = torch.stack([angle.cos(), angle.sin()], dim=1)
    turned = torch.stack([(angle + 0.3).cos(), (angle + 0.3).sin()], dim=1)
    model = Koopman(lift="linear", unit_pairs=[(0, 1)])
    model.fit(logged(pair, turned), rng=generator(0))
    out = model.predict(2 * pair[:9], torch.zeros(9, 1)).mean[0]
    assert torch.allclose(out.norm(dim=1), torch.ones(9), atol=1e-5)
    model = Koopman(lift="linear", angles=[0])
    model.fit(logged(angle[:, None], angle[:, None] + 0.3), rng=generator(0))
    far = angle[:9, None] + 4 * torch.pi
    assert torch.allclose(model.predict(far, torch.zeros(9, 1)).mean[0], far + 0.3, atol=1e-3)


@pytest.mark.parametrize("lift", ["rbf", "learned"])
def test_other_lifts_beat_the_linear_one(lift):
    obs = 4 * torch.rand(3000, 1, generator=generator(5)) - 2
    data = logged(obs, torch.sin(2 * obs))
    plain, lifted = Koopman(lift="linear"), Koopman(lift=lift, centres=20, epochs=10)
    worse = plain.fit(data, rng=generator(0)).metrics["holdout_mse"]
    better = lifted.fit(data, rng=generator(0)).metrics["holdout_mse"]
    assert better < 0.05 * worse


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"lift": "cubic"}, "lift must be one of"),
        ({"delays": 2, "relift": False}, "delays must be 1 where relift is False"),
        ({"unit_pairs": [[0]]}, "pairs of columns"),
    ],
)
def test_bad_arguments(arguments, told):
    with pytest.raises(ValueError, match=told):
        Koopman(**arguments)


def test_too_few_rows_for_the_centres():
    with pytest.raises(DataError, match="lower centres"):
        Koopman(lift="rbf", centres=300).fit(example_transitions(), rng=generator(0))
