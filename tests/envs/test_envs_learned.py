from collections import OrderedDict

import gymnasium as gym
import numpy as np
import pytest
import torch
from env_doubles import ANY_TASK, BOX, COMPOSITE, TASK, linear_world
from gymnasium import spaces

from learneddyn.core import Task, Transitions
from learneddyn.envs import InvalidAction, LearnedEnv, first_observations
from learneddyn.envs.interface import Interface
from learneddyn.spaces import Spaces


def episode(env: LearnedEnv, seed: int, steps: int = 30) -> list[tuple[np.ndarray, float, bool, bool]]:
    env.action_space.seed(seed)
    rows = [(env.reset(seed=seed)[0], 0.0, False, False)]
    for _ in range(steps):
        rows.append(env.step(env.action_space.sample())[:4])
        if rows[-1][2] or rows[-1][3]:
            break
    return rows


def same(one: list, two: list) -> bool:
    return len(one) == len(two) and all(
        np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(one, two, strict=True)
    )


def test_one_seed_one_episode():
    env = LearnedEnv(linear_world(noise=0.1, sampler="elite"))
    first = episode(env, 1)
    assert same(first, episode(env, 1))
    assert same(first, episode(LearnedEnv(linear_world(noise=0.1, sampler="elite")), 1))
    assert not same(first, episode(env, 2))


def test_reset_without_a_seed_goes_on_in_the_stream():
    env = LearnedEnv(linear_world())
    env.reset(seed=3)
    starts = [env.reset()[0] for _ in range(3)]
    env.reset(seed=3)
    again = [env.reset()[0] for _ in range(3)]
    np.testing.assert_array_equal(starts, again)
    assert len(np.unique(starts, axis=0)) == 3


def test_step_is_the_worlds_step():
    world = linear_world()
    env = LearnedEnv(world)
    start, action = np.array([1.0, -1.0, 0.5], np.float32), np.array([1.0, -1.0, 0.0], np.float32)
    obs, info = env.reset(options={"obs": start})
    np.testing.assert_array_equal(obs, start)
    assert info == {}
    obs, reward, terminated, truncated, info = env.step(action)
    np.testing.assert_allclose(obs, [1.505, -1.495, 0.505], atol=1e-6)
    assert reward == pytest.approx(0.515 - 0.2, abs=1e-6)
    assert (terminated, truncated, info) == (False, False, {})
    assert env.step(action)[2] is True


def test_horizon_truncates_and_trust_says_why():
    env = LearnedEnv(linear_world(), horizon=4)
    env.reset(seed=0)
    ends = [env.step(np.zeros(3, np.float32))[2:] for _ in range(4)]
    assert ends == [(False, False, {})] * 3 + [(False, True, {"trusted": True})]
    env = LearnedEnv(linear_world(reach=1.0), horizon=4)
    env.reset(options={"obs": np.zeros(3, np.float32)})
    push = np.array([0, 1, 0], np.float32)
    assert env.step(push)[2:] == (False, False, {})
    obs, _, *end = env.step(push)
    assert end == [False, True, {"trusted": False}]
    np.testing.assert_allclose(obs, [0.01, 1.01, 0.01], atol=1e-6)


def test_horizon_defaults_to_the_tasks_time_limit_then_to_1000():
    assert LearnedEnv(linear_world()).horizon == 50
    bare = Task("Linear-v0", TASK.reward, TASK.terminated, TASK.initial)
    assert LearnedEnv(linear_world(task=bare)).horizon == 1000


def test_an_ended_episode_and_no_episode_need_a_reset():
    env = LearnedEnv(linear_world(), horizon=1)
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(3, np.float32))
    env.reset(seed=0)
    env.step(np.zeros(3, np.float32))
    with pytest.raises(gym.error.ResetNeeded, match="reset"):
        env.step(np.zeros(3, np.float32))


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (np.array([0, 1.01, 0], np.float32), r"entry 1 is 1\.00999.*allowed are -1"),
        (np.array([0, np.nan, 0], np.float32), "entry 1 is nan"),
        (np.zeros(2, np.float32), r"must have shape \(1, 3\), got \(1, 2\)"),
    ],
)
def test_bad_actions_are_named(action: np.ndarray, says: str):
    env = LearnedEnv(linear_world())
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=says):
        env.step(action)


def test_rounding_at_the_bounds_is_no_error():
    env = LearnedEnv(linear_world())
    env.reset(seed=0)
    env.step(np.full(3, 1.0 + 1e-6))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"render_mode": "ansi"}, "render_mode must be None or 'rgb_array', got 'ansi'"),
        ({"start": torch.zeros(4, 2)}, r"shape \(n >= 1, 3\), got shape \(4, 2\)"),
        ({"start": torch.full((4, 3), torch.nan)}, "12 non-finite"),
        ({"start": torch.zeros(0, 3)}, r"got shape \(0, 3\)"),
    ],
)
def test_bad_settings_are_named(kwargs: dict, says: str):
    with pytest.raises(ValueError, match=says):
        LearnedEnv(linear_world(), **kwargs)


