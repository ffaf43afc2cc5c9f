"""One-step flows and diffusion policies: closed forms, and what learners promise."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.offline import BC, DQL, OFQL, GenerativePolicy, ofql
from learneddyn.offline.base import descend
from learneddyn.offline.diffusion import DiffusionActor, NoiseSchedule
from learneddyn.offline.flow import FlowActor, draw_times, mean_flow
from learneddyn.offline.generative import sinusoids
from learneddyn.offline.policy import Normaliser
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy

SMALL = {"policy_kwargs": {"net_arch": (16, 16), "candidates": 4}, "batch_size": 32, "device": "cpu"}
LEARNERS = [OFQL, DQL]


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def flow(rng_seed: int = 0, hidden=(16, 16), action_dim: int = 2) -> FlowActor:
    return FlowActor(hidden, Normaliser(3), action_dim, rng=generator(rng_seed))


def test_a_point_mass_has_its_closed_form():
    """Data at c alone: u(a_t, r, t) = (a_t - c) / t for every r, and the target of that u is that u."""
    rng, c = generator(0), torch.tensor([0.3, -0.8], dtype=torch.float64)
    noise = torch.randn(50, 2, generator=rng, dtype=torch.float64)
    r, t = (time.double() for time in draw_times(50, rng, flow_ratio=0.2))
    u, target = mean_flow(lambda at, r, t: (at - c) / t, c.expand(50, 2), noise, r, t)
    assert float((u - target).abs().max()) < 1e-5
    assert torch.allclose(noise - u, c.expand(50, 2))  # the sign: noise minus average velocity is the data
    # A net that is off by a function of time is told so: u + t gives d/dt (u + t) = 1.
    _, off = mean_flow(lambda at, r, t: (at - c) / t + t, c.expand(50, 2), noise, r, t)
    assert torch.allclose(off, noise - c - (t - r))


def test_the_target_holds_for_a_flow_that_bends():
    """Data N(0, s²): the velocity at (x, τ) is linear in x, and its average along the path is u, exactly."""
    s = 0.5

    def scale(time):  # paths are x_τ = x_t scale(τ) / scale(t)
        return ((1 - time).square() * s**2 + time.square()).sqrt()

    def u(x, r, t):
        return (x - x * scale(r) / scale(t)) / (t - r)

    rng = generator(1)
    r, t = torch.rand(2, 200_000, 1, generator=rng, dtype=torch.float64).mul(0.45) + torch.tensor(
        [[[0.0]], [[0.5]]], dtype=torch.float64
    )
    r, t = r[:1].expand_as(r).clone(), t[:1].expand_as(t).clone()  # one pair of times, many draws
    action, noise = torch.randn(2, *r.shape, generator=rng, dtype=torch.float64)
    value, target = mean_flow(u, action * s, noise, r, t)
    # The target is right in the mean given a_t: the residual has no part along a_t, nor a mean.
    at = (1 - t) * action * s + t * noise
    residual = target - value
    assert abs(float(residual.mean())) < 0.01
    assert abs(float((residual * at).mean() / at.square().mean())) < 0.01
    assert float(residual.std()) > 0.1


def test_no_gradient_flows_through_the_target():
    weight = torch.tensor(0.7, requires_grad=True, dtype=torch.float64)
    rng = generator(0)
    action, noise = torch.randn(2, 20, 2, generator=rng, dtype=torch.float64)
    r, t = (time.double() for time in draw_times(20, rng, flow_ratio=0.0))
    u, target = mean_flow(lambda at, r, t: weight * at * (t + r), action, noise, r, t)
    assert u.requires_grad
    assert not target.requires_grad
    at, velocity = (1 - t) * action + t * noise, noise - action
    slope = 0.7 * (velocity * (t + r) + at)
    assert torch.allclose(target, velocity - (t - r) * slope)
    (gradient,) = torch.autograd.grad((u - target).square().sum(), weight)
    assert torch.allclose(gradient, (2 * (u - target) * at * (t + r)).sum())


def test_times_are_ordered_and_at_their_shares():
    r, t = draw_times(40_000, generator(0), flow_ratio=0.3, p01=0.2)
    assert bool((r <= t).all())
    assert float((r == t).float().mean()) == pytest.approx(0.3 * 0.8, abs=0.01)
    assert float(((r == 0) & (t == 1)).float().mean()) == pytest.approx(0.2, abs=0.01)
    r, t = draw_times(40_000, generator(0), flow_ratio=1.0)
    assert torch.equal(r, t)
    assert float(t.logit().mean()) == pytest.approx(-0.4 + math.pi**-0.5, abs=0.02)  # the later of two normal draws


def test_flow_ratio_1_is_flow_matching():
    actor, data = flow(), torch.rand(64, 2) * 2 - 1
    obs = torch.randn(64, 3)
    loss = actor.imitation(obs, data, generator(5), flow_ratio=1.0)
    rng = generator(5)
    _, t = draw_times(64, rng, flow_ratio=1.0)
    noise = torch.randn(data.shape, generator=rng)
    inputs = torch.cat(((1 - t) * data + t * noise, obs, sinusoids(t), sinusoids(t)), 1)
    torch.testing.assert_close(loss, (actor.net(inputs)[0] - (noise - data)).square().sum(1).mean())
    halves = actor.imitation(obs, data, generator(5), flow_ratio=0.5)
    assert not torch.isclose(halves, loss)


def test_one_step_and_many_steps():
    actor, obs = flow(), torch.randn(5, 3)
    noise = actor.noise(5, generator(0))
    torch.testing.assert_close(
        actor.at(obs, noise), noise[0] - actor.ask(obs, noise[0], torch.zeros(5, 1), torch.ones(5, 1))
    )
    half, one = torch.full((5, 1), 0.5), torch.ones(5, 1)
    middle = noise[0] - 0.5 * actor.ask(obs, noise[0], one, one)
    wanted = middle - 0.5 * actor.ask(obs, middle, half, half)
    torch.testing.assert_close(actor.integrate(obs, noise, 2, average=False), wanted)


def test_schedules():
    schedule = NoiseSchedule.linear(100)
    betas = np.linspace(1e-3, 2e-2, 100)
    assert float(schedule.signal[4]) ** 2 == pytest.approx(np.prod(1 - betas[:5]), rel=1e-5)
    torch.testing.assert_close(schedule.signal.square() + schedule.noise.square(), torch.ones(100))
    few = NoiseSchedule.variance_preserving(5)
    assert 1 - (few.signal[0] ** 2) == pytest.approx(1 - math.exp(-0.1 / 5 - 0.5 * 9.9 / 25), rel=1e-5)
    assert bool((few.signal.diff() < 0).all())
    with pytest.raises(ValueError, match="between 0 and 1, got"):
        NoiseSchedule([0.5, 1.5])
    with pytest.raises(ValueError, match="at least 1 denoising step, got 0"):
        DiffusionActor((4,), Normaliser(1), 1, steps=0, rng=generator(0))


def test_reverse_steps_with_the_right_noise_lead_back():
    """Told the true noise, the chain of means ends at the data; a reverse step keeps the Gaussian marginals."""
    schedule, rng = NoiseSchedule.linear(30), generator(0)
    clean = torch.randn(40, 3, 2, generator=rng)
    x = schedule.diffuse(clean, torch.full((40,), 29), torch.randn(clean.shape, generator=rng))
    for step in reversed(range(30)):
        guess = (x - schedule.signal[step] * clean) / schedule.noise[step]
        x = schedule.reverse(x, guess, step, torch.randn(x.shape, generator=rng))
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4)
    data = torch.full((200_000,), 0.7)
    step = 10
    noisy = schedule.diffuse(data, torch.full((200_000,), step), torch.randn(data.shape, generator=rng))
    guess = (noisy - schedule.signal[step] * data) / schedule.noise[step]
    before = schedule.reverse(noisy, guess, step, torch.randn(data.shape, generator=rng))
    assert float(before.mean()) == pytest.approx(float(schedule.signal[step - 1]) * 0.7, abs=3e-3)
    assert float(before.std()) == pytest.approx(float(schedule.noise[step - 1]), rel=1e-2)


def test_diffusion_of_a_point_mass():
    """The exact guess of the noise for data at c leads all noise to c, whatever the number of steps."""
    actor, c = DiffusionActor((8,), Normaliser(3), 2, steps=4, rng=generator(0)), 0.4
    schedule = actor.schedule
    actor.ask = lambda features, noisy, time: (noisy - schedule.signal[int(time[0])] * c) / schedule.noise[int(time[0])]
    drawn = actor.at(torch.zeros(30, 3), actor.noise(30, generator(1)))
    torch.testing.assert_close(drawn, torch.full((30, 2), c), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_loaded_agent_goes_on_as_if_nothing_had_happened(kind, log, tmp_path):
    common = SMALL | {"actor_every": 2, "actor_start": 3, "backup_actions": 2}
    straight, halved = (kind("MlpPolicy", log, seed=3, **common) for _ in range(2))
    straight.learn(5)
    straight.learn(4, reset_num_timesteps=False)
    halved.learn(5).save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", data=log, device="cpu")
    loaded.learn(4, reset_num_timesteps=False)
    assert torch.equal(weights(loaded), weights(straight))


@pytest.mark.parametrize("kind", LEARNERS)
def test_policy_contract_and_no_side_effects(kind, log, tmp_path):
    before = torch.get_rng_state()
    agent, same, other = (kind("MlpPolicy", log, seed=seed, **SMALL).learn(3) for seed in (0, 0, 1))
    agent.policy.actor.mode(log.obs)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(agent), weights(same))
    assert not torch.equal(weights(agent), weights(other))
    check_policy(agent, log.spaces)
    agent.policy.save(tmp_path / "policy")
    alone = GenerativePolicy.load(tmp_path / "policy", device="cpu")
    obs = log.obs[:4].numpy()
    assert np.array_equal(alone.predict(obs, deterministic=True)[0], agent.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("kind", LEARNERS)
def test_the_slow_actor(kind, log):
    agent = kind("MlpPolicy", log, seed=0, actor_start=2, actor_every=3, actor_decay=0.9, **SMALL).learn(2)
    slow, fast = ([p.clone() for p in net.parameters()] for net in (agent.policy.actor_target, agent.policy.actor))
    assert all(map(torch.equal, slow, fast))
    agent.learn(1)
    fast = [p.detach().clone() for p in agent.policy.actor.parameters()]
    for now, was, towards in zip(agent.policy.actor_target.parameters(), slow, fast, strict=True):
        torch.testing.assert_close(now, 0.9 * was + 0.1 * towards)


@pytest.mark.parametrize("kind", LEARNERS)
def test_targets_take_the_best_of_several_actions(kind, log):
    agent = kind("MlpPolicy", log, seed=0, backup_actions=3, **SMALL)
    batch, state = agent._batch(), agent._rng.get_state()
    found = agent._target(batch)
    agent._rng.set_state(state)
    policy, rows = agent.policy, batch.next_obs.repeat_interleave(3, 0)
    with torch.no_grad():
        values = policy.critic_target(rows, policy.actor_target.sample(rows, agent._rng))
    best = values.reshape(2, 32, 3).max(2).values.min(0).values
    torch.testing.assert_close(found, batch.reward + 0.99 * (1 - batch.terminated) * best)


def test_candidates_are_chosen_by_value(log, monkeypatch):
    """Greedy: the best of fixed candidates. Drawn: by the softmax of values, here one certain choice."""
    agent = OFQL("MlpPolicy", log, seed=0, **SMALL | {"policy_kwargs": {"net_arch": (16, 16), "candidates": 8}})
    policy, obs = agent.policy, log.obs[:6]
    policy.critic_target.forward = lambda obs, action: 1e4 * action[None, :, 0]  # the first column is all that counts
    with torch.no_grad():
        rows = policy.actor.at(obs.repeat_interleave(8, 0), policy.candidate_noise.repeat(1, 6, 1)).clamp(-1, 1)
    wanted = rows.view(6, 8, 2)[..., 0].amax(1)
    assert np.allclose(agent.predict(obs.numpy(), deterministic=True)[0][:, 0], wanted, atol=1e-5)
    monkeypatch.setattr(ofql, "ROWS", 17)  # candidates of two rows at once
    assert np.allclose(agent.predict(obs.numpy(), deterministic=True)[0][:, 0], wanted, atol=1e-5)
    single = OFQL("MlpPolicy", log, seed=0, **SMALL | {"policy_kwargs": {"net_arch": (16, 16), "candidates": 1}})
    mode = single.policy.actor.mode(obs).detach()
    assert np.allclose(single.predict(obs.numpy(), deterministic=True)[0], mode, atol=1e-5)
    many = np.stack([single.predict(obs.numpy())[0][:, 0] for _ in range(20)])
    chosen = np.stack([agent.predict(obs.numpy())[0][:, 0] for _ in range(20)])
    assert chosen.mean() > many.mean()


@pytest.mark.parametrize("kind", LEARNERS)
def test_actions_stay_in_their_box(kind, log):
    """Whatever the value says: inside [-1, 1] in learning, inside the space's box in acting."""
    box = gym.spaces.Box(np.array([0, -3], np.float32), np.array([4, 1], np.float32))
    action = (log.action + 1) * 2 + torch.tensor([0.0, -3.0])
    moved = replace(log, action=action, reward=action[:, 0], spaces=Spaces(log.spaces.observation, box))
    agent = kind("MlpPolicy", moved, seed=0, eta=100.0, learning_rate=1e-2, **SMALL)
    agent.learn(50)
    actions = agent.predict(log.obs.numpy())[0]
    assert actions.min(0) >= box.low if actions.ndim == 1 else (actions >= box.low).all()
    assert (actions <= box.high).all()
    plain = kind("MlpPolicy", log, seed=0, **SMALL)
    boxed = kind("MlpPolicy", replace(moved, reward=log.reward), seed=0, **SMALL)
    assert torch.allclose(plain.replay.rows(), boxed.replay.rows(), atol=1e-5)


