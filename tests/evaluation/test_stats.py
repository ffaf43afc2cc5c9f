import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from learneddyn.evaluation import stats
from learneddyn.evaluation.stats import Estimate


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_interval_of_the_mean_agrees_with_scipy(method):
    values = np.random.default_rng(3).exponential(size=40)
    ours = stats.bootstrap_interval(values, method=method, resamples=20_000)
    named = {"bca": "BCa", "percentile": "percentile"}[method]
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method=named, rng=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_intervals_cover_the_truth_about_as_often_as_promised():
    rng = np.random.default_rng(0)
    trials, hits = 400, 0
    for trial in range(trials):
        estimate = stats.bootstrap_interval(rng.normal(5.0, 2.0, size=30), level=0.9, resamples=500, seed=trial)
        hits += estimate.low <= 5.0 <= estimate.high
    assert 0.84 <= hits / trials <= 0.94


def test_paired_difference_is_tighter_than_unpaired_and_both_cover():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, size=25)
    a, b = shared + rng.normal(1, 0.1, size=25), shared + rng.normal(0, 0.1, size=25)
    paired, unpaired = stats.bootstrap_difference(a, b, paired=True), stats.bootstrap_difference(a, b)
    assert paired.value == pytest.approx(unpaired.value) == pytest.approx(a.mean() - b.mean())
    assert paired.low < 1.0 < paired.high
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)


def test_same_seed_same_interval_and_chunks_do_not_change_the_level(monkeypatch):
    values = np.random.default_rng(2).normal(size=50)
    whole = stats.bootstrap_interval(values, seed=7)
    assert whole == stats.bootstrap_interval(values, seed=7)
    assert whole != stats.bootstrap_interval(values, seed=8)
    monkeypatch.setattr(stats, "_CHUNK", 1_000)
    chunked = stats.bootstrap_interval(values, seed=7)
    assert chunked.low == pytest.approx(whole.low, abs=0.05)


def test_interquartile_mean_is_the_trimmed_mean():
    values = np.random.default_rng(4).normal(size=(3, 11))
    assert stats.interquartile_mean(values) == pytest.approx(scipy_stats.trim_mean(values, 0.25, axis=1))
    assert stats.interquartile_mean(values, axis=None) == pytest.approx(scipy_stats.trim_mean(values, 0.25, axis=None))
    outlier = np.array([0.0, 1.0, 2.0, 1e9])
    assert stats.interquartile_mean(outlier) == pytest.approx(1.5)


def test_stratified_interval_keeps_tasks_apart():
    scores = np.tile([0.0, 1.0], (6, 1))
    # Resampling runs within a task changes nothing here; mixing the tasks would spread the interval.
    assert stats.stratified_interval(scores, np.mean) == Estimate(0.5, 0.5, 0.5)


def test_probability_of_improvement_counts_pairs():
    first = np.array([[1.0], [3.0], [5.0]])
    second = np.array([[0.0], [3.0]])
    value = stats.probability_of_improvement(first, second).value
    wins = scipy_stats.mannwhitneyu(first[:, 0], second[:, 0]).statistic
    assert value == pytest.approx(wins / 6)
    mirrored = stats.probability_of_improvement(second, first).value
    assert value + mirrored == pytest.approx(1.0)


def test_correlations_agree_with_scipy_also_with_ties():
    rng = np.random.default_rng(5)
    x = rng.integers(0, 6, size=40).astype(float)
    y = x + rng.normal(size=40)
    assert stats.correlation(x, y).value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    pearson = stats.correlation(x, y, method="pearson")
    assert pearson.value == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert 0 < pearson.low < pearson.value < pearson.high < 1


def test_one_value_has_no_interval_and_survives_json():
    lone = stats.bootstrap_interval([3.0])
    assert lone == Estimate(3.0, -math.inf, math.inf)
    assert Estimate.from_json(json.loads(json.dumps(lone.to_json(), allow_nan=False))) == lone


def test_constant_values_have_a_point_interval():
    assert stats.bootstrap_interval(np.full(20, 1000.0)) == Estimate(1000.0, 1000.0, 1000.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.bootstrap_interval([]), "non-empty"),
        (lambda: stats.bootstrap_interval([1.0, np.nan]), "1 NaN or infinite entries of 2, the first at 1"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], level=95.0), "level must lie between 0 and 1, got 95"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], method="basic"), "allowed are 'bca' and 'percentile'"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], resamples=0), "resamples must be at least 2, got 0"),
        (lambda: stats.bootstrap_difference([1.0], [1.0, 2.0], paired=True), "same length, got 1 and 2"),
        (lambda: stats.stratified_interval([1.0, 2.0]), "array of 2 axes"),
        (lambda: stats.probability_of_improvement(np.ones((2, 2)), np.ones((2, 3))), "same tasks"),
        (lambda: stats.correlation([1, 2, 3], [1, 1, 1]), "y is constant"),
        (lambda: stats.correlation([1, 2], [1, 2]), "at least three pairs"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ValueError, match=message):
        call()
