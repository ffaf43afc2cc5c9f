"""MOREC: the learned dynamics reward, the filter that asks it, and the agents around both."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp

from learneddyn.core import DataError, Outcome, Prediction, State, Task, Transitions, generator
from learneddyn.models import ModelFileError, ProbabilisticEnsemble
from learneddyn.models.nets import BatchedMLP
from learneddyn.offline import (
    MOBILE,
    MOREC,
    MORECMOBILE,
    DynamicsReward,
    OfflineMBPO,
    TransitionFilter,
    dynamics_reward,
)
from learneddyn.offline.transition_filter import Threshold, threshold_of
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.testing import check_policy, check_world
from learneddyn.world import PENALTIES, World

LEAST, MOST = (math.log1p(math.exp(side)) for side in (-1, 1))  # of r^D: x / (1 + |x|) lies in (-1, 1)
QUICK = {
    "snapshots": 3,
    "games": 2,
    "updates": 30,
    "hidden": (16,),
    "generator_hidden": (8,),
    "warm_up": 5,
    "batch_size": 32,
}
SMALL = {
    "policy_kwargs": {"net_arch": (16, 16)},
    "batch_size": 40,
    "rollout_batch": 60,
    "rollout_every": 4,
    "horizon": 3,
    "device": "cpu",
    "seed": 0,
}
ENDLESS = Task("Example-v0", terminated=never)


@pytest.fixture(scope="module")
def model(log):
    ensemble = ProbabilisticEnsemble(num_members=4, num_elites=3, hidden=[16], max_epochs=3, learn_reward=True)
    ensemble.fit(log, rng=generator(0))
    return ensemble


@pytest.fixture(scope="module")
def learned(log):
    reward = DynamicsReward(snapshots=6, games=2, updates=500, hidden=(32, 32), generator_hidden=(16,), warm_up=100)
    reward.fit(log, rng=generator(0))
    return reward


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def indifferent(obs, action, next_obs):
    return torch.full((len(obs),), 0.7)


def judged(reward: DynamicsReward, log: Transitions, shift: float = 0.0) -> torch.Tensor:
    return reward(log.obs, log.action, log.next_obs + shift)


class Steps:
    """Members that step by fixed amounts, pay what they step, and remember how often they stepped."""

    def __init__(self, amounts, elites) -> None:
        self.amounts, self.elites, self.num_members = torch.tensor(amounts), torch.tensor(elites), len(amounts)
        self.spaces = None

    def predict(self, obs, action, memory=None):
        raise AssertionError("the filter draws")

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        step = self.amounts[member]
        return Outcome(obs + step[:, None], step, step > 100, None if memory is None else memory + step[:, None])


# --- the reward -------------------------------------------------------------------------------------------------------


def by_hand(log, slope, expert, learner, **more):
    """A reward of linear discriminators that look at the first column's change only."""
    count = len(slope)
    reward = DynamicsReward(snapshots=count, updates=count, hidden=(), generator_hidden=(), warm_up=0, **more)
    reward.fit(log, rng=generator(0))
    with torch.no_grad():
        for part in reward.nets.parameters():
            part.zero_()
        reward.nets.weights[0][:, 5, 0] = torch.tensor(slope)
        reward.shift.zero_()
        reward.factor.fill_(1.0)
        reward.expert.copy_(torch.tensor(expert))
        reward.learner.copy_(torch.tensor(learner))
    return reward


CHANGE = torch.tensor([-3.0, 0.0, 0.1, 0.25, 0.3, 0.5, 1.0, 40.0])
STEPS = torch.zeros(8, 3), torch.zeros(8, 2), torch.cat((CHANGE[:, None], torch.zeros(8, 2)), 1)


