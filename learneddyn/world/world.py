"""World: a dynamics model and a task, put together. Everything above (envs, planners, agents) talks to this class."""

import inspect
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from learneddyn.core import ActionFn, Dynamics, Outcome, Penalty, State, Step, Task, Transitions
from learneddyn.models.base import AbstractDynamics
from learneddyn.world.bounds import Bounded
from learneddyn.world.penalties import require_members
from learneddyn.world.sampling import SAMPLERS, Heard, Sampler, draw_members
from learneddyn.world.sentinel import Sentinel, told
from learneddyn.world.trust import Trust, all_trusted

_PORTION = 2048  # rows whose hidden layers, in a policy of the usual width, still fit a core's cache


class World:
    """Simulate a task inside a dynamics model, many lanes at once, on the model's device.

    Reward and termination come from the task where it knows them, otherwise from the model's heads. With a penalty,
    the reward is ``reward - penalty_weight * penalty(obs, action, prediction, after)``, and every member is asked.

    Args:
        dynamics: a fitted model, or the truth (`learneddyn.world.truth`).
        task: what is asked; its None parts are answered by the model's heads.
        sampler: one of ``mean``, ``ts1``, ``tsinf``, ``elite``, or a callable of the same signature, such as
            `learneddyn.world.bounds.Bounded`.
        penalty: uncertainty to subtract from the reward, see `learneddyn.world.penalties`.
        penalty_weight: weight of the penalty, in reward units per penalty unit.
        trust: which steps to believe; see `learneddyn.world.trust`.
        halt_reward: None leaves it to the caller to stop at a step that is not trusted (environments truncate there,
            and a learner bootstraps the value of a state nobody has seen). A number makes such a step a termination
            that pays it in place of the reward. It follows the pessimistic MDP of Kidambi, Rajeswaran, Netrapalli,
            Joachims, "MOReL: Model-Based Offline Reinforcement Learning" (2020), but pays once, where their absorbing
            HALT state pays -kappa at every later step: choose ``-kappa / (1 - gamma)`` for the same value. "kept" makes
            it a termination that pays its own reward; one that is not finite has none, and is left to the caller.
        sentinel: told of rows that diverge in `rollout` and `returns`, see `learneddyn.world.sentinel`.

    Raises:
        ValueError: the model is not fitted, neither task nor model answers reward or termination (models that are no
            AbstractDynamics say so at the first step), an unknown sampler, bounds of other columns than the model's, a
            penalty that compares members beside a model of one, or a halt_reward of another kind.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        task: Task,
        *,
        sampler: str | Sampler = "elite",
        penalty: Penalty | None = None,
        penalty_weight: float = 0.0,
        trust: Trust = all_trusted,
        halt_reward: float | str | None = None,
        sentinel: Sentinel | None = None,
    ) -> None:
        if dynamics.spaces is None:
            raise ValueError(f"{type(dynamics).__name__} has not been fitted: call fit(data) or load a model first")
        if isinstance(sampler, str) and sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}, allowed are {sorted(SAMPLERS)} or a callable")
        if isinstance(halt_reward, str) and halt_reward != "kept":
            raise ValueError(f"halt_reward must be a number, 'kept' or None, got {halt_reward!r}")
        if isinstance(dynamics, AbstractDynamics):
            _require_heads(dynamics, task)
        if penalty_weight and penalty is None:
            raise ValueError(f"penalty_weight is {penalty_weight} but no penalty is given")
        if isinstance(sampler, Bounded):
            sampler.check_columns(dynamics.spaces.obs_dim)
        if penalty is not None:
            require_members(penalty, dynamics.num_members)
        self.dynamics, self.task, self.spaces = dynamics, task, dynamics.spaces
        self.sampler = SAMPLERS[sampler] if isinstance(sampler, str) else sampler
        self.penalty, self.penalty_weight = penalty, penalty_weight
        self.trust, self.halt_reward, self.sentinel = trust, halt_reward, sentinel

    def start(self, obs: Float[Tensor, "b o"], rng: torch.Generator) -> State:
        """Return the state of lanes that begin at ``obs``, each with an elite drawn for it.

        Raises:
            ValueError: no lanes, or observations with the wrong number of columns.
        """
        if obs.ndim != 2 or len(obs) == 0 or obs.shape[1] != self.spaces.obs_dim:
            raise ValueError(
                f"start needs observations of shape (lanes >= 1, {self.spaces.obs_dim}), got {tuple(obs.shape)}"
            )
        return State(obs, draw_members(self.dynamics.elites, len(obs), rng))

    def initial(self, lanes: int, rng: torch.Generator) -> Float[Tensor, "b o"]:
        """Draw start observations of the task.

        Raises:
            ValueError: the task defines no start states.
        """
        if self.task.initial is None:
            raise ValueError(
                f"the task of {self.task.real_id} defines no start states; start from a data set's observations instead"
            )
        return self.task.initial(lanes, rng)

    def step(self, state: State, action: Float[Tensor, "b a"], rng: torch.Generator) -> tuple[State, Step]:
        """Advance every lane by one step of the model.

        Returns:
            The new state, and reward, terminated, trusted per lane. A row with a non-finite entry is not trusted, and
            its next observation is the one before, so that nothing downstream meets a NaN.

        Raises:
            ValueError: neither the task nor the model answers reward or termination.
        """
        after, step, _ = self._advance(state, action, rng)
        return after, step

    @torch.no_grad()
    def rollout(
        self,
        obs: Float[Tensor, "b o"],
        policy: ActionFn,
        horizon: int,
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
    ) -> Transitions:
        """Imagine ``horizon`` steps from every start, acting by ``policy``, asked about 2048 rows at a time on the CPU.

        A row stops at its first terminated or untrusted step (the untrusted step itself is left out) and never
        reappears. Rows come out grouped by episode (one per start), in order of time. ``memory`` is what the model
        remembers at ``obs`` (`learneddyn.models.base.memory_of` tells it for logged rows), by default nothing: then
        every start begins an episode.

        Raises:
            ValueError: horizon below 1.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}")
        state = self.start(obs, rng)._replace(memory=memory)
        episode = torch.arange(len(obs), device=obs.device)
        parts: list[tuple[Tensor, ...]] = []
        for number in range(1, horizon + 1):
            action = _act(policy, state.obs)
            after, step, finite = self._advance(state, action, rng)
            if finite is not None and self.sentinel is not None:
                told(self.sentinel, number, after.member, torch.ones_like(finite), finite)
            rows = (state.obs, action, step.reward, after.obs, step.terminated, episode)
            keep = step.trusted
            parts.append(rows if bool(keep.all()) else tuple(column[keep] for column in rows))
            alive = keep & ~step.terminated
            if not bool(alive.all()):
                state, episode = _select(after, alive), episode[alive]
            else:
                state = after
            if len(episode) == 0:
                break
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        order = columns[-1].argsort(stable=True)
        obs, action, reward, next_obs, terminated, episode = (column[order] for column in columns)
        return Transitions(obs, action, reward, next_obs, terminated, episode, self.spaces, "imagined")

    def returns(
        self,
        obs: Float[Tensor, "b o"],
        plans: Float[Tensor, "b s h a"],
        rng: torch.Generator,
        particles: int = 1,
        chunk: int = 16_384,
        memory: Float[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b s"]:
        """Return the mean undiscounted return of every action plan over ``particles`` imagined futures.

        At most ``chunk`` particles (of one plan at least) are in memory at a time. Chunks differ in the numbers they
        draw, not in their distribution. ``memory`` is what the model remembers at ``obs``, by default nothing.

        A particle collects no reward from an untrusted step, nor after a terminated or untrusted one. A plan that
        drives a living particle to a non-finite observation or reward returns -inf: a broken model must not look good.

        Where the plans ask for a gradient they get one, as far as model, reward and sampler are differentiable; it does
        not see that an episode ends sooner or later.

        Raises:
            ValueError: plans that are not ``[b, s, h, a]`` of these lanes and this action space, or particles or chunk
                below 1.
        """
        if plans.ndim != 4 or len(plans) != len(obs) or plans.shape[3] != self.spaces.action_dim:
            raise ValueError(
                f"plans must have shape ({len(obs)} lanes, candidates, horizon, {self.spaces.action_dim}), "
                f"got {tuple(plans.shape)}"
            )
        for name, value in (("particles", particles), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        lanes, candidates = plans.shape[:2]
        lane = torch.arange(lanes, device=obs.device).repeat_interleave(candidates)
        together = max(1, chunk // particles)
        parts = zip(lane.split(together), plans.flatten(0, 1).split(together), strict=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and plans.requires_grad):
            returns = [
                self._plan_returns(obs[lane], None if memory is None else memory[lane], plan, rng, particles)
                for lane, plan in parts
            ]
        return torch.cat(returns).view(lanes, candidates)

    def _plan_returns(
        self,
        obs: Float[Tensor, "c o"],
        memory: Float[Tensor, "c m"] | None,
        plans: Float[Tensor, "c h a"],
        rng: torch.Generator,
        particles: int,
    ) -> Float[Tensor, " c"]:
        """Return the mean return of every plan from its own observation."""
        state = self.start(obs.repeat_interleave(particles, dim=0), rng)
        if memory is not None:
            state = state._replace(memory=memory.repeat_interleave(particles, dim=0))
        total = torch.zeros(len(state.obs), device=obs.device)
        alive = torch.ones(len(state.obs), dtype=torch.bool, device=obs.device)
        # Once for all steps: repeating costs more than a layer of few rows.
        for number, actions in enumerate(plans.repeat_interleave(particles, dim=0).unbind(dim=1), start=1):
            state, step, finite = self._advance(state, actions, rng)
            if finite is not None:
                if self.sentinel is not None:
                    told(self.sentinel, number, state.member, alive, finite)
                total = torch.where(alive & ~finite, -torch.inf, total)
            alive = alive & step.trusted
            total = torch.where(alive, total + step.reward, total)
            alive = alive & ~step.terminated
        return total.view(-1, particles).mean(dim=1)

    def _advance(
        self, state: State, action: Float[Tensor, "b a"], rng: torch.Generator
    ) -> tuple[State, Step, Bool[Tensor, " b"] | None]:
        """Advance every lane; the last value says which rows came out finite, None that all are known to."""
        if self.penalty is None or not self.penalty_weight:
            after, outcome = self.sampler(state, action, self.dynamics, rng)
            reward = self._reward(state.obs, action, outcome)
        else:
            heard = Heard(self.dynamics, state.obs, action)
            after, outcome = self.sampler(state, action, heard, rng)
            prediction = heard.prediction or self.dynamics.predict(state.obs, action, state.memory)
            penalty = self.penalty(state.obs, action, prediction, after)
            reward = self._reward(state.obs, action, outcome) - self.penalty_weight * penalty
        finite = None if _all_finite(outcome.next_obs, reward) else _finite_rows(outcome.next_obs, reward)
        if finite is None:
            after = after if after.obs is outcome.next_obs else after._replace(obs=outcome.next_obs)
        else:
            after = after._replace(obs=torch.where(finite[:, None], outcome.next_obs, state.obs))
            reward = torch.where(finite, reward, torch.zeros_like(reward))
        terminated, trusted = self._terminated(after.obs, outcome), self.trust(state, action, after)
        if self.halt_reward == "kept":
            terminated, trusted = terminated | ~trusted, torch.ones_like(trusted)
        if finite is not None:
            terminated, trusted = terminated & finite, trusted & finite
        if isinstance(self.halt_reward, float | int):
            reward = torch.where(trusted, reward, self.halt_reward)
            terminated, trusted = terminated | ~trusted, torch.ones_like(trusted)
        return after, Step(reward, terminated, trusted), finite

    def _reward(self, obs: Tensor, action: Tensor, outcome: Outcome) -> Tensor:
        if self.task.reward is not None:
            return self.task.reward(obs, action, outcome.next_obs)
        if outcome.reward is None:
            raise unanswered(self.task, "reward", self.dynamics)
        return outcome.reward

    def _terminated(self, next_obs: Tensor, outcome: Outcome) -> Tensor:
        if self.task.terminated is not None:
            return self.task.terminated(next_obs)
        if outcome.terminated is None:
            raise unanswered(self.task, "termination", self.dynamics)
        return outcome.terminated


def unanswered(task: Task, what: str, model: object) -> ValueError:
    """Return the error of a world in which nobody answers ``what``."""
    head, name = f"learn_{what}", type(model).__name__
    if head in inspect.signature(type(model)).parameters:
        ways = f"fit it with {head}=True"
    else:
        ways = f"{name} cannot learn one (ProbabilisticEnsemble can, with {head}=True): fit another model"
    return ValueError(
        f"the {what} of {task.real_id} does not follow from the observation and the model, a {name}, has no {what} "
        f"head: {ways}, or give the task a {what} function"
    )


@torch.no_grad()
def _require_heads(model: AbstractDynamics, task: Task) -> None:
    """Ask the model about one row, so that a world nobody can step is refused when it is built."""
    if model.spaces is None or (task.reward is not None and task.terminated is not None):
        return
    device = model.elites.device
    row = torch.zeros(1, model.spaces.obs_dim, device=device), torch.zeros(1, model.spaces.action_dim, device=device)
    prediction = model.predict(*row)
    for what, known, head in (
        ("reward", task.reward, prediction.reward_mean),
        ("termination", task.terminated, prediction.terminated),
    ):
        if known is None and head is None:
            raise unanswered(task, what, model)


def _act(policy: ActionFn, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
    """Ask the policy in portions where that is faster."""
    if not obs.is_cpu or len(obs) <= _PORTION:
        return policy(obs)
    return torch.cat([policy(part) for part in obs.split(_PORTION)])


def _all_finite(next_obs: Float[Tensor, "b o"], reward: Float[Tensor, " b"]) -> bool:
    """Tell whether every row is known to be finite: one sum costs a fiftieth of a test per entry.

    False says nothing (finite numbers may add up to infinity), and is the answer where to know would wait for a device.
    """
    if len(reward) == 1 and next_obs.is_cpu:  # Python adds a single row faster than PyTorch
        return math.isfinite(sum(next_obs.tolist()[0]) + reward.item())
    return next_obs.is_cpu and math.isfinite(next_obs.sum().item() + reward.sum().item())


def _finite_rows(next_obs: Float[Tensor, "b o"], reward: Float[Tensor, " b"]) -> Bool[Tensor, " b"]:
    return next_obs.isfinite().all(dim=1) & reward.isfinite()


def _select(state: State, rows: Tensor) -> State:
    memory = None if state.memory is None else state.memory[rows]
    return State(state.obs[rows], state.member[rows], memory)