def test_a_task_without_starts_says_what_to_pass():
    with pytest.raises(ValueError, match="defines no start states: pass start="):
        LearnedEnv(linear_world(task=Task("Linear-v0", TASK.reward, TASK.terminated)))


@pytest.mark.parametrize(
    ("obs", "says"),
    [([0, 0, 11], "not in Box"), ([0, 0, np.nan], "not in Box"), ([0, 0], r"must have shape")],
)
def test_bad_start_options_are_named(obs: list, says: str):
    with pytest.raises(ValueError, match=says):
        LearnedEnv(linear_world()).reset(options={"obs": np.array(obs, np.float32)})


def logs() -> Transitions:
    obs = torch.arange(18.0).reshape(6, 3) / 10
    zeros = torch.zeros(6)
    episodes = torch.tensor([4, 4, 4, 7, 7, 8])
    return Transitions(obs, torch.zeros(6, 3), zeros, obs, zeros.bool(), episodes, BOX)


def test_starts_from_a_table_from_logs_and_from_their_first_rows():
    data = logs()
    np.testing.assert_array_equal(first_observations(data).numpy(), data.obs[[0, 3, 5]].numpy())
    env = LearnedEnv(linear_world(), start=data)
    env.reset(seed=0)
    seen = {tuple(env.reset()[0]) for _ in range(200)}
    assert seen == {tuple(row) for row in data.obs.numpy()}
    env = LearnedEnv(linear_world(), start=first_observations(data))
    env.reset(seed=0)
    assert {tuple(env.reset()[0]) for _ in range(100)} == {tuple(row) for row in data.obs[[0, 3, 5]].numpy()}


def test_observations_keep_to_the_space():
    small = Spaces(spaces.Box(-1.0, 1.0, (3,), np.float64), BOX.action)
    env = LearnedEnv(linear_world(spaces=small))
    env.reset(seed=0)
    for _ in range(5):
        obs = env.step(np.ones(3, np.float32))[0]
    assert obs in env.observation_space
    np.testing.assert_array_equal(obs, np.ones(3))


@pytest.mark.parametrize(
    "pair",
    [
        Spaces(BOX.observation, spaces.Discrete(3, start=-1)),
        Spaces(COMPOSITE, BOX.action),
        Spaces(spaces.Discrete(4), spaces.MultiDiscrete([2, 3])),
        Spaces(spaces.Tuple((BOX.observation, spaces.MultiBinary(2))), spaces.MultiBinary(3)),
        Spaces(BOX.observation, spaces.Dict({"a": spaces.Box(0, 2, (2,)), "b": spaces.Discrete(2)})),
        Spaces(BOX.observation, spaces.Box(np.array([-1, -2, 0.0]), np.array([1, 0, 5.0]), dtype=np.float64)),
    ],
    ids=str,
)
def test_every_space_goes_in_and_out(pair: Spaces):
    env = LearnedEnv(linear_world(spaces=pair, task=ANY_TASK), start=torch.zeros(1, pair.obs_dim), horizon=10)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space
    for _ in range(10):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert obs in env.observation_space
        assert isinstance(reward, float)
        if terminated or truncated:
            env.reset()


@pytest.mark.parametrize(
    ("action", "says"),
    [(3, "got the entry 3"), (0.5, "must be integers"), (np.array([1, 1]), "one action per lane")],
)
def test_bad_discrete_actions_are_named(action: object, says: str):
    env = LearnedEnv(linear_world(spaces=Spaces(BOX.observation, spaces.Discrete(3))))
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=says):
        env.step(action)


def test_multi_binary_actions_are_zero_or_one():
    env = LearnedEnv(linear_world(spaces=Spaces(BOX.observation, spaces.MultiBinary(3))))
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"entry 2 is 2\.0, allowed are"):
        env.step(np.array([0, 1, 2]))


def test_a_category_is_the_likeliest_one_however_large_the_model_says_it_is():
    env = LearnedEnv(linear_world(spaces=Spaces(spaces.Discrete(3), BOX.action), task=ANY_TASK), start=torch.ones(1, 3))
    env.reset(seed=0)
    assert env.step(np.array([0, 0.2, 0], np.float32))[0] == 1


def test_bounds_of_a_dict_follow_its_columns_and_not_its_order():
    parts = OrderedDict(wide=spaces.Box(-1.0, 1.0, (1,)), arm=spaces.Box(-5.0, 5.0, (1,)))
    interface = Interface(Spaces(BOX.observation, spaces.Dict(parts)), 1, torch.device("cpu"))
    action = {"wide": np.array([-1.0], np.float32), "arm": np.array([5.0], np.float32)}
    assert interface.one_to_array(action).tolist() == [[5.0, -1.0]]
    with pytest.raises(InvalidAction, match=r"entry 1 is 2\.0"):
        interface.one_to_array(action | {"wide": np.array([2.0], np.float32)})
