"""Deep IWOCS: the filter that recognises models, the critics without entropy, the loop, the files."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.evaluation import evaluate_policy

from learneddyn.agents import DeviceReplayBuffer
from learneddyn.agents.iwocs import (
    IWOCS,
    Case,
    Forecast,
    Randomised,
    RobustPolicy,
    fitted_forecast,
    least,
    play,
    unregularised_critic,
)
from learneddyn.agents.worst_case import every
from learneddyn.core import Task
from learneddyn.envs.learned import LearnedEnv
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy, example_transitions
from learneddyn.world import World

SMALL = {"policy_kwargs": {"net_arch": [16]}, "learning_starts": 20, "buffer_size": 2000, "batch_size": 32}


class Drift(gym.Env):
    """A point is pushed by the action and drifts by ``drift`` a step; the reward is 1 near 0; 20 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, drift=0.0, paid=1.0):
        self.drift, self.paid = drift, paid

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs, self.steps = self.np_random.uniform(-0.1, 0.1, 2).astype(np.float32), 0
        return self.obs.copy(), {"drift": self.drift}

    def step(self, action):
        self.obs = self.obs + np.array([0.3 * action[0] + self.drift, 0.0], np.float32)
        self.steps += 1
        return self.obs.copy(), self.paid * float(abs(self.obs[0]) < 0.5), False, self.steps == 20, {}


def learner(**changes):
    arguments = {
        "make": Drift,
        "nominal": 0.0,
        "search": every([-0.4, 0.0, 0.4]),
        "draw": lambda rng: float(rng.uniform(-0.4, 0.4)),
        "default_timesteps": 100,
        "case_timesteps": 100,
        "agent_kwargs": SMALL,
        "fit_steps": 20,
        "radii": (0.1, 0.5),
        "probes": 1,
        "episodes": 1,
    }
    return IWOCS("MlpPolicy", **arguments | changes)


@pytest.fixture(scope="module")
def learned():
    return learner().learn(400)


class Exact(Forecast):
    """The forecast of `Drift`, exact; scaled actions are halves of actions."""

    def __init__(self, drift):
        super().__init__(2, 1, width=1)
        self.drift = drift

    def forward(self, obs, action):
        return obs + torch.cat([0.6 * action + self.drift, torch.zeros_like(action)], dim=1)


