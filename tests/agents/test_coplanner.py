import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.agents import MBPO, DynaTD3, SpectralCap
from learneddyn.agents import coplanner as room
from learneddyn.agents.checkpoint import load_checkpoint, save_checkpoint
from learneddyn.agents.coplanner import UPMPC, COPlanner, step_uncertainty, uncertainty, uncertainty_scale, up_mpc
from learneddyn.core import Outcome, Prediction, Task, Transitions, generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.spaces import Spaces
from learneddyn.world import World

DRAWS = 1000
LINE = Spaces(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1.0, 1.0, (1,), np.float32))


class Fan:
    """next_obs = obs + (1 + spread[member]) action: members disagree as much as the action is large."""

    spaces, num_members = LINE, 3
    spread = torch.tensor([-1.0, 0.0, 1.0])[:, None, None]

    def __init__(self, std: float = 0.0, elites=(1,), reward=None) -> None:
        self.std, self.elites, self.reward = std, torch.tensor(elites), reward

    def predict(self, obs, action, memory=None) -> Prediction:
        mean = obs + (1 + self.spread) * action
        heads = {}
        if self.reward is not None:
            heads = {"reward_mean": self.reward[:, None].expand(3, len(obs)), "reward_std": torch.zeros(3, len(obs))}
        return Prediction(mean, torch.full_like(mean, self.std), self.elites, **heads)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True) -> Outcome:
        raise AssertionError("plans ask every member at once")


class Cliff(Fan):
    """Every member leaves the numbers where the action is positive."""

    def predict(self, obs, action, memory=None) -> Prediction:
        mean = torch.where(action > 0, torch.inf, obs + action).expand(3, -1, -1)
        return Prediction(mean, torch.zeros_like(mean), self.elites)


