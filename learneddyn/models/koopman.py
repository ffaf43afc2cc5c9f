"""Koopman: linear or bilinear dynamics of a lifted observation, fitted by least squares (EDMD with control).

Source: Williams, Kevrekidis, Rowley, "A Data-Driven Approximation of the Koopman Operator: Extending Dynamic Mode
Decomposition" (2015); inputs as in Korda, Mezic, "Linear predictors for nonlinear dynamical systems: Koopman operator
meets model predictive control" (2018), bilinear inputs as in Peitz, Otto, Rowley, "Data-Driven Model Predictive Control
using Interpolated Koopman Generators" (2020). Spectra with certificates are in `learneddyn.evaluation.koopman`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, combinations_with_replacement, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import DataError, Transitions
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import or_one, spread
from learneddyn.models.windows import elapsed
from learneddyn.spaces import Spaces

LIFTS = ("linear", "polynomial", "rbf", "learned")
_OWN = 1e-4
"""Distance from the model's own last prediction, in standard deviations, up to which an observation counts as it."""
_BLOCK = 2**22
"""Numbers in a block of lifted rows; a log is lifted and decomposed block by block."""
_RIDGE = 1e-6
"""Keeps the least squares inside the training of a learned lift of full rank, relative to its rows' norm."""


class LinearSystem(NamedTuple):
    """``psi' = psi @ transition + action @ inputs``, ``y = psi @ readout``, in float64 and the environment's units."""

    transition: Float[Tensor, "n n"]
    inputs: Float[Tensor, "a n"]
    readout: Float[Tensor, "n q"]
    """To the observation, with angles as cosines and then sines behind the other columns."""
    lift: Callable[[Float[Tensor, "b o"]], Float[Tensor, "b n"]]
    """From observations to psi."""


