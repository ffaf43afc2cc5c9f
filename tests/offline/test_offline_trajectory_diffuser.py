"""Trajectory Diffuser: parts that must not look ahead, windows, pinned refinement, and the learner's surface."""

from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from learneddyn.core import DataError, Transitions, generator
from learneddyn.offline import TrajectoryDiffuser, TrajectoryPolicy, trajectory_diffuser
from learneddyn.offline.diffusion import NoiseSchedule
from learneddyn.offline.policy import Normaliser
from learneddyn.offline.proposer import PROPOSERS, RecurrentProposer
from learneddyn.offline.temporal import TemporalUNet, TrajectoryDiffusion
from learneddyn.offline.trajectory_diffuser import Windows
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy

PARTS = {
    "unet_width": 8,
    "unet_multipliers": (1, 2),
    "diffusion_steps": 10,
    "plans": 3,
    "inverse_arch": (16,),
    "critic_arch": (16,),
}
TRANSFORMER = PARTS | {"proposer_kwargs": {"width": 8, "layers": 2, "heads": 2}}
SMALL = {"horizon": 4, "refinement_steps": 2, "batch_size": 16, "device": "cpu", "policy_kwargs": TRANSFORMER}
GRU = SMALL | {"proposer": "gru", "policy_kwargs": PARTS | {"proposer_kwargs": {"width": 8}}}


def proposer(kind: str):
    options = {"width": 8, "layers": 2, "heads": 2} if kind == "transformer" else {"width": 8}
    return PROPOSERS[kind](3, **options, rng=generator(0))


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def column(values, episode, terminated=None) -> Transitions:
    """Episodes of one observation column, which counts the rows."""
    obs = torch.tensor(values)[:, None]
    number = torch.tensor(episode)
    box = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    return Transitions(
        obs, obs / 100, obs[:, 0], obs + 1, torch.zeros(len(obs), dtype=torch.bool), number, Spaces(*box)
    )


@pytest.mark.parametrize("kind", PROPOSERS)
def test_proposers_do_not_look_ahead(kind):
    net, rng = proposer(kind), generator(1)
    states, returns = torch.randn(2, 6, 3, generator=rng), torch.randn(2, 6, generator=rng)
    before = net(states, returns)
    changed = states.clone()
    changed[:, 4:] += 1.0
    after = net(changed, torch.cat((returns[:, :4], returns[:, 4:] - 2), 1))
    for one, two in zip(before, after, strict=True):
        torch.testing.assert_close(one[:, :4], two[:, :4])
        assert not torch.allclose(one[:, 4], two[:, 4])
    earlier = states.clone()
    earlier[:, 0] += 1.0
    assert not torch.allclose(net(earlier, returns)[0][:, 5], before[0][:, 5])


@pytest.mark.parametrize("kind", PROPOSERS)
def test_rolling_out_is_feeding_back(kind):
    """Histories of any length, side by side; a transformer forgets the oldest entry once c are there."""
    net, rng = proposer(kind), generator(2)
    states, returns = torch.randn(3, 4, 3, generator=rng), torch.randn(3, 4, generator=rng)
    count = torch.tensor([1, 3, 4])
    plan = net.roll(states, returns, count, 5)
    for row in range(3):
        seen, told = states[row : row + 1, : count[row]], returns[row : row + 1, : count[row]]
        for step in range(5):
            kept = slice(-4 if kind == "transformer" else None, None)
            following, left = (part[:, -1:] for part in net(seen[:, kept], told[:, kept]))
            torch.testing.assert_close(plan[row, step], following[0, 0], rtol=1e-4, atol=1e-5)
            seen, told = torch.cat((seen, following), 1), torch.cat((told, left), 1)
    states[0, 1:] = states[1, 3:] = 9.0  # what stands behind the count is not read
    torch.testing.assert_close(plan, net.roll(states, returns, count, 5))


def test_a_proposer_learns_a_line():
    net, rng = RecurrentProposer(1, 16, rng=generator(0)), generator(3)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    known = torch.ones(32, 6, dtype=torch.bool)
    for _ in range(150):
        start = torch.rand(32, 1, generator=rng)
        returns = start + torch.arange(6) / 10
        loss = net.loss(returns[..., None], returns, known)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        ahead = net.roll(torch.full((1, 4, 1), 0.3), torch.full((1, 4), 0.3), torch.tensor([1]), 3)
    torch.testing.assert_close(ahead[0, :, 0], torch.tensor([0.4, 0.5, 0.6]), rtol=0, atol=0.05)


