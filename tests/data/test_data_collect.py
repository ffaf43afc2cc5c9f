"""The collector against hand-stepped environments, in all three autoreset modes."""

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from learneddyn import data
from learneddyn.spaces import decode, encode


class Clock(gym.Env):
    """Counts up to a limit that its seed draws; the observation says lane-independent, unmistakable numbers."""

    observation_space = spaces.Dict(count=spaces.Discrete(12), mark=spaces.Box(-1e6, 1e6, (2,), np.float64))
    action_space = spaces.Tuple((spaces.Discrete(3, start=-1), spaces.Box(-1.0, 1.0, (2,), np.float32)))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.limit = 0, int(self.np_random.integers(1, 10))
        self.mark = float(self.np_random.integers(1000)) * 100
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        self.mark += 1 + float(action[0]) / 4
        ended = self.count >= self.limit
        return self._obs(), float(action[1][0]), ended and self.limit % 2 == 0, ended and self.limit % 2 == 1, {}

    def _obs(self):
        return {"count": self.count, "mark": np.array([self.mark, -self.mark])}


def replayed(env, transitions, episode, seed):
    """Step ``env`` by hand through the recorded actions of an episode; yield what it says beside what was recorded."""
    rows = (transitions.episode == episode).nonzero().flatten().tolist()
    obs, _ = env.reset(seed=seed)
    actions = decode(env.action_space, transitions.action[rows].numpy())
    for index, row in enumerate(rows):
        action = tuple(a[index] for a in actions) if isinstance(actions, tuple) else actions[index]
        before = obs
        obs, reward, terminated, truncated, _ = env.step(action)
        yield row, before, reward, obs, terminated, truncated, index == len(rows) - 1


def flat(space, obs):
    if isinstance(obs, dict):
        obs = {key: np.asarray(value)[None] for key, value in obs.items()}
    else:
        obs = np.asarray(obs)[None]
    return encode(space, obs)[0].tolist()


@pytest.mark.parametrize("make", [Clock, lambda: gym.make("InvertedPendulum-v5"), lambda: gym.make("CartPole-v1")])
@pytest.mark.parametrize("lanes", [1, 3])
def test_every_episode_replays_exactly_from_its_seed(make, lanes, datasets):
    transitions = data.collect(make, "mine/replay-v0", steps=100, lanes=lanes, seed=5, progress=False)
    dataset = minari.load_dataset("mine/replay-v0")
    seeds = [meta["seed"] for meta in dataset.storage.get_episode_metadata(range(dataset.total_episodes))]
    assert len(transitions) == 100
    assert len(set(seeds)) == len(seeds) == int(transitions.episode.max()) + 1
    env, cut = make(), 0
    for episode, seed in enumerate(seeds):
        for row, before, reward, after, terminated, truncated, last in replayed(env, transitions, episode, seed):
            assert transitions.obs[row].tolist() == flat(env.observation_space, before)
            assert transitions.next_obs[row].tolist() == flat(env.observation_space, after)
            assert transitions.reward[row] == np.float32(reward)
            assert bool(transitions.terminated[row]) == bool(terminated)
            assert last or not (terminated or truncated)
            cut += last and not (terminated or truncated)
    assert cut <= lanes


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_foreign_vector_envs_of_every_autoreset_mode(mode):
    vector = SyncVectorEnv([Clock] * 4, autoreset_mode=mode)
    transitions = data.collect(vector, steps=203, seed=1, progress=False)
    assert len(transitions) == 203
    count, mark = transitions.obs[:, :12].argmax(1), transitions.obs[:, 12]
    # A reset row would show as a count that falls or a mark that jumps inside one row.
    assert torch.equal(transitions.next_obs[:, :12].argmax(1), count + 1)
    assert ((transitions.next_obs[:, 12] - mark - 1).abs() <= 0.25).all()
    same = transitions.episode[1:] == transitions.episode[:-1]
    assert torch.equal(transitions.obs[1:][same], transitions.next_obs[:-1][same])
    assert (count[1:][~same] == 0).all()
    assert count[0] == 0
    assert transitions.episode.unique().tolist() == list(range(int(transitions.episode.max()) + 1))
    assert not (transitions.terminated[:-1] & same).any()
    vector.close()


