"""Hybrid internal model: histories, assignments, what trains the estimator and what does not, copies, estimates."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO, SAC

from learneddyn.agents import HIMCallback, HIMExtractor, PrivilegedHistory
from learneddyn.agents.him import HIMTrainer, Successions, rollout_successions, sinkhorn

KWARGS = {"features_extractor_class": HIMExtractor, "net_arch": [16]}


def pendulum(limit=20):
    return PrivilegedHistory(gym.make("Pendulum-v1", max_episode_steps=limit), steps=4)


def extractor(**arguments):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HIMExtractor(pendulum().observation_space, **arguments)


def successions(rows=600):
    """Histories of circular motion at a constant speed: the speed is hidden, the angle is seen."""
    rng = np.random.default_rng(0)
    angle, speed = rng.uniform(-3, 3, (rows, 1)), rng.uniform(-4, 4, (rows, 1))
    angles = angle + 0.1 * speed * np.arange(5)
    steps = np.stack([np.cos(angles), np.sin(angles), np.zeros_like(angles)], axis=2)
    steps, hidden = torch.from_numpy(steps).float(), torch.from_numpy(speed).float()
    return Successions(steps[:, :4], steps[:, 4], hidden)


def test_histories_hold_what_was_shown_and_done():
    env = pendulum()
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert np.ptp(obs["history"], axis=0).max() == 0, "copies of the first row"
    assert obs["history"][0, 2] == 0
    env.action_space.seed(0)
    shown, actions, before = [obs["history"][-1, :2]], [0.0], obs["history"].copy()
    for _ in range(6):
        action = env.action_space.sample()
        obs, *_ = env.step(action)
        shown.append(obs["history"][-1, :2])
        actions.append(float(action[0]))
    state = env.unwrapped.state
    assert obs["history"][-1, 0] == pytest.approx(math.cos(state[0]), abs=1e-6)
    assert obs["hidden"] == pytest.approx(state[1], abs=1e-6)
    assert np.array_equal(obs["history"][:, :2], np.stack(shown[-4:]))
    assert obs["history"][:, 2] == pytest.approx(actions[-4:], abs=1e-6)
    assert not np.array_equal(before, obs["history"]), "earlier observations are not written over"


def test_specs_are_written_and_read():
    again = gym.make(gym.envs.registration.EnvSpec.from_json(pendulum().spec.to_json()))
    assert again.observation_space["history"].shape == (4, 3)


def test_assignments_are_balanced():
    scores = 2 * torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) - 1
    scores[:, 0] = 1.0  # every row's favourite
    share = sinkhorn(scores, rounds=50)
    assert torch.allclose(share.sum(dim=1), torch.ones(500), atol=1e-5)
    assert torch.allclose(share.sum(dim=0), torch.full((8,), 500 / 8), rtol=0.02)
    assert sinkhorn(scores).sum(dim=0).max() < 0.5 * 500


def test_without_knowledge_the_swap_is_the_entropy_of_the_prototypes():
    model = extractor(prototypes=8)
    with torch.no_grad():
        model.prototypes.copy_(model.prototypes[:1].expand(8, -1))
    assert float(model.loss(successions(50)).swap.detach()) == pytest.approx(math.log(8) / 8, rel=1e-5)


def test_features_are_the_newest_row_the_estimate_and_the_code():
    model, rows = extractor(), successions(5)
    out = model({"history": rows.history, "hidden": rows.hidden})
    assert out.shape == (5, model.features_dim) == (5, 3 + 1 + 16)
    assert torch.equal(out[:, :3], rows.history[:, -1])
    assert torch.allclose(out[:, 4:].norm(dim=1), torch.ones(5))
    assert not out.requires_grad
    other = model({"history": rows.history, "hidden": rows.hidden + 1})
    assert torch.equal(out, other), "what is hidden is never looked at"


def test_the_estimate_is_learned_and_prototypes_are_used():
    rows, test = successions(), successions(700).rows(torch.arange(600, 700))
    trainer = HIMTrainer(extractor(), 2e-3)
    trainer.extractor.observe(rows)
    trainer.epochs(rows, 40, 100, torch.Generator().manual_seed(0))
    said, code = (part.detach() for part in trainer.extractor.estimate(test.history))
    assert 1 - (said - test.hidden).square().mean() / test.hidden.var() > 0.9
    assert len((code @ trainer.extractor.prototypes.T).argmax(dim=1).unique()) >= 4
    trainer.extractor.normalise_prototypes()
    norms = trainer.extractor.prototypes.detach().norm(dim=1)
    assert torch.allclose(norms, torch.ones(32), atol=1e-6)
    assert all(parameter.grad is None for parameter in trainer.extractor.parameters())


def test_moments_are_those_of_all_rows():
    model, rows = extractor(), successions()
    for part in torch.arange(600).split(70):
        model.observe(rows.rows(part))
    assert torch.allclose(model.hidden_mean, rows.hidden.double().mean(dim=0), atol=1e-5)
    expected = rows.after.std(dim=0, correction=0)
    expected[2] = 1.0  # a column that never changes is divided by 1
    assert torch.allclose(model._std("row"), expected, atol=1e-4)


def test_moments_keep_their_digits_beside_large_means():
    model, rows = extractor(), successions()
    far = Successions(rows.history, 0.1 * rows.after + 1e4, rows.hidden + 3e6)
    for part in torch.arange(600).split(7):
        model.observe(far.rows(part))
    for name, column in (("row", far.after), ("hidden", far.hidden)):
        wanted = column.double().std(dim=0, correction=0)
        wanted[wanted == 0] = 1.0
        assert torch.allclose(model._std(name).double(), wanted, rtol=1e-5)
        assert torch.allclose(getattr(model, f"{name}_mean"), column.double().mean(dim=0), rtol=1e-12)
    assert float(model.seen) == 600


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    def agent():
        kwargs = KWARGS | {"features_extractor_kwargs": {"hidden": [16], "prototypes": 8}}
        return PPO("MultiInputPolicy", pendulum(), n_steps=32, batch_size=16, n_epochs=2, policy_kwargs=kwargs, seed=0)

    whole = agent()
    whole.learn(128, callback=HIMCallback(batch_size=16))
    first = agent()
    first.learn(64, callback=HIMCallback(batch_size=16))
    first.save(tmp_path / "agent")
    chance = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002  # Stable-Baselines3's
    resumed = PPO.load(tmp_path / "agent", env=first.get_env(), force_reset=False)
    torch.set_rng_state(chance[0])
    np.random.set_state(chance[1])  # noqa: NPY002
    resumed.learn(64, callback=HIMCallback(batch_size=16), reset_num_timesteps=False)
    want, got = (model.policy.state_dict() for model in (whole, resumed))
    state = {name: value for name, value in want.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, got[name]) for name, value in state.items())
    optimizers = [model.policy.features_extractor.optimizer.state_dict()["state"] for model in (whole, resumed)]
    assert len(optimizers[0]) == len(list(whole.policy.features_extractor.parameters()))
    for number, moments in optimizers[0].items():
        assert float(moments["step"]) == 4 * 5 * 2, "four rollouts, five epochs, two batches"
        assert all(torch.equal(value, optimizers[1][number][name]) for name, value in moments.items())


def weights(agent):
    found = [module for module in agent.policy.modules() if isinstance(module, HIMExtractor)]
    return [torch.cat([p.detach().flatten() for p in module.parameters()]) for module in found]


def test_only_the_callback_trains_the_estimator():
    def agent():
        return PPO("MultiInputPolicy", pendulum(), n_steps=64, batch_size=64, n_epochs=2, policy_kwargs=KWARGS, seed=0)

    alone, beside = agent(), agent()
    before = weights(alone)[0].clone()
    alone.learn(128)
    assert torch.equal(weights(alone)[0], before), "no gradient of the policy reaches it"
    beside.learn(128, callback=HIMCallback(batch_size=32))
    assert not torch.equal(weights(beside)[0], before)


def test_rollouts_give_pairs_within_episodes():
    agent = PPO("MultiInputPolicy", pendulum(limit=10), n_steps=32, batch_size=32, n_epochs=1, policy_kwargs=KWARGS)
    seen = {}

    class Keep(HIMCallback):
        def _on_rollout_end(self):
            seen["rows"] = rollout_successions(self.model)
            seen["now"] = rollout_successions(self.model, ahead=False).hidden
            super()._on_rollout_end()

    agent.learn(32, callback=Keep(batch_size=32))
    rows = seen["rows"]
    assert len(rows.after) == 31 - 3
    step = (rows.after[:, :2] - rows.history[:, -1, :2]).norm(dim=1)
    assert step.max() < 0.5, "a pendulum does not jump between two steps"
    turned = torch.linalg.cross(
        *(torch.nn.functional.pad(x, (0, 1)) for x in (rows.history[:, -1, :2], rows.after[:, :2]))
    )
    assert torch.allclose(turned[:, 2].arcsin() / 0.05, rows.hidden[:, 0], atol=1e-2), "the velocity that moved it"
    assert (rows.hidden - seen["now"]).abs().max() <= 0.05 * (15 + 3 * 2) + 1e-4


def test_all_copies_of_an_off_policy_agent_agree():
    agent = SAC("MultiInputPolicy", pendulum(), learning_starts=20, batch_size=16, policy_kwargs=KWARGS, seed=0)
    agent.learn(30, callback=HIMCallback(batch_size=16))
    first, *others = weights(agent)
    assert len(others) == 2
    assert all(torch.allclose(first, other, atol=1e-6) for other in others), "targets are averaged: rounding"


def test_bad_arguments():
    with pytest.raises(ValueError, match="observations of PrivilegedHistory"):
        HIMExtractor(gym.spaces.Box(-1, 1, (3,)))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        PrivilegedHistory(gym.make("Pendulum-v1"), steps=0)
    with pytest.raises(ValueError, match="Box of one axis for actions"):
        PrivilegedHistory(gym.make("CartPole-v1"))
    agent = PPO("MlpPolicy", "Pendulum-v1", n_steps=8, batch_size=8)
    with pytest.raises(ValueError, match="features_extractor_class"):
        agent.learn(8, callback=HIMCallback())


@pytest.mark.parametrize("name", ["epochs", "updates", "batch_size"])
def test_a_callback_that_would_never_learn_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        HIMCallback(**{name: 0})