def test_padding_is_not_learned_from():
    net = proposer("transformer")
    states, returns = torch.randn(4, 6, 3), torch.randn(4, 6)
    known = torch.arange(6)[None] < torch.tensor([2, 3, 6, 4])[:, None]
    diffusion = TrajectoryDiffusion(TemporalUNet(3, 8, (1,), rng=generator(0)), NoiseSchedule.linear(5))
    padded = torch.where(known[..., None], states, 9.0)
    assert torch.equal(net.loss(states, returns, known), net.loss(padded, returns, known))
    full = diffusion.loss(states, known, generator(0))
    diffusion.net.forward = lambda x, step, returns=None, told=None: torch.zeros_like(x)
    rng = generator(0)
    torch.randint(5, (4,), generator=rng)
    noise = torch.randn(states.shape, generator=rng)
    error = noise[:, 1:].square().mean(2)[known[:, 1:]].mean()
    torch.testing.assert_close(diffusion.loss(states, known, generator(0)), error)
    assert not torch.isclose(full, error)


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 4)])
def test_the_unet_keeps_shapes_and_hears_its_condition(multipliers):
    net, x = TemporalUNet(3, 8, multipliers, rng=generator(0)), torch.randn(5, 8, 3)
    step, goal = torch.arange(5), torch.randn(5)
    out = net(x, step, goal)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, step + 1, goal))
    assert not torch.allclose(out, net(x, step, goal + 1))
    none = net(x, step)
    torch.testing.assert_close(none, net(x, step, goal, torch.zeros(5, dtype=torch.bool)))
    some = net(x, step, goal, torch.arange(5) < 2)
    torch.testing.assert_close(some, torch.cat((out[:2], none[2:])))


def test_refinement():
    net, rng = TemporalUNet(2, 8, (1, 2), rng=generator(0)), generator(1)
    diffusion = TrajectoryDiffusion(net, NoiseSchedule.linear(20))
    x, goal = torch.randn(6, 4, 2, generator=rng), torch.randn(6, generator=rng)

    def noise():
        return torch.randn(6, 4, 2, generator=rng)

    assert torch.equal(diffusion.refine(x, 0, noise), x)
    with torch.no_grad():
        for guidance in (1.0, 1.5):
            assert torch.equal(diffusion.refine(x, 7, noise, goal, guidance=guidance)[:, 0], x[:, 0])
        # Guidance extrapolates from the guess without a goal to the one with it.
        at, told = torch.full((6,), 3), net(x, torch.full((6,), 3), goal)
        free = net(x, at)
        torch.testing.assert_close(diffusion._guided(x, 3, goal, 1.5), free + 1.5 * (told - free))
        torch.testing.assert_close(diffusion._guided(x, 3, goal, 1.0), told)
        torch.testing.assert_close(diffusion._guided(x, 3, None, 1.5), free)
    with pytest.raises(ValueError, match="between 0 and the schedule's 20, got 21"):
        diffusion.refine(x, 21, noise)


def test_all_steps_with_the_exact_guess_sample_the_data():
    """One trajectory is all the data: every start ends on it, but for the pinned first state."""
    diffusion = TrajectoryDiffusion(TemporalUNet(1, 8, (1,), rng=generator(0)), NoiseSchedule.linear(30))
    truth, rng = torch.linspace(-1, 1, 8)[None, :, None], generator(0)
    schedule = diffusion.schedule
    diffusion.net.forward = lambda x, step, returns=None, told=None: (
        (x - schedule.signal[step][:, None, None] * truth) / schedule.noise[step][:, None, None]
    )
    start = torch.randn(5, 8, 1, generator=rng)
    start[:, 0] = 7.0
    found = diffusion.refine(start, 30, lambda: torch.randn(start.shape, generator=rng))
    torch.testing.assert_close(found[:, 1:], truth[:, 1:].expand(5, -1, -1), rtol=0, atol=1e-4)
    assert bool((found[:, 0] == 7.0).all())


def test_windows_hold_episodes_and_nothing_across_them():
    log = column([0.0, 1, 2, 10, 20, 21], [0, 0, 0, 1, 2, 2])
    windows = Windows(log, Normaliser(1))
    assert windows.episode_returns.tolist() == [3.0, 10.0, 41.0]
    window = windows.sample(500, 4, generator(0))
    seen = {tuple(row) for row in window.states[..., 0].tolist()}
    assert seen == {(0, 1, 2, 3), (1, 2, 3, 3), (2, 3, 3, 3), (10, 11, 11, 11), (20, 21, 22, 22), (21, 22, 22, 22)}
    columns = (window.states, window.returns, window.rewards, window.actions, window.known)
    for row in zip(*(part.flatten(1).tolist() for part in columns), strict=True):
        states, returns, rewards, actions, known = row
        assert known == [True, *(two != one for one, two in pairwise(states))]
        logged = [state not in (3, 11, 22) for state in states]
        assert rewards == [state if real else 0 for state, real in zip(states, logged, strict=True)]
        assert actions == pytest.approx([reward / 100 for reward in rewards])
        left = {0: 3, 1: 3, 2: 2, 3: 0, 10: 10, 11: 0, 20: 41, 21: 21, 22: 0}
        assert returns == [left[int(state)] for state in states]


