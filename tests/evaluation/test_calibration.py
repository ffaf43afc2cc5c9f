import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate
from scipy import stats as scipy_stats

from learneddyn.core import Transitions, generator
from learneddyn.evaluation import cloud_calibration, one_step_calibration
from learneddyn.evaluation.calibration import (
    BINS,
    mixture_crps,
    mixture_nll,
    normal_crps,
    normal_nll,
    sample_crps,
    sample_pit,
)
from learneddyn.world import World


def noisy(std, rows=4000, seed=0, length=20):
    """Episodes of obs' = 0.9 obs + N(0, std), with a second column that never moves."""
    rng = np.random.default_rng(seed)
    episodes = rows // length
    obs = rng.normal(size=episodes)
    parts = []
    for _ in range(length):
        after = 0.9 * obs + std * rng.normal(size=episodes)
        parts.append((obs, after))
        obs = after
    before, after = (np.stack([part[i] for part in parts], axis=1).reshape(-1) for i in (0, 1))
    still = np.ones(rows)
    return Transitions.from_numpy(
        np.stack([before, still], axis=1),
        np.zeros((rows, 1)),
        np.ones(rows),
        np.stack([after, still], axis=1),
        np.zeros(rows, bool),
        np.repeat(np.arange(episodes), length),
    )


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_normal_scores_agree_with_scipy_and_with_the_integral():
    y, mean, std = 1.3, 0.4, 0.7
    assert normal_nll(doubles(y), doubles(mean), doubles(std)).item() == pytest.approx(
        -scipy_stats.norm.logpdf(y, mean, std)
    )
    squared = integrate.quad(lambda x: (scipy_stats.norm.cdf(x, mean, std) - (x >= y)) ** 2, -10, 10, points=[y])[0]
    assert normal_crps(doubles(y), doubles(mean), doubles(std)).item() == pytest.approx(squared, rel=1e-6)


def test_mixture_scores_agree_with_the_integral_and_reduce_to_the_normal():
    mean, std, y = doubles(-1.0, 0.5, 2.0)[:, None], doubles(0.3, 1.0, 0.6)[:, None], doubles(0.9)

    def cdf(x):
        return np.mean([scipy_stats.norm.cdf(x, m, s) for m, s in zip((-1.0, 0.5, 2.0), (0.3, 1.0, 0.6), strict=True)])

    squared = integrate.quad(lambda x: (cdf(x) - (x >= 0.9)) ** 2, -12, 12, points=[-1.0, 0.9, 2.0])[0]
    assert mixture_crps(y, mean, std).item() == pytest.approx(squared, rel=1e-6)
    density = np.mean([scipy_stats.norm.pdf(0.9, m, s) for m, s in zip((-1.0, 0.5, 2.0), (0.3, 1.0, 0.6), strict=True)])
    assert mixture_nll(y, mean, std).item() == pytest.approx(-np.log(density))
    same = (mean[:1].expand(4, 1), std[:1].expand(4, 1))
    assert mixture_crps(y, *same).item() == pytest.approx(normal_crps(y, mean[0], std[0]).item())
    assert mixture_nll(y, *same).item() == pytest.approx(normal_nll(y, mean[0], std[0]).item())


def test_fair_crps_equals_all_pairs_and_is_unbiased_for_few_samples():
    samples, y = torch.randn(6, 3, dtype=torch.float64, generator=generator(0)), doubles(0.1, -2.0, 1.0)
    pairs = (samples[:, None] - samples[None]).abs().sum(dim=(0, 1)) / (6 * 5)
    by_hand = (samples - y).abs().mean(dim=0) - pairs / 2
    torch.testing.assert_close(sample_crps(y, samples), by_hand)
    few = sample_crps(torch.full((200_000,), 0.7, dtype=torch.float64), torch.randn(3, 200_000, generator=generator(1)))
    closed = normal_crps(doubles(0.7), doubles(0.0), doubles(1.0))
    assert few.mean().item() == pytest.approx(closed.item(), abs=0.005)


def test_sample_pit_is_uniform_also_with_ties():
    samples, y = torch.randn(9, 5000, generator=generator(0)), torch.randn(5000, generator=generator(1))
    assert scipy_stats.kstest(sample_pit(y, samples, generator(2)), "uniform").pvalue > 0.01
    tied = sample_pit(torch.zeros(5000), torch.zeros(9, 5000), generator(2))
    assert scipy_stats.kstest(tied, "uniform").pvalue > 0.01


def test_the_true_model_is_calibrated_after_one_step(linear):
    data = noisy(0.2)
    got = one_step_calibration(linear([[[0.9, 0.0], [0.0, 1.0]]] * 3, std=0.2), data, batch=1000)
    for level, coverage in got.mean_coverage.items():
        assert abs(coverage[0] - level) < 4 * np.sqrt(level * (1 - level) / 4000)
    assert scipy_stats.chisquare(got.pit[0]).pvalue > 0.001
    assert got.pit.sum() == 4000, "the constant column does not enter"
    assert got.mean_ece[0] < 0.02
    assert got.mean_nll[0] == pytest.approx(0.5 + np.log(0.2) + 0.5 * np.log(2 * np.pi), abs=0.05)
    assert got.crps[0, 0] == pytest.approx(0.2 / np.sqrt(np.pi), rel=0.05)
    assert np.isnan(got.nll[0, 1])


