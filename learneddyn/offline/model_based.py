"""Offline learning inside a learned model: MOPO, MOReL, COMBO, MOBILE and RAVL as settings of one loop.

    fit the ensemble on the log (once)
    every rollout_every updates  imagine ``horizon`` steps from ``rollout_batch`` logged states, acting by the policy;
                                 a rollout stops where the model terminates, a cut one is not terminated at its end
    every update                 an update of `OfflineSAC` on real_ratio logged rows, the rest imagined

    part                     MBPO    MOPO       MOReL        COMBO       MOBILE         RAVL
    reward transform         -       - λ u      HALT         -           -              -
    critic rule              twin    twin       twin         β on top    U in target    n critics, diversity η
    real_ratio               .05     .05        .05          .5          .05            .05
    entropy in the target    yes     yes        yes          no          no             yes

The transition selector is the world's sampler ("elite": an elite drawn anew per row and step), or, given a dynamics
reward, the filter of `learneddyn.offline.transition_filter`, under any of the columns (MOREC, morec.py). Every column
is MBPO with a weight that can be 0: MOPO at λ = 0, MOReL with pessimism 0, COMBO at β = 0, MOBILE at weight 0 and RAVL
with two critics and η = 0 are the same updates, bit for bit where the settings that remain agree.

Source of the loop and its constants: Yu et al., "MOPO: Model-based Offline Policy Optimization", 2020, after Janner et
al., "When to Trust Your Model: Model-Based Policy Optimization", 2019. Deviations: rewards and terminations come from
the task wherever the observation determines them, else from the model's heads; the order of steps is `OfflineSAC`'s.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from learneddyn.agents.diagnostics import imagination_figures
from learneddyn.agents.dyna import default_dynamics
from learneddyn.core import DataError, Dynamics, Json, Penalty, Prediction, RewardFn, Task, Transitions
from learneddyn.data.replay import Batch, MixedReplay, Replay
from learneddyn.models import AbstractDynamics, AbstractModel, blueprint, from_blueprint
from learneddyn.models.base import memory_of
from learneddyn.offline import weight_rule
from learneddyn.offline.base import Cosine, Diverged
from learneddyn.offline.dataset import Data, bounds
from learneddyn.offline.dynamics_reward import DynamicsReward
from learneddyn.offline.halting import Halting
from learneddyn.offline.policy import OfflinePolicy, SquashedActor
from learneddyn.offline.reach import edge_of_reach_share
from learneddyn.offline.sac import DIVERSE_NETS, WIDE, OfflineSAC
from learneddyn.offline.transition_filter import TransitionFilter, quantile_of, threshold_of
from learneddyn.spaces import Spaces
from learneddyn.world import PENALTIES, Sampler, World, penalty_below, require_members
from learneddyn.world.world import unanswered

MANY = 0.1
"""Share of the log below `OfflineMBPO`'s ``least_dynamics_reward`` from which on it warns."""


