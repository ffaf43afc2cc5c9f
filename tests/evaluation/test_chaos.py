"""Metrics of chaos: closed forms, known exponents, and no mercy for orbits that diverge or stand still."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter

from learneddyn.core import generator
from learneddyn.evaluation import chaos
from learneddyn.evaluation.chaos import (
    correlation_dimension,
    lyapunov_spectrum,
    prediction_error,
    scaled_error,
    spectral_distance,
    state_space_divergence,
    symmetric_error,
    symmetric_prediction_time,
    valid_prediction_time,
)
from learneddyn.integrate import rk4


def slope(state):
    x, y, z = state.unbind(1)
    return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], dim=1)


def step(state, dt=0.01):
    return rk4(slope, state, dt)


def orbits(lanes, steps, seed=0, transient=1000):
    noise = torch.randn(lanes, 3, dtype=torch.float64, generator=generator(seed))
    state = 8 * noise + torch.tensor([0.0, 0.0, 25.0])
    found = []
    for number in range(transient + steps):
        if number >= transient:
            found.append(state)
        state = step(state)
    return torch.stack(found, dim=1)


@pytest.fixture(scope="module")
def lorenz():
    return orbits(8, 2500).numpy()


def test_a_linear_maps_exponents_are_its_log_singular_values():
    matrix = torch.tensor([[1.2, 0.0], [0.3, 0.5]], dtype=torch.float64)
    starts = torch.zeros(2, 2, dtype=torch.float64)
    found = lyapunov_spectrum(lambda s: s @ matrix.T, starts, 100, dt=0.5, transient=1)
    expected = torch.linalg.eigvals(matrix).abs().log().sort(descending=True).values / 0.5
    assert torch.allclose(found, expected, atol=0.02)


def test_lorenz_has_its_known_exponents():
    found = lyapunov_spectrum(lambda s: step(s, 0.03), orbits(60, 1)[:, 0], 600, dt=0.03, transient=0)
    assert float(found[0]) == pytest.approx(0.906, abs=0.02)
    assert float(found[1]) == pytest.approx(0.0, abs=0.02)
    assert float(found.sum()) == pytest.approx(-(10 + 1 + 8 / 3), abs=1e-2), "the flow's divergence is constant"


def test_a_tiny_error_lives_as_long_as_its_growth_allows(lorenz):
    scale = lorenz.std(axis=(0, 1))
    state = near = orbits(40, 1, seed=2)[:, 0]
    noise = torch.randn(near.shape, dtype=torch.float64, generator=generator(1))
    near = near + 1e-6 * torch.as_tensor(scale) * noise
    paths = [], []
    for _ in range(1800):
        state, near = step(state), step(near)
        paths[0].append(state)
        paths[1].append(near)
    true, predicted = (torch.stack(path, dim=1).numpy() for path in paths)
    times = valid_prediction_time(true, predicted, scale, 0.01, 0.906)
    assert np.median(times) == pytest.approx(np.log(0.4 / 1e-6), abs=1.5)


def test_valid_prediction_time_counts_lyapunov_times_until_the_error_shows():
    true = np.zeros((3, 10, 1))
    predicted = true.copy()
    predicted[0, 4:] = 1.0
    predicted[2, 2:] = np.nan
    times = valid_prediction_time(true, predicted, np.ones(1), 0.1, 2.0)
    assert times.tolist() == pytest.approx([0.8, 2.0, 0.4])


def test_symmetric_prediction_time_counts_until_the_share_is_above_the_threshold():
    true = np.ones((3, 10, 2))
    predicted = true.copy()
    predicted[0, 4:, 0] = 3.0  # 200 * 2 / 4 in one of two columns: 50
    predicted[1, 4:, 0] = 1.5  # 20
    predicted[2, 2] = [np.inf, 1.0]
    assert symmetric_prediction_time(true, predicted, 0.1, 2.0).tolist() == pytest.approx([0.8, 2.0, 0.4])
    assert symmetric_prediction_time(true, predicted, 0.1, 2.0, threshold=60.0)[0] == pytest.approx(2.0)


def test_a_sine_is_no_distance_from_itself():
    wave = np.sin(0.3 * np.arange(2000))[:, None]
    assert spectral_distance(wave, 5 * wave + 2) == pytest.approx(0.0, abs=1e-6), "neither size nor mean count"
    assert spectral_distance(wave, np.sin(0.6 * np.arange(2000))[:, None]) > 0.9
    assert state_space_divergence(wave, wave) == pytest.approx(0.0, abs=1e-12)


def test_spectra_are_smoothed_as_two_sided_ones_go_on():
    series = np.random.default_rng(0).normal(size=600).cumsum()
    power = np.abs(np.fft.rfft(series - series.mean())) ** 2
    smooth = gaussian_filter1d(power, 5.0, mode="mirror")
    assert np.allclose(chaos._spectrum(series, 5.0), smooth / smooth.sum(), rtol=1e-9)


def dense_divergence(true, generated, bins):
    """The divergence with every cell of the grid held."""
    std = true.std(axis=0)
    edges = [np.linspace(x.min() - 0.1 * s, x.max() + 0.1 * s, bins + 1) for x, s in zip(true.T, std, strict=True)]
    counts = [np.histogramdd(states, edges)[0].ravel() for states in (true, generated)]
    p, q = (np.append(c, len(s) - c.sum()) + 1e-5 for c, s in zip(counts, (true, generated), strict=True))
    p, q = p / p.sum(), q / q.sum()
    return np.sum(p * np.log(p / q))


@pytest.mark.parametrize("rows", [500, 70])
def test_cells_without_states_count_though_they_are_not_held(rows):
    true, generated = np.random.default_rng(0).normal(size=(2, 500, 3))
    found = state_space_divergence(true, generated[:rows], bins=9)
    assert found == pytest.approx(dense_divergence(true, generated[:rows], 9), rel=1e-9)


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_noise_fills_all_its_dimensions(columns):
    noise = np.random.default_rng(columns).normal(size=(3000, columns))
    assert correlation_dimension(noise, apart=1) == pytest.approx(columns, rel=0.03)


def test_curves_have_one_dimension_and_points_none():
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, size=2000)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert correlation_dimension(circle) == pytest.approx(1.0, abs=0.05)
    assert correlation_dimension(100 * circle - 7) == pytest.approx(correlation_dimension(circle), abs=1e-6)
    assert correlation_dimension(np.ones((300, 2))) == 0.0
    assert correlation_dimension(np.tile(circle[:5], (60, 1))) == 0.0
    assert np.isnan(correlation_dimension(np.where(angle[:, None] > 5.9, np.nan, circle)))


def test_lorenz_has_its_known_dimension(lorenz, monkeypatch):
    states = lorenz[:, ::3].reshape(-1, 3)
    found = correlation_dimension(states, apart=50)
    assert found == pytest.approx(2.05, abs=0.06)
    monkeypatch.setattr(chaos, "_PAIRS", 70_001)
    assert correlation_dimension(states, apart=50) == pytest.approx(found, rel=1e-12), "in blocks of any size"


def test_neighbours_in_time_are_no_neighbours_in_space():
    noise = np.random.default_rng(0).normal(size=(3000, 3))
    smooth = lfilter([1.0], [1.0, -1.9, 0.9025], noise, axis=0)
    assert correlation_dimension(smooth, apart=200) == pytest.approx(3.0, abs=0.15)
    assert correlation_dimension(smooth, apart=1) < 2.2


@pytest.mark.parametrize(
    ("states", "arguments", "message"),
    [
        (np.zeros(500), {}, "must be .t, d."),
        (np.zeros((150, 2)), {}, "at least 2 apart = 200"),
        (np.zeros((500, 2)), {"shares": (0.1, 0.1)}, "shares must increase"),
    ],
)
def test_dimensions_that_cannot_be_told(states, arguments, message):
    with pytest.raises(ValueError, match=message):
        correlation_dimension(states, **arguments)


def test_equal_attractors_are_no_distance_apart(lorenz):
    states = lorenz[0]
    assert state_space_divergence(states, states) == pytest.approx(0.0, abs=1e-9)
    assert spectral_distance(states, states) == pytest.approx(0.0, abs=1e-6)
    floor = state_space_divergence(lorenz[0], lorenz[1])
    noise = np.random.default_rng(0).normal(size=(2500, 3))
    assert state_space_divergence(states, np.repeat(states[:1], 2500, axis=0)) > 3 * floor
    assert spectral_distance(states, noise) > 2 * spectral_distance(lorenz[0], lorenz[1])


@pytest.mark.parametrize("away", [np.nan, np.inf, -np.inf, 1e300])
def test_an_orbit_that_leaves_pays_for_every_step_it_is_away(lorenz, away):
    floor = state_space_divergence(lorenz[0], lorenz[1])
    costs = []
    for kept in (2000, 1000, 100, 0):
        orbit = lorenz[1].copy()
        orbit[kept:] = away
        costs.append(state_space_divergence(lorenz[0], orbit))
    assert floor < costs[0] < costs[1] < costs[2] < costs[3]
    half = np.where(np.arange(2500)[:, None] % 2, lorenz[0], away)
    inside = state_space_divergence(lorenz[0], lorenz[0][1::2])
    assert state_space_divergence(lorenz[0], half) == pytest.approx(inside + np.log(2), abs=0.02)


def test_spectra_of_orbits_that_die(lorenz):
    broken, still = lorenz[0].copy(), np.ones_like(lorenz[0])
    broken[-1, 0] = np.nan
    assert spectral_distance(lorenz[0], broken) == pytest.approx(1 / 3, abs=1e-6)
    assert spectral_distance(lorenz[0], still) > 0.25
    assert spectral_distance(still, still) == pytest.approx(0.0, abs=1e-6)


def test_many_columns_are_compared_as_mixtures():
    rng = np.random.default_rng(0)
    true, same = rng.normal(size=(2, 900, 6))
    floor = state_space_divergence(true, same)
    assert abs(floor) < 0.3
    shifted = [state_space_divergence(true, same + 2 * s * np.eye(6)[0]) for s in (0.5, 1.0, 2.0)]
    assert floor < shifted[0] < shifted[1] < shifted[2]
    apart = np.zeros((1, 7)), np.full((1, 7), 3.0)
    expected = 0.5 * 7 * 9  # two single Gaussians: half the squared distance of their centres
    assert state_space_divergence(*apart) == pytest.approx(expected, rel=0.1)
    half = np.where(np.arange(900)[:, None] % 2, same, np.nan)
    assert state_space_divergence(true, half) == pytest.approx(floor + np.log(2), abs=0.2)
    assert state_space_divergence(true, np.full_like(true, np.inf)) > 100


def test_errors_in_closed_form():
    true, predicted = np.array([[[1.0], [2.0]]]), np.array([[[3.0], [2.0]]])
    assert symmetric_error(true, predicted) == pytest.approx(200 * 0.5 * 2 / 4)
    assert symmetric_error(true, -true) == 200.0
    assert symmetric_error(true, true * np.nan) == 200.0
    assert symmetric_error(0 * true, 0 * true) == 0.0
    assert prediction_error(true, predicted, 1, np.array([2.0])) == pytest.approx(1.0)
    assert prediction_error(true, predicted, 2, np.array([2.0])) == 0.0
    past = np.array([[0.0], [0.5], [0.0]])
    assert scaled_error(true, predicted, past) == pytest.approx((2 / 0.5 + 0) / 2)
    assert scaled_error(true, predicted * np.inf, past) == np.inf
    assert prediction_error(true, predicted * np.nan, 1, np.ones(1)) == np.inf
    with pytest.raises(ValueError, match="steps must be 1 to 2, got 3"):
        prediction_error(true, predicted, 3, np.ones(1))
    with pytest.raises(ValueError, match="change in every column"):
        scaled_error(true, predicted, np.ones((4, 1)))


@pytest.mark.parametrize(
    ("true", "generated", "message"),
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), "same d"),
        (np.zeros((4, 3)), np.zeros((0, 3)), "t >= 1"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "true states must be finite"),
    ],
)
def test_states_that_cannot_be_compared(true, generated, message):
    with pytest.raises(ValueError, match=message):
        state_space_divergence(true, generated)


def test_a_column_that_stays_the_same_hides_no_difference():
    true = np.stack([np.random.default_rng(0).normal(size=5000), np.full(5000, 3.0)], axis=1)
    assert state_space_divergence(true, true) == pytest.approx(0, abs=1e-9)
    assert state_space_divergence(true, np.full_like(true, 77.0)) > 1
