import copy
import io
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from learneddyn.core import DataError, Transitions, generator
from learneddyn.models.nets import BatchedMLP
from learneddyn.offline import BC, CQL, EDAC, IQL, SACN, TD3BC, Cosine, Diverged, OfflineSAC, OfflineTD3, ReBRAC
from learneddyn.spaces import Spaces, encode
from learneddyn.testing import check_policy

SMALL = {"policy_kwargs": {"net_arch": (16, 16)}, "batch_size": 32, "device": "cpu"}
LEARNERS = [BC, OfflineTD3, TD3BC, ReBRAC, IQL, OfflineSAC, SACN, EDAC, CQL]


class Walk(gym.Env):
    """Ends after five steps; pays the first action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        return self.np_random.normal(size=3).astype(np.float32), float(action[0]), False, self.steps == 5, {}


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_loaded_agent_goes_on_as_if_nothing_had_happened(kind, log, tmp_path):
    # Whatever depends on the share of training left would differ: the two halves do not know of each other.
    straight, halved = (kind("MlpPolicy", log, seed=3, actor_learning_rate=1e-3, **SMALL) for _ in range(2))
    straight.learn(5)
    straight.learn(7, reset_num_timesteps=False)
    halved.learn(5).save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", data=log, device="cpu")
    assert loaded.num_timesteps == 5
    loaded.learn(7, reset_num_timesteps=False)
    assert torch.equal(weights(loaded), weights(straight))


@pytest.mark.parametrize("kind", LEARNERS)
def test_policy_contract_and_no_side_effects(kind, log):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    agent, same, other = (kind("MlpPolicy", log, seed=seed, **SMALL).learn(3) for seed in (0, 0, 1))
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(weights(agent), weights(same))
    assert not torch.equal(weights(agent), weights(other))
    check_policy(agent, log.spaces)


def test_loading_without_data_predicts_but_does_not_learn(log):
    file = io.BytesIO()
    agent = TD3BC("MlpPolicy", log, seed=0, **SMALL).learn(2)
    agent.save(file)
    assert len(file.getvalue()) < 200_000  # nets and optimisers, not the data
    file.seek(0)
    loaded = TD3BC.load(file, device="cpu")
    obs = log.obs[:5].numpy()
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    with pytest.raises(DataError, match="no data to learn from"):
        loaded.learn(1)
    with pytest.raises(DataError, match="pass Transitions or a Minari id"):
        TD3BC("MlpPolicy")


def test_policies_are_saved_alone(log, tmp_path):
    agent = CQL("MlpPolicy", log, seed=0, **SMALL).learn(2)
    agent.policy.save(tmp_path / "policy")
    alone = type(agent.policy).load(tmp_path / "policy", device="cpu")
    obs = log.obs[:4].numpy()
    assert np.array_equal(alone.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])
    copied = copy.deepcopy(agent.policy)
    agent.learn(5)
    assert not torch.equal(copied.actor.mode(log.obs), agent.policy.actor.mode(log.obs))


def test_evaluation_happens_in_the_env_only_and_the_last_policy_stays(log):
    agent = TD3BC("MlpPolicy", log, env=Walk(), seed=0, eval_freq=2, n_eval_episodes=3, **SMALL)
    without = TD3BC("MlpPolicy", log, seed=0, **SMALL).learn(25)
    with pytest.raises(ValueError, match="nothing has been evaluated"):
        _ = without.final_return
    agent.learn(25)
    assert torch.equal(weights(agent), weights(without))
    steps, returns = zip(*agent.evaluations, strict=True)
    assert steps == (*range(2, 25, 2), 25)
    assert agent.final_return == pytest.approx(np.mean(returns[-10:]))
    agent.env.seed(0)
    assert returns[-1] == pytest.approx(evaluate_policy(agent, agent.env, 3)[0])


def test_an_env_of_other_spaces_is_refused(log):
    with pytest.raises(ValueError, match=r"the data has the observation_space .* is asked for"):
        BC("MlpPolicy", log, env=gym.make("Pendulum-v1"), device="cpu")


def test_sb3_callbacks(log, tmp_path):
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 6

    evaluation = EvalCallback(Monitor(Walk()), n_eval_episodes=2, eval_freq=2, verbose=0)
    agent = BC("MlpPolicy", log, env=Walk(), seed=0, **SMALL)  # SB3's EvalCallback asks for the learner's own env
    agent.learn(20, callback=[evaluation, CheckpointCallback(3, str(tmp_path)), Stop()])
    assert agent.num_timesteps == 6
    assert len(list(tmp_path.glob("*.zip"))) == 2
    assert np.isfinite(evaluation.last_mean_reward)


def test_without_an_env_there_are_callbacks_and_a_bar_and_one_may_come_later(log, tmp_path, capsys):
    agent = BC("MlpPolicy", log, seed=0, **SMALL)
    agent.learn(4, callback=CheckpointCallback(2, str(tmp_path)), progress_bar=True)
    assert len(list(tmp_path.glob("*.zip"))) == 2
    assert "4/4" in capsys.readouterr().err
    agent.set_env(Walk())
    agent.learn(2)
    assert np.isfinite(agent.final_return)


def test_the_log_holds_means_and_a_nan_stops(log, listen, monkeypatch):
    agent = BC("MlpPolicy", log, seed=0, **SMALL)
    lines = listen(agent)
    figures = iter([1.0, 3.0, 5.0, float("nan")])
    monkeypatch.setattr(agent, "_update", lambda: {"actor_loss": torch.tensor(next(figures))})
    agent.learn(2, log_interval=2)
    assert lines[-1]["train/actor_loss"] == 2.0
    with pytest.raises(Diverged, match="BC diverged before update 2: actor_loss"):
        agent.learn(2)


def test_schedules(log):
    agent = BC("MlpPolicy", log, seed=0, learning_rate=1e-3, actor_learning_rate=Cosine(4e-3), **SMALL)
    rates = []

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            rates.append(agent.policy.actor.optimizer.param_groups[0]["lr"])
            return True

    agent.learn(4, callback=Note())
    wanted = [4e-3 * 0.5 * (1 + np.cos(np.pi * done / 4)) for done in range(4)]
    assert rates == pytest.approx(wanted)


def test_rewards_are_shifted_then_scaled(log):
    agent = OfflineTD3("MlpPolicy", log, reward_shift=-1.0, reward_scale=0.5, seed=0, **SMALL)
    torch.testing.assert_close(agent.replay.unpack(agent.replay.rows()).reward, (log.reward - 1) * 0.5)


def test_observations_are_standardised_inside(log):
    """Any affine change of the observations' units leaves the learned policy as it was."""
    stretch, move = torch.tensor([2.0, 0.25, 8.0]), torch.tensor([1.0, -2.0, 0.5])
    other = replace(log, obs=log.obs * stretch + move, next_obs=log.next_obs * stretch + move)
    agents = [TD3BC("MlpPolicy", data, seed=0, **SMALL) for data in (log, other)]
    for agent in agents:
        agent.policy.normaliser.fit(agent.replay.unpack(agent.replay.rows()).obs, slack=0.0)
        agent.learn(20)
    one, two = agents[0].policy.actor.mode(log.obs), agents[1].policy.actor.mode(other.obs)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def test_dict_and_discrete_observations(log):
    """Columns are those of `learneddyn.spaces.encode`, whatever the order of the keys."""
    space = gym.spaces.Dict({"z": gym.spaces.Box(-9.0, 9.0, (2,)), "a": gym.spaces.Discrete(3)})
    rng = np.random.default_rng(0)
    batch = {"z": rng.normal(size=(len(log), 2)).astype(np.float32), "a": rng.integers(3, size=len(log))}
    obs = torch.as_tensor(encode(space, batch))
    data = replace(log, obs=obs, next_obs=obs.roll(-1, 0), spaces=Spaces(space, log.spaces.action))
    agent = BC("MlpPolicy", data, seed=0, **SMALL).learn(3)
    actions, _ = agent.predict({key: value[:6] for key, value in batch.items()}, deterministic=True)
    assert np.allclose(actions, agent.policy.actor.mode(obs[:6]).detach(), atol=1e-6)