def test_the_calibration_keeps_the_order(log):
    """x is -1 at the learner's mean logit and 1 at the expert's, in units of at least one logit; averaged, squashed."""
    reward = by_hand(log, [1.0, 10.0, 3.0], [1.0, 4.0, -2.0], [0.0, 1.0, 5.0])
    x = ((2 * CHANGE - 1) / 2 + (20 * CHANGE - 5) / 3 + (6 * CHANGE - 3) / 2) / 3
    torch.testing.assert_close(reward(*STEPS), -(1 - (x / (1 + x.abs())).sigmoid()).log())
    assert reward(*STEPS).diff().gt(0).all()
    level = by_hand(log, [1.0], [0.5], [0.5])(*STEPS)
    assert level[5] == pytest.approx(math.log(2), abs=1e-6)  # half-way between the two
    assert pytest.approx((0.3133, 1.3133), abs=1e-4) == (LEAST, MOST)


def test_the_published_calibration_clips(log):
    """σ(-1) at the learner's mean and below, σ(1) at the expert's and above; blind where the expert lies lower."""
    reward = by_hand(log, [1.0, 10.0, 3.0], [1.0, 4.0, -2.0], [0.0, 2.0, 5.0], calibration="clip")
    one, two = ((2 * x - 1).sigmoid() for x in (CHANGE.clamp(0, 1), (5 * CHANGE - 1).clamp(0, 1)))
    blind = torch.full_like(CHANGE, 0.5)
    torch.testing.assert_close(reward(*STEPS), -(1 - (one + two + blind) / 3).log())
    alone = by_hand(log, [1.0], [1.0], [0.0], calibration="clip")(*STEPS)
    assert alone[[0, -1]].tolist() == pytest.approx([LEAST, MOST], abs=1e-6)
    lost = by_hand(log, [1.0], [0.0], [0.0], calibration="clip")
    assert torch.allclose(judged(lost, log), torch.tensor(math.log(2)))


def test_its_range(learned, log):
    for scale in (0.1, 1.0, 1e3, 1e8):
        rows = scale * torch.randn(500, 8, generator=generator(1))
        found = learned(rows[:, :3], rows[:, 3:5], rows[:, 5:])
        assert found.min() > LEAST - 1e-5
        assert found.max() < MOST + 1e-5


def test_all_snapshots_are_asked_at_once(learned, log, monkeypatch):
    """The batched net says what its nets say one after the other, in portions of any size."""
    rows = learned._features(log.obs, log.action, log.next_obs)
    total = torch.zeros(len(log))
    for index in range(12):
        x = rows
        for layer, (weight, bias) in enumerate(zip(learned.nets.weights, learned.nets.biases, strict=True)):
            x = (x if layer == 0 else x.relu()) @ weight[index] + bias[index]
        expert, learner = learned.expert[index], learned.learner[index]
        total += (2 * x[:, 0] - expert - learner) / (expert - learner).clamp_min(2)
    wanted = -(1 - (total / 12 / (1 + (total / 12).abs())).sigmoid()).log()
    torch.testing.assert_close(judged(learned, log), wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(dynamics_reward, "_ENTRIES", 7 * 12 * 32)
    torch.testing.assert_close(judged(learned, log), wanted, rtol=1e-4, atol=1e-5)
    assert judged(learned, log[:0]).shape == (0,)


def test_fewer_snapshots_of_the_same_training(learned, log):
    """Of each of the two games, which lie side by side."""
    half, last = learned.thinned(2), learned.thinned(6)
    assert (half.snapshots, last.snapshots) == (3, 1)
    assert torch.equal(last.expert, learned.expert[-2:])
    assert torch.equal(half.nets.weights[1], learned.nets.weights[1][[2, 3, 6, 7, 10, 11]])
    assert torch.equal(judged(learned.thinned(1), log), judged(learned, log))
    assert not torch.equal(judged(half, log), judged(learned, log))
    with pytest.raises(ValueError, match="every must be 1 to snapshots = 6 of a learned reward, got 7"):
        learned.thinned(7)


def test_games_are_played_apart(log):
    """Where the second one starts elsewhere, the first ends where it would have; the entropy's weight is shared."""
    one, other = (DynamicsReward(**QUICK, entropy_learning_rate=0.0) for _ in range(2))
    one.fit(log, rng=generator(0))
    assert not torch.equal(one.nets.weights[0][0], one.nets.weights[0][1])
    make = BatchedMLP.__init__

    def elsewhere(self, count, *args, **kwargs):
        make(self, count, *args, **kwargs)
        with torch.no_grad():
            for weight in self.weights:
                weight[1] *= 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedMLP, "__init__", elsewhere)
        other.fit(log, rng=generator(0))
    first, second = ((one.nets.weights[0] - other.nets.weights[0])[game::2].abs().max() for game in range(2))
    assert first < 1e-4
    assert second > 1e-2