class OfflineMBPO(OfflineSAC):
    """The loop above; `MOPO`, `MOReL`, `COMBO`, `MOBILE` and `RAVL` are its published settings.

    The log holds, besides the losses: the penalty (``imagined/uncertainty``), the pessimism of the critics
    (``train/spread``, mean minus least at next states), the share of targets at the edge of reach
    (``imagined/edge_of_reach``), and where rollouts are halted the share of steps that are (``imagined/halted``); with
    a filter also r^D of imagination and log.

    `save` keeps the model with the agent if it is an `AbstractDynamics` (else pass ``model=`` to `load`), but not the
    imagined rows: a loaded agent imagines anew when it goes on.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        model: any dynamics; an `AbstractDynamics` that is not fitted is fitted in place when learning begins, and the
            published ensemble with the heads that the task needs is the default. The truth will do, too.
        sampler: of the world, see `learneddyn.world.sampling`.
        dynamics_reward: r^D of the filter that takes the sampler's place; a `DynamicsReward` that has not learned yet
            learns when learning begins, from the log.
        filter_temperature: κ of the filter, 0 for the largest r^D.
        filter_draws: candidates per elite.
        filter_limit: candidates are clipped to plus and minus this; 25 in MOREC's published code for D4RL.
        least_dynamics_reward: r_min, a number or a quantile of r^D over the log, ``"quantile:q"``. A step of lower r^D
            ends the rollout, terminated, with its own reward. MOREC's published 0.6 belongs to the published
            calibration and networks; how much of a log lies below a number differs from one r^D to the next, and more
            than a tenth raises a warning. 0 ends none. An end is worth 0 from there on: where rewards are negative it
            is a way out, not a punishment (a warning says so), and 0 the choice.
        penalty: u, a name of `learneddyn.world.PENALTIES` or a function.
        penalty_weight: λ, in units of the logged reward per unit of u; or a rule that measures both on the log,
            ``"quantile:c"`` (`learneddyn.offline.weight_rule`). ``penalty_rule`` then tells the rule and the number.
        pessimism: c > 0 halts imagination where two members lie further apart than the largest distance on the log / c;
            such a step ends the rollout, terminated, and pays the least logged reward + ``halt_offset``.
        halt_offset: see there; in units of the logged reward, at most 0. The step pays once: where that is worth more
            than the log's mean reward for ever, a warning says so.
        inconsistency: weight of U, the deviation of the Bellman target over elites, in the target of imagined rows.
        inconsistency_draws: next states drawn per elite for U.
        clip_target: keep targets at 0 or above, as published code does on tasks with positive rewards; where the log's
            mean reward is negative, a warning says so.
        horizon: steps of an imagined rollout.
        rollout_batch: logged states that an imagination starts from.
        rollout_every: updates between imaginations.
        retain: imaginations whose rows are kept.
        real_ratio: share of logged rows in a batch; with ``conservatism``, enough for one row at least.
        max_ent_coef: see `OfflineSAC`.
        **common: see `OfflineSAC`. Without a ``task`` reward and termination are learned from the log's flags.

    Raises:
        ValueError: an argument outside its range, a dynamics reward beside another sampler or pessimism, a model or
            dynamics reward of other spaces than the data's, or a model with too few members or elites.
        DataError: neither a task nor a terminal flag says whether imagined rollouts end.
        Diverged: the model's steps are not finite, or a loss (see `OfflineAlgorithm.learn`).
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        model: Dynamics | AbstractDynamics | None = None,
        sampler: str | Sampler = "elite",
        dynamics_reward: DynamicsReward | RewardFn | None = None,
        filter_temperature: float = 0.1,
        filter_draws: int = 2,
        filter_limit: float = math.inf,
        least_dynamics_reward: float | str = "quantile:0.01",
        penalty: str | Penalty = "max_aleatoric",
        penalty_weight: float | str = 0.0,
        pessimism: float = 0.0,
        halt_offset: float = 0.0,
        inconsistency: float = 0.0,
        inconsistency_draws: int = 10,
        clip_target: bool = False,
        horizon: int = 5,
        rollout_batch: int = 50_000,
        rollout_every: int = 1000,
        retain: int = 5,
        real_ratio: float = 0.05,
        actor_learning_rate: Any = 1e-4,
        ent_coef_learning_rate: float | None = 1e-4,
        max_ent_coef: float = 1.0,
        **common: Any,
    ) -> None:
        for name, ok, value, allowed in (
            ("penalty", not isinstance(penalty, str) or penalty in PENALTIES, penalty, f"one of {sorted(PENALTIES)}"),
            ("pessimism", pessimism >= 0, pessimism, "at least 0"),
            ("halt_offset", halt_offset <= 0, halt_offset, "at most 0"),
            ("inconsistency", inconsistency >= 0, inconsistency, "at least 0"),
            ("inconsistency_draws", inconsistency_draws >= 1, inconsistency_draws, "at least 1"),
            ("horizon", horizon >= 1, horizon, "at least 1"),
            ("rollout_batch", rollout_batch >= 1, rollout_batch, "at least 1"),
            ("rollout_every", rollout_every >= 1, rollout_every, "at least 1"),
            ("retain", retain >= 1, retain, "at least 1"),
            ("real_ratio", 0 <= real_ratio <= 1, real_ratio, "in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        weight_rule.factor(penalty_weight)
        quantile_of(least_dynamics_reward)
        self.model = model
        self._model_card: Json | None = None  # of a saved agent; empty if its model is no AbstractDynamics
        self.sampler, self.penalty, self.penalty_weight = sampler, penalty, penalty_weight
        self.dynamics_reward, self.filter_temperature = dynamics_reward, filter_temperature
        self.filter_draws, self.filter_limit = filter_draws, filter_limit
        self.least_dynamics_reward = least_dynamics_reward
        self._log_figures: dict[str, float] = {}
        self._measured: dict[str, Sequence[float]] = {}  # the value, then `_fingerprint` of the log it belongs to
        self._reward_card: Json | None = None  # of a saved agent; empty if its dynamics reward is a plain function
        self.pessimism, self.halt_offset = pessimism, halt_offset
        self.inconsistency, self.inconsistency_draws, self.clip_target = inconsistency, inconsistency_draws, clip_target
        self.horizon, self.rollout_batch, self.rollout_every = horizon, rollout_batch, rollout_every
        self.retain, self.real_ratio = retain, real_ratio
        self.world: World | None = None
        self._memory: Tensor | None = None  # [n m]: what the model remembers before each row of the log
        super().__init__(
            policy,
            data,
            actor_learning_rate=actor_learning_rate,
            ent_coef_learning_rate=ent_coef_learning_rate,
            max_ent_coef=max_ent_coef,
            **common,
        )
        if self.conservatism and not round(self.real_ratio * self.batch_size):
            raise ValueError(
                f"real_ratio must leave conservatism a logged row to push up in every batch of {self.batch_size}, got "
                f"{self.real_ratio}"
            )
        if data is None and self.task is not None:  # of data, `_fill` has asked
            _check_heads(self.model, self.task)

    def _setup_model(self) -> None:
        super()._setup_model()
        spaces = Spaces(self.observation_space, self.action_space)
        if self.model is None and self._model_card:
            self.model = from_blueprint(self._model_card, spaces)
        if self.dynamics_reward is None and self._reward_card:
            self.dynamics_reward = from_blueprint(self._reward_card, spaces)
        for part in (self.model, self.dynamics_reward):
            if isinstance(part, AbstractModel):
                part.to(self.device)

    def _fill(self, rows: Transitions) -> None:
        super()._fill(rows)
        if self.dynamics_reward is not None and (self.sampler != "elite" or self.pessimism):
            raise ValueError(
                "a dynamics_reward chooses steps and ends rollouts: leave sampler at 'elite' and pessimism at 0, got "
                f"{self.sampler!r} and {self.pessimism}"
            )
        if self.task is None:
            if not bool(rows.terminated.any()):
                raise DataError(
                    "whether imagined rollouts end is unknown: the data flags no termination and names no task; pass "
                    "task=, for an endless one learneddyn.core.Task(id, terminated=learneddyn.tasks.endless.never)"
                )
            self.task = Task(rows.source or "log")
        if self.model is None and self._model_card is None:
            self.model = default_dynamics(self.task)
        if self.model is not None:
            for penalty in (self.penalty, "max_pairwise_diff") if self.pessimism else (self.penalty,):
                require_members(PENALTIES[penalty] if isinstance(penalty, str) else penalty, self.model.num_members)
            if self.inconsistency:
                _check_elites(getattr(self.model, "num_elites", self.model.num_members))
        _check_heads(self.model, self.task)
        if weight_rule.factor(self.penalty_weight) is not None:
            weight_rule.median_reward(self.penalty_weight, rows)
        mean = float(rows.reward.mean()) + self.reward_shift
        if self.clip_target and mean < 0:
            warnings.warn(
                f"clip_target keeps targets at 0 or above, but the log's mean reward is {mean:.4g}: values that should "
                "differ all become 0; set clip_target=False, or raise the rewards by reward_shift",
                UserWarning,
                stacklevel=2,
            )
        assert rows.spaces is not None
        self.rows = rows
        self._low, self._high = bounds(rows.spaces.action, self.device)
        self.imagined = Replay(
            self.horizon * self.rollout_batch * self.retain,
            rows.obs.shape[1],
            rows.action.shape[1],
            device=self.device,
        )
        assert self.replay is not None
        self._mixed = MixedReplay(self.replay, self.imagined, self.real_ratio)

    def make_world(self) -> World:
        """Return the world that imagines, around the fitted model."""
        assert self.model is not None
        assert self.task is not None
        penalty = PENALTIES[self.penalty] if isinstance(self.penalty, str) else self.penalty
        weight = self._once(
            f"penalty_weight {self.penalty_weight}",
            partial(weight_rule.weight_of, self.penalty_weight, self.model, self.rows, penalty),
        )
        halting: dict[str, Any] = {}
        sampler = self.sampler
        if self.dynamics_reward is not None:
            sampler = TransitionFilter(
                self.dynamics_reward,
                temperature=self.filter_temperature,
                draws=self.filter_draws,
                limit=self.filter_limit,
            )
            least = self._least()
            halting["trust"] = Halting(sampler.above(least), rule="dynamics reward below", threshold=least)
            halting["halt_reward"] = "kept"
            if least > 0 or self._log_figures["log/below_least"] > 0:
                self._warn_of_a_way_out(float(self.rows.reward.mean()), "least_dynamics_reward=0 ends no rollout")
        if self.pessimism:
            threshold = self._once("discrepancy", partial(discrepancy, self.model, self.rows)) / self.pessimism
            known = penalty_below(self.model, PENALTIES["max_pairwise_diff"], threshold)
            halting["trust"] = Halting(known, rule="max_pairwise_diff above", threshold=threshold)
            worst = float(self.rows.reward.min())
            halting["halt_reward"] = worst + self.halt_offset
            enough = (worst + self.reward_shift) * self.gamma / (1 - self.gamma) if self.gamma < 1 else -math.inf
            cure = f"halt_offset={enough:.4g} makes it as bad as the log's least reward for ever"
            self._warn_of_a_way_out(worst + self.halt_offset, cure)
        return World(
            self.model,
            self.task,
            sampler=sampler,
            penalty=penalty,
            penalty_weight=weight,
            **halting,
        )

    def _once(self, name: str, measure: Callable[[], float]) -> float:
        """Return what was measured on this log and the model when learning began: RAMBO alters its model meanwhile."""
        log, (value, *measured_on) = _fingerprint(self.rows), self._measured.get(name, (math.nan,))
        # Another device or number of threads adds in another order.
        if len(measured_on) != len(log) or not np.allclose(log, measured_on, rtol=1e-9, atol=1e-6):
            value = measure()
            self._measured[name] = (value, *log)
        return value

    def _warn_of_a_way_out(self, paid: float, cure: str) -> None:
        """Warn where a halt, which pays ``paid`` and ends all, is worth more than to go on as the log does."""
        mean = float(self.rows.reward.mean()) + self.reward_shift
        if (1 - self.gamma) * (paid + self.reward_shift) > mean:
            warnings.warn(
                f"a halted step is worth {paid + self.reward_shift:.4g}, more than to go on for ever at the log's mean "
                f"reward of {mean:.4g} (gamma = {self.gamma:g}): a policy may learn to be halted. {cure}",
                UserWarning,
                stacklevel=3,
            )

    def _least(self) -> float:
        """Return r_min on this log, and warn where it would end imagination at steps like many logged ones."""
        assert self.dynamics_reward is not None
        found = threshold_of(self.least_dynamics_reward, self.dynamics_reward, self.rows)
        if found.below > MANY:
            warnings.warn(
                f"{found.below:.0%} of the logged steps have a dynamics reward below least_dynamics_reward = "
                f"{found.least:.4g} (their mean is {found.mean:.4g}): imagination will end at steps as real as these; "
                "give a quantile of the log, as 'quantile:0.01', or 0 to end none",
                UserWarning,
                stacklevel=2,
            )
        self._log_figures = {
            "log/dynamics_reward": found.mean,
            "log/below_least": found.below,
            "imagined/least_dynamics_reward": found.least,
        }
        return found.least

    @property
    def penalty_rule(self) -> str:
        """The penalty's weight as it was asked for and, if that was a rule, what it came to on this log and model.

        Raises:
            ValueError: the agent has not begun to learn, so that the rule has not been applied.
        """
        if self.world is None:
            raise ValueError(f"this {type(self).__name__} has not learned yet: its penalty weight is not known")
        weight = f"{self.world.penalty_weight:.4g}"
        return f"{self.penalty_weight} -> {weight}" if isinstance(self.penalty_weight, str) else weight

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        found = super()._setup_learn(*args, **kwargs)
        if self.world is None:
            if self.model is None:
                raise ValueError(
                    f"this {type(self).__name__} was saved without its model: use load(path, data=..., model=...)"
                )
            if self.dynamics_reward is None and self._reward_card is not None:
                raise ValueError(
                    f"this {type(self).__name__} was saved without its dynamics reward, a function: use load(path, "
                    "data=..., dynamics_reward=...)"
                )
            for kind, part in (("model", self.model), ("dynamics_reward", self.dynamics_reward)):
                if isinstance(part, AbstractModel) and part.spaces is None:
                    report = part.fit(self.rows, rng=self._rng)
                    for name, value in report.metrics.items():
                        self.logger.record(f"{kind}/{name}", value)
            self._check_model(self.model)
            self.world = self.make_world()
            self._memory = memory_of(self.model, self.rows)
            self.logger.record("imagined/penalty_rule", self.penalty_rule, exclude=("csv", "tensorboard"))
        return found

    def _check_model(self, model: Dynamics) -> None:
        """Refuse a fitted model that does not go with the data or the critic rule."""
        if model.spaces != self.rows.spaces:
            raise ValueError(f"the model was fitted on {model.spaces}, the data has {self.rows.spaces}")
        judge = self.dynamics_reward
        if isinstance(judge, DynamicsReward) and judge.spaces != self.rows.spaces:
            raise ValueError(f"the dynamics reward was learned on {judge.spaces}, the data has {self.rows.spaces}")
        if self.inconsistency:
            _check_elites(len(model.elites))

    @torch.no_grad()
    def imagine(self) -> Transitions:
        """Roll the policy out from logged states, keep the rows for the updates and return them as the world gave them.

        A model with memory starts with what it remembers of the log there. A rollout that is cut at the horizon is not
        terminated there.
        """
        assert self.world is not None
        first = torch.randint(len(self.rows), (self.rollout_batch,), generator=self._rng, device=self.device)

        def act(obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
            return self._unscaled(self.policy.actor.sample(obs, self._rng))

        self._halts()  # forgets what others have played in this world
        memory = None if self._memory is None else self._memory[first]
        rows = self.world.rollout(self.rows.obs[first], act, self.horizon, self._rng, memory)
        if not len(rows):
            raise Diverged(f"none of {self.rollout_batch} imagined first steps is finite: the model has diverged")
        self.imagined.add(self._prepared(rows))
        for name, value in imagination_figures(self.world, rows).items():
            self.logger.record(name, value)
        for name, value in self._halts().items():
            self.logger.record(name, value)
        self.logger.record("imagined/penalty_weight", self.world.penalty_weight)
        self.logger.record("imagined/edge_of_reach", edge_of_reach_share(rows, self.rows))
        self.logger.record("imagined/length", len(rows) / self.rollout_batch)
        self.logger.record("imagined/reward", float(rows.reward.mean()))
        return rows

    def _halts(self) -> dict[str, float]:
        """Return what filter and trust have seen since the last call."""
        assert self.world is not None
        figures: dict[str, float] = {}
        if isinstance(self.world.trust, Halting):
            figures["imagined/halted"] = self.world.trust.share()
        if isinstance(self.world.sampler, TransitionFilter):
            figures |= self._log_figures | self.world.sampler.figures()
        return figures

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        if self._n_updates % self.rollout_every == 0 or not len(self.imagined):
            self.imagine()
        return super()._update()

    def _batch(self) -> Batch:
        return self._mixed.sample(self.batch_size, self._rng)

    def _logged_rows(self) -> int:
        return round(self.real_ratio * self.batch_size) if len(self.imagined) else self.batch_size

    def _target(self, batch: Batch, value: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        target, logged = super()._target(batch, value), self._logged_rows()
        if self.inconsistency and logged < self.batch_size:
            assert self.model is not None
            prediction = self.model.predict(batch.obs[logged:], self._unscaled(batch.action[logged:]))
            spread = bellman_inconsistency(self.policy, prediction, self._rng, self.inconsistency_draws)
            target = torch.cat((target[:logged], target[logged:] - self.inconsistency * spread))
        return target.clamp(min=0) if self.clip_target else target

    def _unscaled(self, action: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        return self._low + (0.5 * action + 0.5) * (self._high - self._low)

    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write an SB3 zip file with nets, optimisers, dynamics model and the generator's state; no data."""
        self._model_card = blueprint(self.model) if isinstance(self.model, AbstractDynamics) else {}
        if self.dynamics_reward is not None:
            judge = self.dynamics_reward
            self._reward_card = blueprint(judge) if isinstance(judge, DynamicsReward) else {}
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        own = ["model", "dynamics_reward", "world", "rows", "imagined", "_memory", "_mixed", "_low", "_high"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        own = [name for name in ("model", "dynamics_reward") if isinstance(getattr(self, name), AbstractModel)]
        return [*modules, *own], tensors


def _fingerprint(rows: Transitions) -> tuple[float, ...]:
    """Return the number of rows and their sums of rewards and observations: enough to tell one log from another."""
    return float(len(rows)), float(rows.reward.sum(dtype=torch.float64)), float(rows.obs.sum(dtype=torch.float64))


def _check_elites(elites: int) -> None:
    if elites < 2:
        raise ValueError(f"inconsistency compares elites and needs at least 2, the model has {elites}")


def _check_heads(model: object, task: Task) -> None:
    """Refuse a model that says itself that it lacks a head the task needs: before it is fitted, not after."""
    for what, known in (("reward", task.reward), ("termination", task.terminated)):
        if known is None and getattr(model, f"learn_{what}", None) is False:
            raise unanswered(task, what, model)


def discrepancy(model: Dynamics, data: Transitions) -> float:
    """Return the largest distance between two members' means at one logged step, ``max_D max_ij |μ_i - μ_j|``."""
    return float(weight_rule.penalties_of(model, data, PENALTIES["max_pairwise_diff"]).max())


@torch.no_grad()
def bellman_inconsistency(
    policy: OfflinePolicy, prediction: Prediction, rng: torch.Generator, draws: int
) -> Float[Tensor, " b"]:
    """Return U, the deviation over elites (unbiased) of ``mean_m min_j Q̄_j(s'_m, a'_m)``, a' from the policy.

    Source: Sun, Zhang, Jia, Lin, Ye, Yu, "Model-Bellman Inconsistency for Model-based Offline Reinforcement Learning",
    2023. Deviation: all elites share the noise of s' and of a', so that U measures the elites' disagreement alone
    (elites that agree have U = 0 exactly; with noise of their own U is positive even there).
    """
    mean, std = prediction.mean[prediction.elites], prediction.std[prediction.elites]
    members, rows, columns = mean.shape
    shape = (members, draws, rows, columns)
    noise = torch.randn(shape[1:], generator=rng, device=mean.device)
    after = torch.addcmul(mean[:, None], std[:, None], noise).reshape(-1, columns)
    actor = policy.actor
    assert isinstance(actor, SquashedActor)
    wide = math.prod(policy.action_space.shape or ())
    drawn = torch.randn((draws, rows, wide), generator=rng, device=mean.device)
    action = actor.at(after, drawn.expand(members, -1, -1, -1).reshape(-1, wide))
    return policy.critic_target(after, action).amin(0).view(shape[:3]).mean(1).std(0)


class MOPO(OfflineMBPO):
    """Pay for the model's uncertainty: imagined rewards are ``r - λ u(s, a)``.

    Source: Yu, Thomas, Yu, Ermon, Zou, Levine, Finn, Ma, "MOPO: Model-based Offline Policy Optimization", 2020. λ is in
    units of the reward and u in those of the observation, so λ does not carry over to another task.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        penalty: u; the source's is "max_aleatoric".
        penalty_weight: λ, 0.5 to 5 in the source; see `OfflineMBPO`.
        **common: see `OfflineMBPO`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        penalty: str | Penalty = "max_aleatoric",
        penalty_weight: float | str = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(policy, data, penalty=penalty, penalty_weight=penalty_weight, **common)


class MOReL(OfflineMBPO):
    """End imagination where the members disagree, in a state that pays a price.

    Source: Kidambi, Rajeswaran, Netrapalli, Joachims, "MOReL: Model-Based Offline Reinforcement Learning", 2020.
    Deviations: the policy learns by SAC on branched rollouts, not by natural policy gradient on full episodes; members
    are compared at one input; the halted step is terminated and pays once (the published code only truncates), where
    the source's absorbing state pays at every step. So with least logged reward r_min < 0 the imagined value is a
    pessimist's only for ``halt_offset <= r_min γ / (1 - γ)``: above it a halt may be a way out (see `OfflineMBPO`).

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        pessimism: c; at most 1 halts nowhere on the log, 3 in the source's code for Hopper.
        halt_offset: see `OfflineMBPO`; -30 to -200 in other published code.
        **common: see `OfflineMBPO`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        pessimism: float = 3.0,
        halt_offset: float = -50.0,
        **common: Any,
    ) -> None:
        super().__init__(policy, data, pessimism=pessimism, halt_offset=halt_offset, **common)