def test_actions_come_out_in_their_box(log):
    box = gym.spaces.Box(np.array([0, -3], np.float32), np.array([4, 1], np.float32))
    action = (log.action + 1) * torch.tensor([2.0, 2.0]) + torch.tensor([0.0, -3.0])
    moved = replace(log, action=action, spaces=Spaces(log.spaces.observation, box))
    agents = [BC("MlpPolicy", data, seed=0, **SMALL).learn(30) for data in (log, moved)]
    plain, boxed = (agent.predict(log.obs.numpy(), deterministic=True)[0] for agent in agents)
    assert np.allclose((plain + 1) * 2 + [0.0, -3.0], boxed, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        (BC, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (BC, {"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        (BC, {"reward_scale": "big"}, "reward_scale must be a number or 'return_range', got 'big'"),
        (BC, {"policy_kwargs": {"actor": "tanh"}}, "actor must be one of .* got 'tanh'"),
        (TD3BC, {"alpha": 0.0}, "alpha must be above 0, got 0"),
        (ReBRAC, {"critic_bc": -1.0}, "critic_bc must be at least 0, got -1"),
        (IQL, {"expectile": 1.0}, "expectile must be between 0 and 1, got 1"),
        (EDAC, {"n_critics": 1}, "diversity must be 0 where there is one critic"),
        (CQL, {"conservatism": -5.0}, "conservatism must be at least 0, got -5"),
        (CQL, {"ent_coef": "learn"}, "ent_coef must be 'auto' or a number, got 'learn'"),
    ],
)
def test_arguments_outside_their_range(log, kind, argument, message):
    with pytest.raises(ValueError, match=message):
        kind("MlpPolicy", log, **({"device": "cpu"} | argument))


@pytest.mark.parametrize("normalise", [False, True])
def test_batched_nets_equal_single_ones(normalise):
    net = BatchedMLP(3, (4, 8, 6, 2), normalise=normalise, rng=generator(0))
    rows, own = torch.randn(5, 4), torch.randn(3, 5, 4)
    for x in (rows, own):
        for index, out in enumerate(net(x)):
            layers = []
            for layer, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
                linear = torch.nn.Linear(*weight.shape[1:])
                linear.weight.data, linear.bias.data = weight[index].T, bias[index, 0]
                layers += [linear, torch.nn.ReLU()]
                if normalise and layer < 2:
                    layers.append(torch.nn.LayerNorm(weight.shape[2]))
            single = torch.nn.Sequential(*layers[:5] if not normalise else layers[:7])
            torch.testing.assert_close(single(x if x.ndim == 2 else x[index]), out)


def test_transitions_of_the_caller_stay_as_they_were(log):
    before: Transitions = copy.deepcopy(log)
    IQL("MlpPolicy", log, seed=0, **SMALL).learn(2)
    for name, column in before.tensors().items():
        assert torch.equal(column, getattr(log, name)), name
