import pytest
import torch
from world_doubles import Shifts, first_column, never, still, task

from learneddyn.core import Outcome, State, generator
from learneddyn.world import World, all_trusted, penalty_below, within_data
from learneddyn.world.penalties import PENALTIES, ensemble_std, max_pairwise_diff
from learneddyn.world.trust import within_box


def steps(world, state, horizon, rng):
    for _ in range(horizon):
        state, _ = world.step(state, still(state.obs), rng)
    return state.obs[:, 0]


@pytest.mark.parametrize("horizon", [1, 4, 16])
def test_ts1_variance_grows_with_h_and_tsinf_with_h_squared(horizon):
    c, lanes, rng = 0.5, 65536, generator(0)
    model = Shifts([[c], [-c]])
    start = torch.zeros(lanes, 1)
    kept = World(model, task(), sampler="tsinf")
    x = steps(kept, kept.start(start, rng), horizon, rng)
    assert x.mean() == pytest.approx(0, abs=1e-4)
    assert x.var(correction=0) == pytest.approx((c * horizon) ** 2, rel=1e-5)
    assert set(x.tolist()) == {c * horizon, -c * horizon}
    redrawn = World(model, task(), sampler="ts1")
    x = steps(redrawn, redrawn.start(start, rng), horizon, rng)
    assert x.mean() == pytest.approx(0, abs=1e-3)
    assert x.var(correction=0) == pytest.approx(c**2 * horizon, rel=0.03)


def test_noise_adds_its_own_variance():
    lanes, horizon, rng = 65536, 9, generator(1)
    model = Shifts([[0.1], [0.3]], std=0.2)
    for sampler, between in (("tsinf", (0.1 * horizon) ** 2), ("ts1", 0.1**2 * horizon)):
        world = World(model, task(), sampler=sampler)
        x = steps(world, world.start(torch.zeros(lanes, 1), rng), horizon, rng)
        assert x.mean() == pytest.approx(0.2 * horizon, abs=0.02)
        assert x.var() == pytest.approx(between + 0.04 * horizon, rel=0.03)


def test_mean_sampler_averages_elites_without_noise():
    model = Shifts(
        [[1.0], [2.0], [100.0]],
        std=5.0,
        elites=[0, 1],
        reward=torch.tensor([1.0, 3.0, 50.0]),
        terminated=torch.tensor([0.2, 0.9, 0.0]),
    )
    world = World(model, task(reward=None, terminated=None), sampler="mean")
    state, step = world.step(world.start(torch.zeros(4, 1), generator(0)), torch.zeros(4, 1), generator(0))
    assert state.obs.tolist() == [[1.5]] * 4
    assert step.reward.tolist() == [2.0] * 4
    assert step.terminated.all()


def test_elite_sampler_draws_elites_only_in_equal_shares():
    model = Shifts([[0.0], [1.0], [2.0], [3.0]], elites=[1, 3])
    world = World(model, task(), sampler="elite")
    state = world.start(torch.zeros(1000, 1), generator(0))
    seen = []
    for seed in range(3):
        after, _ = world.step(state, torch.zeros(1000, 1), generator(seed))
        assert (after.obs == 1).sum() == 500
        assert (after.obs == 3).sum() == 500
        assert torch.equal(after.obs[:, 0], model.shift[after.member, 0])
        seen.append(after.member)
    assert not torch.equal(seen[0], seen[1])
    everyone = World(model, task(), sampler="ts1")
    after, _ = everyone.step(state, torch.zeros(1000, 1), generator(0))
    assert after.member.bincount().tolist() == [250] * 4


def test_start_draws_a_uniform_elite_for_a_single_lane():
    world = World(Shifts([[0.0], [1.0], [2.0]], elites=[0, 2]), task())
    members = [int(world.start(torch.zeros(1, 1), generator(seed)).member) for seed in range(400)]
    assert set(members) == {0, 2}
    assert 150 < members.count(0) < 250