class COMBO(OfflineMBPO):
    """CQL's conservatism on imagined states: values are pushed down on the whole batch and up on its logged rows.

    Source: Yu, Kumar, Rafailov, Rajeswaran, Levine, Finn, "COMBO: Conservative Offline Model-Based Policy
    Optimization", 2021. Pushed down on the mixed batch, with CQL's thirty actions and their densities.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        conservatism: β, 0.5 to 5 in published code.
        real_ratio: see `OfflineMBPO`.
        entropy_backup: see `OfflineSAC`.
        **common: see `OfflineMBPO`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        conservatism: float = 1.0,
        real_ratio: float = 0.5,
        entropy_backup: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            conservatism=conservatism,
            real_ratio=real_ratio,
            entropy_backup=entropy_backup,
            **common,
        )

    def _nets(self) -> dict[str, Any]:
        return super()._nets() | {"net_arch": WIDE}


class MOBILE(OfflineMBPO):
    """Pay for the disagreement of the elites about the Bellman target, in the target of imagined rows.

    Source: Sun, Zhang, Jia, Lin, Ye, Yu, "Model-Bellman Inconsistency for Model-based Offline Reinforcement Learning",
    2023; see `bellman_inconsistency`. The source's code also clips targets at 0, which ruins tasks with negative
    rewards: ``clip_target=True`` does so.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        inconsistency: weight of U, 0.1 to 5 in the source.
        actor_learning_rate: see `OfflineAlgorithm`.
        entropy_backup: see `OfflineSAC`.
        **common: see `OfflineMBPO`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        inconsistency: float = 0.5,
        actor_learning_rate: float | Callable[[float], float] | None = Cosine(1e-4),  # noqa: B008 (immutable)
        entropy_backup: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            inconsistency=inconsistency,
            actor_learning_rate=actor_learning_rate,
            entropy_backup=entropy_backup,
            **common,
        )


