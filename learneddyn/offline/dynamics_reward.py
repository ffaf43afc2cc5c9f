"""The dynamics reward r^D(s, a, s'): how much a step looks like one of the real system. Adversarial IRL on the log.

The system is taken for an agent that, in the state (s, a), chooses s' so as to maximise a hidden reward. A generator P
plays the system, a discriminator 𝒟 tells its steps from logged ones:

    𝒟   maximises  mean_log log 𝒟(s, a, s') + mean_P log (1 - 𝒟(s, a, s')) + c mean H(𝒟),  c holds H at a target
    P    maximises  mean logit 𝒟(s, a, s'_P) + w mean log σ_P,              after a start by maximum likelihood

Once P is as good as the log, 𝒟 says 1/2 everywhere; the reward therefore is made of T snapshots from all of training:

    x_t  = (2 l_t - X_t - L_t) / max(X_t - L_t, 2)      l_t: logit; X_t, L_t: its mean on logged and on P's steps
    x    = 1/T Σ_t x_t
    r^D  = -log (1 - σ(x / (1 + |x|)))                  in [0.313, 1.313]; log 2 = 0.693 half-way between X and L

Source: Luo, Xu, Cao, Yu, "Reward-Consistent Dynamics Models are Strongly Generalizable for Offline Reinforcement
Learning", 2024. Calibration, scales of state and action, and the discriminator's entropy target are those of the
published code, which holds no training: networks, rates and numbers of updates here are our own choices.
Deviations: the generator climbs the logit by its gradient (there: policy gradient), and is soon so good that X and L
nearly meet. w keeps it broader than the log, so that 𝒟 keeps a peak at real steps. The published calibration
(``calibration="clip"``) divides by X - L alone, clips x_t at -1 and 1 and averages σ(x_t): where X - L is small, all
steps worse than the generator's look alike, and a snapshot with X <= L (there it counts as 1/2) is noise. Ours has the
same range and the same middle, and keeps the order. Changes of the state are scaled by their own deviation, not by the
state's range; X and L are means of 4096 rows each, not of one batch. And T may span several games, each of a 𝒟 and a P
of its own: far from the log one 𝒟 extrapolates by chance.

``scaling="deviation"`` is ours too. Scaled by their range, states and actions of a controlled system crowd around its
set point: what little tells there the effect of the action from that of the state is then a hundredth of a unit wide,
𝒟 learns it last or never, and far from the log its peak leaves the truth to one side, in every game alike.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus, softsign
from tqdm import tqdm

from learneddyn.core import DataError, Transitions, generator
from learneddyn.models import AbstractModel, FitReport
from learneddyn.models.attempt import attempt
from learneddyn.models.nets import BatchedMLP
from learneddyn.offline.base import descend
from learneddyn.spaces import Spaces

SCALE = 0.8, 1.0
"""Ranges that observations and actions of the log are scaled to, plus and minus, where ``scaling="range"``."""
LOG_STD = (-5.0, 1.0)
"""Bounds of the generator's log standard deviation, in scaled units."""
LEAST_GAP = 1e-6  # between the mean logits of logged and generated steps, below which a snapshot knows nothing
_CALIBRATION = 4096
_CONSTANT_RANGE = 1e-6  # relative to a column's largest magnitude: below it, rounding is all that changes
_ENTRIES = 2**21  # hidden units, over rows and snapshots, that are computed at once on the CPU


class _Guess(NamedTuple):
    """What the generator says about scaled changes."""

    mean: Float[Tensor, "e b o"]
    log_std: Float[Tensor, "e b o"]