def test_it_knows_real_steps(learned, log):
    real = judged(learned, log).mean()
    assert real > judged(learned, log, 0.2).mean() + 0.1
    assert real > judged(learned, log, -0.2).mean() + 0.1
    swapped = replace(log, action=-log.action)
    assert real > judged(learned, swapped).mean() + 0.1


def test_units_do_not_matter(log):
    """Any affine change of units of state and action gives the same reward of the same steps."""
    stretch, move = torch.tensor([4.0, 0.25, 8.0]), torch.tensor([1.0, -2.0, 4.0])
    other = replace(
        log, obs=log.obs * stretch + move, next_obs=log.next_obs * stretch + move, action=log.action * 2 - 1
    )
    one, two = DynamicsReward(**QUICK), DynamicsReward(**QUICK)
    one.fit(log, rng=generator(3))
    two.fit(other, rng=generator(3))
    torch.testing.assert_close(judged(one, log), judged(two, other), rtol=0, atol=2e-2)


def test_scales_of_state_and_action(log):
    """Over both ends of all steps: to the published ranges, or to mean 0 and deviation 1."""
    seen = torch.cat((log.obs, log.next_obs))
    for scaling in ("range", "deviation"):
        reward = DynamicsReward(**QUICK, scaling=scaling)
        reward.fit(log, rng=generator(0))
        starts, ends = (reward._features(obs, log.action, obs) for obs in (log.obs, log.next_obs))
        found = torch.cat((starts, ends))
        if scaling == "range":
            wanted = torch.tensor([0.8] * seen.shape[1] + [1.0] * log.action.shape[1])
            places = (found.amax(0), -found.amin(0))
        else:
            wanted = torch.ones(seen.shape[1] + log.action.shape[1])
            places = (found.std(0, correction=0), found.mean(0) + 1)
        for place in places:
            torch.testing.assert_close(place[: len(wanted)], wanted, atol=1e-4, rtol=1e-4)


def test_columns_that_never_change(log):
    """A constant sensor and a clock divide by nothing, and what they show later changes nothing."""
    clock = torch.arange(len(log), dtype=torch.float32)
    wide = replace(
        log,
        obs=torch.cat((log.obs, torch.full((len(log), 1), 1e4), clock[:, None]), 1),
        next_obs=torch.cat((log.next_obs, torch.full((len(log), 1), 1e4), clock[:, None] + 1), 1),
        action=torch.cat((log.action, torch.zeros(len(log), 1)), 1),
        spaces=None,
    )
    wide = replace(wide, spaces=example_spaces(5, 3))
    reward = DynamicsReward(**QUICK)
    reward.fit(wide, rng=generator(0))
    found = reward(wide.obs, wide.action, wide.next_obs)
    assert found.isfinite().all()
    assert found.std() > 0
    drifted, ticked, pushed = wide.obs.clone(), wide.next_obs.clone(), wide.action.clone()
    drifted[:, 3] = 5.0
    ticked[:, 3:] = 7.0
    ticked[:, 4] += wide.obs[:, 4]
    pushed[:, 2] = 0.5
    torch.testing.assert_close(reward(drifted, pushed, ticked), found)
    still = replace(log, next_obs=log.obs.clone())
    with pytest.raises(DataError, match="no observation column ever changes"):
        DynamicsReward(**QUICK).fit(still, rng=generator(0))