def test_beyond_the_box_values_have_no_gradient():
    actor, obs = flow(), torch.randn(200, 3)
    noise = 3 * actor.noise(200, generator(0))
    actor.noise = lambda rows, rng=None: noise
    raw = actor.at(obs, noise)
    (gradient,) = torch.autograd.grad(actor.sample(obs).sum(), actor.net.biases[-1])
    inside = (raw.abs() <= 1).float().sum(0)
    assert 0 < float(inside.min()) < 200
    torch.testing.assert_close(gradient[0, 0], -inside)


@pytest.mark.parametrize("kind", LEARNERS)
def test_without_a_value_they_imitate(kind, log):
    """eta = 0: rewards play no part in the actor."""
    agents = [
        kind("MlpPolicy", data, seed=0, eta=0.0, max_grad_norm=math.inf, **SMALL).learn(5)
        for data in (log, replace(log, reward=-3 * log.reward))
    ]
    for one, two in zip(*(agent.policy.actor.parameters() for agent in agents), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", LEARNERS)
def test_they_find_the_better_action(kind, bandit):
    """Uniform actions; the reward peaks at half the observation's sign, and imitation alone would be spread."""
    small = {"policy_kwargs": {"net_arch": (32, 32), "candidates": 20}, "batch_size": 64, "device": "cpu"}
    agent = kind("MlpPolicy", bandit, seed=0, learning_rate=3e-3, tau=0.05, **small).learn(200)
    obs = np.array([[-1.0], [1.0]], np.float32)
    assert np.abs(agent.predict(obs, deterministic=True)[0] - obs / 2).max() < 0.25


def test_the_norm_of_gradients_is_bounded():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    descend(50 * weight.square().sum(), optimizer, max_norm=0.5)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.0, 4.0]) * (1 - 0.1))