def test_modes_agree_on_the_rows_of_the_first_episodes():
    """The first episode of each lane depends on the reset seeds and actions only, not on the mode."""
    first = {}
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        transitions = data.collect(
            SyncVectorEnv([Clock] * 2, autoreset_mode=mode), steps=60, seed=1, progress=False, lanes=2
        )
        first[mode] = transitions[transitions.episode < 2]
    for name, column in first[AutoresetMode.NEXT_STEP].tensors().items():
        assert torch.equal(column, first[AutoresetMode.SAME_STEP].tensors()[name]), name


@pytest.mark.parametrize("lanes", [1, 5])
def test_same_seed_same_rows_and_another_seed_others(lanes):
    def run(seed):
        return data.collect("Pendulum-v1", steps=450, lanes=lanes, seed=seed, progress=False)

    first, again, other = run(0), run(0), run(1)
    for name, column in first.tensors().items():
        assert torch.equal(column, again.tensors()[name]), name
    assert not torch.equal(first.obs, other.obs)
    assert not first.terminated.any()


def test_episodes_are_numbered_by_their_start():
    transitions = data.collect(Clock, steps=64, lanes=4, progress=False)
    first_four = [int((transitions.episode == k).nonzero()[0]) for k in range(4)]
    assert first_four == sorted(first_four)
    assert transitions.obs[first_four, 12].unique().numel() == 4
    assert (transitions.episode.diff() >= 0).all()


def test_random_actions_are_uniform():
    transitions = data.collect("CartPole-v1", steps=4000, progress=False)
    share = transitions.action.mean(0)
    assert (share - 0.5).abs().max() < 4 * 0.5 / 4000**0.5
    transitions = data.collect("Pendulum-v1", steps=4000, progress=False)
    counts = torch.histc(transitions.action, bins=8, min=-2, max=2) / 4000
    assert (counts - 1 / 8).abs().max() < 4 * (1 / 8 * 7 / 8 / 4000) ** 0.5


class Constant:
    """A policy that always does the same, and counts how it is asked."""

    def __init__(self, value):
        self.value, self.calls = value, []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.calls.append((state, episode_start.copy(), deterministic))
        state = np.zeros(len(observation)) if state is None else state
        state = np.where(episode_start, 0, state + 1)
        return np.full((len(observation), 1), self.value, np.float32), state


def test_policies_get_their_state_and_episode_starts():
    policy = Constant(0.5)
    transitions = data.collect(
        "InvertedPendulum-v5", steps=120, lanes=2, behaviour=policy, deterministic=True, progress=False
    )
    assert (transitions.action == 0.5).all()
    assert policy.calls[0][0] is None
    assert policy.calls[0][1].all()
    assert all(deterministic for _, _, deterministic in policy.calls)
    starts = sum(int(started.sum()) for _, started, _ in policy.calls)
    assert starts == int(transitions.episode.max()) + 1


def test_mixtures_are_drawn_per_episode_in_proportion():
    behaviour = [(3.0, Constant(1.0)), (1.0, Constant(-1.0)), (4.0, "random")]
    transitions = data.collect("InvertedPendulum-v5", steps=6000, behaviour=behaviour, progress=False)
    share = {"high": 0, "low": 0, "random": 0}
    episodes = int(transitions.episode.max()) + 1
    length = torch.bincount(transitions.episode).float()
    total = torch.zeros(episodes).index_add_(0, transitions.episode, transitions.action[:, 0])
    spread = torch.zeros(episodes).index_add_(0, transitions.episode, (transitions.action[:, 0].abs() - 1).abs())
    constant = spread == 0
    share["high"] = float((constant & (total == length)).float().mean())
    share["low"] = float((constant & (total == -length)).float().mean())
    share["random"] = float((~constant).float().mean())
    assert sum(share.values()) == pytest.approx(1.0)  # no episode mixes two behaviours
    for name, weight in {"high": 3 / 8, "low": 1 / 8, "random": 1 / 2}.items():
        assert share[name] == pytest.approx(weight, abs=4 * (weight * (1 - weight) / episodes) ** 0.5), name