def example_spaces(obs_dim: int, action_dim: int) -> Spaces:
    from gymnasium.spaces import Box

    return Spaces(Box(-np.inf, np.inf, (obs_dim,), np.float32), Box(-1.0, 1.0, (action_dim,), np.float32))


def test_the_entropy_bonus_steers_towards_its_target(log):
    """Its weight grows where the discriminator is surer than asked for, and shrinks where it is less sure."""
    ends = []
    for target in (0.6931, 0.05):
        report = DynamicsReward(**(QUICK | {"updates": 200}), entropy=target).fit(log, rng=generator(0))
        ends.append(report.history[-1]["entropy_weight"])
    assert ends[0] > 1e-3 > ends[1]


def test_one_seed_one_reward_and_nothing_else_moves(log):
    before = torch.get_rng_state()
    one, same, other = (DynamicsReward(**QUICK) for _ in range(3))
    report = one.fit(log, rng=generator(0))
    same.fit(log, rng=generator(0))
    other.fit(log, rng=generator(1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(judged(one, log), judged(same, log))
    assert not torch.equal(judged(one, log), judged(other, log))
    assert len(report.history) == 3
    assert LEAST <= report.metrics["generated_reward"] <= MOST
    one.fit(log, rng=generator(1))  # anew, not from the weights at hand
    assert torch.equal(judged(one, log), judged(other, log))


def test_it_is_kept_in_a_folder(learned, log, tmp_path):
    learned.save(tmp_path / "reward")
    loaded = DynamicsReward.load(tmp_path / "reward")
    assert loaded.config() == learned.config()
    assert torch.equal(judged(loaded, log), judged(learned, log))
    blob = tmp_path / "reward" / "model.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="truncated or altered"):
        DynamicsReward.load(tmp_path / "reward")


def test_training_that_diverges_keeps_what_was_learned(log):
    reward = DynamicsReward(**QUICK)
    reward.fit(log, rng=generator(0))
    kept = judged(reward, log)
    reward.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match="diverged before update 10: lower learning_rate"):
        reward.fit(log, rng=generator(0))
    assert torch.equal(judged(reward, log), kept)
    fresh = DynamicsReward(**QUICK, learning_rate=1e30)
    with pytest.raises(FloatingPointError):
        fresh.fit(log, rng=generator(0))
    with pytest.raises(ValueError, match="has not been learned"):
        judged(fresh, log)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"games": 0}, "games must be at least 1, got 0"),
        ({"snapshots": 0}, "snapshots must be at least 1, got 0"),
        ({"updates": 2}, "updates must be at least snapshots = 3, got 2"),
        ({"calibration": "raw"}, "calibration must be 'mean' or 'clip', got 'raw'"),
        ({"scaling": "raw"}, "scaling must be 'range' or 'deviation', got 'raw'"),
        ({"entropy": 0.7}, "entropy must be between 0 and log 2, got 0.7"),
        ({"hidden": (0,)}, "hidden must be positive widths"),
    ],
)
def test_arguments_of_the_reward(argument, message):
    with pytest.raises(ValueError, match=message):
        DynamicsReward(**(QUICK | argument))


def test_data_that_nothing_can_be_learned_from(log):
    broken = replace(log, next_obs=log.next_obs.clone().fill_(torch.nan))
    with pytest.raises(DataError, match="NaN or infinity in 'next_obs'"):
        DynamicsReward(**QUICK).fit(broken, rng=generator(0))


# --- the filter -------------------------------------------------------------------------------------------------------


def chosen(reward, *, temperature, rows=4000, draws=2, seed=0):
    """Return how often each of the members 0 to 3 is chosen; 1, 2 and 3 are elites."""
    model = Steps([9.0, 1.0, 2.0, 3.0], [1, 2, 3])
    state = State(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.long))
    after, outcome = TransitionFilter(reward, temperature=temperature, draws=draws)(
        state, torch.zeros(rows, 1), model, generator(seed)
    )
    assert torch.equal(outcome.reward, model.amounts[after.member])  # what a candidate pays goes with it
    assert torch.equal(after.obs[:, 0], outcome.reward)
    return after.member.bincount(minlength=4).tolist()


