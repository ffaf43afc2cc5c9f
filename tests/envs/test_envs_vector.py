from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from env_doubles import ANY_TASK, BOX, COMPOSITE, linear_world
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from learneddyn.core import Outcome
from learneddyn.envs import InvalidAction, LearnedEnv, LearnedVectorEnv
from learneddyn.spaces import Spaces

MODES = list(AutoresetMode)
START = torch.tensor([[0.5, 0.2, 0.0]])


def assert_same(one: Any, two: Any, where: str) -> None:
    """Equal values, dtypes, keys and masks, through dicts and object arrays."""
    if isinstance(one, dict):
        assert list(one) == list(two), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, tuple):
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, np.ndarray) and one.dtype == object:
        assert one.shape == two.shape, where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, np.ndarray):
        assert one.dtype == two.dtype, (where, one.dtype, two.dtype)
        np.testing.assert_array_equal(one, two, err_msg=where)
    else:
        assert (type(one), one) == (type(two), two), where


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "pair",
    [BOX, Spaces(spaces.Box(-9, 9, (3,), np.float64), spaces.Discrete(3)), Spaces(COMPOSITE, BOX.action)],
    ids=["box", "float64-discrete", "dict"],
)
def test_semantics_are_those_of_sync_vector_env(mode: AutoresetMode, pair: Spaces):
    """Same observations, rewards, flags, infos and masks through 120 steps with ends of all three kinds."""
    lanes = 5
    start = torch.zeros(1, pair.obs_dim)

    def world():
        return linear_world(spaces=pair, task=ANY_TASK, reach=1.2)

    kwargs = {"horizon": 9, "start": start}
    sync = SyncVectorEnv([lambda: LearnedEnv(world(), **kwargs)] * lanes, autoreset_mode=mode)
    ours = LearnedVectorEnv(world(), lanes, autoreset_mode=mode, **kwargs)
    assert ours.observation_space == sync.observation_space
    assert ours.action_space == sync.action_space
    assert ours.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    ours.action_space.seed(0)
    assert_same(ours.reset(seed=0), sync.reset(seed=0), "reset")
    reasons = {"terminated": 0, "horizon": 0, "distrust": 0}
    for step in range(120):
        action = ours.action_space.sample()
        # Lane 0 always pushes towards its end, lane 1 towards distrust, the others drift.
        if pair is BOX:
            action[0], action[1] = (1, 0, 0), (0, 1, 0)
        result = ours.step(action)
        assert_same(result, sync.step(action), f"step {step}")
        terminated, truncated, infos = result[2:]
        reports = infos.get("final_info", infos)
        reasons["terminated"] += terminated.sum()
        reasons["distrust"] += (reports["_trusted"] & ~reports["trusted"]).sum() if truncated.any() else 0
        reasons["horizon"] += (reports["_trusted"] & reports["trusted"]).sum() if truncated.any() else 0
        ended = terminated | truncated
        if mode is AutoresetMode.DISABLED and ended.any():
            mask = {"reset_mask": ended}
            assert_same(ours.reset(options=dict(mask)), sync.reset(options=dict(mask)), f"reset {step}")
    assert reasons["horizon"] > 0
    if pair is BOX:
        assert min(reasons.values()) > 10, reasons