class DynamicsReward(AbstractModel):
    """r^D of the module's first lines; call it with rows: ``reward(obs, action, next_obs) -> [b]``.

    All snapshots are one batched net. A column of the log that never changes is not looked at, nor is a change that is
    always the same.

    Args:
        snapshots: of each discriminator, evenly spread over training; the published code averages 10 or 40.
        games: pairs of networks, trained side by side on rows of their own; the source has one.
        updates: of each of the two networks, at least ``snapshots``.
        hidden: widths of the discriminator's ReLU layers.
        generator_hidden: widths of the generator's.
        warm_up: updates of the generator by maximum likelihood, before anything else.
        batch_size: logged, and as many generated, rows per update.
        learning_rate: of Adam, for both.
        entropy: target of the discriminator's mean entropy, in nats.
        entropy_learning_rate: of the logarithm of its weight c, which starts at 0.001.
        spread: w.
        calibration: "mean" of the logits, as above, or "clip", as in the published code.
        scaling: of observations and actions: by the log's "range", as in the published code, or by its "deviation",
            to mean 0 and standard deviation 1.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    factor: Tensor
    shift: Tensor
    expert: Tensor
    learner: Tensor

    def __init__(
        self,
        snapshots: int = 10,
        games: int = 1,
        updates: int = 10_000,
        hidden: Sequence[int] = (256, 256),
        generator_hidden: Sequence[int] = (256, 256),
        warm_up: int = 1000,
        batch_size: int = 256,
        learning_rate: float = 3e-4,
        entropy: float = 0.35,
        entropy_learning_rate: float = 1e-2,
        spread: float = 0.1,
        calibration: str = "mean",
        scaling: str = "range",
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("snapshots", snapshots >= 1, snapshots, "at least 1"),
            ("games", games >= 1, games, "at least 1"),
            ("updates", updates >= snapshots, updates, f"at least snapshots = {snapshots}"),
            ("hidden", all(width >= 1 for width in hidden), hidden, "positive widths"),
            ("generator_hidden", all(width >= 1 for width in generator_hidden), generator_hidden, "positive widths"),
            ("warm_up", warm_up >= 0, warm_up, "at least 0"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("spread", spread >= 0, spread, "at least 0"),
            ("calibration", calibration in ("mean", "clip"), calibration, "'mean' or 'clip'"),
            ("scaling", scaling in ("range", "deviation"), scaling, "'range' or 'deviation'"),
            ("entropy", 0 < entropy < math.log(2), entropy, "between 0 and log 2"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.snapshots, self.games, self.updates = snapshots, games, updates
        self.warm_up, self.batch_size = warm_up, batch_size
        self.hidden, self.generator_hidden = list(hidden), list(generator_hidden)
        self.learning_rate, self.entropy, self.entropy_learning_rate = learning_rate, entropy, entropy_learning_rate
        self.spread, self.calibration, self.scaling = spread, calibration, scaling

    def _build(self, spaces: Spaces) -> None:
        columns = 2 * spaces.obs_dim + spaces.action_dim
        count = self.snapshots * self.games
        self.nets = BatchedMLP(count, (columns, *self.hidden, 1), rng=torch.Generator()).requires_grad_(False)
        for name, size, fill in (
            ("shift", columns, 0.0),
            ("factor", columns, 1.0),
            ("expert", count, 0.0),
            ("learner", count, 0.0),
        ):
            self.register_buffer(name, torch.full((size,), fill))

    def forward(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], next_obs: Float[Tensor, "b o"]
    ) -> Float[Tensor, " b"]:
        """Return r^D of every row.

        Raises:
            ValueError: nothing has been learned yet.
        """
        if self.spaces is None:
            raise ValueError(
                "this dynamics reward has not been learned: call fit(data, rng=...) or DynamicsReward.load"
            )
        rows = self._features(obs, action, next_obs)
        together = max(1, _ENTRIES // (len(self.expert) * max(self.hidden, default=1))) if rows.is_cpu else len(rows)
        real = torch.cat([self._belief(part) for part in rows.split(together)]) if len(rows) else rows.sum(1)
        return -torch.log1p(-real)

    def _belief(self, rows: Float[Tensor, "b i"]) -> Float[Tensor, " b"]:
        """Return the calibrated probability that a step is real."""
        gap, middle = (self.expert - self.learner)[:, None], (self.expert + self.learner)[:, None] / 2
        excess = 2 * (self.nets(rows)[..., 0] - middle)
        if self.calibration == "clip":
            place = (excess / gap.clamp_min(LEAST_GAP)).clamp(-1, 1)
            return torch.where(gap > LEAST_GAP, place, 0.0).sigmoid().mean(0)
        return softsign((excess / gap.clamp_min(2)).mean(0)).sigmoid()

    def _features(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Float[Tensor, "b i"]:
        """Return scaled observation, action and change; columns that never change in the log are 0."""
        return (torch.cat((obs, action, next_obs - obs), 1) - self.shift) * self.factor

    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn anew from all rows; what was learned before is replaced.

        Args:
            data: logged steps. The first call makes the parameters on the data's device, later data moves to them.
            rng: on this module's device; the same seed and data give the same reward on one machine.
            progress: show a bar.

        Returns:
            Updates (as epochs), seconds, one entry of history per snapshot, and r^D on logged and on generated rows at
            the end (``log_reward``, ``generated_reward``).

        Raises:
            DataError: no rows, NaN or infinite rows, or no observation column that changes.
            ValueError: the data has other spaces than the rows learned from before.
            FloatingPointError: training diverged; what was learned before is kept.
        """
        started = time.perf_counter()
        data.check()
        with attempt(self, data):
            data = data.to(self.shift.device)
            self._fit_scales(data)
            table = self._features(data.obs, data.action, data.next_obs)
            history, generated = self._play(table, rng, progress)
        logged = table[torch.randint(len(table), (_CALIBRATION,), generator=rng, device=table.device)]
        rewards = [float(-torch.log1p(-self._belief(rows)).mean()) for rows in (logged, generated)]
        metrics = dict(zip(("log_reward", "generated_reward"), rewards, strict=True))
        return FitReport(self.updates, time.perf_counter() - started, metrics, history)

    def thinned(self, every: int) -> "DynamicsReward":
        """Return the reward of every so-manieth snapshot of each game alone, the last one among them.

        The published code learns 400 and asks every tenth or fortieth of them.

        Raises:
            ValueError: nothing has been learned yet, or ``every`` is not 1 to ``snapshots``.
        """
        if self.spaces is None or not 1 <= every <= self.snapshots:
            raise ValueError(f"every must be 1 to snapshots = {self.snapshots} of a learned reward, got {every}")
        times = torch.arange(self.snapshots - 1, -1, -every, device=self.shift.device).flip(0)
        kept = torch.arange(len(self.expert), device=self.shift.device).view(self.snapshots, -1)[times].flatten()
        fewer = DynamicsReward(**(self.config() | {"snapshots": len(times)}))
        fewer._build(self.spaces)
        fewer.spaces, fewer.source = self.spaces, self.source
        whole = ("shift", "factor")
        state = self.state_dict().items()
        fewer.load_state_dict({name: part if name in whole else part[kept] for name, part in state})
        return fewer.to(self.shift.device)

    def _fit_scales(self, data: Transitions) -> None:
        seen, change = torch.cat((data.obs, data.next_obs)).double(), (data.next_obs - data.obs).double()
        magnitude = seen.abs().amax(0)
        shifts, factors = [], []
        for rows, size, reach in ((seen, magnitude, SCALE[0]), (data.action.double(), None, SCALE[1])):
            if self.scaling == "deviation":
                centre, factor = rows.mean(0), 1 / rows.std(0, correction=0)
            else:
                low, high = rows.amin(0), rows.amax(0)
                centre, factor = (low + high) / 2, 2 * reach / (high - low)
            shifts.append(centre)
            factors.append(torch.where(_varies(rows, size), factor, 0.0))
        shifts.append(change.mean(0))
        moving = _varies(change, magnitude)
        if not bool(moving.any()):
            raise DataError("no observation column ever changes by different amounts: there is no dynamics to learn")
        factors.append(torch.where(moving, 1 / change.std(0, correction=0), 0.0))
        self.shift.copy_(torch.cat(shifts))
        self.factor.copy_(torch.cat(factors))

    def _play(
        self, table: Float[Tensor, "n i"], rng: torch.Generator, progress: bool
    ) -> tuple[list[dict[str, float]], Float[Tensor, "b i"]]:
        """Train both networks, fill in the snapshots; return the history and rows of the last generator."""
        assert self.spaces is not None
        columns, o = table.shape[1], self.spaces.obs_dim
        weights = generator(int(torch.randint(2**31, (), generator=rng, device=rng.device)))
        critic = BatchedMLP(self.games, (columns, *self.hidden, 1), rng=weights).to(table.device)
        player = BatchedMLP(self.games, (columns - o, *self.generator_hidden, 2 * o), rng=weights).to(table.device)
        log_weight = torch.full((), math.log(1e-3), device=table.device, requires_grad=True)
        critic_adam, player_adam, weight_adam = (
            torch.optim.Adam(parameters, lr=rate, fused=True)
            for parameters, rate in (
                (critic.parameters(), self.learning_rate),
                (player.parameters(), self.learning_rate),
                ([log_weight], self.entropy_learning_rate),
            )
        )
        moving = self.factor[-o:] != 0

        def batch(rows: int) -> tuple[Float[Tensor, "e b i"], Float[Tensor, "e b g"]]:
            chosen = torch.randint(len(table), (self.games, rows), generator=rng, device=table.device)
            return table[chosen], table[chosen][..., :-o]

        def generated(given: Float[Tensor, "e b g"]) -> tuple[Float[Tensor, "e b i"], _Guess]:
            guess = _guess(player, given)
            noise = torch.randn(guess.mean.shape, generator=rng, device=table.device)
            change = torch.where(moving, guess.mean + guess.log_std.exp() * noise, 0.0)
            return torch.cat((given, change), 2), guess

        # Losses are means over rows and sums over games, so that a game learns at the same rate among any number.
        for _ in range(self.warm_up):
            real, given = batch(self.batch_size)
            guess = _guess(player, given)
            z = (real[..., -o:] - guess.mean) * (-guess.log_std).exp()
            descend(((0.5 * z.square() + guess.log_std) * moving).sum((0, 2)).mean(), player_adam)

        history: list[dict[str, float]] = []
        for update in tqdm(range(1, self.updates + 1), "learn r^D", unit="update", disable=not progress, leave=False):
            real, given = batch(self.batch_size)
            fake, guess = generated(given)
            logit = critic(torch.cat((real, fake.detach()), 1))[..., 0]
            entropy = (softplus(logit) - logit * logit.sigmoid()).mean()
            mistake = softplus(-logit[:, : self.batch_size]).mean() + softplus(logit[:, self.batch_size :]).mean()
            descend(self.games * (mistake - log_weight.detach().exp() * entropy), critic_adam)
            descend(log_weight * (entropy.detach() - self.entropy), weight_adam)
            gain = critic(fake).mean() + self.spread * (guess.log_std * moving).mean()
            descend(-self.games * gain, player_adam)
            if update * self.snapshots // self.updates > len(history):
                with torch.no_grad():
                    real, given = batch(_CALIBRATION)
                    fake = generated(given)[0]
                    expert, learner = (critic(rows)[..., 0].mean(1) for rows in (real, fake))
                self._keep(len(history), critic, expert, learner)
                history.append(
                    {
                        "expert_logit": float(expert.mean()),
                        "learner_logit": float(learner.mean()),
                        "entropy": float(entropy.detach()),
                        "entropy_weight": float(log_weight.detach().exp()),
                    }
                )
                if not all(map(math.isfinite, history[-1].values())):
                    raise FloatingPointError(
                        f"learning the dynamics reward diverged before update {update}: lower learning_rate (now "
                        f"{self.learning_rate})"
                    )
        return history, fake.flatten(0, 1)

    @torch.no_grad()
    def _keep(self, time: int, critic: BatchedMLP, expert: Float[Tensor, " e"], learner: Float[Tensor, " e"]) -> None:
        """Store a snapshot of every game."""
        rows = slice(time * self.games, (time + 1) * self.games)
        for own, other in zip(self.nets.parameters(), critic.parameters(), strict=True):
            own[rows] = other
        self.expert[rows], self.learner[rows] = expert, learner


def _guess(player: BatchedMLP, given: Float[Tensor, "e b g"]) -> _Guess:
    mean, log_std = player(given).chunk(2, 2)
    return _Guess(mean, log_std.clamp(*LOG_STD))


def _varies(rows: Float[Tensor, "n k"], magnitude: Float[Tensor, " k"] | None) -> Bool[Tensor, " k"]:
    """Say which columns change by more than rounding, relative to their magnitude."""
    size = rows.abs().amax(0) if magnitude is None else magnitude
    return rows.amax(0) - rows.amin(0) > _CONSTANT_RANGE * size