def test_epsilon_and_noise():
    action = data.collect("Pendulum-v1", steps=4000, behaviour=Constant(0.5), epsilon=0.25, progress=False).action
    assert float((action != 0.5).float().mean()) == pytest.approx(0.25, abs=0.03)
    action = data.collect("Pendulum-v1", steps=4000, behaviour=Constant(0.5), noise=0.1, progress=False).action
    assert float(action.mean()) == pytest.approx(0.5, abs=0.015)
    assert float(action.std()) == pytest.approx(0.1 * 2, rel=0.05)
    action = data.collect("Pendulum-v1", steps=400, behaviour=Constant(2.0), noise=0.5, progress=False).action
    assert action.max() == 2.0


def test_sb3_policies_are_reproducible_and_leave_the_global_stream_alone():
    from stable_baselines3 import PPO

    policy = PPO("MlpPolicy", "Pendulum-v1", seed=0, n_steps=64)
    torch.manual_seed(3)
    first = data.collect("Pendulum-v1", steps=300, behaviour=policy, progress=False)
    drawn = torch.rand(1)
    again = data.collect("Pendulum-v1", steps=300, behaviour=policy, progress=False)
    assert torch.equal(first.action, again.action)
    assert first.action.unique().numel() > 250
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    mode = data.collect("Pendulum-v1", steps=30, lanes=1, behaviour=policy, deterministic=True, progress=False)
    assert np.allclose(mode.action, policy.predict(mode.obs.numpy(), deterministic=True)[0], atol=1e-6)


def test_discrete_policies():
    class Left:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.zeros(len(observation), np.int64), None

    transitions = data.collect("CartPole-v1", steps=50, behaviour=Left(), epsilon=0.0, progress=False)
    assert transitions.action.tolist() == [[1.0, 0.0]] * 50


def test_an_env_handed_in_stays_open_and_has_one_lane():
    env = Clock()
    closed = []
    env.close = lambda: closed.append(True)
    assert len(data.collect(env, steps=20, lanes=8, progress=False)) == 20
    assert not closed


def test_env_kwargs_reach_the_env_and_the_stored_spec(datasets):
    data.collect("Pendulum-v1", "mine/moon-v0", steps=5, env_kwargs={"g": 1.62}, progress=False)
    assert minari.load_dataset("mine/moon-v0").recover_environment().unwrapped.g == 1.62


def test_vector_env_specs_recover_the_single_env(datasets):
    vector = gym.make_vec("CartPole-v1", num_envs=2)
    data.collect(vector, "mine/cart-v0", steps=50, progress=False)
    env = minari.load_dataset("mine/cart-v0").recover_environment()
    assert env.spec.id == "CartPole-v1"
    assert env.spec.max_episode_steps == 500
    assert env.observation_space == vector.single_observation_space


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"behaviour": "expert"}, "a behaviour is 'random' or a policy.*got 'expert'"),
        ({"behaviour": []}, "at least one"),
        ({"behaviour": [(0.0, "random")]}, "weight > 0"),
        ({"behaviour": [(1.0, "medium")]}, "a behaviour is 'random' or a policy"),
        ({"epsilon": 1.5}, "epsilon must be between 0 and 1, got 1.5"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"behaviour": Constant(5.0)}, r"Constant returned actions from 5.0 to 5.0, outside Box\(-2.0, 2.0"),
        ({"env": "CartPole-v1", "noise": 0.1}, "noise needs a bounded Box action space"),
    ],
)
def test_bad_arguments(wrong, message):
    arguments = {"env": "Pendulum-v1", "steps": 10, "progress": False} | wrong
    with pytest.raises(ValueError, match=message):
        data.collect(arguments.pop("env"), **arguments)


def test_lanes_of_different_spaces_are_refused():
    kinds = iter(["Pendulum-v1", "CartPole-v1"])
    with pytest.raises(ValueError, match="all lanes must have the same spaces"):
        data.collect(lambda: gym.make(next(kinds)), steps=10, lanes=2, progress=False)


def test_a_spec_that_cannot_be_written_costs_no_data(datasets, monkeypatch):
    monkeypatch.setitem(gym.registry, "Local-v0", EnvSpec("Local-v0", entry_point=Clock, max_episode_steps=9))
    with pytest.warns(UserWarning, match=r"will not know Local-v0.*entry_point='module:Class'"):
        data.collect("Local-v0", "mine/local-v0", steps=20, progress=False)
    assert len(data.load("mine/local-v0")) == 20
