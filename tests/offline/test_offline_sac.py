import math

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from learneddyn.core import generator
from learneddyn.offline import CQL, EDAC, RAVL, SACN, OfflineSAC
from learneddyn.offline.sac import conservative_values, diversity_loss

SMALL = {"policy_kwargs": {"net_arch": (16, 16)}, "batch_size": 32, "device": "cpu", "seed": 0}
ADAM = {"eps": 1e-20}  # SB3 halves the critics' loss, which Adam does not notice without its epsilon


class Blank(gym.Env):
    def __init__(self, spaces) -> None:
        self.observation_space, self.action_space = spaces


def sb3_twin(agent, spaces) -> SAC:
    """SB3's SAC with the weights of ``agent``."""
    kwargs = {"net_arch": [16, 16], "optimizer_kwargs": ADAM, "n_critics": agent.n_critics}
    twin = SAC("MlpPolicy", Blank(spaces), policy_kwargs=kwargs, device="cpu", gamma=agent.gamma, batch_size=32)
    twin.set_logger(configure(None, []))
    layers = [layer for layer in twin.actor.latent_pi if isinstance(layer, torch.nn.Linear)]
    for layer, weight, bias in zip(layers, agent.policy.actor.net.weights, agent.policy.actor.net.biases, strict=False):
        layer.weight.data.copy_(weight[0].T)
        layer.bias.data.copy_(bias[0, 0])
    net = agent.policy.actor.net
    for head, columns in ((twin.actor.mu, slice(0, 2)), (twin.actor.log_std, slice(2, 4))):
        head.weight.data.copy_(net.weights[-1][0].T[columns])
        head.bias.data.copy_(net.biases[-1][0, 0, columns])
    for critics, own in ((twin.critic, agent.policy.critic), (twin.critic_target, agent.policy.critic_target)):
        for index, q in enumerate(critics.q_networks):
            linears = [layer for layer in q if isinstance(layer, torch.nn.Linear)]
            for layer, weight, bias in zip(linears, own.net.weights, own.net.biases, strict=True):
                layer.weight.data.copy_(weight[index].T)
                layer.bias.data.copy_(bias[index, 0])
    return twin


@pytest.mark.parametrize(("kind", "critics"), [(OfflineSAC, 2), (OfflineSAC, 3), (RAVL, 2)])
def test_without_diversity_and_conservatism_it_is_sb3s_sac(log, kind, critics, monkeypatch):
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": (16, 16), "log_std": (-20.0, 2.0), "optimizer_kwargs": ADAM}}
    agent = kind("MlpPolicy", log, n_critics=critics, diversity=0.0, conservatism=0.0, **kwargs)
    if kind is RAVL:
        agent.world = "none: this test compares updates"
        monkeypatch.setattr(agent, "imagine", lambda: None)
    agent.ent_coef_optimizer.param_groups[0]["eps"] = 1e-8
    twin = sb3_twin(agent, log.spaces)
    batches = [agent._batch() for _ in range(6)]
    mine, theirs = iter(batches), iter(batches)
    monkeypatch.setattr(agent, "_batch", lambda: next(mine))

    class Source:
        def sample(self, *_, **__):
            b = next(theirs)
            return ReplayBufferSamples(b.obs, b.action, b.next_obs, b.terminated[:, None], b.reward[:, None])

    twin.replay_buffer = Source()
    for step in range(6):
        agent._rng.manual_seed(step)
        agent.learn(1)
        torch.manual_seed(step)
        twin.train(1, 32)
    obs, action = log.obs, log.action
    torch.testing.assert_close(agent.policy.actor.mode(obs), twin.actor(obs, deterministic=True), rtol=0, atol=1e-5)
    for own, other in ((agent.policy.critic, twin.critic), (agent.policy.critic_target, twin.critic_target)):
        torch.testing.assert_close(own(obs, action), torch.stack(other(obs, action))[..., 0], rtol=0, atol=1e-5)
    assert float(agent.log_ent_coef.detach()) == pytest.approx(float(twin.log_ent_coef.detach()), abs=1e-6)


