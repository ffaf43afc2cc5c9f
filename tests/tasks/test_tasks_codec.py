"""Observation to simulator state and back, judged by the environments' own observations."""

import numpy as np
import pytest
import torch
from tasks_real import IDS, make, observe, transitions

from learneddyn import tasks
from learneddyn.core import generator

NO_WAY_BACK = {"Ant-v5", "Humanoid-v5", "HumanoidStandup-v5", "InvertedDoublePendulum-v5"}


@pytest.mark.parametrize("real_id", IDS)
def test_the_environment_set_to_the_decoded_state_observes_the_same(real_id):
    codec, env, real = tasks.get(real_id).codec, make(real_id), transitions(real_id)
    env.reset(seed=0)
    qpos, qvel = codec.to_simulator(real.next_obs)
    assert qpos.dtype == qvel.dtype == np.float64
    seen = np.array([observe(env, *state) for state in zip(qpos, qvel, strict=True)])
    exact = list(codec.exact)
    np.testing.assert_allclose(seen[:, exact], real.next_obs.numpy()[:, exact], rtol=0, atol=1e-6)


@pytest.mark.parametrize("real_id", [name for name in IDS if name not in NO_WAY_BACK])
def test_from_simulator_is_the_environments_own_observation(real_id):
    codec, env, real = tasks.get(real_id).codec, make(real_id), transitions(real_id)
    env.reset(seed=0)
    own = np.array([observe(env, *state) for state in zip(real.qpos, real.qvel, strict=True)])
    got = codec.from_simulator(real.qpos, real.qvel, dtype=torch.float64)
    np.testing.assert_allclose(got.numpy(), own, rtol=0, atol=1e-6)
    assert codec.from_simulator(real.qpos, real.qvel).dtype == torch.float32


@pytest.mark.parametrize("real_id", sorted(NO_WAY_BACK))
def test_there_is_no_way_back_where_the_observation_holds_forces(real_id):
    real = transitions(real_id)
    assert tasks.get(real_id).codec.from_simulator(real.qpos, real.qvel) is None


@pytest.mark.parametrize("real_id", IDS)
def test_only_what_the_codec_calls_lost_is_lost(real_id):
    codec, real = tasks.get(real_id).codec, transitions(real_id)
    qpos, qvel = codec.to_simulator(real.next_obs)
    limit = 10 if "beyond 10" in codec.lost else np.inf
    true_qpos, true_qvel = real.qpos.copy(), np.clip(real.qvel, -limit, limit)
    if "x and y position" in codec.lost:
        true_qpos[:, :2] = 0
    if "forward position" in codec.lost:
        true_qpos[:, 0] = 0
    if "full turns" in codec.lost:
        turns = {"Reacher-v5": [0, 1], "InvertedDoublePendulum-v5": [1, 2], "Pendulum-v1": [0]}[real_id]
        true_qpos[:, turns] = np.arctan2(np.sin(true_qpos[:, turns]), np.cos(true_qpos[:, turns]))
    if "cylinder" in codec.lost:
        assert np.abs(true_qvel[:, 7:]).max() > 0.1  # a cylinder was pushed
        true_qvel[:, 7:], moved = 0, np.abs(true_qpos[:, 7:] - qpos[:, 7:]).max()
        assert moved > 1e-4  # and the observation lags behind it
        true_qpos[:, 7:], qpos[:, 7:] = 0, 0
    np.testing.assert_allclose(qpos, true_qpos, rtol=0, atol=2e-6)
    np.testing.assert_allclose(qvel, true_qvel, rtol=0, atol=2e-6)


@pytest.mark.parametrize("real_id", [name for name in IDS if name not in NO_WAY_BACK])
def test_starts_survive_the_round_trip_whole(real_id):
    task = tasks.get(real_id)
    obs = task.initial(50, generator(0))
    back = task.codec.from_simulator(*task.codec.to_simulator(obs))
    torch.testing.assert_close(back, obs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("real_id", IDS)
def test_wrong_columns_are_refused(real_id):
    with pytest.raises(ValueError, match=f"observations of {real_id} have shape \\(b, "):
        tasks.get(real_id).codec.to_simulator(torch.zeros(2, 999))
