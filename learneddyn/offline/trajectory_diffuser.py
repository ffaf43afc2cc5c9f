"""Trajectory Diffuser: propose a feasible plan state by state, refine it in few denoising steps, take its first action.

    proposer   P(s_{≤t}, g_{≤t}) → s_{t+1}, g_{t+1}      a causal sequence model; rolls the plan out
    diffusion  ε(x_k, k, g)                              m reverse steps, guided towards the return to go g
    inverse    I(s, s') → a                              the action between the plan's first two states
    critic     C(s, a) → g                               draws one of the plans
    reward     R(s, a, s') → r                           keeps the return to go while acting

Every part learns from the same windows of episodes, one step of AdamW each per update.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor
from torch.nn.functional import mish

from learneddyn.core import Transitions, generator
from learneddyn.models.nets import BatchedMLP
from learneddyn.models.windows import linked
from learneddyn.offline.base import OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.diffusion import NoiseSchedule
from learneddyn.offline.policy import FlatPolicy, Normaliser
from learneddyn.offline.proposer import PROPOSERS, Proposer, masked_mean
from learneddyn.offline.temporal import TemporalUNet, TrajectoryDiffusion
from learneddyn.spaces import flat_dim

FLOOR = 1 / 3
"""The return to go never falls below this share of a positive target, as in the source."""


TOGETHER = 4096
"""Plans that are refined together; more take turns, to bound memory."""


class Memory(NamedTuple):
    """What a policy remembers of the episodes it plays: the last c entries, the oldest first."""

    obs: Float[Tensor, "b c o"]
    returns: Float[Tensor, "b c"]
    filled: Int[Tensor, " b"]
    """Entries that each row holds."""
    action: Float[Tensor, "b a"]
    """The last action, in [-1, 1]."""


class TrajectoryPolicy(FlatPolicy):
    """The parts, and how they act together.

    `predict` keeps the history of each episode in ``state``, as SB3's recurrent policies do: hand back what it
    returned, and say with ``episode_start`` where a new episode begins. Without ``state`` every observation is the
    first of its episode. A deterministic action refines with noise that never changes and follows the plan that the
    critic likes best; any other draws a plan by the softmax of the critic.

    Args:
        observation_space: see `OfflinePolicy`.
        action_space: see `OfflinePolicy`.
        lr_schedule: see `OfflinePolicy`.
        horizon: states H of a plan, the present one among them.
        proposer: "transformer" or "gru".
        proposer_kwargs: arguments of `TransformerProposer` or `RecurrentProposer`.
        unet_width: channels of the U-Net's first level.
        unet_multipliers: channels of its levels as multiples of ``unet_width``.
        diffusion_steps: steps of the noise schedule.
        refinement_steps: reverse steps m of a plan.
        guidance: weight w of the return to go.
        plans: plans that are refined at once.
        inverse_arch: hidden widths of inverse dynamics and reward.
        critic_arch: hidden widths of the critic.
        optimizer_class: of every net.
        optimizer_kwargs: its arguments besides the learning rate.
        rng: of the start weights, on the CPU.

    Raises:
        ValueError: an argument outside its range.
    """

    proposer: Proposer
    target: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        lr_schedule: Any,
        *,
        horizon: int = 16,
        proposer: str = "transformer",
        proposer_kwargs: dict[str, Any] | None = None,
        unet_width: int = 64,
        unet_multipliers: Sequence[int] = (1, 2, 4, 8),
        diffusion_steps: int = 100,
        refinement_steps: int = 5,
        guidance: float = 1.2,
        plans: int = 32,
        inverse_arch: Sequence[int] = (256, 256),
        critic_arch: Sequence[int] = (128, 128),
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        rng: torch.Generator | None = None,
    ) -> None:
        divisor = 2 ** (len(unet_multipliers) - 1)
        for name, ok, value, allowed in (
            ("horizon", horizon >= 2 and horizon % divisor == 0, horizon, f"at least 2 and divisible by {divisor}"),
            ("proposer", proposer in PROPOSERS, proposer, f"one of {sorted(PROPOSERS)}"),
            ("refinement_steps", 0 <= refinement_steps <= diffusion_steps, refinement_steps,
             f"between 0 and diffusion_steps, {diffusion_steps}"),
            ("plans", plans >= 1, plans, "at least 1"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        if optimizer_kwargs is None:
            optimizer_kwargs = {"weight_decay": 1e-4, "fused": True} if optimizer_class is torch.optim.AdamW else {}
        super().__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._arguments: dict[str, Any] = {
            "horizon": horizon,
            "proposer": proposer,
            "proposer_kwargs": proposer_kwargs,
            "unet_width": unet_width,
            "unet_multipliers": unet_multipliers,
            "diffusion_steps": diffusion_steps,
            "refinement_steps": refinement_steps,
            "guidance": guidance,
            "plans": plans,
            "inverse_arch": inverse_arch,
            "critic_arch": critic_arch,
        }
        rng = torch.Generator().manual_seed(torch.initial_seed()) if rng is None else rng
        self.horizon, self.refinement_steps, self.guidance, self.plans = horizon, refinement_steps, guidance, plans
        states, actions = flat_dim(observation_space), flat_dim(action_space)
        self.normaliser = Normaliser(states)

        def diffusion(rng: torch.Generator) -> TrajectoryDiffusion:
            net = TemporalUNet(states, unet_width, unet_multipliers, rng=rng)
            return TrajectoryDiffusion(net, NoiseSchedule.linear(diffusion_steps))

        self.proposer = PROPOSERS[proposer](states, **(proposer_kwargs or {}), rng=rng)
        self.diffusion, self.slow_diffusion = diffusion(rng), diffusion(torch.Generator())
        self.slow_diffusion.load_state_dict(self.diffusion.state_dict())
        self.slow_diffusion.requires_grad_(False)
        self.inverse = BatchedMLP(1, (2 * states, *inverse_arch, actions), rng=rng)
        self.critic = BatchedMLP(1, (states + actions, *critic_arch, 1), activation=mish, rng=rng)
        self.reward = BatchedMLP(1, (2 * states + actions, *inverse_arch, 1), rng=rng)
        self.register_buffer("target", torch.zeros(()))
        self.learners = ["proposer", "diffusion", "inverse", "critic", "reward"]
        for name in self.learners:
            module: Any = getattr(self, name)
            module.optimizer = optimizer_class(module.parameters(), lr=lr_schedule(1), **optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces = {"observation_space": self.observation_space, "action_space": self.action_space}
        optimizer = {"optimizer_class": self.optimizer_class, "optimizer_kwargs": self.optimizer_kwargs}
        return {**spaces, **optimizer, **self._arguments, "lr_schedule": self._dummy_schedule}

    def actions_between(self, now: Float[Tensor, "b s"], then: Float[Tensor, "b s"]) -> Float[Tensor, "b a"]:
        """Return the actions, in [-1, 1], that lead from one standardised state to another."""
        return self.inverse(torch.cat((now, then), 1))[0].clamp(-1, 1)

    def follow(self, tau: float) -> None:
        """Move the slow diffusion, which acts, towards the one that learns by the share ``tau``."""
        with torch.no_grad():
            torch._foreach_lerp_(list(self.slow_diffusion.parameters()), list(self.diffusion.parameters()), tau)

    def remember(self, obs: Float[Tensor, "b o"], memory: Memory | None, fresh: Bool[Tensor, " b"]) -> Memory:
        """Return the memory with an observation appended.

        Args:
            obs: present observations.
            memory: what came before, or None where nothing did.
            fresh: rows where an episode begins; their history is dropped.
        """
        rows, entries = len(obs), self.horizon - 1
        if memory is None:
            blank = torch.zeros(rows, entries, obs.shape[1], device=obs.device)
            memory = Memory(
                blank,
                blank[..., 0],
                torch.zeros(rows, dtype=torch.long, device=obs.device),
                torch.zeros(rows, flat_dim(self.action_space), device=obs.device),
            )
            fresh = torch.ones_like(fresh)
        every = torch.arange(rows, device=obs.device)
        before, last = memory.obs[every, memory.filled - 1], memory.returns[every, memory.filled - 1]
        paid = self.reward(torch.cat((self.normaliser(before), memory.action, self.normaliser(obs)), 1))[0, :, 0]
        left = torch.where(fresh, self.target, torch.maximum(last - paid, self._floor()))
        count = torch.where(fresh, 0, memory.filled)
        full = (count == entries)[:, None]
        at = count.clamp(max=entries - 1)
        return Memory(
            torch.where(full[..., None], memory.obs.roll(-1, 1), memory.obs).index_put((every, at), obs),
            torch.where(full, memory.returns.roll(-1, 1), memory.returns).index_put((every, at), left),
            at + 1,
            memory.action,
        )

    def _floor(self) -> Tensor:
        return torch.where(self.target > 0, FLOOR * self.target, -torch.inf)

    def plan(
        self, memory: Memory, rng: torch.Generator | None = None, *, shared_noise: bool = False
    ) -> Float[Tensor, "b p h s"]:
        """Return refined plans in standardised units; their first state is the present one.

        Args:
            memory: histories; `remember` gives them.
            rng: of the refinement's noise; None is torch's global generator.
            shared_noise: let plan i of every row see the same noise.
        """
        rows, entries, _ = memory.obs.shape
        states = self.normaliser(memory.obs.flatten(0, 1)).view(rows, entries, -1)
        every = torch.arange(rows, device=states.device)
        now, left = states[every, memory.filled - 1], memory.returns[every, memory.filled - 1]
        ahead = self.proposer.roll(states, memory.returns, memory.filled, self.horizon - 1)
        proposal = torch.cat((now[:, None], ahead), 1).repeat_interleave(self.plans, 0)

        def noise() -> Tensor:
            shape = (self.plans if shared_noise else len(proposal), *proposal.shape[1:])
            drawn = torch.randn(shape, generator=rng, device=proposal.device)
            return drawn.repeat(rows, 1, 1) if shared_noise else drawn

        goal = left.repeat_interleave(self.plans)
        refined = self.slow_diffusion.refine(proposal, self.refinement_steps, noise, goal, guidance=self.guidance)
        return refined.view(rows, self.plans, *refined.shape[1:])

    def act(self, memory: Memory, *, deterministic: bool = False) -> Float[Tensor, "b a"]:
        """Return actions in [-1, 1] for histories."""
        parts = zip(*(part.split(max(1, TOGETHER // self.plans)) for part in memory), strict=True)
        return torch.cat([self._act(Memory(*part), deterministic) for part in parts])

    def _act(self, memory: Memory, deterministic: bool) -> Float[Tensor, "b a"]:
        device = memory.obs.device
        plans = self.plan(memory, generator(0, device) if deterministic else None, shared_noise=deterministic)
        rows, count = plans.shape[:2]
        now, then = (plans[:, :, at].flatten(0, 1) for at in (0, 1))
        actions = self.actions_between(now, then)
        promise = self.critic(torch.cat((now, actions), 1))[0, :, 0].view(rows, count)
        chosen = promise.argmax(1) if deterministic else torch.multinomial(promise.softmax(1), 1)[:, 0]
        return actions.view(rows, count, -1)[torch.arange(rows, device=device), chosen]

    def _predict(self, observation: Any, deterministic: bool = False) -> Float[Tensor, "b a"]:
        obs = self.columns(observation)
        fresh = torch.ones(len(obs), dtype=torch.bool, device=obs.device)
        return self.act(self.remember(obs, None, fresh), deterministic=deterministic)

    def forward(self, observation: Any, deterministic: bool = False) -> Float[Tensor, "b a"]:
        """Return actions in [-1, 1] for first observations."""
        return self._predict(observation, deterministic)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions in environment units, and the histories that the next call needs.

        Raises:
            ValueError: ``state`` belongs to another number of environments.
        """
        self.set_training_mode(False)
        tensor, vectorised = self.obs_to_tensor(observation)
        obs = self.columns(tensor)
        memory = None if state is None else Memory(*(torch.as_tensor(part, device=self.device) for part in state))
        if memory is not None and len(memory.obs) != len(obs):
            raise ValueError(f"state remembers {len(memory.obs)} environments, but there are {len(obs)} observations")
        starts = np.zeros(len(obs), bool) if episode_start is None else np.asarray(episode_start, bool).reshape(-1)
        with torch.no_grad():
            memory = self.remember(obs, memory, torch.as_tensor(starts, device=self.device))
            memory = memory._replace(action=self.act(memory, deterministic=deterministic))
        scaled = memory.action.cpu().numpy().reshape(-1, *(self.action_space.shape or ()))
        actions = self.unscale_action(scaled)
        return actions if vectorised else actions[0], tuple(part.cpu().numpy() for part in memory)


