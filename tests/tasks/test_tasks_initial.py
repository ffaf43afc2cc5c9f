"""Start states drawn in torch against the environments' own resets."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from tasks_real import IDS, MUJOCO, make, observe

from learneddyn import tasks
from learneddyn.core import generator

LANES = 2000


@cache
def real_starts(real_id):
    env = make(real_id)
    return np.array([env.reset(seed=seed)[0] for seed in range(LANES)], np.float64)


@cache
def drawn_starts(real_id):
    return tasks.get(real_id).initial(LANES, generator(1)).double().numpy()


@pytest.mark.parametrize("real_id", IDS)
def test_starts_have_the_environments_distribution_column_by_column(real_id):
    real, drawn = real_starts(real_id), drawn_starts(real_id)
    assert drawn.shape == real.shape == (LANES, make(real_id).observation_space.shape[0])
    constant = np.ptp(real, axis=0) < 1e-9
    np.testing.assert_allclose(drawn[:, constant], real[:, constant], rtol=0, atol=1e-6)
    for column in np.flatnonzero(~constant):
        ours, theirs = drawn[:, column], real[:, column]
        assert ks_2samp(ours, theirs).pvalue > 1e-6, f"column {column}"
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * np.sqrt(2 / LANES), f"column {column}"
        assert 0.85 < ours.std() / theirs.std() < 1.15, f"column {column}"
        ends = np.abs([ours.min() - theirs.min(), ours.max() - theirs.max()])
        assert (ends < 0.25 * np.ptp(theirs)).all(), f"column {column}"


@pytest.mark.parametrize("real_id", IDS)
def test_starts_have_the_environments_correlations(real_id):
    real, drawn = real_starts(real_id), drawn_starts(real_id)
    moving = np.ptp(real, axis=0) > 1e-9
    if moving.sum() > 1:
        ours, theirs = (np.corrcoef(x[:, moving], rowvar=False) for x in (drawn, real))
        assert np.abs(ours - theirs).max() < 0.2


@pytest.mark.parametrize("real_id", MUJOCO)
def test_a_start_is_what_the_environment_observes_in_that_state(real_id):
    task, env = tasks.get(real_id), make(real_id)
    obs = task.initial(20, generator(3))
    for row, qpos, qvel in zip(obs, *task.codec.to_simulator(obs), strict=True):
        env.reset(seed=0)
        np.testing.assert_allclose(row.numpy(), observe(env, qpos, qvel), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("real_id", IDS)
def test_starts_repeat_under_a_seed_and_are_float32(real_id):
    initial = tasks.get(real_id).initial
    first, again, other = (initial(3, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("real_id", IDS)
def test_starts_are_never_terminal(real_id):
    task = tasks.get(real_id)
    if task.terminated is not None:
        assert not task.terminated(task.initial(500, generator(0))).any()


@pytest.mark.parametrize("real_id", IDS)
@pytest.mark.parametrize("lanes", [0, -1])
def test_no_lanes_is_an_error(real_id, lanes):
    with pytest.raises(ValueError, match=f"lanes must be at least 1, got {lanes}"):
        tasks.get(real_id).initial(lanes, generator(0))