class RAVL(OfflineMBPO):
    """No penalty on the model at all: diverse critics, the least of which is trusted, hold down the edge of reach.

    Rollouts are cut after ``horizon`` steps, so some states are only ever a next state: nothing corrects their value,
    however good the model. The figure ``spread`` (mean minus least critic at next states) is the pessimism applied.

    How far N and η cure it was measured where the model is exact (``learneddyn reproduce edge_of_reach``, rollouts of 5
    steps, plain critics end at -19): η = 10 with 10 critics still earned 10 [8, 14] after 40 epochs, η = 1 had earned 7
    after 20 and lost it again, -8 [-15, 5], and 30 critics without diversity fared as plain ones, -20. It is the
    diversity that is pessimistic in few dimensions, not the number, and it delays the failure more than it ends it.

    Source: Sims, Lu, Foerster, Teh, "The Edge-of-Reach Problem in Offline Model-Based Reinforcement Learning", 2024.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        n_critics: N, 10 in the source's example.
        diversity: η, 1 in the source's example.
        actor_learning_rate: see `OfflineAlgorithm`.
        ent_coef_learning_rate: see `OfflineSAC`.
        max_ent_coef: see `OfflineSAC`.
        **common: see `OfflineMBPO`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        n_critics: int = 10,
        diversity: float = 1.0,
        actor_learning_rate: Any = 3e-4,
        ent_coef_learning_rate: float | None = 3e-4,
        max_ent_coef: float = math.inf,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            n_critics=n_critics,
            diversity=diversity,
            actor_learning_rate=actor_learning_rate,
            ent_coef_learning_rate=ent_coef_learning_rate,
            max_ent_coef=max_ent_coef,
            **common,
        )

    def _nets(self) -> dict[str, Any]:
        return super()._nets() | DIVERSE_NETS