def test_windows_do_not_bridge_rows_that_were_dropped():
    """Of 0, 1, 2, 3, 4 the middle row is gone: what came of 1 is known, what became of it is not; its return is."""
    whole = column([0.0, 1, 2, 3, 4], [0] * 5)
    windows = Windows(whole[torch.tensor([0, 1, 3, 4])], Normaliser(1))
    window = windows.sample(500, 4, generator(0))
    seen = {tuple(row) for row in window.states[..., 0].tolist()}
    assert seen == {(0, 1, 2, 2), (1, 2, 2, 2), (3, 4, 5, 5), (4, 5, 5, 5)}
    left = {0: 8, 1: 8, 2: 7, 3: 7, 4: 4, 5: 0}
    for states, returns, known in zip(*(part.flatten(1).tolist() for part in window[:2] + window[4:]), strict=True):
        assert returns == [left[int(state)] for state in states]
        assert known == [True, *(two != one for one, two in pairwise(states))]
    assert windows.episode_returns.tolist() == [8.0]


@pytest.mark.parametrize("options", [SMALL, GRU], ids=["transformer", "gru"])
def test_a_loaded_agent_goes_on_as_if_nothing_had_happened(options, log, tmp_path):
    common = options | {"slow_start": 3, "slow_every": 2, "seed": 3}
    straight, halved = (TrajectoryDiffuser("MlpPolicy", log, **common) for _ in range(2))
    straight.learn(4)
    straight.learn(3, reset_num_timesteps=False)
    halved.learn(4).save(tmp_path / "agent")
    loaded = TrajectoryDiffuser.load(tmp_path / "agent", data=log, device="cpu")
    loaded.learn(3, reset_num_timesteps=False)
    assert torch.equal(weights(loaded), weights(straight))
    alone = TrajectoryDiffuser.load(tmp_path / "agent", device="cpu")
    with pytest.raises(DataError, match="no data to learn from"):
        alone.learn(1)
    obs = log.obs[:4].numpy()
    halved.policy.save(tmp_path / "policy")
    policy = TrajectoryPolicy.load(tmp_path / "policy", device="cpu")
    for other in (alone, policy):
        assert np.array_equal(other.predict(obs, deterministic=True)[0], halved.predict(obs, deterministic=True)[0])


def test_policy_contract_and_no_side_effects(log):
    before = torch.get_rng_state()
    agent, same, other = (TrajectoryDiffuser("MlpPolicy", log, seed=seed, **SMALL).learn(2) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(agent), weights(same))
    assert not torch.equal(weights(agent), weights(other))
    check_policy(agent, log.spaces)


def test_the_state_is_the_history_of_each_episode(log):
    """Two environments whose episodes begin at other times answer as they would alone."""
    agent = TrajectoryDiffuser("MlpPolicy", log, seed=0, target_return=2.0, reward_scale=1.0, **SMALL).learn(3)
    obs = log.obs[:14].view(7, 2, 3).numpy()
    state, together = None, []
    for step in range(7):
        starts = np.array([step == 0, step in (0, 3)])
        actions, state = agent.predict(obs[step], state, starts, deterministic=True)
        together.append(actions)
    for lane, begins in ((0, 0), (1, 3)):
        state = None
        for step in range(begins, 7):
            action, state = agent.predict(obs[step, lane], state, np.array([step == begins]), deterministic=True)
            assert np.allclose(action, together[step][lane], atol=1e-4)
    assert state[2].tolist() == [3]  # horizon - 1 entries at most
    assert np.array_equal(state[0][0], obs[4:, 1])
    with pytest.raises(ValueError, match="state remembers 1 environments, but there are 2 observations"):
        agent.predict(obs[0], state)


def test_the_return_to_go_is_kept(log):
    """It starts at the target, loses what was paid, and stops at a third of the target."""
    agent = TrajectoryDiffuser("MlpPolicy", log, seed=0, target_return=9.0, reward_scale=0.1, **SMALL)
    policy = agent.policy
    policy.reward.forward = lambda rows: torch.full((1, len(rows), 1), 0.25)
    memory, kept = None, []
    for obs in log.obs[:5]:
        memory = policy.remember(obs[None], memory, torch.tensor([False]))
        kept.append(float(memory.returns[0, memory.filled - 1]))
    assert kept == pytest.approx([0.9, 0.65, 0.4, 0.3, 0.3])
    again = policy.remember(log.obs[:1], memory, torch.tensor([True]))
    assert float(again.returns[0, 0]) == pytest.approx(0.9)
    assert again.filled.tolist() == [1]
    best = TrajectoryDiffuser("MlpPolicy", log, seed=0, reward_scale=1.0, **SMALL)
    number = torch.unique_consecutive(log.episode, return_inverse=True)[1]
    returns = torch.zeros(int(number[-1]) + 1).index_add(0, number, log.reward)
    assert float(best.policy.target) == pytest.approx(float(returns.max()), rel=1e-4)
    cost = TrajectoryDiffuser("MlpPolicy", log, seed=0, target_return=-9.0, reward_scale=0.1, **SMALL)
    assert float(cost.policy._floor()) == -np.inf