class Constant(torch.nn.Module):
    """A critic that says one number."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, obs, action):
        return (torch.full((len(obs), 1), self.value), torch.full((len(obs), 1), self.value + 5))


def exact_policy(learned, drifts, values, radius=0.1):
    agents = [learned.policy.cases[0].agent] * len(drifts)
    rows = zip(drifts, agents, values, strict=True)
    cases = [Case(drift, agent, Constant(value), Exact(drift), radius) for drift, agent, value in rows]
    return RobustPolicy(learned.policy.default, cases)


@pytest.mark.parametrize("true", [0, 1, 2])
def test_exact_forecasts_identify_the_model_after_one_step(learned, true):
    """Spec 9.7: a radius below the gap between models leaves the true index alone, from the second step on."""
    drifts = [-0.4, 0.0, 0.4]
    policy = exact_policy(learned, drifts, [3.0, 2.0, 1.0])
    env = Drift(drifts[true])
    obs, state = env.reset(seed=1)[0], None
    for step in range(6):
        action, state = policy.predict(obs, state, np.array([step == 0]), deterministic=True)
        assert policy.chosen.tolist() == [0 if step == 0 else true + 1]
        assert action.shape == (1,)
        obs = env.step(action)[0]


def test_the_least_value_of_the_valid_cases_acts(learned):
    policy = exact_policy(learned, [0.0, 0.0, 0.4], [2.0, 1.0, -9.0])
    batch = np.zeros((3, 2), np.float32)
    state = (batch, np.zeros((3, 1), np.float32))
    batch = batch.copy()
    batch[1, 0], batch[2, 0] = 0.4, 7.0  # drifted as the third case says; as none says
    policy.predict(batch, state, np.zeros(3, bool))
    assert policy.chosen.tolist() == [2, 3, 0]
    policy.predict(batch, state, np.array([True, False, False]))
    assert policy.chosen.tolist() == [0, 3, 0]
    assert policy.promised(batch) == -9.0


def test_one_case_that_is_always_valid_acts_as_its_agent(learned):
    policy = exact_policy(learned, [0.0], [1.0], radius=1e9)
    batch = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    _, state = policy.predict(batch, None, None, deterministic=True)
    actions, _ = policy.predict(batch, state, np.zeros(5, bool), deterministic=True)
    assert np.array_equal(actions, policy.cases[0].agent.predict(batch, deterministic=True)[0])


def test_the_learned_policy_is_a_policy(learned):
    check_policy(learned, Spaces(Drift.observation_space, Drift.action_space))
    returns, _ = evaluate_policy(learned, Drift(0.2), n_eval_episodes=2, warn=False)
    assert 0 <= returns <= 20


def test_rounds_are_those_of_the_loop(learned):
    assert learned.rounds[0].solved == 0.0
    assert len(learned.policy.cases) == len(learned.rounds) <= 3
    assert all(case.radius in (0.1, 0.5) for case in learned.policy.cases)
    solved = [turn.solved for turn in learned.rounds]
    assert len(set(solved)) == len(solved)
    assert [turn.worst for turn in learned.rounds[:-1]] == solved[1:]


def test_a_second_call_goes_on(learned):
    one = learner(search=lambda value: (0.123, value([0.123])[0])).learn(200)
    assert [turn.solved for turn in one.rounds] == [0.0]
    one.learn(100)
    assert [turn.solved for turn in one.rounds] == [0.0, 0.123]
    one.learn(100)  # 0.123 has been solved: nothing to do
    assert len(one.policy.cases) == 2


def test_a_later_call_does_not_solve_again_what_an_earlier_one_has():
    answers = iter([0.123, 0.0])
    one = learner(search=lambda value: (found := next(answers), value([found])[0])).learn(200)
    one.learn(200)  # steps for two cases more
    assert [turn.solved for turn in one.rounds] == [0.0, 0.123]


def test_save_and_load_act_alike(learned, tmp_path):
    learned.save(tmp_path / "robust")
    policy = RobustPolicy.load(tmp_path / "robust")
    batch = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    results = []
    for actor in (learned.policy, policy):
        _, state = actor.predict(batch, deterministic=True)
        results.append(actor.predict(batch + 0.1, state, np.zeros(6, bool), deterministic=True)[0])
        results.append(actor.chosen)
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[3])
    again = learner().restore(tmp_path / "robust")
    assert again.rounds == learned.rounds
    cards = json.loads((tmp_path / "robust" / "robust.json").read_text())
    assert [card["model"] for card in cards] == [turn.solved for turn in learned.rounds]
    with pytest.raises(ValueError, match="nowhere holds no robust policy"):
        RobustPolicy.load(tmp_path / "nowhere")
    (tmp_path / "robust" / "rounds.json").write_text("[")
    kept = again.policy
    with pytest.raises(ValueError, match="robust holds no rounds of IWOCS"):
        again.restore(tmp_path / "robust")
    assert again.policy is kept


def constant_agent(reward, gamma=0.8, entropy=5.0):
    """An agent whose replay memory holds one endless reward, and whose own values are full of entropy."""
    env = gym.wrappers.TimeLimit(Drift(0.0, paid=reward), 20)
    agent = SAC("MlpPolicy", env, gamma=gamma, ent_coef=entropy, learning_rate=1e-2, tau=0.1, seed=0, **SMALL)
    rng = np.random.default_rng(0)
    for _ in range(300):
        obs, action = rng.normal(size=(1, 2)).astype(np.float32), rng.uniform(-1, 1, (1, 1)).astype(np.float32)
        moved = obs + np.array([[0.6, 0.0]]) * action
        agent.replay_buffer.add(obs, moved, action, np.array([reward]), np.array([False]), [{}])
    return agent


def test_the_critic_has_no_entropy_in_it():
    """A reward of 1 for ever is worth 1 / (1 - gamma), whatever the entropy coefficient."""
    agent = constant_agent(1.0)
    torch.manual_seed(0)
    before = [parameter.clone() for parameter in agent.critic.parameters()]
    critic = unregularised_critic(agent, 600)
    batch = agent.replay_buffer.sample(200)
    assert float(least(critic, batch.observations, batch.actions).mean()) == pytest.approx(5.0, rel=0.05)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critic.parameters(), strict=True))


def test_the_forecast_learns_what_moves():
    agent = constant_agent(1.0)
    torch.manual_seed(0)
    forecast = fitted_forecast(agent, 600)
    batch = agent.replay_buffer.sample(200)
    wrong = (forecast(batch.observations, batch.actions) - batch.next_observations).abs().sum(dim=1)
    still = (batch.observations - batch.next_observations).abs().sum(dim=1)
    assert wrong.mean() < 0.05 * still.mean()


def test_every_episode_is_another_model():
    env = Randomised(Drift, lambda rng: float(rng.uniform(-1, 1)), 0.0)
    drifts = [env.reset(seed=3)[1]["drift"], env.reset()[1]["drift"], env.reset(seed=3)[1]["drift"]]
    assert drifts[0] == drifts[2] != drifts[1]


def test_play_discounts_and_stops(learned):
    policy = exact_policy(learned, [], [])
    policy.default = type(
        "Still",
        (),
        {
            "observation_space": Drift.observation_space,
            "policy": learned.policy.default.policy,
            "predict": lambda self, batch, deterministic: (np.zeros((len(batch), 1), np.float32), None),
        },
    )()
    returns = play(policy, [Drift(0.0), Drift(0.3), Drift(0.0)], [0, 0, 1])
    assert returns.tolist() == [20.0, 1.0, 20.0]
    halves = play(policy, [Drift(0.0)], [0], discount=0.5)
    assert halves[0] == pytest.approx(2 - 0.5**19)


def test_worlds_are_models_too():
    """The search and the agents stand in two learned worlds, named by their numbers."""
    data = example_transitions()
    worlds = []
    for seed in range(2):
        model = ProbabilisticEnsemble(2, 1, (8,), learn_reward=True, learn_termination=True, max_epochs=1)
        model.fit(data, rng=torch.Generator().manual_seed(seed))
        worlds.append(World(model, Task("Example-v0", initial=lambda lanes, rng: data.obs[:lanes])))
    robust = learner(
        make=lambda number: LearnedEnv(worlds[number], horizon=8),
        nominal=0,
        search=every([0, 1]),
        draw=lambda rng: int(rng.integers(2)),
        default_timesteps=40,
        case_timesteps=40,
        agent_kwargs=SMALL | {"replay_buffer_class": DeviceReplayBuffer, "device": "cpu"},
    )
    robust.learn(120)
    assert {turn.worst for turn in robust.rounds} <= {0, 1}
    action, _ = robust.predict(data.obs[:3].numpy())
    assert action.shape == (3, 2)


def test_bad_input(learned):
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        learner(episodes=0)
    with pytest.raises(ValueError, match="n_steps must be 1"):
        learner(agent_kwargs=SMALL | {"n_steps": 3})
    with pytest.raises(ValueError, match=r"must be at least 200 .* got 150"):
        learner().learn(150)
    with pytest.raises(ValueError, match="has not learned yet"):
        learner().predict(np.zeros(2))
    with pytest.raises(ValueError, match="nothing to save"):
        learner().save("never")
    agent = DQN("MlpPolicy", "CartPole-v1", buffer_size=10)
    with pytest.raises(ValueError, match=r"ContinuousCritic .* got DQN"):
        unregularised_critic(agent, 1)
    with pytest.raises(ValueError, match="FastSAC has no replay memory"):
        learned.policy.default.replay_buffer.reset()
        fitted_forecast(learned.policy.default, 1)