@pytest.mark.parametrize(
    ("kind", "argument", "message"),
    [
        (OFQL, {"flow_ratio": 1.5}, r"flow_ratio must be in \[0, 1\], got 1.5"),
        (OFQL, {"p01": -0.1}, r"p01 must be in \[0, 1\], got -0.1"),
        (OFQL, {"eta": -1.0}, "eta must be at least 0, got -1"),
        (OFQL, {"backup_actions": 0}, "backup_actions must be at least 1, got 0"),
        (OFQL, {"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0"),
        (DQL, {"actor_every": 0}, "actor_every must be at least 1, got 0"),
        (DQL, {"policy_kwargs": {"candidates": 0}}, "candidates must be at least 1, got 0"),
        (DQL, {"denoising_steps": 0}, "at least 1 denoising step, got 0"),
        (
            DQL,
            {"policy_kwargs": {"actor": "squashed"}},
            r"actor must be one of \['diffusion', 'flow'\], got 'squashed'",
        ),
    ],
)
def test_arguments_outside_their_range(log, kind, argument, message):
    with pytest.raises(ValueError, match=message):
        kind("MlpPolicy", log, **({"device": "cpu"} | argument))


def test_another_learner_keeps_its_policy(log):
    with pytest.raises(ValueError, match="actor must be one of"):
        BC("MlpPolicy", log, policy_kwargs={"actor": "flow"}, device="cpu")