class Recorded:
    """A uniform policy that keeps what it drew."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.actions = generator(seed), []

    def __call__(self, obs):
        self.actions.append(2 * torch.rand(len(obs), 1, generator=self.rng) - 1)
        return self.actions[-1]


def never(next_obs):
    return torch.zeros(len(next_obs), dtype=torch.bool)


def world(dynamics, reward=lambda obs, action, next_obs: next_obs[:, 0]) -> World:
    return World(dynamics, Task("Double-v0", reward=reward, terminated=never))


def flat(obs, action, next_obs):
    return torch.zeros(len(obs))


def test_without_a_rate_the_best_plan_by_return_is_taken() -> None:
    obs, policy = torch.linspace(-3, 3, 50)[:, None], Recorded()
    taken = up_mpc(world(Fan()), obs, policy, generator(1), rate=0.0, candidates=4, horizon=3, discount=0.9)
    state, worth = obs.repeat_interleave(4, 0).numpy(), 0
    for step, action in enumerate(policy.actions):
        state = state + action.numpy()  # the only elite is the member without a fault
        worth = worth + 0.9**step * state
    best = worth.reshape(50, 4).argmax(1)
    assert len(policy.actions) == 3
    np.testing.assert_array_equal(taken[:, 0], policy.actions[0].view(50, 4)[torch.arange(50), best])


@pytest.mark.parametrize(("rate", "wanted"), [(-1e6, "min"), (1e6, "max")])
@pytest.mark.parametrize("horizon", [1, 3])
def test_a_large_rate_takes_the_plan_of_least_or_most_uncertainty(rate: float, wanted: str, horizon: int) -> None:
    policy = Recorded()
    taken = up_mpc(world(Fan()), torch.zeros(40, 1), policy, generator(1), rate=rate, candidates=5, horizon=horizon)
    unsure = sum(0.97**i * action.abs() for i, action in enumerate(policy.actions)).view(40, 5)
    best = getattr(unsure, f"arg{wanted}")(dim=1)
    assert torch.equal(taken[:, 0], policy.actions[0].view(40, 5)[torch.arange(40), best])


def test_one_candidate_is_the_policys_action_and_asks_no_model() -> None:
    policy, rng = Recorded(), generator(1)
    before = rng.get_state()
    taken = up_mpc(world(Fan()), torch.zeros(7, 1), policy, rng, rate=-2.0, candidates=1)
    assert torch.equal(taken, policy.actions[0])
    assert torch.equal(rng.get_state(), before)


def test_uncertainty_is_the_members_spread_in_units_of_the_columns() -> None:
    answers = torch.tensor([[[0.0, 5.0]], [[2.0, 5.0]], [[4.0, 8.0]]])
    spread = [math.sqrt(8 / 3), math.sqrt(2)]
    assert uncertainty(answers).item() == pytest.approx(sum(spread) / 2)
    scaled = uncertainty(answers, torch.tensor([2.0, torch.inf]))
    assert scaled.item() == pytest.approx(spread[0] / 4)


def test_samples_carry_noise_that_means_do_not() -> None:
    noisy, (obs, action) = world(Fan(std=2.0)), (torch.zeros(4000, 1), torch.zeros(4000, 1))
    assert step_uncertainty(noisy, obs, action, generator(0), use_means=True).abs().max() == 0
    sampled = step_uncertainty(noisy, obs, action, generator(0)).mean().item()
    assert sampled == pytest.approx(2.0 * math.sqrt(2 / 3) * 0.886, rel=0.05)  # E chi_2 / sqrt 2 = 0.886 for 3 samples


def test_a_reward_head_counts_as_a_column_and_pays() -> None:
    rewards = torch.tensor([0.0, 7.0, 3.0])
    model = Fan(reward=rewards)
    action = torch.full((1, 1), 0.5)
    unsure = step_uncertainty(world(model, None), torch.zeros(1, 1), action, generator(0), use_means=True)
    assert unsure.item() == pytest.approx((0.5 * math.sqrt(2 / 3) + rewards.std(correction=0).item()) / 2)

    class Choice(Fan):
        """Pays its action."""

        def predict(self, obs, action, memory=None) -> Prediction:
            given = super().predict(obs, action)
            return given._replace(reward_mean=action[:, 0].expand(3, -1), reward_std=torch.zeros(3, len(obs)))

    policy = Recorded()
    taken = up_mpc(
        world(Choice(reward=rewards), None), torch.zeros(9, 1), policy, generator(1), rate=0.0, candidates=4, horizon=1
    )
    assert torch.equal(taken[:, 0], policy.actions[0].view(9, 4).amax(1))


def test_a_plan_that_leaves_the_numbers_is_the_worst() -> None:
    for rate in (-1.0, 0.0, 1.0):
        policy = Recorded()
        taken = up_mpc(world(Cliff()), torch.zeros(60, 1), policy, generator(1), rate=rate, candidates=6, horizon=1)
        possible = (policy.actions[0].view(60, 6) <= 0).any(1)
        assert possible.sum() > 50
        assert (taken[possible] <= 0).all()


def test_rows_keep_their_own_candidates_in_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CHUNK", 12)
    obs, rng = torch.arange(31.0)[:, None], generator(0)

    def near(state):
        return state + 0.1 * torch.rand(state.shape, generator=rng)

    taken = up_mpc(world(Fan()), obs, near, generator(1), rate=1.0, candidates=5, horizon=2)
    assert ((taken - obs >= 0) & (taken - obs <= 0.1)).all()


@pytest.fixture(scope="module")
def left_half() -> World:
    """A line of which the model has seen x < 0 alone."""
    rng = generator(0)
    obs, action = -2 * torch.rand(400, 1, generator=rng), 2 * torch.rand(400, 1, generator=rng) - 1
    after = obs + action + 0.3 * torch.sin(2 * obs) + 0.02 * torch.randn(400, 1, generator=rng)
    data = Transitions(obs, action, obs[:, 0], after, torch.zeros(400).bool(), torch.zeros(400).long(), LINE)
    model = ProbabilisticEnsemble(num_members=5, num_elites=5, hidden=[32, 32], max_epochs=60, batch_size=32)
    model.fit(data, rng=rng)
    return World(model, Task("Line-v0", reward=flat, terminated=never))


@pytest.mark.parametrize(("rate", "side"), [(1.0, 1), (-1.0, -1)])
def test_plans_seek_or_avoid_the_half_line_without_data(left_half: World, rate: float, side: int) -> None:
    """From just beyond the data; one of 2^5 times all candidates point the wrong way, so 97 % is the most."""
    policy, start = Recorded(), torch.full((DRAWS, 1), 0.3)
    taken = up_mpc(left_half, start, policy, generator(1), rate=rate, candidates=5, horizon=3)
    assert (taken * side > 0).float().mean() >= 0.9


def test_units_are_those_of_the_changes() -> None:
    obs = torch.zeros(4, 2)
    after = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    data = Transitions(
        obs, torch.zeros(4, 1), torch.tensor([0.0, 4.0, 0.0, 4.0]), after, torch.zeros(4).bool(), torch.arange(4)
    )
    assert uncertainty_scale(data).tolist() == [1.0, math.inf, 2.0]


def agent(kind, **kwargs):
    given = {
        "model": ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=[16], max_epochs=4, batch_size=64),
        "rollout_batch": 100,
        "refit_every": 50,
        "learning_starts": 100,
        "gradient_steps": 1,
        "batch_size": 64,
        "policy_kwargs": {"net_arch": [16]},
        "seed": 0,
        "device": "cpu",
    }
    return kind("MlpPolicy", gym.make("Pendulum-v1"), **given | kwargs)


def distance(one, other) -> float:
    states = (model.policy.state_dict() for model in (one, other))
    return max((a - b).abs().max().item() for a, b in zip(*(state.values() for state in states), strict=True))


def test_with_one_candidate_it_is_mbpo() -> None:
    plain, single, planned = (
        agent(kind, **kwargs).learn(160)
        for kind, kwargs in ((MBPO, {}), (COPlanner, {"candidates": 1}), (COPlanner, {}))
    )
    assert distance(plain, single) == 0 < distance(plain, planned)


@pytest.mark.parametrize(("rate", "sign"), [("conservative_rate", -1), ("optimistic_rate", 1)])
def test_imagination_is_conservative_and_the_real_environment_optimistic(rate: str, sign: int) -> None:
    """Actions of one state: what is imagined is less uncertain than the policy's, what is done more."""
    model = agent(COPlanner, gradient_steps=0, **{rate: 1e6}, candidates=8, plan_horizon=1, use_means=True)
    model.learn(101)
    state = model.real_data().obs[:1].expand(400, -1)
    plain = super(UPMPC, model).imagination_policy(model.world)
    if sign < 0:
        action = model.imagination_policy(model.world)(state)
    else:
        model._last_obs = state[:1].numpy()
        action = torch.as_tensor(np.concatenate([model._sample_action(0)[0] for _ in range(400)]))
    scale = torch.tensor(model.uncertainty_scale)
    unsure = [
        step_uncertainty(model.world, state, a, generator(0), scale=scale, use_means=True)
        for a in (action, plain(state))
    ]
    assert sign * (unsure[0].mean() - unsure[1].mean()) > 0.05 * unsure[1].mean()
    greedy, _ = model.predict(state.numpy(), deterministic=True)
    expected = model.policy.unscale_action(model.actor(state, deterministic=True).detach().numpy())
    np.testing.assert_allclose(greedy, expected, rtol=1e-5)


