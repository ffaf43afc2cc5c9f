import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import Dynamics, Task, generator
from learneddyn.spaces import Spaces, encode
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

IDS = tasks.names()
STEPS = 200


def drive(real_id, seed):
    """Drive the bare environment with random actions; go on after terminations, as a world may."""
    env = gym.make(real_id).unwrapped
    env.reset(seed=seed)
    env.action_space.seed(seed)
    actions, seen = [], []
    for _ in range(STEPS):
        actions.append(env.action_space.sample())
        seen.append(env.step(actions[-1])[:3])
        if real_id == "CartPole-v1" and seen[-1][2]:
            break  # the environment warns and stops paying
    obs, reward, terminated = (np.asarray(column, float) for column in zip(*seen, strict=True))
    env.close()
    return encode(env.action_space, np.stack(actions)), obs, reward, terminated.astype(bool)


@pytest.mark.parametrize("real_id", IDS)
def test_a_step_of_the_truth_is_a_step_of_the_environment(real_id):
    actions, obs, reward, terminated = drive(real_id, seed=3)
    truth = TruthDynamics(real_id, threads=1)
    assert isinstance(truth, Dynamics)
    world = World(truth, Task(real_id))
    start, memory = truth.reset([3])
    state = world.start(start, generator(0))._replace(memory=memory)
    for t, action in enumerate(torch.as_tensor(actions)):
        state, step = world.step(state, action[None], generator(0))
        assert np.array_equal(state.obs[0].numpy(), obs[t])
        assert step.reward.item() == reward[t]
        assert bool(step.terminated) == terminated[t]


@pytest.mark.parametrize("real_id", IDS)
def test_the_tasks_functions_judge_the_truth_as_the_environment_does(real_id):
    task = tasks.get(real_id)
    actions, _, reward, terminated = drive(real_id, seed=4)
    truth = TruthDynamics(task, threads=1)
    world = World(truth, task)
    start, memory = truth.reset([4])
    state = world.start(start, generator(0))._replace(memory=memory)
    rewards, ends = [], []
    for action in torch.as_tensor(actions):
        state, step = world.step(state, action[None], generator(0))
        rewards.append(step.reward.item())
        ends.append(bool(step.terminated))
    assert sum(rewards) == pytest.approx(reward.sum(), abs=1e-6)
    assert ends == terminated.tolist()


def warmed_up(truth, seeds, steps=15):
    """Go on from resets for a while, so that the solver's warm start and the lag of body positions matter."""
    obs, memory = truth.reset(seeds)
    rng, member = generator(7), torch.zeros(len(obs), dtype=torch.long)
    for _ in range(steps):
        action = 2 * torch.rand(len(obs), truth.spaces.action_dim, generator=rng) - 1
        obs, _, _, memory = truth.sample(obs, action, member, rng, memory)
    return obs, memory


@pytest.mark.parametrize("real_id", IDS)
def test_open_loop_equals_single_steps_on_any_number_of_threads(real_id):
    truth, alone = TruthDynamics(real_id, threads=2), TruthDynamics(real_id, threads=1)
    obs, memory = warmed_up(truth, range(5))
    actions = 2 * torch.rand(5, 7, truth.spaces.action_dim, generator=generator(0)) - 1
    judged = truth.open_loop(obs, actions, memory)
    bare = truth.open_loop(obs, actions, memory, judged=False)
    assert bare.reward is None
    assert bare.terminated is None
    assert torch.equal(bare.next_obs, judged.next_obs)
    member, rng = torch.zeros(5, dtype=torch.long), generator(0)
    for t in range(7):
        outcome = alone.sample(obs, actions[:, t], member, rng, memory)
        obs, memory = outcome.next_obs, outcome.memory
        assert torch.equal(obs, judged.next_obs[:, t])
        assert torch.equal(outcome.reward, judged.reward[:, t])
        assert torch.equal(outcome.terminated, judged.terminated[:, t])
    truth.close()
    alone.close()


@pytest.mark.parametrize("real_id", IDS)
def test_observations_start_the_simulator_as_a_reset_does(real_id):
    truth = TruthDynamics(real_id, threads=1)
    obs, memory = truth.reset([0, 1])
    actions = 2 * torch.rand(2, 3, truth.spaces.action_dim, generator=generator(0)) - 1
    exact = truth.open_loop(obs, actions, memory).next_obs
    rebuilt = truth.open_loop(obs, actions).next_obs
    if real_id == "Pusher-v5":  # the object's joints are stored to rounding only, and it lies still
        torch.testing.assert_close(rebuilt, exact, atol=1e-4, rtol=1e-4)
    elif truth.task.codec.exact == tuple(range(obs.shape[1])):
        torch.testing.assert_close(rebuilt, exact, atol=1e-7, rtol=1e-7)
        single = truth.open_loop(obs.float(), actions).next_obs
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)
    else:
        assert rebuilt.isfinite().all()


def test_a_start_from_an_observation_has_no_past():
    truth, fresh = TruthDynamics("Hopper-v5", threads=1), TruthDynamics("Hopper-v5", threads=1)
    obs, _ = warmed_up(truth, [0])
    assert torch.equal(truth.begin(obs), fresh.begin(obs))