@pytest.mark.parametrize("mode", MODES)
def test_torch_output_says_what_numpy_output_says(mode: AutoresetMode):
    worlds = [linear_world(noise=0.1, sampler="elite", reach=1.5) for _ in range(2)]
    arrays, tensors = (
        LearnedVectorEnv(world, 6, horizon=11, autoreset_mode=mode, output=output)
        for world, output in zip(worlds, ("numpy", "torch"), strict=True)
    )
    arrays.action_space.seed(1)
    np.testing.assert_array_equal(arrays.reset(seed=5)[0], tensors.reset(seed=5)[0].numpy())
    for _ in range(60):
        action = arrays.action_space.sample()
        one, two = arrays.step(action), tensors.step(torch.from_numpy(action))
        for a, b in zip(one[:4], two[:4], strict=True):
            assert isinstance(b, torch.Tensor)
            np.testing.assert_array_equal(a, b.numpy())
        assert list(one[4]) == list(two[4])
        if "final_obs" in one[4]:
            mask = one[4]["_final_obs"]
            np.testing.assert_array_equal(np.stack(one[4]["final_obs"][mask]), two[4]["final_obs"].numpy()[mask])
        ended = one[2] | one[3]
        if mode is AutoresetMode.DISABLED and ended.any():
            a, b = (env.reset(options={"reset_mask": ended})[0] for env in (arrays, tensors))
            np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_what_one_lane_does_changes_nothing_in_another(mode: AutoresetMode):
    """With noise and random elites: lane 0 ends often in one run only, the others stay bit for bit the same."""
    runs = []
    for push in (0.0, 1.0):
        env = LearnedVectorEnv(linear_world(noise=0.05, sampler="elite"), 4, horizon=1000, autoreset_mode=mode)
        env.reset(seed=3)
        action = np.zeros((4, 3), np.float32)
        action[0, 0] = push
        steps = [env.step(action) for _ in range(40)]
        runs.append((np.stack([step[0][1:] for step in steps]), sum(step[2][0] for step in steps)))
    assert (runs[0][1], runs[1][1] > 3) == (0, True)
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert len(np.unique(runs[0][0][-1], axis=0)) == 3


def test_one_seed_one_result():
    def run(seed: int) -> np.ndarray:
        env = LearnedVectorEnv(linear_world(noise=0.1, sampler="ts1"), 3, horizon=5)
        env.reset(seed=seed)
        return np.stack([env.step(np.zeros((3, 3)))[0] for _ in range(20)])

    np.testing.assert_array_equal(run(7), run(7))
    assert not np.array_equal(run(7), run(8))


@pytest.mark.parametrize("lanes", [1, 7, 4096])
def test_any_number_of_lanes(lanes: int):
    env = LearnedVectorEnv(linear_world(noise=0.1, sampler="elite"), lanes, horizon=3)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space
    for _ in range(5):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert obs in env.observation_space
        assert reward.shape == terminated.shape == truncated.shape == (lanes,)


@pytest.mark.parametrize("lanes", [0, -1])
def test_no_lanes_is_an_error(lanes: int):
    with pytest.raises(ValueError, match=f"num_envs must be at least 1, got {lanes}"):
        LearnedVectorEnv(linear_world(), lanes)


def test_returned_arrays_belong_to_the_caller():
    for output in ("numpy", "torch"):
        env = LearnedVectorEnv(linear_world(), 2, output=output, start=START)
        obs, _ = env.reset(seed=0)
        obs[:] = 99
        first = env.step(np.zeros((2, 3)))
        kept = np.array(first[0].tolist(), np.float32)
        np.testing.assert_allclose(kept, START.numpy().repeat(2, 0) + 0.005, atol=1e-6)
        env.step(np.ones((2, 3)))
        np.testing.assert_array_equal(kept, np.array(first[0].tolist(), np.float32))
        first[0][:] = 99
        assert float(abs(env.step(np.zeros((2, 3)))[0]).max()) < 10