def far(obs, action, next_obs):
    return 0.1 * next_obs[:, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.1, math.inf])
def test_a_constant_reward_chooses_elites_uniformly(temperature):
    counts = chosen(indifferent, temperature=temperature)
    assert counts[0] == 0
    assert chisquare(counts[1:]).pvalue > 0.01


def test_the_choice_is_the_softmax_of_the_reward():
    counts = chosen(far, temperature=0.1)
    wanted = np.exp([1.0, 2.0, 3.0])
    assert chisquare(counts[1:], 4000 * wanted / wanted.sum()).pvalue > 0.01
    assert chisquare(chosen(far, temperature=math.inf)[1:]).pvalue > 0.01
    assert chisquare(chosen(far, temperature=1e9)[1:]).pvalue > 0.01
    assert chosen(far, temperature=0.0) == [0, 0, 0, 4000]


@pytest.mark.parametrize(("reward", "temperature"), [(far, math.inf), (indifferent, 0.1), (indifferent, 0.0)])
def test_a_hot_or_indifferent_filter_draws_as_a_random_elite(model, log, reward, temperature):
    """Candidates are drawn otherwise than the sampler "elite" draws, so only the law can be the same."""
    rows, rng = 3000, generator(5)
    state = State(log.obs[:1].expand(rows, -1), model.elites[:1].expand(rows))
    action = log.action[:1].expand(rows, -1)
    with torch.no_grad():
        filtered, plain = (
            World(model, ENDLESS, sampler=sampler).step(state, action, rng)
            for sampler in (TransitionFilter(reward, temperature=temperature), "elite")
        )
    for column in range(3):
        assert ks_2samp(filtered[0].obs[:, column], plain[0].obs[:, column]).pvalue > 0.01
    assert ks_2samp(filtered[1].reward, plain[1].reward).pvalue > 0.01
    assert ks_2samp(filtered[0].member.float(), plain[0].member.float()).pvalue > 0.01


def test_one_elite_and_one_draw_is_no_filter(model, log):
    """Bit for bit, from one stream of random numbers: where there is one candidate nothing is drawn to choose it."""
    single = only_first(model)
    worlds = [
        World(single, ENDLESS, sampler=sampler)
        for sampler in (TransitionFilter(far, draws=1), TransitionFilter(far, draws=1, temperature=0.0), "tsinf")
    ]
    rows = [world.rollout(log.obs[:50], lambda obs: obs[:, :2].tanh(), 5, generator(0)) for world in worlds]
    for found in rows[:2]:
        assert torch.equal(found.next_obs, rows[2].next_obs)
        assert torch.equal(found.reward, rows[2].reward)


def only_first(model):
    import copy

    single = copy.deepcopy(model)
    single._elites = single._elites[:1]
    return single


def test_a_world_with_a_filter_is_a_world(model, learned):
    choose = TransitionFilter(learned)
    check_world(World(model, ENDLESS, sampler=choose, trust=choose.above(0.6)))


def test_all_candidates_are_drawn_and_judged_at_once(model, log, monkeypatch):
    """One call of the model, one member per row, also where a penalty asks every member about the rows themselves."""
    rows = {"model": [], "reward": []}
    draw = model.sample

    def counted(obs, *args, **kwargs):
        rows["model"].append(len(obs))
        return draw(obs, *args, **kwargs)

    def judge(obs, action, next_obs):
        rows["reward"].append(len(obs))
        return far(obs, action, next_obs)

    def every(*args, **kwargs):
        raise AssertionError("every member was asked about every candidate")

    monkeypatch.setattr(model, "sample", counted)
    monkeypatch.setattr(model, "sample_and_predict", every)
    choose = TransitionFilter(judge)
    world = World(
        model,
        ENDLESS,
        sampler=choose,
        trust=choose.above(0.0),
        penalty=PENALTIES["ensemble_std"],
        penalty_weight=1.0,
    )
    state = State(log.obs, model.elites[:1].expand(len(log)))
    after, step = world.step(state, log.action, generator(0))
    assert rows == {"model": [6 * len(log)], "reward": [6 * len(log)]}
    assert torch.equal(step.trusted, far(log.obs, log.action, after.obs) >= 0)
    other = after._replace(member=after.member.clone(), obs=log.obs - 100)
    assert not choose.above(0.0)(state, log.action, other).any()  # a step that the filter did not choose