class Window(NamedTuple):
    """Pieces of unbroken stretches of episodes, padded behind the end with the last state."""

    states: Float[Tensor, "b h s"]
    """Standardised."""
    returns: Float[Tensor, "b h"]
    """Undiscounted rewards that the log holds from here to the episode's end."""
    actions: Float[Tensor, "b h a"]
    rewards: Float[Tensor, "b h"]
    known: Bool[Tensor, "b h"]
    """False in the padding."""


class Windows:
    """The episodes of a log, from which windows are drawn that begin at any row.

    A window ends with its episode, and where rows were dropped (`learneddyn.models.windows`): it holds no step that
    nobody took.

    Args:
        rows: the log, with the rewards and actions to learn from.
        normaliser: of its observations.
    """

    def __init__(self, rows: Transitions, normaliser: Normaliser) -> None:
        begins = ~linked(rows)
        ends = (begins.roll(-1)).nonzero().flatten()
        # A stretch of T rows has T + 1 states: those of later stretches stand one place further per earlier stretch.
        stretch = begins.cumsum(0) - 1
        place = torch.arange(len(rows), device=rows.device) + stretch
        self._last = (ends + torch.arange(len(ends), device=rows.device) + 1)[stretch]
        self._starts = place
        total = len(rows) + len(ends)

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(total, *values.shape[1:]).index_copy(0, place, values)

        def with_last(values: Tensor, last: Tensor) -> Tensor:
            return placed(values).index_copy(0, self._last[ends], last[ends])

        number, lengths = torch.unique_consecutive(rows.episode, return_inverse=True, return_counts=True)[1:]
        paid = rows.reward.double().cumsum(0)
        after = paid[lengths.cumsum(0) - 1][number] - paid
        self._states = normaliser(with_last(rows.obs, rows.next_obs))
        self._returns = with_last((after + rows.reward.double()).float(), after.float())
        self._actions, self._rewards = placed(rows.action), placed(rows.reward)
        self.episode_returns = self._returns[place[lengths.cumsum(0) - lengths]]
        """Return of every episode."""

    def sample(self, rows: int, horizon: int, rng: torch.Generator) -> Window:
        """Return windows of ``horizon`` states; ``rng`` is on the device of the log."""
        drawn = torch.randint(len(self._starts), (rows, 1), generator=rng, device=rng.device)
        at, last = self._starts[drawn] + torch.arange(horizon, device=rng.device), self._last[drawn]
        known, at = at <= last, torch.minimum(at, last)
        return Window(self._states[at], self._returns[at], self._actions[at], self._rewards[at], known)