@pytest.mark.parametrize("real_id", ["Hopper-v5", "Ant-v5", "CartPole-v1", "MountainCarContinuous-v0"])
def test_a_running_environment_goes_on_from_its_snapshot(real_id):
    env = gym.make(real_id)
    truth = TruthDynamics(real_id, threads=1)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(5):
        obs = env.step(env.action_space.sample())[0]
    memory = truth.snapshot(env)
    action = env.action_space.sample()
    want = env.step(action)
    flat = torch.as_tensor(encode(env.action_space, np.asarray(action)[None]))
    got = truth.sample(
        torch.as_tensor(obs)[None].double(), flat, torch.zeros(1, dtype=torch.long), generator(0), memory
    )
    assert np.array_equal(got.next_obs[0].numpy(), want[0])
    assert got.reward.item() == want[1]
    env.close()


def test_steps_after_a_termination_are_judged_like_any_other():
    truth = TruthDynamics("CartPole-v1", threads=1)
    obs, memory = truth.reset([0])
    push_right = torch.tensor([[0.0, 1.0]]).repeat(1, 30, 1)
    judged = truth.open_loop(obs, push_right, memory)
    assert judged.terminated.sum() > 10
    assert judged.reward.tolist() == [[1.0] * 30]


def test_lanes_do_not_touch_each_other():
    truth = TruthDynamics("Ant-v5", threads=2)
    obs, memory = truth.reset(range(6))
    action = torch.rand(6, 8, generator=generator(0))
    member, order = torch.zeros(6, dtype=torch.long), torch.tensor([3, 0, 5, 1, 4, 2])
    together = truth.sample(obs, action, member, generator(0), memory)
    shuffled = truth.sample(obs[order], action[order], member, generator(0), memory[order])
    for column, moved in zip(together, shuffled, strict=True):
        assert torch.equal(column[order], moved)
    truth.close()


def test_predict_is_the_same_step_without_noise():
    truth = TruthDynamics("InvertedPendulum-v5", threads=1)
    obs, memory = truth.reset([0, 1])
    action = torch.tensor([[3.0], [-3.0]])
    prediction = truth.predict(obs, action, memory)
    outcome = truth.sample(obs, action, torch.zeros(2, dtype=torch.long), generator(0), memory)
    assert torch.equal(prediction.mean[0], outcome.next_obs)
    assert torch.equal(prediction.reward_mean[0], outcome.reward)
    assert torch.equal(prediction.memory, outcome.memory)
    assert not prediction.std.any()
    assert prediction.elites.tolist() == [0]
    after, step = World(truth, Task("InvertedPendulum-v5"), sampler="mean").step(
        World(truth, Task("InvertedPendulum-v5")).start(obs, generator(0))._replace(memory=memory), action, generator(0)
    )
    assert torch.equal(after.obs, outcome.next_obs)
    assert torch.equal(after.memory, outcome.memory)
    assert torch.equal(step.terminated, outcome.terminated)


def test_rollouts_and_returns_run_in_the_truth():
    task = tasks.get("InvertedPendulum-v5")
    world = World(TruthDynamics(task), task)
    obs = world.initial(4, generator(0))
    data = world.rollout(obs, lambda obs: torch.full((len(obs), 1), 3.0), 50, generator(0))
    lengths = data.episode.bincount()
    assert lengths.max() < 50
    assert data.terminated.sum() == 4
    plans = torch.full((4, 1, 50, 1), 3.0)
    assert torch.equal(world.returns(obs, plans, generator(0))[:, 0].long(), lengths - 1)


def test_rollout_splits_long_work_into_shares(monkeypatch):
    monkeypatch.setattr("learneddyn.world.truth.ROLLOUT_BYTES", 1)
    truth = TruthDynamics("HalfCheetah-v5", threads=1)
    obs, memory = truth.reset([0, 1, 2])
    actions = torch.rand(3, 4, 6, generator=generator(0))
    fast = truth.open_loop(obs, actions, memory, judged=False).next_obs
    assert torch.equal(fast, truth.open_loop(obs, actions, memory).next_obs)


def test_worlds_of_the_truth_are_on_the_device_asked_for():
    assert TruthDynamics("Pendulum-v1", device="meta").elites.device.type == "meta"
    assert TruthDynamics("Pendulum-v1").elites.device.type == "cpu"


def test_errors_name_what_is_missing():
    truth = TruthDynamics(Task("Pendulum-v1"), threads=1)
    assert truth.lost == "the whole state"
    with pytest.raises(ValueError, match=r"Pendulum-v1 has no codec.*snapshot.*reset"):
        truth.open_loop(torch.zeros(1, 3), torch.zeros(1, 2, 1))
    with pytest.raises(
        ValueError, match=r"snapshot needs an environment of Pendulum-v1 \(PendulumEnv\), got .*CartPole"
    ):
        truth.snapshot(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        TruthDynamics("Pendulum-v1", threads=0)
    with pytest.raises(tasks.UnknownTask):
        TruthDynamics("Pendulum-v17")
    with pytest.raises(TypeError, match=r"FrozenLake-v1 is .*FrozenLakeEnv"):
        TruthDynamics(Task("FrozenLake-v1"))
    assert isinstance(truth.spaces, Spaces)