def test_reset_takes_observations_and_leaves_unmasked_lanes_alone():
    env = LearnedVectorEnv(linear_world(), 3, autoreset_mode="Disabled", horizon=2)
    starts = np.arange(9, dtype=np.float32).reshape(3, 3) / 10
    obs, _ = env.reset(seed=0, options={"obs": starts})
    np.testing.assert_array_equal(obs, starts)
    moved, *_ = env.step(np.zeros((3, 3)))
    mask = np.array([False, True, False])
    obs, _ = env.reset(options={"obs": -starts, "reset_mask": mask})
    np.testing.assert_array_equal(obs, np.where(mask[:, None], -starts, moved))
    truncated = env.step(np.zeros((3, 3)))[3]
    np.testing.assert_array_equal(truncated, ~mask)
    with pytest.raises(gym.error.ResetNeeded, match=r"lanes \[0, 2\] have ended"):
        env.step(np.zeros((3, 3)))
    env.reset(options={"reset_mask": truncated})
    env.step(np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        ([True, False], TypeError, "must be a NumPy array of bool"),
        (np.array([1, 0]), TypeError, "must be a NumPy array of bool"),
        (np.array([True]), ValueError, r"must have shape \(2,\)"),
        (np.array([False, False]), ValueError, "at least one lane"),
    ],
)
def test_bad_masks_are_named(mask: Any, error: type[Exception], says: str):
    env = LearnedVectorEnv(linear_world(), 2)
    env.reset(seed=0)
    with pytest.raises(error, match=says):
        env.reset(options={"reset_mask": mask})


def test_misuse_is_named():
    env = LearnedVectorEnv(linear_world(), 2)
    with pytest.raises(gym.error.ResetNeeded, match="before the first step"):
        env.step(np.zeros((2, 3)))
    with pytest.raises(gym.error.ResetNeeded, match="must reset all lanes"):
        env.reset(options={"reset_mask": np.array([True, False])})
    env.reset(seed=0)
    actions = np.zeros((2, 3))
    actions[1, 2] = -3
    for bad in (actions, torch.from_numpy(actions)):
        with pytest.raises(InvalidAction, match=r"of lane 1 .*entry 2 is -3\.0, allowed are -1"):
            env.step(bad)
    for bad in (np.zeros((3, 3)), torch.zeros(2, 2)):
        with pytest.raises(InvalidAction, match=r"must have shape \(2, 3\)"):
            env.step(bad)
    with pytest.raises(InvalidAction, match="entry 0 is nan"):
        env.step(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="one observation per lane"):
        env.reset(options={"obs": np.zeros((3, 3), np.float32)})
    with pytest.raises(ValueError, match="output must be"):
        LearnedVectorEnv(linear_world(), 2, output="jax")
    with pytest.raises(ValueError, match="needs a Box observation space"):
        LearnedVectorEnv(linear_world(spaces=Spaces(COMPOSITE, BOX.action)), 2, output="torch", start=torch.zeros(1, 7))
    with pytest.raises(ValueError, match="AutoresetMode"):
        LearnedVectorEnv(linear_world(), 2, autoreset_mode="never")


def test_memory_of_a_restarted_lane_is_fresh():
    """A model that counts its steps in its memory: the count starts anew in the lanes that restart, and only there."""
    world = linear_world()
    plain = world.sampler

    def counting(state, action, dynamics, rng):
        after, outcome = plain(state, action, dynamics, rng)
        memory = torch.zeros(len(state.obs), 1) if state.memory is None else state.memory
        return after._replace(memory=memory + 1), Outcome(outcome.next_obs)

    world.sampler = counting
    env = LearnedVectorEnv(world, 2, autoreset_mode="SameStep", start=torch.zeros(1, 3))
    env.reset(seed=0)
    counts = []
    for _ in range(6):
        env.step(np.array([[1, 0, 0], [0, 0, 0]], np.float32))
        counts.append(env._state.memory[:, 0].tolist())
    assert counts == [[1, 1], [2, 2], [3, 3], [0, 4], [1, 5], [2, 6]]


def test_a_restarted_lane_draws_its_member_anew():
    """Under TSinf an episode keeps its member (member 1 drifts by 0.01 a step); over episodes both must turn up."""
    env = LearnedVectorEnv(linear_world(sampler="tsinf"), 2, autoreset_mode="SameStep", horizon=2, start=START)
    env.reset(seed=0)
    drifts = []
    for _ in range(20):
        env.step(np.zeros((2, 3)))
        drifts.append(round(float(env.step(np.zeros((2, 3)))[4]["final_obs"][0][2]), 3))
    assert set(drifts) == {0.0, 0.02}
