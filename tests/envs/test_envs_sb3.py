import numpy as np
import pytest
import torch
from env_doubles import ANY_TASK, BOX, COMPOSITE, linear_world
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from learneddyn.envs import LearnedEnv, LearnedVecEnv
from learneddyn.spaces import Spaces


@pytest.mark.parametrize("pair", [BOX, Spaces(COMPOSITE, BOX.action)], ids=["box", "dict"])
def test_says_what_dummy_vec_env_over_monitored_envs_says(pair: Spaces):
    def world():
        return linear_world(spaces=pair, task=ANY_TASK, reach=1.2)

    kwargs = {"horizon": 9, "start": torch.zeros(1, pair.obs_dim)}
    dummy = DummyVecEnv([lambda: Monitor(LearnedEnv(world(), **kwargs))] * 4)
    ours = LearnedVecEnv(world(), 4, **kwargs)
    assert ours.observation_space == dummy.observation_space
    np.testing.assert_equal(ours.reset(), dict(dummy.reset()) if pair is not BOX else dummy.reset())
    rng, ends = np.random.default_rng(0), set()
    for _ in range(100):
        action = rng.uniform(-1, 1, (4, 3)).astype(np.float32)
        action[0], action[1] = (1, 0, 0), (0, 1, 0)
        obs, reward, done, infos = ours.step(action)
        expected = dummy.step(action)
        np.testing.assert_equal(obs, dict(expected[0]) if pair is not BOX else expected[0])
        np.testing.assert_array_equal(reward, expected[1])
        assert reward.dtype == expected[1].dtype
        np.testing.assert_array_equal(done, expected[2])
        for lane in range(4):
            info, other = infos[lane], expected[3][lane]
            assert set(info) == (set(other) if done[lane] else set())
            if done[lane]:
                np.testing.assert_equal(info["terminal_observation"], other["terminal_observation"])
                assert info["TimeLimit.truncated"] is other["TimeLimit.truncated"]
                assert info["episode"]["r"] == pytest.approx(other["episode"]["r"], abs=1e-5)
                assert info["episode"]["l"] == other["episode"]["l"]
                assert info.get("trusted") is other.get("trusted")
                ends.add((info["TimeLimit.truncated"], info.get("trusted")))
    assert (True, True) in ends
    if pair is BOX:
        assert ends == {(True, True), (True, False), (False, None)}


def test_ppo_and_sac_learn_in_it_and_see_episode_returns():
    env = LearnedVecEnv(linear_world(noise=0.05, sampler="elite", reach=5), 16, horizon=10)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=64, seed=0, device="cpu").learn(512)
    assert len(model.ep_info_buffer) > 10
    assert evaluate_policy(model, env, n_eval_episodes=16, return_episode_rewards=True)[1] == [10] * 16
    SAC("MlpPolicy", env, learning_starts=32, batch_size=16, seed=0, device="cpu").learn(64)


def test_ppo_learns_to_push_in_one_direction():
    env = LearnedVecEnv(linear_world(), 32, horizon=8)
    before = evaluate_policy(PPO("MlpPolicy", env, seed=1, device="cpu"), env, n_eval_episodes=32)[0]
    model = PPO("MlpPolicy", env, n_steps=32, batch_size=256, learning_rate=3e-3, seed=1, device="cpu").learn(8192)
    assert evaluate_policy(model, env, n_eval_episodes=32)[0] > before + 2


def test_discrete_actions_and_vec_wrappers():
    pair = Spaces(BOX.observation, spaces.Discrete(3))
    env = VecNormalize(LearnedVecEnv(linear_world(spaces=pair), 3, horizon=5))
    DQN("MlpPolicy", env, learning_starts=8, batch_size=8, seed=0, device="cpu").learn(60)


def test_seed_and_options_hold_for_one_reset():
    env = LearnedVecEnv(linear_world(), 3)
    env.seed(4)
    first = env.reset()
    assert not np.array_equal(first, env.reset())
    env.seed(4)
    np.testing.assert_array_equal(first, env.reset())
    env.set_options({"obs": np.ones(3, np.float32)})
    np.testing.assert_array_equal(env.reset(), np.ones((3, 3)))
    assert not np.array_equal(env.reset(), np.ones((3, 3)))
    env.set_options([{"obs": np.ones(3, np.float32)}, {}, {}])
    with pytest.raises(ValueError, match="to all 3 lanes or to none, got 1"):
        env.reset()


def test_attributes_are_shared_by_all_lanes():
    env = LearnedVecEnv(linear_world(), 3)
    assert env.get_attr("horizon") == [50] * 3
    assert env.get_attr("horizon", indices=[0, 2]) == [50] * 2
    env.set_attr("horizon", 7)
    assert env.env.horizon == 7
    with pytest.raises(ValueError, match="share one environment: set 'horizon' for all"):
        env.set_attr("horizon", 7, indices=[1])
    assert not env.has_attr("nothing_of_that_name")
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(TimeLimit, indices=0) == [False]
    assert env.env_method("render", indices=1) == [None]
    assert env.render_mode is None
    env.close()


def test_infos_belong_to_one_lane_each():
    env = LearnedVecEnv(linear_world(), 2)
    env.reset()
    infos = env.step(np.zeros((2, 3), np.float32))[3]
    infos[0]["mark"] = 1
    assert infos[1] == {}
    assert env.step(np.zeros((2, 3), np.float32))[3] == [{}, {}]


def test_no_lanes_is_an_error():
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        LearnedVecEnv(linear_world(), 0)


def test_discrete_actions_that_do_not_begin_at_zero_are_refused():
    with pytest.raises(ValueError, match=r"numbers discrete actions from 0, this world has Discrete\(3, start=5\)"):
        LearnedVecEnv(linear_world(spaces=Spaces(BOX.observation, spaces.Discrete(3, start=5))), 2)
