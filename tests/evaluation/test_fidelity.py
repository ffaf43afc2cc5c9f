import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import DataError, Task, Transitions, generator
from learneddyn.evaluation import (
    evaluate,
    fidelity_of_log,
    fidelity_of_plans,
    longest_window,
    open_loop,
    step_accuracy,
)
from learneddyn.evaluation.fidelity import varying_scale, windows_of
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics


def logged(matrix, gain=0.0, episodes=20, length=30, width=1, seed=0):
    """Episodes of obs' = obs * matrix + gain * action per column, reward 1, no terminations."""
    rng = np.random.default_rng(seed)
    rows = []
    for episode in range(episodes):
        obs = rng.normal(size=width)
        for _ in range(length):
            action = rng.uniform(-1, 1, 1)
            after = obs * matrix + gain * action
            rows.append((obs, action, 1.0, after, False, episode))
            obs = after
    return Transitions.from_numpy(*(np.array(column) for column in zip(*rows, strict=True)))


def test_error_of_a_biased_model_grows_by_its_bias_each_step(linear, line_task):
    # Truth stands still, the model adds 0.1 a step (through a constant column): error k * 0.1, exactly.
    data = logged(np.array([1.0, 1.0]), width=2)
    data.obs[:, 1] = data.next_obs[:, 1] = 1.0
    world = World(linear([[[1.0, 0.0], [0.1, 1.0]]]), line_task(width=2))
    got = fidelity_of_log(world, data, horizon=8, rng=generator(0))
    expected = 0.1 * np.arange(1, 9)
    np.testing.assert_allclose(got.rmse[:, 0], expected, rtol=1e-4)
    scale = data.obs[:, 0].double().std(correction=0)
    np.testing.assert_allclose(got.error[:, 0], expected / float(scale), rtol=1e-4)
    assert np.isnan(got.error[:, 1]).all(), "a constant column has no normalised error"
    np.testing.assert_allclose(got.overall, got.error[:, 0])
    assert got.persistence_overall.tolist() == [0.0] * 8
    assert got.break_even_horizon == 1, "nothing beats persistence where nothing moves"
    assert got.break_even == (1, None)


def test_break_even_is_the_first_horizon_no_better_than_persistence(linear, line_task):
    # Truth shrinks to 0.9^k; the model claims 0.7^k. Persistence is better once 0.9^k - 0.7^k >= 1 - 0.9^k.
    data = logged(np.array([0.9]))
    got = fidelity_of_log(World(linear([[[0.7]]]), line_task()), data, horizon=12, rng=generator(0))
    k = np.arange(1, 13)
    worse = 0.9**k - 0.7**k >= 1 - 0.9**k
    assert worse.any()
    assert got.break_even_horizon == int(k[worse][0])
    np.testing.assert_allclose(got.rmse[:, 0] / got.persistence[:, 0], (0.9**k - 0.7**k) / (1 - 0.9**k), rtol=1e-3)


def test_the_true_model_has_no_error_and_never_breaks_even(linear, line_task):
    data = logged(np.array([0.9, 1.01]), gain=0.3, width=2)
    world = World(linear([[[0.9, 0.0], [0.0, 1.01]]], gain=[[0.3, 0.3]]), line_task(width=2))
    got = fidelity_of_log(world, data, horizon=20, rng=generator(0))
    assert got.overall.max() < 1e-5
    assert got.break_even_horizon is None
    assert got.reward_rmse.max() == 0


def test_the_mean_of_many_samples_averages_the_noise_away(linear, line_task):
    data = logged(np.array([0.9]))
    world = World(linear([[[0.9]]], std=0.1), line_task())
    one = fidelity_of_log(world, data, horizon=1, rng=generator(0)).rmse[0, 0]
    many = fidelity_of_log(world, data, horizon=1, samples=100, rng=generator(0)).rmse[0, 0]
    assert one == pytest.approx(0.1, rel=0.1)
    assert many == pytest.approx(0.01, rel=0.2)


def test_a_runaway_model_has_infinite_error_not_a_frozen_one(linear, line_task):
    data = logged(np.array([0.9]))
    got = fidelity_of_log(World(linear([[[1e20]]]), line_task()), data, horizon=5, rng=generator(0))
    assert np.isfinite(got.rmse[0, 0])
    assert np.isinf(got.overall[-1])
    text = json.dumps(got.to_json(), allow_nan=False)
    assert json.loads(text)["overall"][-1] is None


