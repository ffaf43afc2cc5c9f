import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from learneddyn.agents import DeviceReplayBuffer, FastSAC
from learneddyn.core import Transitions

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))


class Walk(gym.Env):
    """Counts its steps in the observation; ends at 7 with probability 1/2, else is cut at 9 by the time limit."""

    observation_space, action_space = BOX, ACTION

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.full(3, self.count, np.float32), {}

    def step(self, action):
        self.count += 1
        ended = self.count == 7 and self.np_random.random() < 0.5
        return np.full(3, self.count, np.float32), float(action[0]), ended, False, {}


def walks(lanes: int) -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.wrappers.TimeLimit(Walk(), 9)] * lanes)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("steps", [150, 420])
@pytest.mark.parametrize("handle_timeouts", [True, False])
def test_collects_the_rows_that_sb3s_buffer_collects(lanes: int, steps: int, handle_timeouts: bool) -> None:
    mine, theirs = (
        FastSAC(
            "MlpPolicy",
            walks(lanes),
            seed=0,
            learning_starts=10**6,
            buffer_size=300,
            device="cpu",
            replay_buffer_class=kind,
            replay_buffer_kwargs={"handle_timeout_termination": handle_timeouts},
        )
        .learn(steps)
        .replay_buffer
        for kind in (DeviceReplayBuffer, ReplayBuffer)
    )
    assert (mine.size(), mine.pos, mine.full, mine.buffer_size) == (
        theirs.size(),
        theirs.pos,
        theirs.full,
        theirs.buffer_size,
    )
    rows = mine.real.unpack(mine.real.rows())
    order = (np.arange(theirs.size()) + (theirs.pos if theirs.full else 0)) % theirs.buffer_size
    ended = theirs.dones * (1 - theirs.timeouts)
    assert 0 < ended.sum() < theirs.dones.sum() or not handle_timeouts
    for got, expected in (
        (rows.obs, theirs.observations),
        (rows.action, theirs.actions),
        (rows.next_obs, theirs.next_observations),
        (rows.reward, theirs.rewards),
        (rows.terminated, ended),
    ):
        np.testing.assert_array_equal(got.numpy(), expected[order].reshape(got.shape))


def test_samples_have_sb3s_shapes_and_normalisation() -> None:
    env = VecNormalize(walks(2))
    model = SAC(
        "MlpPolicy", env, seed=0, learning_starts=50, device="cpu", replay_buffer_class=DeviceReplayBuffer
    ).learn(100)
    buffer, state = model.replay_buffer, model.replay_buffer.rng.get_state()
    raw = buffer.sample(32)
    buffer.rng.set_state(state)
    normal = buffer.sample(32, env=env)
    shapes = [tuple(part.shape) for part in raw[:5]]
    assert shapes == [(32, 3), (32, 2), (32, 3), (32, 1), (32, 1)]
    assert all(part.dtype == torch.float32 for part in (*raw[:5], *normal[:5]))
    np.testing.assert_allclose(normal.observations, env.normalize_obs(raw.observations.numpy()), rtol=1e-6)
    np.testing.assert_allclose(normal.next_observations, env.normalize_obs(raw.next_observations.numpy()), rtol=1e-6)
    np.testing.assert_allclose(normal.rewards, env.normalize_reward(raw.rewards.numpy()), rtol=1e-6)
    assert torch.equal(normal.actions, raw.actions)


def imagined_rows(count: int) -> Transitions:
    """Rows in the environment's units, at observations that the environment does not reach."""
    action = torch.tensor([[-2.0, 1.0]]).repeat(count, 1)
    obs, flags = torch.full((count, 3), 1000.0), torch.zeros(count, dtype=torch.bool)
    return Transitions(obs, action, torch.ones(count), obs + 1, flags, torch.zeros(count, dtype=torch.long))


def test_mixes_imagined_rows_with_scaled_actions() -> None:
    buffer = DeviceReplayBuffer(100, BOX, ACTION, "cpu", imagined_size=50, real_share=0.1, seed=0)
    one = np.zeros((1, 3), np.float32)
    buffer.add(one, one + 1, np.zeros((1, 2), np.float32), np.ones(1), np.zeros(1), [{}])
    assert (buffer.sample(64).observations == 0).all()
    buffer.add_imagined(imagined_rows(70))
    assert len(buffer.imagined) == 50
    batch = buffer.sample(64)
    assert (batch.observations[:6] == 0).all()
    assert (batch.observations[6:] == 1000).all()
    assert torch.equal(batch.actions[6:], torch.tensor([[-1.0, 1.0]]).repeat(58, 1))
    buffer.reset()
    assert len(buffer.imagined) == len(buffer.real) == buffer.size() == 0


def test_trains_in_sb3_and_goes_through_its_files(tmp_path) -> None:
    kwargs = {"policy_kwargs": {"net_arch": [8]}, "replay_buffer_class": DeviceReplayBuffer, "device": "cpu"}
    model = FastSAC("MlpPolicy", walks(1), seed=0, learning_starts=20, buffer_size=100, **kwargs).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "replay")
    back = SAC.load(tmp_path / "model", env=walks(1))
    back.load_replay_buffer(tmp_path / "replay")
    assert torch.equal(back.replay_buffer.real.rows(), model.replay_buffer.real.rows())
    assert torch.equal(back.replay_buffer.sample(16).rewards, model.replay_buffer.sample(16).rewards)
    back.learn(20, reset_num_timesteps=False)
    assert len(pickle.loads(pickle.dumps(back.replay_buffer)).real) == 80


def test_one_seed_gives_one_run() -> None:
    runs = [
        FastSAC(
            "MlpPolicy",
            walks(1),
            seed=seed,
            learning_starts=20,
            device="cpu",
            policy_kwargs={"net_arch": [8]},
            replay_buffer_class=DeviceReplayBuffer,
        )
        .learn(60)
        .policy.state_dict()
        for seed in (5, 5, 6)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_bad_input_is_named() -> None:
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    with pytest.raises(ValueError, match="optimize_memory_usage=True"):
        DeviceReplayBuffer(10, BOX, ACTION, optimize_memory_usage=True)
    for space in (image, spaces.Discrete(3), spaces.Dict({"a": BOX})):
        with pytest.raises(ValueError, match="Box of numbers as observation space, got"):
            DeviceReplayBuffer(10, space, ACTION)
    with pytest.raises(ValueError, match=r"Box as action space, got Discrete\(3\)"):
        DeviceReplayBuffer(10, BOX, spaces.Discrete(3))
    with pytest.raises(ValueError, match="imagined_size > 0"):
        DeviceReplayBuffer(10, BOX, ACTION, "cpu").add_imagined(imagined_rows(2))