def test_the_work_counts_the_steps_of_plans() -> None:
    assert agent(COPlanner).work(200)["planned_steps"] == 5 * 5 * (3 * 100 + 100)  # fits at 101, 150, 200
    assert agent(COPlanner, candidates=1).work(200)["planned_steps"] == 0


def test_the_replay_holds_what_was_done() -> None:
    model = agent(COPlanner)
    model.learn(101)
    done, stored = model._sample_action(0)
    assert done.shape == (1, 1)
    np.testing.assert_allclose(done, 2 * stored, rtol=1e-6)
    assert np.abs(stored).max() <= 1


def test_any_dyna_agent_can_plan() -> None:
    class Planned(UPMPC, DynaTD3):
        """TD3, planned."""

    model = agent(Planned, imagination_noise=0.3)
    model.learn(160)
    pool = model.replay_buffer.imagined
    assert pool.unpack(pool.rows()).action.abs().max() <= 1 + 1e-6
    assert np.isfinite(model.predict(model._last_obs)[0]).all()


def test_a_loaded_agent_plans_in_the_same_units(tmp_path) -> None:
    model = agent(COPlanner)
    model.learn(101)
    model.save(tmp_path / "agent")
    loaded = COPlanner.load(tmp_path / "agent", env=gym.make("Pendulum-v1"), device="cpu")
    assert loaded.uncertainty_scale == model.uncertainty_scale is not None
    assert (loaded.conservative_rate, loaded.candidates) == (2.0, 5)
    assert agent(COPlanner, standardise=False).uncertainty_scale is None


def test_a_resumed_run_goes_on_bit_equal(tmp_path) -> None:
    """With a regularised critic, whose singular vectors are part of the file."""
    model = agent(COPlanner, critic_regulariser=SpectralCap(0.8)).learn(130)
    save_checkpoint(model, tmp_path / "checkpoint")
    model.learn(30, reset_num_timesteps=False)
    other = load_checkpoint(COPlanner, tmp_path / "checkpoint", gym.make("Pendulum-v1"), "cpu")
    assert other.critic_regulariser == SpectralCap(0.8)
    other.learn(30, reset_num_timesteps=False)
    assert other.num_timesteps == model.num_timesteps == 160
    assert distance(model, other) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"candidates": 0}, "candidates must be finite and at least 1, got 0"),
        ({"plan_horizon": 0}, "plan_horizon must be finite and at least 1, got 0"),
        ({"conservative_rate": -1.0}, "conservative_rate must be finite and at least 0, got -1.0"),
        ({"optimistic_rate": math.inf}, "optimistic_rate must be finite and at least 0, got inf"),
        ({"plan_discount": math.nan}, "plan_discount must be finite and at least 0, got nan"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent(COPlanner, **kwargs)