@pytest.mark.parametrize(("claimed", "covers"), [(0.1, "too little"), (0.4, "too much")])
def test_wrong_confidence_is_detected(linear, claimed, covers):
    data = noisy(0.2)
    right = one_step_calibration(linear([[[0.9, 0.0], [0.0, 1.0]]], std=0.2), data)
    wrong = one_step_calibration(linear([[[0.9, 0.0], [0.0, 1.0]]], std=claimed), data)
    expected = 2 * scipy_stats.norm.cdf(1.6449 * claimed / 0.2) - 1
    assert wrong.mean_coverage[0.9][0] == pytest.approx(expected, abs=0.03), covers
    ends, middle = wrong.pit[0, [0, -1]].sum(), wrong.pit[0, 9:11].sum()
    assert (ends > 2 * middle) if claimed < 0.2 else (middle > 2 * ends)
    assert wrong.mean_ece[0] > 5 * right.mean_ece[0]
    assert wrong.mean_nll[0] > right.mean_nll[0]
    assert wrong.mean_crps[0] > right.mean_crps[0]


def test_clouds_of_the_true_model_are_calibrated_at_every_horizon(linear, line_task):
    world = World(linear([[[0.9, 0.0], [0.0, 1.0]]], std=0.2), line_task(width=2))
    got = cloud_calibration(world, noisy(0.2), horizons=(1, 3, 8), windows=1000, samples=40, rng=generator(0))
    for level, coverage in got.mean_coverage.items():
        # Windows of one episode overlap, so their hits are not independent: twice the binomial error.
        assert np.abs(coverage - level).max() < 8 * np.sqrt(level * (1 - level) / 1000)
    growth = 0.2 * np.sqrt([sum(0.81**i for i in range(k)) for k in (1, 3, 8)])
    np.testing.assert_allclose(got.sharpness[:, 0], growth, rtol=0.03)
    assert got.pit.shape == (3, BINS)


def test_overconfident_clouds_cover_too_little(linear, line_task):
    world = World(linear([[[0.9, 0.0], [0.0, 1.0]]], std=0.05), line_task(width=2))
    got = cloud_calibration(world, noisy(0.2), horizons=(1, 8), windows=500, rng=generator(0))
    assert (got.mean_coverage[0.9] < 0.5).all()


def test_results_are_plain_json_even_after_a_divergence(linear, line_task):
    world = World(linear([[[1e30, 0.0], [0.0, 1.0]]], std=0.1), line_task(width=2))
    got = cloud_calibration(world, noisy(0.2), horizons=(1, 4), windows=50, rng=generator(0))
    assert not np.isnan(got.mean_crps).any()
    assert got.mean_crps[-1] > 1e6
    plain = json.loads(json.dumps(got.to_json(), allow_nan=False))
    assert plain["horizons"] == [1, 4]
    assert sum(plain["pit"][0]) == 50


def test_bad_input_names_itself(linear, line_task):
    world, data = World(linear([[[0.9, 0.0], [0.0, 1.0]]]), line_task(width=2)), noisy(0.2, rows=40)
    with pytest.raises(ValueError, match=r"ascending numbers of steps from 1, got \(5, 2\)"):
        cloud_calibration(world, data, horizons=(5, 2), rng=generator(0))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        cloud_calibration(world, data, samples=1, rng=generator(0))
    with pytest.raises(ValueError, match="no window of 21 consecutive steps"):
        cloud_calibration(world, data, horizons=(21,), rng=generator(0))
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        sample_crps(torch.ones(2), torch.ones(1, 2))


def turning(seam, start=2.8, rows=4000, speed=0.4, std=0.1, seed=0):
    """Steps of ``speed`` with noise from angles about ``start``; cut at pi, or not cut."""
    rng = np.random.default_rng(seed)
    before = start + 0.3 * rng.normal(size=rows)
    after = before + speed + std * rng.normal(size=rows)
    before, after = ((x + np.pi) % (2 * np.pi) - np.pi if seam else x for x in (before, after))
    one = np.full(rows, speed)
    return Transitions.from_numpy(
        np.stack([before, one], axis=1), np.zeros((rows, 1)), np.ones(rows), np.stack([after, one], axis=1),
        np.zeros(rows, bool), np.arange(rows),
    )  # fmt: skip


def test_an_angles_calibration_does_not_see_the_seam(linear, line_task):
    model, cut, whole = linear([[[1.0, 0.0], [1.0, 1.0]]] * 2, std=0.1), turning(True), turning(False)
    got, unnamed = one_step_calibration(model, cut, angles=[0]), one_step_calibration(model, cut)
    wanted = one_step_calibration(model, whole)
    for name in ("mean_nll", "mean_crps", "mean_ece"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-3)
    assert got.mean_coverage[0.9][0] == pytest.approx(0.9, abs=0.02)
    assert unnamed.mean_coverage[0.9][0] < 0.8
    task = replace(line_task(width=2, above=100.0), angles=(0,))
    clouds = [
        cloud_calibration(World(model, task), log, horizons=(1,), samples=20, windows=500, rng=generator(0))
        for log in (cut, whole)
    ]
    np.testing.assert_allclose(clouds[0].mean_crps, clouds[1].mean_crps, rtol=1e-3)
    np.testing.assert_allclose(clouds[0].mean_nll, clouds[1].mean_nll, rtol=1e-3)


def test_members_on_both_sides_of_the_seam_agree(linear):
    """One member says pi - 0.05, the other -pi + 0.05: a tenth of a radian apart."""
    data = turning(False, start=0.0, rows=200)
    sides = [[[0.0, 0.0], [(np.pi - 0.05) / 0.4, 1.0]], [[0.0, 0.0], [(0.05 - np.pi) / 0.4, 1.0]]]
    data.next_obs[:, 0] = torch.where(torch.arange(200) % 2 == 0, np.pi - 0.01, 0.01 - np.pi)
    got = one_step_calibration(linear(sides, std=0.1), data, angles=[0])
    assert got.sharpness[0, 0] == pytest.approx(np.hypot(0.1, 0.05), rel=1e-4)
    assert got.crps[0, 0] < 0.1