def test_windows_never_cross_an_episode_or_bridge_a_dropped_row():
    data = logged(np.array([0.9]), episodes=3, length=10)
    assert longest_window(data) == 10
    assert [longest_window(data, windows=n) for n in (3, 4, 30, 31)] == [10, 9, 1, 0]
    holed = data[torch.arange(len(data)) != 4]
    assert longest_window(holed[holed.episode == 0]) == 5
    log = windows_of(data, 10, rng=generator(0))
    assert len(log.start) == 3
    assert torch.equal(log.next_obs[:, :-1], torch.stack([data.obs[i * 10 + 1 : i * 10 + 10] for i in range(3)]))
    partial = windows_of(data, 10, rng=generator(0), full=False)
    assert len(partial.start) == 30
    assert partial.alive.sum(dim=0).tolist() == [3 * n for n in range(10, 0, -1)]


def test_no_window_is_long_enough():
    data = logged(np.array([0.9]), length=4)
    with pytest.raises(ValueError, match=r"no window of 5 consecutive steps.* has 4; use horizon <= 4"):
        windows_of(data, 5, rng=generator(0))


def test_bad_input_names_itself(linear, line_task):
    data, world = logged(np.array([0.9])), World(linear([[[0.9]]]), line_task())
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        longest_window(data, windows=0)
    with pytest.raises(ValueError, match="got horizon=0"):
        fidelity_of_log(world, data, horizon=0, rng=generator(0))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        fidelity_of_log(world, data, horizon=2, samples=0, rng=generator(0))
    with pytest.raises(ValueError, match="names must hold 1 entries"):
        fidelity_of_log(world, data, horizon=2, names=["x", "y"], rng=generator(0))
    with pytest.raises(ValueError, match="horizon of 0"):
        open_loop(world, torch.ones(2, 1), torch.ones(2, 0, 1), generator(0))
    data.obs[3] = torch.nan
    with pytest.raises(DataError, match="1 of 600 rows hold NaN"):
        fidelity_of_log(world, data, horizon=2, rng=generator(0))


def test_plans_are_judged_against_a_true_world_up_to_its_terminations(linear, line_task):
    truth, model = World(linear([[[2.0]]]), line_task()), World(linear([[[2.0]], [[1.0]]]), line_task())
    start, plans = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 5, 1)
    data = logged(np.array([0.9]))
    got = fidelity_of_plans(truth, truth, start, plans, reference=data, rng=generator(0))
    # From 1: 2 4 8 16, the fourth step terminates; from 3: 6 12, the second does.
    assert got.windows.tolist() == [2, 2, 1, 1, 0]
    assert got.overall[:4].max() == 0
    assert got.termination.recall[[1, 3]].tolist() == [1.0, 1.0]
    # A model that knows no doubling, rolled by its second member.
    model.dynamics.elites = torch.tensor([1])
    got = fidelity_of_plans(model, truth, start, plans, reference=data, rng=generator(0))
    assert got.rmse[0, 0] == pytest.approx(np.sqrt((1 + 9) / 2))
    assert got.rmse[2, 0] == pytest.approx(7.0), "only the start at 1 is alive at step 3"
    assert got.termination.recall[1] == 0


def test_step_accuracy_counts_rewards_and_terminations(linear, line_task):
    data = logged(np.array([1.0]), episodes=4, length=5)
    data.reward[:] = torch.linspace(0, 1, 20)
    data.obs[:] = data.next_obs[:] = torch.arange(20.0)[:, None]
    data.terminated[[11, 12, 3]] = True
    got = step_accuracy(World(linear([[[1.0]]]), line_task(above=10.5)), data, rng=generator(0), batch=7)
    # Predicted: rows 11 ... 19. True: 3, 11, 12.
    assert got.termination.precision == pytest.approx(2 / 9)
    assert got.termination.recall == pytest.approx(2 / 3)
    assert got.termination.balanced_accuracy == pytest.approx((2 / 3 + 10 / 17) / 2)
    assert got.reward_bias == pytest.approx(0.5)
    assert got.reward_rmse == pytest.approx(np.sqrt((np.linspace(0, 1, 20) ** 2).mean()), rel=1e-5)
    assert got.rows == 20
    json.dumps(got.to_json(), allow_nan=False)


def test_shares_with_nothing_to_count_are_undefined(linear, line_task):
    got = step_accuracy(World(linear([[[0.9]]]), line_task()), logged(np.array([0.9])), rng=generator(0))
    assert np.isnan(got.termination.recall)
    assert got.to_json()["termination"]["recall"] is None


class Random:
    def __init__(self, width):
        self.width, self.rng = width, np.random.default_rng(0)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return self.rng.uniform(-1, 1, (len(observation), self.width)).astype(np.float32), state


