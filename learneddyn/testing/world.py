"""Contracts of a World: starts, steps, lanes, rollouts, returns."""

from functools import partial

import torch
from torch import Tensor

from learneddyn.core import State, Step, generator
from learneddyn.testing.contract import Contracts, close, equal, random_rows
from learneddyn.world import World

HORIZON = 5


def check_world(world: World, obs: Tensor | None = None) -> None:
    """Check a World. What must not depend on chance is checked with its model, task, penalty and the sampler ``mean``.

    Args:
        world: what to check.
        obs: start observations ``[b >= 2, o]``; the task's start states by default, random ones where it has none.

    Raises:
        ContractError: a contract is broken.
    """
    device = world.dynamics.elites.device
    contracts = Contracts(f"World({type(world.dynamics).__name__}, {world.task.real_id})")
    if obs is None:
        drawn = world.initial(6, generator(0)) if world.task.initial is not None else random_rows(world.spaces, 6)[0]
        obs = drawn.to(device)
    action = random_rows(world.spaces, len(obs))[1].to(device)
    plain = World(
        world.dynamics,
        world.task,
        sampler="mean",
        penalty=world.penalty,
        penalty_weight=world.penalty_weight,
        trust=world.trust,
        halt_reward=world.halt_reward,
    )
    with torch.no_grad():
        _check_start(world, obs, contracts)
        _check_step(world, obs, action, contracts)
        _check_lanes(plain, obs, action, contracts)
        _check_rollout(world, obs, action[:1], contracts)
        # Some penalties judge the drawn member, so that even equal plans differ by it.
        _check_returns(World(world.dynamics, world.task, sampler="mean"), obs, contracts)


def _check_start(world: World, obs: Tensor, contracts: Contracts) -> None:
    state = world.start(obs, generator(0, obs.device))
    contracts.holds(torch.equal(state.obs, obs), "start stands at the observations given", state.obs)
    chosen = torch.isin(state.member, world.dynamics.elites).all()
    contracts.holds(chosen, "start draws an elite per lane", state.member.tolist())
    for bad, what in ((obs[:0], "no lanes"), (torch.cat([obs, obs[:, :1]], dim=1), "a column too many")):
        contracts.refuses(ValueError, partial(world.start, bad, generator(0)), f"start with {what} is a ValueError")


def _check_step(world: World, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    state = world.start(obs, generator(1, obs.device))
    after, step = world.step(state, action, generator(2, obs.device))
    contracts.column("State.obs", after.obs, tuple(obs.shape), obs)
    contracts.column("Step.reward", step.reward, (len(obs),), obs)
    contracts.flags("Step.terminated", step.terminated, len(obs))
    contracts.flags("Step.trusted", step.trusted, len(obs))
    again, repeated = world.step(state, action, generator(2, obs.device))
    contracts.holds(equal(after, again) and equal(step, repeated), "one seed gives one step", "two steps")
    if world.task.reward is not None and world.penalty is None:
        want = world.task.reward(obs, action, after.obs)
        agree = close(step.reward[step.trusted], want[step.trusted])
        contracts.holds(agree, "the task's reward function judges", f"{step.reward.tolist()}, not {want.tolist()}")
    if world.task.terminated is not None:
        ended = world.task.terminated(after.obs)
        agree = torch.equal(step.terminated[step.trusted], ended[step.trusted])
        contracts.holds(agree, "the task's termination function judges", step.terminated.tolist())


def _check_lanes(world: World, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    state = world.start(obs, generator(1, obs.device))
    after, step = world.step(state, action, generator(2, obs.device))
    order = torch.arange(len(obs), device=obs.device).flip(0)
    for contract, rows in (("permuted lanes permute steps", order), ("a lane alone is as among others", order[:1])):
        part: tuple[State, Step] = world.step(
            State(state.obs[rows], state.member[rows]), action[rows], generator(2, obs.device)
        )
        same = close(part[0].obs, after.obs[rows]) and close(part[1].reward, step.reward[rows])
        contracts.holds(same, contract, "another next observation or reward")


def _check_rollout(world: World, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    def policy(now: Tensor) -> Tensor:
        return action.expand(len(now), -1)

    data, again = (world.rollout(obs, policy, HORIZON, generator(4, obs.device)) for _ in range(2))
    same = equal(tuple(data.tensors().values()), tuple(again.tensors().values()))
    contracts.holds(same, "one seed gives one rollout", "two rollouts")
    contracts.holds((data.episode.diff() >= 0).all(), "a rollout's rows are grouped by episode", data.episode.tolist())
    within = data.episode[1:] == data.episode[:-1]
    ended = data.terminated[:-1] & within
    contracts.holds(not bool(ended.any()), "no row of an episode follows a terminal one", ended.nonzero().tolist())
    joined = torch.equal(data.obs[1:][within], data.next_obs[:-1][within])
    contracts.holds(joined, "obs is the next_obs of the row before", "a gap within an episode")
    lengths = data.episode.bincount() if len(data) else data.episode
    contracts.holds((lengths <= HORIZON).all(), "no episode is longer than the horizon", lengths.tolist())
    contracts.refuses(ValueError, lambda: world.rollout(obs, policy, 0, generator(0)), "horizon 0 is a ValueError")


def _check_returns(world: World, obs: Tensor, contracts: Contracts) -> None:
    plan = random_rows(world.spaces, HORIZON)[1].to(obs.device)
    plans = plan.expand(len(obs), 2, -1, -1)
    got = world.returns(obs, plans, generator(5, obs.device), particles=2)
    contracts.holds(got.shape == (len(obs), 2), "returns are [b, s]", tuple(got.shape))
    contracts.holds(not bool(got.isnan().any()), "returns are never NaN", got.tolist())
    contracts.holds(close(got[:, 0], got[:, 1]), "equal plans have equal returns", got.tolist())