def test_memory_goes_with_the_choice():
    model = Steps([1.0, 2.0, 3.0], [0, 1, 2])
    state = State(torch.zeros(20, 1), torch.zeros(20, dtype=torch.long), torch.full((20, 1), 10.0))
    after, _ = TransitionFilter(far, temperature=0.0)(state, torch.zeros(20, 1), model, generator(0))
    assert after.memory.tolist() == [[13.0]] * 20


def test_candidates_that_are_not_finite_are_not_chosen():
    for bad in (torch.nan, torch.inf):
        model = Steps([bad, 1.0, bad], [0, 1, 2])
        state = State(torch.zeros(50, 1), torch.zeros(50, dtype=torch.long))
        for temperature in (0.0, 0.1, math.inf):
            choose = TransitionFilter(far, temperature=temperature)
            after, _ = choose(state, torch.zeros(50, 1), model, generator(0))
            assert after.obs.eq(1).all()
            figures = choose.figures()
            assert figures["imagined/choice_entropy"] < math.log(2) + 1e-5
            assert figures["imagined/dynamics_reward"] == pytest.approx(0.1)
            hopeless = Steps([bad, bad], [0, 1])
            assert not choose(state, torch.zeros(50, 1), hopeless, generator(0))[0].obs.isfinite().any()
            assert all(map(math.isfinite, choose.figures().values()))
    clipped, _ = TransitionFilter(far, temperature=0.0, limit=2.5)(
        state, torch.zeros(50, 1), Steps([1.0, 900.0], [0, 1]), generator(0)
    )
    assert clipped.obs.eq(2.5).all()


def test_the_entropy_of_the_choice():
    state, action = State(torch.zeros(5, 1), torch.zeros(5, dtype=torch.long)), torch.zeros(5, 1)
    model = Steps([1.0, 2.0, 3.0], [0, 1, 2])
    wanted = [math.log(12), math.log(12), math.log(4), math.log(4)]  # four draws of the best elite are alike
    chosen = [0.7, None, 0.3, 0.3]
    asked = ((indifferent, 0.1), (far, math.inf), (far, 0.0), (far, 1e-3))
    for (reward, temperature), entropy, value in zip(asked, wanted, chosen, strict=True):
        choose = TransitionFilter(reward, temperature=temperature, draws=4)
        assert choose.figures() == {}
        for seed in range(2):
            choose(state, action, model, generator(seed))
        figures = choose.figures()
        assert figures["imagined/choice_entropy"] == pytest.approx(entropy, rel=1e-5)
        if value is not None:
            assert figures["imagined/dynamics_reward"] == pytest.approx(value)
        assert choose.figures() == {}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"temperature": -1.0}, "filter_temperature must be at least 0, got -1.0"),
        ({"draws": 0}, "filter_draws must be at least 1, got 0"),
        ({"limit": 0.0}, "filter_limit must be positive, got 0.0"),
    ],
)
def test_arguments_of_the_filter(argument, message):
    with pytest.raises(ValueError, match=message):
        TransitionFilter(indifferent, **argument)


# --- the agents -------------------------------------------------------------------------------------------------------