class TrajectoryDiffuser(OfflineAlgorithm):
    """Propose, refine, invert: a planner over states that learns from logged episodes.

    Source: Huang et al., "Diffusion Models as Optimizers for Efficient Planning in Offline RL", 2024. Deviations: the
    proposer is causal (in the public code position i sees state i + 1, so that only the last position learns what
    acting asks of it), predicts changes, has no dropout and normalises before each block; windows reach over an
    episode's end, padded and not learned from there, where the code drops them; the rate falls along the whole run
    instead of the first 1e5 updates; and until ``slow_start`` the slow diffusion is a copy. An agent that acts sees no
    rewards through `predict`: the return to go is kept by a net that is fitted to them. Inverse dynamics here are a
    part of the learner; `learneddyn.models.InverseDynamics` is a model of its own, for logs without actions.

    Args:
        policy: "MlpPolicy", or a subclass of `TrajectoryPolicy`.
        data: see `OfflineAlgorithm`; rows of an episode stand in order.
        horizon: states H of a plan; the source's 8 (HalfCheetah), 16 (Hopper) or 32 (Walker2d).
        proposer: "transformer" or "gru".
        refinement_steps: reverse steps m.
        guidance: weight w of the return to go, 1.1 to 1.3 in the source.
        target_return: return to aim at, in units of the (shifted) rewards; None is the best in the data.
        return_drop: probability that a window's return is not told in training.
        slow_decay: share of the slow diffusion that stays when it moves.
        slow_every: updates between its moves.
        slow_start: updates until which it is a copy.
        learning_rate: see `OfflineAlgorithm`.
        batch_size: windows per update.
        reward_scale: see `OfflineAlgorithm`; returns to go should come out of order 1.
        normalize_obs: standardise observations.
        **common: see `OfflineAlgorithm`; ``gamma`` and ``tau`` play no part. ``policy_kwargs`` are those of
            `TrajectoryPolicy`.

    Raises:
        ValueError: an argument outside its range.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {"MlpPolicy": TrajectoryPolicy}
    policy: TrajectoryPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[TrajectoryPolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        horizon: int = 16,
        proposer: str = "transformer",
        refinement_steps: int = 5,
        guidance: float = 1.2,
        target_return: float | None = None,
        return_drop: float = 0.5,
        slow_decay: float = 0.995,
        slow_every: int = 2,
        slow_start: int = 10_000,
        learning_rate: float | Schedule = LinearSchedule(2e-4, 2e-6, 1.0),  # noqa: B008 (immutable)
        batch_size: int = 32,
        reward_scale: float | str = 1e-3,
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        for name, ok, value, allowed in (
            ("return_drop", 0 <= return_drop <= 1, return_drop, "in [0, 1]"),
            ("slow_decay", 0 <= slow_decay < 1, slow_decay, "in [0, 1)"),
            ("slow_every", slow_every >= 1, slow_every, "at least 1"),
            ("slow_start", slow_start >= 0, slow_start, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value}")
        self.horizon, self.proposer, self.refinement_steps = horizon, proposer, refinement_steps
        self.guidance, self.target_return, self.return_drop = guidance, target_return, return_drop
        self.slow_decay, self.slow_every, self.slow_start = slow_decay, slow_every, slow_start
        super().__init__(
            policy,
            data,
            learning_rate=learning_rate,
            batch_size=batch_size,
            reward_scale=reward_scale,
            normalize_obs=normalize_obs,
            **common,
        )

    def _nets(self) -> dict[str, Any]:
        names = ("horizon", "proposer", "refinement_steps", "guidance")
        return {name: getattr(self, name) for name in names}

    def _fill(self, rows: Transitions) -> None:
        self.windows = Windows(self._prepared(rows), self.policy.normaliser)
        target, best = self.target_return, self.windows.episode_returns.max()
        self.policy.target.fill_(best if target is None else target * self.reward_factor)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "windows"]

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        policy, window = self.policy, self.windows.sample(self.batch_size, self.policy.horizon, self._rng)
        goal = window.returns[:, 0]
        losses = {
            "proposer": policy.proposer.loss(window.states, window.returns, window.known),
            "diffusion": policy.diffusion.loss(window.states, window.known, self._rng, goal, drop=self.return_drop),
        }
        paired = window.known[:, 1:]  # positions whose action the log holds
        now, then, action = (
            part.flatten(0, 1) for part in (window.states[:, :-1], window.states[:, 1:], window.actions[:, :-1])
        )
        for name, inputs, wanted in (
            ("inverse", (now, then), action),
            ("critic", (now, action), window.returns[:, :-1].reshape(-1, 1)),
            ("reward", (now, action, then), window.rewards[:, :-1].reshape(-1, 1)),
        ):
            found = getattr(policy, name)(torch.cat(inputs, 1))[0]
            losses[name] = masked_mean((found - wanted).square().mean(1).view(paired.shape), paired)
        for name, loss in losses.items():
            descend(loss, getattr(policy, name).optimizer)
        done = self._n_updates + 1
        if done <= self.slow_start:
            policy.follow(1.0)
        elif done % self.slow_every == 0:
            policy.follow(1 - self.slow_decay)
        return {f"{name}_loss": loss for name, loss in losses.items()}
