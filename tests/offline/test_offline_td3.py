import math

import pytest
import torch

from learneddyn.core import generator
from learneddyn.offline import BC, IQL, TD3BC, OfflineTD3, ReBRAC
from learneddyn.offline.dataset import next_actions
from learneddyn.offline.iql import expectile_loss

SMALL = {"policy_kwargs": {"net_arch": (16, 16)}, "batch_size": 32, "device": "cpu", "seed": 0}


def flat_grad(loss, module) -> torch.Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(module.parameters()))])


def test_critic_target_is_the_formula(log):
    """Without noise the target is a function of the batch; the next action counts where the log holds one."""
    agent = OfflineTD3("MlpPolicy", log, critic_bc=0.7, policy_noise=0.0, gamma=0.9, **SMALL)
    rows = torch.arange(40)
    following, known = next_actions(log)
    assert known[:40].any()
    assert not known[:40].all()
    batch = agent.replay.unpack(agent.replay.rows()[rows])
    batch = batch._replace(action=log.action[rows])
    loss, _ = agent._critic_loss(batch, following[rows], known[rows].float())
    policy = agent.policy
    value = policy.critic_target(log.next_obs[rows], action := policy.actor_target.mode(log.next_obs[rows])).amin(0)
    value = value - 0.7 * known[rows] * (action - following[rows]).square().sum(1)
    target = log.reward[rows] + 0.9 * ~log.terminated[rows] * value
    q = policy.critic(log.obs[rows], log.action[rows])
    torch.testing.assert_close(loss, sum((each - target).square().mean() for each in q))


def test_target_noise_is_clipped(log):
    """Huge noise lands on the bounds of the clip, so the target action moves by exactly ±c."""
    agent = OfflineTD3("MlpPolicy", log, policy_noise=1e6, noise_clip=0.25, **SMALL)
    seen = []
    agent.policy.critic_target.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    agent.learn(1)
    obs, action = seen[0]
    moved = action - agent.policy.actor_target.mode(obs)
    inside = (agent.policy.actor_target.mode(obs).abs() < 0.7).all(1)
    torch.testing.assert_close(moved[inside].abs(), torch.full_like(moved[inside], 0.25), rtol=0, atol=1e-5)


def test_actor_and_targets_wait_for_the_delay(log):
    agent = OfflineTD3("MlpPolicy", log, policy_delay=3, **SMALL)
    parts = ("actor", "actor_target", "critic_target", "critic")
    before = {name: [p.clone() for p in getattr(agent.policy, name).parameters()] for name in parts}

    def moved(name):
        return not all(map(torch.equal, before[name], getattr(agent.policy, name).parameters()))

    agent.learn(2)
    assert [moved(name) for name in parts] == [False, False, False, True]
    agent.learn(1)
    assert all(moved(name) for name in parts)


def test_td3bc_between_td3_and_cloning(log):
    """α → ∞ is TD3, α → 0 climbs nothing but the likeness to the data; the ratio of both terms is the published one."""
    td3, plain = (
        TD3BC("MlpPolicy", log, alpha=math.inf, normalize_obs=False, **SMALL),
        OfflineTD3("MlpPolicy", log, **SMALL),
    )
    for agent in (td3, plain):
        agent.learn(6)
    assert torch.equal(td3.policy.actor.mode(log.obs), plain.policy.actor.mode(log.obs))

    agent = TD3BC("MlpPolicy", log, alpha=2.5, **SMALL)
    batch = agent._batch()
    batch = batch._replace(action=batch.action[:, :2])
    actor, critic = agent.policy.actor, agent.policy.critic
    action = actor.mode(batch.obs)
    value = critic(batch.obs, action)[0]
    published = -2.5 * value.mean() / value.abs().mean().detach() + (action - batch.action).square().mean()
    torch.testing.assert_close(2.5 * flat_grad(agent._actor_loss(batch), actor), flat_grad(published, actor))

    near = TD3BC("MlpPolicy", log, alpha=1e-6, **SMALL)
    cloning = (near.policy.actor.mode(batch.obs) - batch.action).square().mean()
    one, two = (flat_grad(loss, near.policy.actor) for loss in (near._actor_loss(batch), cloning))
    torch.testing.assert_close(one * 1e-6, two, rtol=1e-3, atol=1e-6)


def test_rebrac_without_its_extras_is_td3bc(log):
    shared = {**SMALL, "policy_kwargs": {"net_arch": (16, 16), "layer_norm": False}, "learning_rate": 3e-4}
    one = ReBRAC("MlpPolicy", log, actor_bc=1 / (2.5 * 2), critic_bc=0.0, **shared)
    one.least_critic = False
    two = TD3BC("MlpPolicy", log, alpha=2.5, normalize_obs=False, **shared)
    for agent in (one, two):
        agent.learn(6)
    assert torch.equal(one.policy.actor.mode(log.obs), two.policy.actor.mode(log.obs))


def test_bandit_optimum(bandit):
    """Uniform actions: cloning gives their mean 0, the value methods find the peak at ±1/2."""
    quick = {"policy_kwargs": {"net_arch": (32, 32)}, "batch_size": 64, "device": "cpu", "seed": 0}
    ends = torch.tensor([[-1.0], [1.0]])
    found = {}
    for kind, extra in (
        (BC, {}),
        (TD3BC, {"alpha": math.inf}),
        (IQL, {"expectile": 0.5, "beta": 20.0, "reward_scale": 1.0, "actor_learning_rate": 1e-2}),
    ):
        agent = kind("MlpPolicy", bandit, learning_rate=1e-2, **extra, **quick).learn(150)
        found[kind.__name__] = agent.policy.actor.mode(ends)
    assert found["BC"].abs().max() < 0.15
    torch.testing.assert_close(found["TD3BC"], ends / 2, rtol=0, atol=0.1)
    torch.testing.assert_close(found["IQL"], ends / 2, rtol=0, atol=0.2)


def test_expectile_of_two_points():
    """The τ-expectile of 0 and 1 in equal shares is τ."""
    points = torch.tensor([0.0, 1.0])
    for expectile in (0.1, 0.5, 0.9):
        guess = torch.linspace(0, 1, 1001)
        losses = torch.stack([expectile_loss(points - value, expectile) for value in guess])
        assert guess[losses.argmin()] == pytest.approx(expectile, abs=2e-3)


def test_iql_never_asks_about_other_actions(log):
    agent = IQL("MlpPolicy", log, **SMALL)
    logged = {tuple(row) for row in agent.replay.unpack(agent.replay.rows()).action.tolist()}
    asked = []
    for net in (agent.policy.critic, agent.policy.critic_target):
        net.register_forward_hook(lambda _, inputs, __: asked.extend(map(tuple, inputs[1].tolist())))
    agent.learn(4)
    assert len(asked) == 4 * 2 * 32
    assert set(asked) <= logged


def test_iql_with_beta_zero_clones_by_likelihood(log):
    agent = IQL("MlpPolicy", log, beta=0.0, **SMALL)
    actor, batch = agent.policy.actor, agent._batch()
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([-0.5, 0.3]))
    normal = torch.distributions.Normal(actor.mode(batch.obs), actor.log_std.exp())
    torch.testing.assert_close(actor.log_prob(batch.obs, batch.action), normal.log_prob(batch.action).sum(1))
    other = agent.policy.actor.sample(batch.obs, generator(0))
    assert other.abs().max() <= 1
    agent.learn(3)
    deterministic = IQL("MlpPolicy", log, **(SMALL | {"policy_kwargs": {"actor": "deterministic"}}))
    deterministic.learn(2)