def test_tsinf_lane_keeps_the_member_it_started_with():
    world = World(Shifts([[1.0], [-1.0], [3.0]]), task(), sampler="tsinf")
    state = world.start(torch.zeros(30, 1), generator(0))
    obs = steps(world, state, 5, generator(1))
    assert torch.equal(obs, 5 * world.dynamics.shift[state.member, 0])


def test_sampler_may_be_a_function():
    def frozen(state, action, dynamics, rng):
        return state, Outcome(state.obs)

    world = World(Shifts([[1.0]]), task(), sampler=frozen)
    assert steps(world, world.start(torch.ones(2, 1), generator(0)), 3, generator(0)).tolist() == [1.0, 1.0]


def test_one_seed_one_result():
    world = World(Shifts([[1.0], [-1.0]], std=0.3), task(), sampler="ts1")
    first, again, other = (world.rollout(torch.zeros(50, 1), still, 4, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.next_obs, again.next_obs)
    assert not torch.equal(first.next_obs, other.next_obs)


def above(limit):
    return lambda next_obs: next_obs[:, 0] >= limit


def test_rollout_rows_stop_at_terminals_and_never_reappear():
    world = World(Shifts([[1.0]]), task(terminated=above(3.0)))
    data = world.rollout(torch.tensor([[0.0], [2.0], [-9.0]]), still, 5, generator(0))
    assert data.episode.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert data.obs[:, 0].tolist() == [0, 1, 2, 2, -9, -8, -7, -6, -5]
    assert torch.equal(data.next_obs, data.obs + 1)
    assert torch.equal(data.reward, data.next_obs[:, 0])
    assert data.terminated.tolist() == [False, False, True, True] + [False] * 5
    assert data.spaces == world.spaces


def test_rollout_ends_early_when_every_lane_has_terminated():
    calls = []

    def policy(obs):
        calls.append(len(obs))
        return still(obs)

    world = World(Shifts([[1.0]]), task(terminated=above(2.0)))
    data = world.rollout(torch.tensor([[0.0], [1.0]]), policy, 100, generator(0))
    assert calls == [2, 1]
    assert len(data) == 3


def test_rollout_leaves_untrusted_steps_out_and_stops_there():
    world = World(Shifts([[1.0]]), task(), trust=within_box(torch.tensor([-10.0]), torch.tensor([2.5])))
    data = world.rollout(torch.tensor([[0.0], [2.0], [-5.0]]), still, 4, generator(0))
    assert data.next_obs[:, 0].tolist() == [1, 2, -4, -3, -2, -1]
    assert data.episode.tolist() == [0, 0, 2, 2, 2, 2]
    assert not data.terminated.any()


class Counting(Shifts):
    """The memory of a row counts its steps, and the count drives it."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        memory = (torch.zeros(len(obs), 1) if memory is None else memory) + obs[:, :1]
        return Outcome(obs + memory, memory=memory)


def test_memory_follows_its_row_through_a_rollout():
    world = World(Counting([[0.0]]), task(terminated=above(5.0)))
    starts = torch.tensor([[4.0], [1.0], [-1.0]])
    data = world.rollout(starts, still, 4, generator(0))
    for row, start in enumerate(starts):
        alone = world.rollout(start[None], still, 4, generator(0))
        assert torch.equal(data.next_obs[data.episode == row], alone.next_obs)
    assert data.episode.bincount().tolist() == [1, 2, 4]


def test_halting_turns_distrust_into_a_termination_with_its_own_reward():
    """MOReL's HALT: the step is kept, pays -kappa and has no future; trusted steps are untouched."""
    box = within_box(torch.tensor([-10.0]), torch.tensor([2.5]))
    plain = World(Shifts([[1.0]]), task(), trust=box)
    halting = World(Shifts([[1.0]]), task(), trust=box, halt_reward=-7.0)
    start = torch.tensor([[0.0], [2.0]])
    one, other = (world.rollout(start, still, 5, generator(0)) for world in (plain, halting))
    assert one.next_obs[:, 0].tolist() == [1.0, 2.0]
    assert other.next_obs[:, 0].tolist() == [1.0, 2.0, 3.0, 3.0]
    assert other.terminated.tolist() == [False, False, True, True]
    assert other.reward[2:].tolist() == [-7.0, -7.0]
    assert torch.equal(other.reward[:2], one.reward)


def test_a_halted_step_may_keep_its_reward():
    box = within_box(torch.tensor([-10.0]), torch.tensor([2.5]))
    kept = World(Shifts([[1.0]]), task(), trust=box, halt_reward="kept")
    rows = kept.rollout(torch.tensor([[0.0], [2.0], [torch.inf]]), still, 5, generator(0))
    assert rows.next_obs[:, 0].tolist() == [1.0, 2.0, 3.0, 3.0]  # of a step that is not finite nothing is kept
    assert rows.terminated.tolist() == [False, False, True, True]
    assert torch.equal(rows.reward, rows.next_obs[:, 0])
    with pytest.raises(ValueError, match="halt_reward must be a number, 'kept' or None"):
        World(Shifts([[1.0]]), task(), halt_reward="own")


def test_rollout_may_have_no_trusted_row_at_all():
    world = World(
        Shifts([[1.0]]), task(), trust=lambda state, action, after: torch.zeros(len(state.obs), dtype=torch.bool)
    )
    assert len(world.rollout(torch.zeros(3, 1), still, 4, generator(0))) == 0


def test_rollout_hands_the_policy_the_living_rows_and_stores_its_action():
    world = World(Shifts([[0.0, 0.0]], gain=1.0), task(terminated=above(4.0)))
    data = world.rollout(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), lambda obs: 2 * obs, 2, generator(0))
    assert data.action[:, 0].tolist() == [2.0, 6.0, 6.0]
    assert data.next_obs[:, 0].tolist() == [3.0, 9.0, 9.0]