def test_the_critic_chooses_among_plans(log, monkeypatch):
    agent = TrajectoryDiffuser("MlpPolicy", log, seed=0, **SMALL).learn(2)
    policy = agent.policy
    memory = policy.remember(log.obs[:6], None, torch.ones(6, dtype=torch.bool))
    with torch.no_grad():
        plans = policy.plan(memory, generator(0), shared_noise=True)
        assert plans.shape == (6, 3, 4, 3)
        torch.testing.assert_close(plans[:, :, 0], policy.normaliser(log.obs[:6])[:, None].expand(6, 3, 3))
        actions = policy.actions_between(plans[:, :, 0].flatten(0, 1), plans[:, :, 1].flatten(0, 1)).view(6, 3, 2)
        policy.critic.forward = lambda rows: 1e4 * rows[None, :, 3:4]  # the first action column is all that counts
        best = actions.gather(1, actions[..., :1].argmax(1, keepdim=True).expand(6, 1, 2))[:, 0]
        torch.testing.assert_close(policy.act(memory, deterministic=True), best)
        monkeypatch.setattr(trajectory_diffuser, "TOGETHER", 7)  # plans of two rows at once
        torch.testing.assert_close(policy.act(memory, deterministic=True), best)


def test_it_aims_at_the_return_it_is_told():
    """x' = x + a / 4 with reward x, logged going left and right: plans go where the target return lies."""

    class Line(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.x, self.steps = 0.0, 0
            return np.zeros(1, np.float32), {}

        def step(self, action):
            self.x, self.steps = self.x + float(action[0]) / 4, self.steps + 1
            return np.array([self.x], np.float32), self.x, False, self.steps == 8, {}

    rng = generator(0)
    side = (torch.randint(2, (100, 1), generator=rng) * 2 - 1).repeat(1, 8)
    action = (0.8 * side + 0.1 * torch.randn(100, 8, generator=rng)).clamp(-1, 1)
    after = action.cumsum(1) / 4
    columns = (after - action / 4, action, after)
    obs, action, following = (part.reshape(-1, 1) for part in columns)
    number = torch.arange(800) // 8
    spaces = Spaces(Line.observation_space, Line.action_space)
    log = Transitions(obs, action, following[:, 0], following, number < 0, number, spaces)
    parts = PARTS | {"proposer_kwargs": {"width": 16}, "inverse_arch": (32,)}
    common = SMALL | {"learning_rate": 1e-2, "reward_scale": 0.1, "policy_kwargs": parts}
    agent = TrajectoryDiffuser("MlpPolicy", log, proposer="gru", target_return=7.2, seed=0, **common).learn(80)
    assert evaluate_policy(agent, Monitor(Line()), 1)[0] > 4
    agent.policy.target.fill_(-0.72)
    assert evaluate_policy(agent, Monitor(Line()), 1)[0] < -4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"horizon": 6}, "horizon must be at least 2 and divisible by 8, got 6"),
        ({"proposer": "lstm"}, r"proposer must be one of \['gru', 'transformer'\], got 'lstm'"),
        ({"refinement_steps": 101}, "refinement_steps must be between 0 and diffusion_steps, 100, got 101"),
        ({"policy_kwargs": {"plans": 0}}, "plans must be at least 1, got 0"),
        ({"policy_kwargs": {"proposer_kwargs": {"width": 5, "heads": 3}}}, "width 10 must be divisible by its 3 heads"),
        ({"return_drop": 2.0}, r"return_drop must be in \[0, 1\], got 2"),
        ({"slow_every": 0}, "slow_every must be at least 1, got 0"),
    ],
)
def test_arguments_outside_their_range(log, argument, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryDiffuser("MlpPolicy", log, **({"device": "cpu"} | argument))


def test_rows_that_end_their_episode_alone(log):
    """Episodes of one row are learned from: a state, its successor, and nothing more."""
    short = replace(log, episode=torch.arange(len(log)))
    agent = TrajectoryDiffuser("MlpPolicy", short, seed=0, **SMALL).learn(2)
    assert np.isfinite(agent.predict(log.obs[0].numpy(), deterministic=True)[0]).all()