class Koopman(AbstractRegression):
    """Lift the observation by a dictionary psi, advance it by one matrix, read the observation back.

    The dictionary holds 1, the observation itself (standardised; ``angles`` as cosine and sine), and what ``lift``
    adds: monomials up to ``degree``, ``centres`` radial functions exp(-|x - c| / d) around data rows picked apart from
    each other (d: mean distance of the data to its centroid), or an MLP trained together with the matrix. Inputs enter
    as ``psi' = psi K + u B`` ("linear") or ``psi' = psi (K_0 + sum_i u_i K_i)`` ("bilinear").

    With ``relift`` every step reads the observation back and lifts it anew, which forgets what the dictionary cannot
    represent and keeps free runs on the data's manifold. Without, the lifted vector itself goes on (it travels as the
    State's memory) as long as observations are the model's own predictions: then the model is linear over the whole
    horizon, as linear MPC needs it. Any other observation, such as a measured one, is lifted anew.

    Args:
        lift: "linear" (nothing more: DMD), "polynomial", "rbf" or "learned".
        degree: of the monomials.
        centres: number of radial functions, or of outputs of the MLP.
        control: "linear" or "bilinear".
        relift: lift anew at every step.
        delays: observations in the lifted vector, the current one and those before it (Hankel DMD); the first step of
            an episode repeats its observation.
        angles: observation columns in radians.
        unit_pairs: pairs of observation columns (cosine, sine) that are brought back to the unit circle.
        rcond: singular values below this share of the largest count as zero. Logs are rounded to float32, so that a
            dictionary's redundancies (a cosine and a sine whose squares add up to 1) show up at about 1e-7; what is
            fitted to them is noise, and free runs of a lifted vector diverge on it.
        hidden: width of the MLP's two hidden layers.
        epochs: of training a learned lift.
        learning_rate: of Adam for a learned lift.
        learn_reward: read the reward from the lifted vector and the input.
        holdout_ratio: share of the rows that measure the noise.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    num_members = 1

    def __init__(
        self,
        lift: str = "polynomial",
        degree: int = 3,
        centres: int = 100,
        control: str = "bilinear",
        relift: bool = True,
        delays: int = 1,
        angles: Sequence[int] = (),
        unit_pairs: Sequence[Sequence[int]] = (),
        rcond: float = 1e-6,
        hidden: int = 64,
        epochs: int = 30,
        learning_rate: float = 1e-3,
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("lift", lift in LIFTS, lift, f"one of {LIFTS}"),
            ("degree", degree >= 1, degree, "at least 1"),
            ("centres", centres >= 1, centres, "at least 1"),
            ("control", control in ("linear", "bilinear"), control, "'linear' or 'bilinear'"),
            ("delays", delays >= 1, delays, "at least 1"),
            ("delays", relift or delays == 1, delays, "1 where relift is False: the lifted vector is the memory"),
            ("unit_pairs", all(len(pair) == 2 for pair in unit_pairs), unit_pairs, "pairs of columns"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.lift, self.degree, self.centres, self.control = lift, degree, centres, control
        self.relift, self.delays, self.rcond = relift, delays, rcond
        self.angles, self.unit_pairs = list(angles), [list(pair) for pair in unit_pairs]
        self.hidden, self.epochs, self.learning_rate = hidden, epochs, learning_rate
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        if any(not 0 <= column < o for column in [*self.angles, *chain(*self.unit_pairs)]):
            raise ValueError(f"angles and unit_pairs must name observation columns 0 to {o - 1}")
        self._plain = [column for column in range(o) if column not in self.angles]
        d = (o + len(self.angles)) * self.delays
        self.register_buffer("pairs", torch.tensor(self.unit_pairs, dtype=torch.long).view(-1, 2), persistent=False)
        n = 1 + d + (self._build_monomials(d) if self.lift == "polynomial" else 0)
        n += self.centres if self.lift in ("rbf", "learned") else 0
        rows = n * (1 + a) if self.control == "bilinear" else n + a
        self.register_buffer("shift", torch.zeros(d // self.delays))
        self.register_buffer("scale", torch.ones(d // self.delays))
        self.register_buffer("action_scale", torch.ones(a))
        self.register_buffer("advance", torch.zeros(rows, n, dtype=torch.float64))
        self.register_buffer("reward_readout", torch.zeros(rows, 1, dtype=torch.float64))
        if self.lift == "rbf":
            self.register_buffer("centre", torch.zeros(self.centres, d))
            self.register_buffer("width", torch.ones(()))
        if self.lift == "learned":
            widths = (d, self.hidden, self.hidden, self.centres)
            # `_train_lift` draws the weights from the fit's own generator.
            first, second, third = (nn.utils.skip_init(nn.Linear, *pair) for pair in pairwise(widths))
            self.features = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)
            self.register_buffer("feature_shift", torch.zeros(self.centres))
            self.register_buffer("feature_scale", torch.ones(self.centres))

    def _build_monomials(self, d: int) -> int:
        """Write every monomial down as one of a degree less times a column; return how many there are."""
        lower: list[tuple[int, ...]] = [(column,) for column in range(d)]
        count = 0
        for degree in range(2, self.degree + 1):
            higher = list(combinations_with_replacement(range(d), degree))
            place = {chosen: index for index, chosen in enumerate(lower)}
            for name, index in (
                ("parent", [place[chosen[:-1]] for chosen in higher]),
                ("factor", [chosen[-1] for chosen in higher]),
            ):
                self.register_buffer(f"{name}_{degree}", torch.tensor(index), persistent=False)
            lower, count = higher, count + len(higher)
        return count

    def coordinates(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b d"]:
        """Return standardised observations, angles as cosine and sine behind the other columns."""
        return (self._encoded(obs) - self.shift) / self.scale

    def lifted(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        """Return the dictionary at (delayed) coordinates: 1, the coordinates, then what the lift adds."""
        parts = [torch.ones_like(x[:, :1]), x]
        if self.lift == "polynomial":
            for degree in range(2, self.degree + 1):
                parent, factor = self.get_buffer(f"parent_{degree}"), self.get_buffer(f"factor_{degree}")
                parts.append(parts[-1].index_select(1, parent) * x.index_select(1, factor))
        if self.lift == "rbf":
            # The faster way by inner products loses the digits of small distances.
            far = torch.cdist(x, self.centre.to(x.dtype), compute_mode="donot_use_mm_for_euclid_dist")
            parts.append((-far / self.width).exp())
        if self.lift == "learned":
            parts.append(((self.features(x.float()) - self.feature_shift) / self.feature_scale).to(x.dtype))
        return torch.cat(parts, dim=1)

    def driven(self, psi: Float[Tensor, "b n"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b r"]:
        """Return what `advance` multiplies: the lifted vector and the scaled inputs, or their products."""
        u = action / self.action_scale
        if self.control == "linear":
            return torch.cat([psi, u], dim=1)
        return torch.cat([psi, (u[:, :, None] * psi[:, None, :]).flatten(1)], dim=1)

    def linear_system(self) -> "LinearSystem":
        """Return the model as matrices, for controllers such as `learneddyn.planners.LinearMPC`.

        They are a copy, lift included: neither a change of them nor another fit of the model touches the other.

        Raises:
            ValueError: the model has not been fitted, its inputs are not linear, or it looks at delayed observations.
        """
        self._require_fitted()
        if self.control != "linear" or self.delays > 1:
            raise ValueError(
                f"a linear system needs control='linear' and delays=1, got {self.control!r} and {self.delays}"
            )
        n, d = self.advance.shape[1], len(self.shift)
        readout = torch.zeros(n, d, dtype=torch.float64, device=self.advance.device)
        readout[0] = self.shift
        readout[1 : 1 + d] = self.scale.double().diag()
        inputs = self.advance[n:] / self.action_scale[:, None]
        kept = copy.deepcopy(self)
        return LinearSystem(
            self.advance[:n].clone(), inputs, readout, lambda obs: kept.lifted(kept.coordinates(obs.double()))
        )

    @torch.no_grad()
    def lifted_pairs(self, data: Transitions) -> Iterator[tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]]:
        """Yield the lifted rows before a step and after it, the inputs' share taken out of the latter, in float64.

        This is what spectra are computed from; they belong to the operator with zero input. Blocks of at most 2^22
        numbers: a long log is never lifted as a whole.

        Raises:
            ValueError: the model has not been fitted.
        """
        self._require_fitted()
        for psi, psi_next, driven, _ in self._lifted_blocks(data, torch.ones_like(data.terminated)):
            n = psi.shape[1]
            yield psi, psi_next - driven[:, n:] @ self.advance[n:]

    def _lifted_blocks(
        self, data: Transitions, rows: Bool[Tensor, " n"]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield the marked rows in float64: lifted before and after the step, driven, and their rewards."""
        before, after = (part[rows] for part in self._windows(data))
        columns = (before, after, data.action[rows].double(), data.reward[rows, None].double())
        for x, then, action, reward in zip(*(c.split(self._block_rows()) for c in columns), strict=True):
            psi = self.lifted(x)
            yield psi, self.lifted(then), self.driven(psi, action), reward

    def _block_rows(self) -> int:
        return max(1, _BLOCK // (len(self.advance) + self.advance.shape[1] + 1))

    def _encoded(self, obs: Tensor) -> Tensor:
        if not self.angles:
            return obs
        angle = obs[:, self.angles]
        return torch.cat([obs[:, self._plain], angle.cos(), angle.sin()], dim=1)

    def _decoded(self, x: Float[Tensor, "b d"], obs: Float[Tensor, "b o"]) -> Float[Tensor, "b o"]:
        """Return observations; angles are continued from those of ``obs``, pairs are brought to the unit circle."""
        encoded = x * self.scale + self.shift
        if not self.angles:
            out = encoded
        else:
            k, angle = len(self.angles), obs[:, self.angles]
            turned = torch.atan2(encoded[:, -k:], encoded[:, -2 * k : -k]) - angle
            out = torch.empty_like(obs)
            out[:, self._plain] = encoded[:, : -2 * k]
            out[:, self.angles] = angle + torch.atan2(turned.sin(), turned.cos())
        for pair in self.pairs:
            circle = out.index_select(1, pair)
            out = out.index_copy(1, pair, circle / circle.norm(dim=1, keepdim=True).clamp_min(1e-6))
        return out

    def begin(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b m"] | None:
        """Return the memory of an episode that starts at ``obs``, as if it had long been there; None: none is kept."""
        now = self.coordinates(obs)
        if not self.relift:
            return self.lifted(now)
        return now.repeat(1, self.delays - 1) if self.delays > 1 else None

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        now = self.coordinates(obs)
        if memory is None:
            memory = self.begin(obs)
        if self.relift:
            past = now.new_empty(len(now), 0) if memory is None else memory
            x = torch.cat([now, past], dim=1)
            psi, after = self.lifted(x), x[:, : past.shape[1]] if self.delays > 1 else None
        else:
            assert memory is not None
            psi, after = self._seen(memory, now, obs), None
        driven = self.driven(psi, action)
        psi_next = driven @ self.advance.to(driven.dtype)
        mean = self._decoded(psi_next[:, 1 : 1 + now.shape[1]], obs)
        if self.learn_reward:
            mean = torch.cat([mean, driven @ self.reward_readout.to(driven.dtype)], dim=1)
        return Answer(mean[None], after if self.relift else psi_next)

    def _seen(
        self, memory: Float[Tensor, "b n"], now: Float[Tensor, "b d"], obs: Float[Tensor, "b o"]
    ) -> Float[Tensor, "b n"]:
        """Return the lifted vector that goes on where the observation is its own; any other one is lifted anew."""
        said = self.coordinates(self._decoded(memory[:, 1 : 1 + now.shape[1]], obs))
        own = (said - now).abs().amax(dim=1, keepdim=True) <= _OWN
        return torch.where(own, memory, self.lifted(now))

    def _windows(self, data: Transitions) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
        """Return delayed coordinates before and after every row, in float64; delays stay within unbroken stretches."""
        now, then = (self.coordinates(part.double()) for part in (data.obs, data.next_obs))
        row = torch.arange(len(data), device=data.device)
        first = row - elapsed(data)
        history = [now[torch.maximum(row - lag, first)] for lag in range(self.delays)]
        return torch.cat(history, dim=1), torch.cat([then, *history[:-1]], dim=1)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        encoded = self._encoded(data.obs[rows])
        self.shift.copy_(encoded.mean(dim=0))
        self.scale.copy_(spread(encoded))
        action = data.action[rows]
        self.action_scale.copy_(or_one(action.abs().amax(dim=0), action))
        history = [{"epoch": 1.0}]
        if self.lift == "rbf":
            self._place_centres(self._windows(data)[0][rows], rng)
        if self.lift == "learned":
            before, after = (part[rows].float() for part in self._windows(data))
            history = self._train_lift(before, after, data.action[rows], rng, progress)
        with torch.no_grad():
            blocks = self._lifted_blocks(data, rows)
            r = triangle(torch.cat([driven, after, reward], dim=1) for _, after, driven, reward in blocks)
            solution = solve(r, len(self.advance), self.rcond)
            self.advance.copy_(solution[:, :-1])
            self.reward_readout.copy_(solution[:, -1:])
        return history

    def _place_centres(self, x: Float[Tensor, "n d"], rng: torch.Generator) -> None:
        """Pick data rows as k-means++ does: the next one with probability proportional to its squared distance."""
        if len(x) < self.centres:
            raise DataError(f"{self.centres} centres need as many training rows, got {len(x)}: lower centres")
        chosen = torch.randint(len(x), (1,), generator=rng, device=x.device)
        distance = (x - x[chosen]).square().sum(dim=1)
        for _ in range(self.centres - 1):
            new = torch.multinomial(distance.clamp_min(1e-12), 1, generator=rng)
            chosen = torch.cat([chosen, new])
            distance = torch.minimum(distance, (x - x[new]).square().sum(dim=1))
        self.centre.copy_(x[chosen])
        self.width.copy_((x - x.mean(dim=0)).norm(dim=1).mean().clamp_min(1e-6))

    def _train_lift(
        self, before: Tensor, after: Tensor, action: Tensor, rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        """Train the MLP on the error of the step when the matrix is the batch's own least-squares solution.

        Features are standardised within the batch, otherwise the smallest error would be features that vanish.
        """
        for layer in self.features:
            if isinstance(layer, nn.Linear):
                bound = 1.0 / layer.in_features**0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=rng)
                nn.init.zeros_(layer.bias)
        optimizer = torch.optim.Adam(self.features.parameters(), self.learning_rate)
        size = min(len(before), max(512, 4 * len(self.advance)))
        history: list[dict[str, float]] = []
        bar = tqdm(range(self.epochs), desc="lift", disable=not progress)
        for epoch in bar:
            losses = []
            for batch in torch.randperm(len(before), generator=rng, device=before.device).split(size):
                if len(batch) < size:
                    continue
                raw = self.features(before[batch])
                self.feature_shift.copy_(raw.detach().mean(dim=0))
                self.feature_scale.copy_(or_one(raw.detach().std(dim=0), raw.detach()))
                psi, psi_next = self.lifted(before[batch]), self.lifted(after[batch])
                driven = self.driven(psi, action[batch])
                floor = _RIDGE**0.5 * len(batch) ** 0.5 * torch.eye(driven.shape[1], device=driven.device)
                # PyTorch's lstsq gives other last digits from call to call: fits would not repeat.
                q, r = torch.linalg.qr(torch.cat([driven, floor]))
                solution = torch.linalg.solve_triangular(r, q[: len(batch)].T @ psi_next, upper=True)
                loss = (driven @ solution - psi_next).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            mean = float(torch.stack(losses).mean())
            history.append({"epoch": epoch + 1.0, "loss": mean})
            bar.set_postfix(loss=mean)
        with torch.no_grad():
            raw = self.features(before)
            self.feature_shift.copy_(raw.mean(dim=0))
            self.feature_scale.copy_(or_one(raw.std(dim=0), raw))
        return history

    # Declared for type checkers; `_build_members` registers them.
    pairs: Tensor
    shift: Tensor
    scale: Tensor
    action_scale: Tensor
    advance: Tensor
    reward_readout: Tensor
    centre: Tensor
    width: Tensor
    feature_shift: Tensor
    feature_scale: Tensor


def triangle(blocks: Iterable[Float[Tensor, "_ k"]]) -> Float[Tensor, "_ k"]:
    """Return the R of the QR decomposition of stacked blocks of rows, which has the same inner products of columns.

    Only one block and R are ever held, and no Q; the condition number is not squared, as normal equations would.

    Raises:
        ValueError: there is no block.
    """
    r: Tensor | None = None
    for block in blocks:
        r = torch.linalg.qr(block if r is None else torch.cat([r, block]), mode="r").R
    if r is None:
        raise ValueError("a QR decomposition needs at least one block of rows")
    return r


def solve(r: Float[Tensor, "_ k"], p: int, rcond: float) -> Float[Tensor, "_ q"]:
    """Return the minimum-norm least-squares map of the first ``p`` columns to the others, from their `triangle`.

    Singular values below ``rcond`` times the largest are left out.
    """
    top = r[:p]
    return torch.linalg.pinv(top[:, :p], rtol=rcond) @ top[:, p:]
