import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from learneddyn.core import generator
from learneddyn.evaluation import evaluate, imagined, objective_mismatch, real_vs_imagined
from learneddyn.evaluation.returns import Imagined, Returns
from learneddyn.world import World
from learneddyn.world.trust import within_box


class Balance:
    """Pushes the cart under the pole; ends at very different times from different starts."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return (observation[:, 2] > 0).astype(np.int64), state


class Counting:
    """A recurrent policy: its state counts the steps since the episode began."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        before = np.zeros(len(observation)) if state is None else state[0]
        count = np.where(episode_start, 0, before) + 1
        return (count.astype(int) // 5) % 2, (count,)


def by_hand(policy, real_id, seeds):
    returns, lengths = [], []
    env = gym.make(real_id)
    for seed in seeds:
        obs, _ = env.reset(seed=int(seed))
        total, steps, done, state, first = 0.0, 0, False, None, True
        while not done:
            action, state = policy.predict(obs[None], state, np.array([first]), True)
            obs, reward, terminated, truncated, _ = env.step(action[0])
            total, steps, done, first = total + float(reward), steps + 1, terminated or truncated, False
        returns.append(total)
        lengths.append(steps)
    return np.array(returns), np.array(lengths)


@pytest.mark.parametrize("lanes", [1, 3, 50])
def test_evaluate_equals_a_loop_written_by_hand_for_any_number_of_lanes(lanes):
    got = evaluate(Balance(), "CartPole-v1", episodes=7, seed=4, lanes=lanes)
    returns, lengths = by_hand(Balance(), "CartPole-v1", got.seeds)
    np.testing.assert_array_equal(got.returns, returns)
    np.testing.assert_array_equal(got.lengths, lengths)
    assert len(set(lengths)) > 2, "the case must mix short and long episodes"
    assert got.steps == lengths.sum()


def test_evaluate_equals_the_hand_loop_on_mujoco(constant):
    got = evaluate(constant([0.05]), "InvertedPendulum-v5", episodes=4, lanes=2, record=True)
    returns, lengths = by_hand(constant([0.05]), "InvertedPendulum-v5", got.seeds)
    np.testing.assert_array_equal(got.returns, returns)
    np.testing.assert_array_equal(got.lengths, lengths)
    assert got.terminated.all()


def test_recorded_rows_are_whole_episodes():
    got = evaluate(Balance(), "CartPole-v1", episodes=5, lanes=3, record=True)
    rows = got.transitions.check()
    assert len(rows) == got.steps
    assert torch.bincount(rows.episode).tolist() == got.lengths.tolist()
    assert rows.spaces.action == gym.spaces.Discrete(2)
    inside = rows.episode[1:] == rows.episode[:-1]
    assert torch.equal(rows.obs[1:][inside], rows.next_obs[:-1][inside])
    first = torch.cat([torch.tensor([True]), ~inside])
    assert torch.equal(rows.obs[first], got.starts)
    last = torch.cat([~inside, torch.tensor([True])])
    assert rows.terminated[last].tolist() == got.terminated.tolist()
    assert not rows.terminated[~last].any()


def test_a_recurrent_policy_gets_its_state_and_the_episode_starts():
    got = evaluate(Counting(), "CartPole-v1", episodes=5, lanes=2)
    returns, _ = by_hand(Counting(), "CartPole-v1", got.seeds)
    np.testing.assert_array_equal(got.returns, returns)


def test_time_limit_is_no_termination():
    got = evaluate(Balance(), "CartPole-v1", episodes=2, env_kwargs={"max_episode_steps": 6}, record=True)
    assert got.lengths.tolist() == [6, 6]
    assert not got.terminated.any()
    assert not got.transitions.terminated.any()


def test_a_stochastic_policy_is_reproducible_and_leaves_the_global_generators_alone():
    agent = PPO("MlpPolicy", "CartPole-v1", device="cpu", seed=0)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    runs = [evaluate(agent, "CartPole-v1", episodes=4, seed=s, deterministic=False).returns.tolist() for s in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.get_rng_state())


class Clock(gym.Env):
    """Dict observations and a Discrete action; pays the action and ends after four steps."""

    observation_space = gym.spaces.Dict(
        {"time": gym.spaces.Box(0, 9, (2,), np.float32), "kind": gym.spaces.Discrete(3)}
    )
    action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.kind = 0, int(self.np_random.integers(3))
        return self.seen(), {}

    def step(self, action):
        self.time += 1
        return self.seen(), float(action), self.time == 4, False, {}

    def seen(self):
        return {"time": np.full(2, self.time, np.float32), "kind": self.kind}


def test_dict_observations_and_discrete_actions():
    gym.register("Clock-v0", Clock, max_episode_steps=10, disable_env_checker=True)
    try:
        agent = PPO("MultiInputPolicy", gym.make("Clock-v0"), device="cpu", seed=0, n_steps=8, batch_size=8)
        got = evaluate(agent, "Clock-v0", episodes=5, lanes=2, record=True)
    finally:
        del gym.registry["Clock-v0"]
    assert got.lengths.tolist() == [4] * 5
    rows = got.transitions
    assert rows.obs.shape == (20, 5)
    assert torch.equal(rows.reward, rows.action.argmax(dim=1).float())
    assert (got.starts[:, :3].sum(dim=1) == 1).all(), "the kind is one-hot"


def test_more_episodes_continue_the_same_list():
    few, many = (evaluate(Balance(), "CartPole-v1", episodes=n, seed=1).returns for n in (3, 6))
    np.testing.assert_array_equal(few, many[:3])


def test_imagined_returns_of_a_known_line(linear, constant, line_task):
    # x doubles from 1: 2, 4, 8, 16 > 10 ends the episode at step 4, and each step pays 1.
    world = World(linear([[[2.0]]]), line_task(), sampler="tsinf")
    got = imagined(constant([0.0]), world, episodes=3, rng=generator(0))
    assert got.returns.tolist() == [4.0] * 3
    assert got.lengths.tolist() == [4] * 3
    assert got.terminated.all()
    assert got.untrusted_share == 0
    short = imagined(constant([0.0]), world, episodes=2, horizon=2, rng=generator(0))
    assert short.returns.tolist() == [2.0, 2.0]
    assert not short.terminated.any()
    from_five = imagined(constant([0.0]), world, episodes=2, start=torch.tensor([[5.0], [2.5]]), rng=generator(0))
    assert from_five.lengths.tolist() == [2, 3]


def test_imagined_leaves_the_penalty_out_and_the_world_as_it_was(linear, constant, line_task):
    world = World(
        linear([[[1.0]]]),
        line_task(limit=10),
        penalty=lambda obs, action, prediction, after: torch.ones(len(obs)),
        penalty_weight=5.0,
    )
    assert imagined(constant([0.0]), world, episodes=2, rng=generator(0)).returns.tolist() == [10.0, 10.0]
    assert world.penalty_weight == 5.0
    assert world.penalty is not None


def test_untrusted_steps_end_the_episode_unpaid_and_are_counted(linear, constant, line_task):
    trust = within_box(torch.tensor([0.0]), torch.tensor([5.0]))
    world = World(linear([[[2.0]]]), line_task(), trust=trust)
    got = imagined(constant([0.0]), world, episodes=2, rng=generator(0))
    assert got.returns.tolist() == [2.0, 2.0], "2 and 4 are trusted, 8 is not"
    assert got.untrusted.all()
    assert not got.terminated.any()
    assert got.untrusted_share == pytest.approx(1 / 3)


def test_imagining_in_a_perfect_world_from_the_same_starts_gives_no_gap(linear, constant, line_task):
    world = World(linear([[[2.0]]]), line_task())
    starts = torch.tensor([[1.0], [2.0], [4.0]])
    dream = imagined(constant([0.0]), world, episodes=3, start=starts, rng=generator(0))
    zeros = np.zeros(3, np.int64)
    truth = Returns(dream.returns.copy(), dream.lengths, dream.terminated, zeros, starts)
    [row] = real_vs_imagined(truth, dream, paired_episodes=True)
    assert row.gap == (0.0, 0.0, 0.0)


def test_the_table_has_a_row_per_seed_and_one_over_seeds():
    def real(values):
        values = np.array(values)
        n = len(values)
        return Returns(values, np.ones(n, np.int64), np.zeros(n, bool), np.arange(n), torch.zeros(n, 1))

    def dream(values):
        values = np.array(values)
        n = len(values)
        return Imagined(values, np.ones(n, np.int64), np.zeros(n, bool), np.zeros(n, bool))

    rows = real_vs_imagined([real([1.0, 3.0]), real([5.0, 7.0])], [dream([12.0, 12.0]), dream([16.0, 16.0])])
    assert [row.gap.value for row in rows] == [10.0, 10.0, 10.0]
    assert rows[-1].real.value == 4.0
    assert (rows[-1].gap.low, rows[-1].gap.high) == (10.0, 10.0), "paired by seed: both seeds promise ten too much"


def test_objective_mismatch_sees_a_perfect_and_a_missing_relation():
    nll = np.linspace(0, 1, 30)
    perfect = objective_mismatch(nll, -nll)
    assert perfect.spearman.value == perfect.spearman_top.value == -1.0
    none = objective_mismatch(nll, np.random.default_rng(0).normal(size=30))
    assert none.spearman.low < 0 < none.spearman.high
    assert none.models == 30


def test_bad_input_names_itself(linear, constant, line_task):
    policy, world = constant([0.0]), World(linear([[[2.0]]]), line_task(limit=None))
    with pytest.raises(ValueError, match="got episodes=0, lanes=8"):
        evaluate(policy, "CartPole-v1", episodes=0)
    with pytest.raises(ValueError, match="Line-v0 has no time limit: pass horizon="):
        imagined(policy, world, rng=generator(0))
    with pytest.raises(ValueError, match="got horizon=0"):
        imagined(policy, world, horizon=0, rng=generator(0))
    with pytest.raises(ValueError, match="only finite numbers"):
        imagined(policy, world, horizon=3, start=torch.tensor([[torch.nan]]), rng=generator(0))
    with pytest.raises(ValueError, match="same seeds, got 0 and 0"):
        real_vs_imagined([], [])


def test_an_environment_without_a_time_limit_is_refused():
    class Endless(gym.Env):
        observation_space = action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    gym.register("Endless-v0", Endless, disable_env_checker=True)
    try:
        with pytest.raises(ValueError, match="Endless-v0 has no time limit"):
            evaluate(Balance(), "Endless-v0", episodes=1)
    finally:
        del gym.registry["Endless-v0"]
