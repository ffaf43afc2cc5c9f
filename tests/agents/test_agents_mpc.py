"""Planning in a world as a policy: SB3's interface, states that travel, latency, refusals."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from learneddyn import tasks
from learneddyn.agents import MPC, mpc
from learneddyn.core import Outcome, Prediction, Task, generator
from learneddyn.evaluation import evaluate
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import CEM, ICEM, CategoricalCEM, GradientPlanner, RandomShooting
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy, example_transitions
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics


class Point:
    """next_obs = obs + action (+ noise); two columns of each."""

    num_members = 1

    def __init__(self, action=None, std=0.0):
        box = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.spaces = Spaces(gym.spaces.Box(-9.0, 9.0, (2,), np.float32), action or box)
        self.std = std

    @property
    def elites(self):
        return torch.zeros(1, dtype=torch.long)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs + action[:, :2] + self.std * torch.randn(obs.shape, generator=rng))

    def predict(self, obs, action, memory=None):
        after = obs + action
        return Prediction(after[None], torch.zeros_like(after)[None], self.elites)


def home(obs, action, next_obs):
    return -next_obs.square().sum(dim=1)


def never(next_obs):
    return torch.zeros(len(next_obs), dtype=torch.bool)


def world(action=None, std=0.0):
    return World(Point(action, std), Task("Point-v0", reward=home, terminated=never), sampler="tsinf")


@pytest.fixture(scope="module")
def pendulum():
    truth = TruthDynamics("Pendulum-v1", threads=1)
    yield World(truth, tasks.get("Pendulum-v1"))
    truth.close()


@pytest.mark.parametrize("planner", [CEM(3, 50, 5), ICEM(3, 100), GradientPlanner(3, 2, 15), RandomShooting(1, 400)])
def test_is_a_policy_that_goes_home(planner):
    policy = MPC(world(), planner)
    check_policy(policy, policy.world.spaces)
    obs = np.array([[0.5, -0.8], [0.1, 0.0], [-0.6, 0.4]], np.float32)
    action, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_allclose(action, -obs, atol=0.25)
    alone, _ = policy.predict(obs[0], deterministic=True)
    assert alone.shape == (2,)


def test_states_warm_the_next_search_and_episode_starts_forget_them():
    policy = MPC(world(), CEM(4, 20, 5, iterations=1))
    obs = np.full((3, 2), 0.5, np.float32)
    first, state = policy.predict(obs, None, np.ones(3, bool), deterministic=True)
    assert state[3].tolist() == [1, 1, 1]
    best = np.zeros((3, 4, 2), np.float32)
    best[:, 0] = -0.5
    action, state = policy.predict(obs, (best, *state[1:]), np.zeros(3, bool), deterministic=True)
    assert np.abs(action + obs).mean() < 0.5 * np.abs(first + obs).mean()
    _, mixed = policy.predict(obs, state, np.array([False, True, False]), deterministic=True)
    assert mixed[3].tolist() == [3, 1, 3]
    again, fresh = policy.predict(obs, state, np.ones(3, bool), deterministic=True)
    np.testing.assert_array_equal(again, first)
    assert fresh[3].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="planning state 'mean' must have shape \\(2, 4, 2\\) for 2 lanes"):
        policy.predict(obs[:2], state)


def test_one_seed_one_answer_and_otherwise_new_numbers():
    obs, many = np.full(2, 0.5, np.float32), []
    for seed in (0, 0, 1):
        policy = MPC(world(std=0.1), RandomShooting(2, 20), particles=3, seed=seed)
        many.append([policy.predict(obs)[0] for _ in range(3)])
    np.testing.assert_array_equal(many[0], many[1])
    assert not np.array_equal(many[0], many[2])
    assert not np.array_equal(many[0][0], many[0][1])


def test_sb3_and_our_judge_play_the_real_pendulum_with_it(pendulum):
    policy = MPC(pendulum, ICEM(6, 20, elites=5, iterations=2))
    ours, alone = (
        evaluate(policy, "Pendulum-v1", episodes=3, lanes=lanes, env_kwargs={"max_episode_steps": 8})
        for lanes in (2, 1)
    )
    assert ours.lengths.tolist() == [8, 8, 8]
    np.testing.assert_allclose(alone.returns, ours.returns, rtol=1e-4)
    env = make_vec_env("Pendulum-v1", 2, seed=0, env_kwargs={"max_episode_steps": 8})
    returns, lengths = evaluate_policy(policy, env, n_eval_episodes=2, return_episode_rewards=True)
    assert lengths == [8, 8]
    assert np.isfinite(returns).all()


def test_balances_the_real_cartpole_with_discrete_actions():
    truth = TruthDynamics("CartPole-v1", threads=1)
    policy = MPC(World(truth, tasks.get("CartPole-v1")), CategoricalCEM(15, 12, elites=4, iterations=2))
    played = evaluate(policy, "CartPole-v1", episodes=1, lanes=1, env_kwargs={"max_episode_steps": 50})
    assert played.lengths.tolist() == [50]
    action, _ = policy.predict(np.zeros(4, np.float32), deterministic=True)
    assert action in (0, 1)
    assert np.shape(action) == ()
    truth.close()


def test_plans_through_a_learned_model_by_gradient():
    model = ProbabilisticEnsemble(2, 2, hidden=[16], scale_targets=True, batch_size=32, max_epochs=30)
    model.fit(example_transitions(), rng=generator(0))
    task = Task("Example-v0", reward=lambda obs, action, next_obs: next_obs[:, 0], terminated=never)
    policy = MPC(World(model, task, sampler="mean"), GradientPlanner(4, 2, iterations=15, learning_rate=0.3))
    action, _ = policy.predict(np.zeros((2, 3), np.float32))
    weights = [parameter.grad for parameter in model.parameters()]
    assert weights == [None] * len(weights)
    assert (np.abs(action) <= 1).all()
    # The reward is x, which grows with the first action: the plan pushes.
    assert (action[:, 0] > 0.5).all()


def ticking(milliseconds):
    """A world whose returns take that long by a clock that nothing else moves."""
    clock = SimpleNamespace(now=0.0, calls=0)
    point = world()
    returns = point.returns

    def slow(*args):
        clock.now += milliseconds / 1000
        clock.calls += 1
        return returns(*args)

    point.returns = slow
    return point, clock


@pytest.mark.parametrize(("budget", "rounds"), [(None, 9), (1000.0, 9), (35.0, 3), (30.5, 3), (29.0, 2), (1.0, 1)])
def test_a_search_ends_before_an_iteration_that_would_end_late(monkeypatch, budget, rounds):
    slow, clock = ticking(10)
    monkeypatch.setattr(mpc.time, "perf_counter", lambda: clock.now)
    policy = MPC(slow, CEM(3, 30, 5, iterations=9, min_variance=0.0), budget_ms=budget)
    action, _ = policy.predict(np.full(2, 0.5, np.float32))
    assert clock.calls == rounds
    assert policy.world.spaces.action.contains(action)


def test_says_and_refuses_what_a_step_costs(capsys):
    planner = ICEM(7, 40)
    policy = MPC(world(), planner, particles=5, verbose=1)
    assert policy.evaluations == planner.sequences * 7 * 5 == 3500
    assert capsys.readouterr().out == (
        "MPC: 3,500 model evaluations per step and lane (ICEM: 100 plans x 7 steps x 5 particles)\n"
    )
    with pytest.raises(ValueError, match=r"this MPC needs 3,500 model evaluations .*, allowed are 3000"):
        MPC(world(), planner, particles=5, max_evaluations=3000)


@pytest.mark.parametrize(
    ("space", "planner", "message"),
    [
        (gym.spaces.Discrete(3), CEM(), "CEM plans actions of a Box with finite bounds, got Discrete"),
        (gym.spaces.MultiBinary(2), CategoricalCEM(), "CategoricalCEM plans actions of Discrete, got MultiBinary"),
        (gym.spaces.Box(-1, 1, (2,)), CategoricalCEM(), "CategoricalCEM plans actions of Discrete, got Box"),
        (gym.spaces.Box(-np.inf, 1, (2,)), ICEM(), "ICEM plans actions of a Box with finite bounds, got Box"),
    ],
)
def test_refuses_actions_that_the_planner_cannot_plan(space, planner, message):
    with pytest.raises(ValueError, match=message):
        MPC(world(space), planner)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 0}, "particles must be at least 1, got 0"),
        ({"budget_ms": 0.0}, "budget_ms must be None or above 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MPC(world(), ICEM(), **arguments)


def test_a_world_that_breaks_gives_a_legal_action():
    class Broken(Point):
        def sample(self, obs, action, member, rng, memory=None, *, noise=True):
            return Outcome(obs * torch.nan)

    broken = World(Broken(), Task("Point-v0", reward=home, terminated=never), sampler="tsinf")
    for planner in (CEM(3, 20, 5), ICEM(3, 20), RandomShooting(3, 20)):
        action, state = MPC(broken, planner).predict(np.zeros((2, 2), np.float32))
        assert (np.abs(action) <= 1).all()
        assert all(np.isfinite(part).all() for part in state)