@pytest.mark.parametrize(("real_id", "width"), [("InvertedPendulum-v5", 1), ("Pendulum-v1", 1)])
def test_the_truth_as_a_world_follows_real_episodes(real_id, width):
    task = tasks.get(real_id)
    world = World(TruthDynamics(task), task)
    played = evaluate(Random(width), real_id, episodes=4, record=True, env_kwargs={"max_episode_steps": 12})
    horizon = min(5, longest_window(played.transitions))
    got = fidelity_of_log(world, played.transitions, horizon=horizon, windows=20, rng=generator(0))
    assert got.overall.max() < 1e-3, "only the float32 rounding of the logged start remains"
    assert got.break_even_horizon is None
    accuracy = step_accuracy(world, played.transitions, rng=generator(0))
    assert accuracy.reward_rmse < 1e-3
    assert accuracy.termination.false_negative + accuracy.termination.false_positive == 0


def test_a_world_that_knows_no_reward_says_so(linear):
    world = World(linear([[[0.9]]]), Task("Line-v0", terminated=lambda after: after[:, 0] > 1))
    with pytest.raises(ValueError, match="reward of Line-v0 does not follow"):
        fidelity_of_log(world, logged(np.array([0.9])), horizon=2, rng=generator(0))


def test_the_longest_window_of_whole_episodes_is_the_longest_episode():
    played = evaluate(Random(1), "InvertedPendulum-v5", episodes=3, record=True)
    assert longest_window(played.transitions) == played.lengths.max()


def orbits(speed=0.3, steps=60, seam=True, start=2.5):
    """Two episodes of an angle that grows by the second column each step; cut at pi, or not cut."""
    angle = start + speed * torch.arange(steps + 1, dtype=torch.float64)
    angle = torch.stack([angle, angle + 1.0])
    shown = torch.atan2(angle.sin(), angle.cos()) if seam else angle
    state = torch.stack([shown, torch.full_like(shown, speed)], dim=2).float()
    state[..., 1] += torch.linspace(0.0, 1e-2, steps + 1)  # a column that varies a little, so that it has a scale
    rows, zero = 2 * steps, torch.zeros(2 * steps)
    return Transitions(
        state[:, :-1].reshape(rows, 2), zero[:, None], zero, state[:, 1:].reshape(rows, 2), zero > 0,
        torch.arange(2).repeat_interleave(steps),
    )  # fmt: skip


def test_an_angle_that_crosses_pi_is_wrong_by_the_short_way_round(linear, line_task):
    # The model turns on and on and never cuts its angle; the log cuts it at pi.
    turning, data = linear([[[1.0, 0.0], [1.0, 1.0]]]), orbits()
    assert (data.next_obs[:, 0] - data.obs[:, 0] < -5).any(), "the orbit crosses"
    task = line_task(width=2)
    got = [
        fidelity_of_log(World(turning, replace(task, angles=angles)), log, horizon=50, rng=generator(0))
        for angles, log in (((0,), data), ((0,), orbits(seam=False)), ((), data))
    ]
    assert got[0].rmse[0, 0] < 0.02
    assert got[0].rmse[-1, 0] < 0.3, "fifty steps at a speed that is wrong by less than 0.01"
    np.testing.assert_allclose(got[0].rmse, got[1].rmse, atol=1e-4)
    np.testing.assert_allclose(got[0].persistence, got[1].persistence, atol=1e-4)
    np.testing.assert_allclose(got[0].scale, got[1].scale, atol=1e-4)
    assert (got[0].persistence[:, 0] <= np.pi).all()
    assert got[0].rmse[-1, 1] == got[2].rmse[-1, 1], "the speed is no angle"
    assert got[2].rmse[0, 0] > 1.0, "no angle is named: the seam counts as a whole turn"
    several = fidelity_of_log(World(turning, replace(task, angles=(0,))), data, horizon=50, samples=3, rng=generator(0))
    np.testing.assert_allclose(several.rmse, got[0].rmse, atol=1e-6)


def test_the_spread_of_an_angle_does_not_see_the_seam():
    swing = orbits(speed=0.01, steps=60, start=np.pi - 0.5)  # the angle stays within about a third of a turn
    plain_scale, short = varying_scale(swing), varying_scale(swing, [0])
    assert plain_scale[0] > 2
    assert 0.3 < short[0] < 0.7
    assert short[1] == plain_scale[1]
    centred = orbits(speed=0.01, steps=60, start=0.0)
    torch.testing.assert_close(varying_scale(centred, [0]), varying_scale(centred), rtol=1e-6, atol=0)


def test_an_angle_that_diverges_is_still_infinitely_wrong(linear, line_task):
    task = replace(line_task(), angles=(0,))
    got = fidelity_of_log(World(linear([[[1e20]]]), task), logged(np.array([0.9])), horizon=5, rng=generator(0))
    assert np.isinf(got.rmse[-1, 0])