def test_diversity_is_the_mean_cosine_of_pairs():
    slopes = torch.randn(4, 5, 3, generator=generator(0))
    cosine = torch.nn.functional.cosine_similarity
    pairs = sum(cosine(slopes[i], slopes[j], dim=1) for i in range(4) for j in range(4) if i != j)
    torch.testing.assert_close(diversity_loss(slopes), pairs.mean() / 3)
    torch.testing.assert_close(diversity_loss(slopes[:1].expand(4, -1, -1)), torch.tensor(4.0))  # n, its largest value


def test_diversity_bends_the_critics_apart(log):
    def likeness(agent):
        action = log.action.expand(4, -1, -1).clone().requires_grad_()
        (slopes,) = torch.autograd.grad(agent.policy.critic(log.obs, action).sum(), action)
        return float(diversity_loss(slopes))

    plain, diverse = (
        EDAC("MlpPolicy", log, n_critics=4, diversity=eta, learning_rate=1e-3, **SMALL) for eta in (0.0, 10.0)
    )
    assert likeness(plain) == likeness(diverse)
    for agent in (plain, diverse):
        agent.learn(40)
    assert likeness(diverse) < likeness(plain) - 0.3


def test_no_diversity_is_sacn(log):
    one, two = SACN("MlpPolicy", log, n_critics=4, **SMALL), EDAC("MlpPolicy", log, n_critics=4, diversity=0.0, **SMALL)
    for agent in (one, two):
        agent.learn(5)
    assert torch.equal(one.policy.actor.mode(log.obs), two.policy.actor.mode(log.obs))


def test_conservative_term_compares_thirty_actions_with_their_densities(log):
    agent = CQL("MlpPolicy", log, **SMALL)
    policy, batch = agent.policy, agent._batch()
    with torch.no_grad():  # a critic that always says 3
        policy.critic.net.weights[-1].zero_()
        policy.critic.net.biases[-1].fill_(3.0)
    values = conservative_values(policy, batch.obs, batch.next_obs, generator(5))
    assert values.shape == (2, 32, 30)
    torch.testing.assert_close(values[..., 20:], torch.full((2, 32, 10), 3 + 2 * math.log(2)))

    action, log_prob = policy.actor.draw(batch.obs, generator(5), 10)
    torch.testing.assert_close(values[0, :, :10].flatten(), 3 - log_prob)
    mean, log_std = policy.actor._out(batch.obs).repeat_interleave(10, 0).chunk(2, 1)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform(cache_size=1)
    )
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(1), rtol=1e-3, atol=1e-3)

    grads = torch.autograd.grad(values.sum(), list(policy.actor.parameters()), allow_unused=True)
    assert all(grad is None for grad in grads)


def test_conservatism_prefers_the_logged_actions(log):
    """Large β: the policy's actions are worth less than the logged ones on nine states of ten, but not without it."""
    near = log.action * 0.2  # leave room outside the data
    data = log.__class__(**(log.tensors() | {"action": near}), spaces=log.spaces)
    share = {}
    for weight in (0.0, 50.0):
        agent = CQL("MlpPolicy", data, conservatism=weight, learning_rate=1e-2, **SMALL)
        agent.learn(40)
        with torch.no_grad():
            own = agent.policy.actor.sample(data.obs, generator(0))
            q = agent.policy.critic(data.obs, data.action), agent.policy.critic(data.obs, own)
        share[weight] = float((q[1] < q[0]).float().mean())
    assert share[50.0] > 0.9
    assert share[0.0] < 0.9


def test_temperature(log):
    fixed = OfflineSAC("MlpPolicy", log, ent_coef=0.3, **SMALL).learn(5)
    assert float(fixed.log_ent_coef.detach().exp()) == pytest.approx(0.3)
    bound = OfflineSAC("MlpPolicy", log, max_ent_coef=0.5, **SMALL)
    assert float(bound._update()["ent_coef"]) == 0.5
    slow, fast = (OfflineSAC("MlpPolicy", log, ent_coef_learning_rate=rate, **SMALL) for rate in (0.0, 1e-2))
    slow.learn(3), fast.learn(3)
    assert float(slow.log_ent_coef.detach()) == 0
    assert float(fast.log_ent_coef.detach()) != 0