def test_rollout_carries_no_gradient():
    model = Shifts([[1.0]])
    model.shift.requires_grad_()
    assert not World(model, task()).rollout(torch.zeros(2, 1), still, 2, generator(0)).next_obs.requires_grad


def test_step_is_differentiable():
    world = World(Shifts([[1.0]], gain=2.0), task(), sampler="tsinf")
    action = torch.full((3, 1), 0.5, requires_grad=True)
    _, step = world.step(world.start(torch.zeros(3, 1), generator(0)), action, generator(0))
    step.reward.sum().backward()
    assert action.grad.tolist() == [[2.0]] * 3


class Poisoned(Shifts):
    """NaN as soon as the action is above 1/2."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        outcome = super().sample(obs, action, member, rng, memory, noise=noise)
        return outcome._replace(next_obs=outcome.next_obs.masked_fill(action > 0.5, torch.nan))


def test_non_finite_rows_are_never_trusted_and_never_seen():
    world = World(Poisoned([[1.0]]), task(terminated=above(0.0)))
    state = world.start(torch.tensor([[3.0], [4.0]]), generator(0))
    after, step = world.step(state, torch.tensor([[1.0], [0.0]]), generator(0))
    assert after.obs.tolist() == [[3.0], [5.0]]
    assert step.reward.tolist() == [0.0, 5.0]
    assert step.trusted.tolist() == [False, True]
    assert step.terminated.tolist() == [False, True]


def test_non_finite_reward_is_not_trusted():
    world = World(Shifts([[1.0]]), task(reward=lambda obs, action, next_obs: torch.log(obs[:, 0])))
    _, step = world.step(world.start(torch.tensor([[-1.0], [1.0]]), generator(0)), torch.zeros(2, 1), generator(0))
    assert step.trusted.tolist() == [False, True]
    assert step.reward.tolist() == [0.0, 0.0]


def test_returns_of_a_linear_model_in_closed_form():
    world = World(Shifts([[0.0]], gain=1.0), task())
    plans = torch.rand(3, 5, 4, 1, generator=generator(0)) * 2 - 1
    obs = torch.tensor([[0.0], [1.0], [-2.0]])
    got = world.returns(obs, plans, generator(0))
    want = (obs[:, None] + plans[..., 0].cumsum(dim=2)).sum(dim=2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(world.returns(obs, plans, generator(0), particles=7), want)


def test_returns_average_particles_over_members():
    c, horizon = 0.5, 4
    world = World(Shifts([[c], [-c]]), task(reward=lambda obs, action, next_obs: next_obs[:, 0] ** 2), sampler="tsinf")
    got = world.returns(torch.zeros(2, 1), torch.zeros(2, 3, horizon, 1), generator(0), particles=10)
    want = sum((c * t) ** 2 for t in range(1, horizon + 1))
    torch.testing.assert_close(got, torch.full((2, 3), want))


@pytest.mark.parametrize("chunk", [1, 6, 7, 10_000])
def test_chunks_of_plans_return_the_same(chunk):
    """A chunk of any size, plans that do not fill it, particles that it cannot hold."""
    largest = []

    def counted(next_obs):
        largest.append(len(next_obs))
        return next_obs[:, 0] >= 2.0

    world = World(Shifts([[0.3]], gain=1.0), task(terminated=counted))
    plans = torch.rand(3, 5, 4, 1, generator=generator(0)) * 2 - 1
    obs = torch.tensor([[0.0], [1.0], [-2.0]])
    want = world.returns(obs, plans, generator(0), particles=3, chunk=45)
    largest.clear()
    torch.testing.assert_close(world.returns(obs, plans, generator(0), particles=3, chunk=chunk), want)
    assert max(largest) == min(max(3, chunk // 3 * 3), 45)


@pytest.mark.parametrize(("sampler", "total"), [("ts1", 0.25 * (1 + 2 + 3)), ("tsinf", 0.25 * (1 + 4 + 9))])
def test_chunked_particles_average_over_members(sampler, total):
    """Equal shares make TSinf exact in every chunk; TS1 redraws, so its squares add up to the horizon on average."""
    world = World(
        Shifts([[0.5], [-0.5]]), task(reward=lambda obs, action, next_obs: next_obs[:, 0] ** 2), sampler=sampler
    )
    got = world.returns(torch.zeros(2, 1), torch.zeros(2, 20, 3, 1), generator(0), particles=50, chunk=100)
    assert got.mean() == pytest.approx(total, rel=0.05)
    assert (got.std() < 1e-6) == (sampler == "tsinf")


def test_chunk_and_particles_below_one_are_named():
    world = World(Shifts([[1.0]]), task())
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        world.returns(torch.zeros(1, 1), torch.zeros(1, 2, 3, 1), generator(0), chunk=0)


def test_finite_rows_that_add_up_to_infinity_are_kept():
    world = World(Shifts([[0.0]]), task())
    huge = torch.full((2, 1), 3e38)
    after, step = world.step(world.start(huge, generator(0)), torch.zeros(2, 1), generator(0))
    assert step.trusted.all()
    assert torch.equal(after.obs, huge)
    assert torch.equal(step.reward, huge[:, 0])


def test_returns_give_plans_the_gradient_that_they_ask_for():
    """Of sums of positions: an action counts once for every step from its own to the end of the particle."""
    world = World(Shifts([[0.0]], gain=1.0), task(terminated=above(2.0)))
    plans = torch.tensor([[0.25, 0.5, 0.0, 0.25], [1.5, 0.75, 0.5, 0.5]])[None, :, :, None].requires_grad_()
    returns = world.returns(torch.zeros(1, 1), plans, generator(0), particles=3, chunk=3)
    (gradient,) = torch.autograd.grad(returns.sum(), plans)
    assert gradient[0, :, :, 0].tolist() == [[4, 3, 2, 1], [2, 1, 0, 0]]
    assert not world.returns(torch.zeros(1, 1), plans.detach(), generator(0)).requires_grad
    with torch.no_grad():
        assert not world.returns(torch.zeros(1, 1), plans, generator(0)).requires_grad


def test_dead_particles_collect_nothing():
    world = World(Shifts([[1.0]]), task(terminated=above(2.0)))
    assert world.returns(torch.zeros(1, 1), torch.zeros(1, 2, 9, 1), generator(0)).tolist() == [[3.0, 3.0]]
    wary = World(Shifts([[1.0]]), task(), trust=within_box(torch.tensor([-9.0]), torch.tensor([2.5])))
    assert wary.returns(torch.zeros(1, 1), torch.zeros(1, 2, 9, 1), generator(0)).tolist() == [[3.0, 3.0]]


def test_plans_into_nan_return_minus_infinity():
    world = World(Poisoned([[-1.0]]), task(terminated=lambda next_obs: next_obs[:, 0] <= -3))
    plans = torch.zeros(1, 3, 5, 1)
    plans[0, 1, 1] = 1.0
    plans[0, 2, 4] = 1.0
    assert world.returns(torch.zeros(1, 1), plans, generator(0), particles=3).tolist() == [[-6.0, -torch.inf, -6.0]]


def test_penalty_is_subtracted_in_reward_units():
    model = Shifts([[0.0], [4.0]], std=3.0)
    bare, weighed = (
        World(model, task(), sampler="tsinf"),
        World(model, task(), sampler="tsinf", penalty=ensemble_std, penalty_weight=0.5),
    )
    state, action = bare.start(torch.zeros(8, 1), generator(0)), torch.zeros(8, 1)
    (_, plain), (_, paid) = (world.step(state, action, generator(1)) for world in (bare, weighed))
    torch.testing.assert_close(plain.reward - paid.reward, torch.full((8,), 0.5 * 13**0.5))


def test_penalty_sees_the_draw_of_the_step():
    seen = {}

    def spy(obs, action, prediction, after):
        seen.update(after=after, prediction=prediction)
        return torch.zeros(len(obs))

    world = World(Shifts([[0.0], [4.0]], std=1.0), task(), sampler="ts1", penalty=spy, penalty_weight=1.0)
    after, _ = world.step(world.start(torch.zeros(6, 1), generator(0)), torch.zeros(6, 1), generator(1))
    assert torch.equal(seen["after"].obs, after.obs)
    assert torch.equal(seen["after"].member, after.member)
    assert seen["prediction"].mean.shape == (2, 6, 1)


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_works_in_a_world(name):
    world = World(Shifts([[0.0], [4.0]], std=1.0), task(), penalty=PENALTIES[name], penalty_weight=1.0)
    _, step = world.step(world.start(torch.zeros(6, 1), generator(0)), torch.zeros(6, 1), generator(1))
    assert step.trusted.all()


def test_without_a_penalty_only_one_member_is_asked():
    class Thrifty(Shifts):
        def predict(self, obs, action, memory=None):
            raise AssertionError("every member was asked")

    for weight in (None, 0.0):
        extra = {} if weight is None else {"penalty": ensemble_std, "penalty_weight": weight}
        world = World(Thrifty([[0.0], [4.0]]), task(), **extra)
        world.step(world.start(torch.zeros(6, 1), generator(0)), torch.zeros(6, 1), generator(1))


def test_penalty_below_stops_where_members_disagree():
    class Splitting(Shifts):
        def predict(self, obs, action, memory=None):
            prediction = super().predict(obs, action, memory)
            return prediction._replace(mean=prediction.mean * torch.tensor([1.0, 2.0])[:, None, None])

    model = Splitting([[1.0], [1.0]])
    world = World(model, task(), trust=penalty_below(model, max_pairwise_diff, threshold=3.0))
    data = world.rollout(torch.zeros(1, 1), still, 10, generator(0))
    assert data.obs[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_within_data_widens_the_box_by_a_share_of_its_range():
    world = World(Shifts([[1.0, 0.0]]), task())
    data = world.rollout(torch.zeros(1, 2), still, 4, generator(0))
    trust = within_data(data, margin=0.25)
    after = torch.tensor([[5.0, 0.0], [5.1, 0.0], [-1.0, 0.0], [-1.1, 0.0], [0.0, 1e-5], [0.0, 0.01]])
    state = State(torch.zeros(6, 2), torch.zeros(6, dtype=torch.long))
    assert trust(state, torch.zeros(6, 2), state._replace(obs=after)).tolist() == [
        True,
        False,
        True,
        False,
        True,
        False,
    ]
    assert all_trusted(state, torch.zeros(6, 2), state).all()
    with pytest.raises(ValueError, match="no transitions"):
        within_data(data[:0])


def test_heads_answer_what_the_task_leaves_open():
    model = Shifts([[1.0]], reward=torch.tensor([7.0]), terminated=torch.tensor([1.0]))
    state = World(model, task()).start(torch.zeros(1, 1), generator(0))
    ask = lambda **open_: World(model, task(**open_)).step(state, torch.zeros(1, 1), generator(0))[1]  # noqa: E731
    assert ask().reward.item() == 1.0
    assert ask(reward=None).reward.item() == 7.0
    assert not ask().terminated.item()
    assert ask(terminated=None).terminated.item()


def test_errors_name_what_is_missing():
    model = Shifts([[1.0]])
    with pytest.raises(ValueError, match=r"unknown sampler 'ts2', allowed are \['elite', 'mean', 'ts1', 'tsinf'\]"):
        World(model, task(), sampler="ts2")
    with pytest.raises(ValueError, match=r"penalty_weight is 2.0 but no penalty"):
        World(model, task(), penalty_weight=2.0)
    state = World(model, task()).start(torch.zeros(1, 1), generator(0))
    for what, absent in (("reward", {"reward": None}), ("termination", {"terminated": None})):
        told = f"a Shifts, has no {what} head: Shifts cannot learn one .*ProbabilisticEnsemble can, with learn_{what}="
        with pytest.raises(ValueError, match=told):
            World(model, task(**absent)).step(state, torch.zeros(1, 1), generator(0))
    with pytest.raises(ValueError, match="Double-v0 defines no start states"):
        World(model, task()).initial(3, generator(0))
    model.spaces = None
    with pytest.raises(ValueError, match="Shifts has not been fitted"):
        World(model, task())


@pytest.mark.parametrize("shape", [(0, 1), (4, 2)])
def test_start_names_the_shape_it_needs(shape):
    with pytest.raises(ValueError, match=rf"\(lanes >= 1, 1\), got \({shape[0]}, {shape[1]}\)"):
        World(Shifts([[1.0]]), task()).start(torch.zeros(shape), generator(0))


def test_bad_horizons_plans_and_particles():
    world = World(Shifts([[1.0]]), task(reward=first_column, terminated=never))
    with pytest.raises(ValueError, match="horizon must be at least 1, got 0"):
        world.rollout(torch.zeros(1, 1), still, 0, generator(0))
    with pytest.raises(
        ValueError, match=r"plans must have shape \(2 lanes, candidates, horizon, 1\), got \(2, 4, 5, 3\)"
    ):
        world.returns(torch.zeros(2, 1), torch.zeros(2, 4, 5, 3), generator(0))
    with pytest.raises(ValueError, match="particles must be at least 1, got 0"):
        world.returns(torch.zeros(2, 1), torch.zeros(2, 4, 5, 1), generator(0), particles=0)


def test_initial_comes_from_the_task():
    world = World(Shifts([[1.0]]), task(initial=lambda lanes, rng: torch.rand(lanes, 1, generator=rng)))
    assert torch.equal(world.initial(5, generator(2)), torch.rand(5, 1, generator=generator(2)))


def test_a_policy_is_asked_in_portions_on_the_cpu():
    asked = []

    def policy(obs):
        asked.append(len(obs))
        return obs / 2

    world = World(Shifts([[0.0]], gain=1.0), task())
    starts = torch.arange(5000.0)[:, None]
    data = world.rollout(starts, policy, 2, generator(0))
    assert asked == [2048, 2048, 904] * 2
    assert torch.equal(data.action[0::2], starts / 2)
    assert torch.equal(data.action[1::2], starts * 0.75)