def test_without_a_choice_it_is_the_base_method(endless, model):
    """One elite, one draw, nothing halted: MOREC is MBPO, and on MOBILE it is MOBILE, bit for bit."""
    shared = {**SMALL, "model": only_first(model), "task": ENDLESS}
    morec = {"dynamics_reward": indifferent, "filter_draws": 1, "least_dynamics_reward": 0.0}
    base = OfflineMBPO("MlpPolicy", endless, sampler="tsinf", **shared).learn(9)
    agent = MOREC("MlpPolicy", endless, penalty_weight=0.0, **morec, **shared).learn(9)
    assert torch.equal(weights(base), weights(agent))
    mobile, filtered = (
        kind("MlpPolicy", endless, inconsistency=0.0, **extra, **shared).learn(9)
        for kind, extra in ((MOBILE, {"sampler": "tsinf"}), (MORECMOBILE, morec))
    )
    assert torch.equal(weights(mobile), weights(filtered))
    choosing = MOREC("MlpPolicy", endless, penalty_weight=0.0, **(morec | {"filter_draws": 2}), **shared).learn(9)
    assert not torch.equal(weights(base), weights(choosing))


def test_a_least_reward_above_all_ends_every_rollout_at_once(endless, model):
    """Every row has d = 1 after one step, and still pays its own reward, penalty included."""
    shared = {**SMALL, "model": model, "task": ENDLESS, "dynamics_reward": indifferent}
    agent = MOREC("MlpPolicy", endless, least_dynamics_reward=0.71, penalty_weight=2.0, **shared)
    with pytest.warns(UserWarning, match=r"100% of the logged steps have a dynamics reward below .* = 0\.71"):
        agent.learn(1)
    pool = agent.imagined.unpack(agent.imagined.rows())
    assert len(pool.reward) == 60
    assert pool.terminated.all()
    state = State(endless.obs, model.elites[:1].expand(len(endless)))
    after, step = agent.world.step(state, endless.action, generator(0))
    assert step.trusted.all()
    choose, rng = agent.world.sampler, generator(0)
    _, outcome = choose(state, endless.action, model, rng)
    penalty = agent.world.penalty(endless.obs, endless.action, model.predict(endless.obs, endless.action), after)
    torch.testing.assert_close(step.reward, outcome.reward - 2 * penalty)
    going = MOREC("MlpPolicy", endless, least_dynamics_reward=0.69, **shared).learn(1)
    pool = going.imagined.unpack(going.imagined.rows())
    assert len(pool.reward) == 3 * 60
    assert not pool.terminated.any()


def test_the_threshold_is_a_quantile_of_the_log(endless, model, learned, listen):
    """By default one logged step in a hundred lies below it, whatever r^D; a number is taken as it is."""
    rewards = judged(learned, endless)
    rule = threshold_of("quantile:0.01", learned, endless)
    assert rule.least == pytest.approx(float(rewards.quantile(0.01)))
    assert rule.below == pytest.approx(0.01, abs=1 / len(endless))
    assert rule.mean == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert threshold_of(0.7, indifferent, endless) == Threshold(0.7, 0.0, pytest.approx(0.7))
    assert threshold_of("quantile:0.5", indifferent, endless).below == 0.0
    agent = MOREC("MlpPolicy", endless, model=model, task=ENDLESS, dynamics_reward=learned, **SMALL)
    told = listen(agent)
    agent.learn(1)
    assert told[0]["imagined/least_dynamics_reward"] == pytest.approx(rule.least)
    assert told[0]["log/below_least"] == pytest.approx(rule.below)
    pool = agent.imagined.unpack(agent.imagined.rows())
    assert told[0]["imagined/halted"] == pytest.approx(float(pool.terminated.float().mean()))
    chosen = learned(pool.obs, agent._unscaled(pool.action), pool.next_obs)
    assert torch.equal(pool.terminated.bool(), chosen < rule.least)
    assert told[0]["imagined/dynamics_reward"] == pytest.approx(float(chosen.mean()), abs=1e-5)


@pytest.mark.parametrize("rule", ["0.6", "quantile:1", "quantile:-0.1", "quantile:x"])
def test_a_threshold_that_is_none(log, rule):
    with pytest.raises(ValueError, match=f"a number or 'quantile:q' with q in .*, got '{rule}'"):
        MOREC("MlpPolicy", log, task=ENDLESS, least_dynamics_reward=rule, **SMALL)


def test_candidates_are_clipped_to_the_limit(endless, model):
    tight = {"dynamics_reward": indifferent, "filter_limit": 0.25, "horizon": 1}
    agent = MOREC("MlpPolicy", endless, model=model, task=ENDLESS, **(SMALL | tight)).learn(1)
    pool = agent.imagined.unpack(agent.imagined.rows())
    assert pool.next_obs.abs().max() == 0.25


def test_its_reward_is_learned_once_and_travels_with_the_agent(endless, model, listen, tmp_path):
    reward = DynamicsReward(**QUICK)
    agent = MORECMOBILE("MlpPolicy", endless, model=model, task=ENDLESS, dynamics_reward=reward, **SMALL)
    told = listen(agent)
    agent.learn(2, log_interval=1)
    assert reward.spaces == endless.spaces
    once = judged(reward, endless)
    for name in (
        "dynamics_reward/log_reward",
        "imagined/dynamics_reward",
        "imagined/halted",
        "imagined/choice_entropy",
    ):
        assert math.isfinite(told[0][name])
    assert 0 < told[0]["imagined/choice_entropy"] <= math.log(6) + 1e-5
    agent.learn(2)
    assert torch.equal(judged(reward, endless), once)
    agent.save(tmp_path / "agent")
    loaded = MORECMOBILE.load(tmp_path / "agent", data=endless, task=ENDLESS, device="cpu")
    assert torch.equal(judged(loaded.dynamics_reward, endless), once)
    loaded.learn(2, reset_num_timesteps=False)
    check_policy(loaded, endless.spaces)
    plain = MOREC("MlpPolicy", endless, model=model, task=ENDLESS, dynamics_reward=indifferent, **SMALL).learn(1)
    plain.save(tmp_path / "plain")
    with pytest.raises(ValueError, match="saved without its dynamics reward"):
        MOREC.load(tmp_path / "plain", data=endless, task=ENDLESS, device="cpu").learn(1)
    MOREC.load(tmp_path / "plain", data=endless, task=ENDLESS, dynamics_reward=indifferent, device="cpu").learn(1)


def test_a_loaded_agent_goes_on_bit_equal(endless, model, learned, tmp_path):
    """Where the next update imagines anew and replaces all imagined rows, which are not saved."""
    shared = {**SMALL, "model": model, "task": ENDLESS, "dynamics_reward": learned, "least_dynamics_reward": 0.0}
    agent = MOREC("MlpPolicy", endless, retain=1, **shared).learn(8)
    agent.save(tmp_path / "agent")
    agent.learn(6, reset_num_timesteps=False)
    loaded = MOREC.load(tmp_path / "agent", data=endless, task=ENDLESS, device="cpu")
    loaded.learn(6, reset_num_timesteps=False)
    assert torch.equal(weights(agent), weights(loaded))


def test_what_does_not_go_together(endless, model, learned):
    with pytest.raises(ValueError, match="leave sampler at 'elite' and pessimism at 0, got 'ts1' and 0"):
        MOREC("MlpPolicy", endless, model=model, task=ENDLESS, sampler="ts1", **SMALL)
    with pytest.raises(ValueError, match="got 'elite' and 2"):
        MOREC("MlpPolicy", endless, model=model, task=ENDLESS, pessimism=2.0, **SMALL)
    narrow = replace(endless, obs=endless.obs[:, :2], next_obs=endless.next_obs[:, :2], spaces=example_spaces(2, 2))
    with pytest.raises(ValueError, match="the dynamics reward was learned on"):
        MOREC("MlpPolicy", narrow, task=ENDLESS, model=Blind(narrow), dynamics_reward=learned, **SMALL).learn(1)


class Blind:
    """A plant of given spaces that stands still."""

    num_members, elites = 1, torch.zeros(1, dtype=torch.long)

    def __init__(self, log) -> None:
        self.spaces = log.spaces

    def predict(self, obs, action, memory=None):
        return Prediction(obs[None], torch.zeros_like(obs)[None], self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs, obs[:, 0])
