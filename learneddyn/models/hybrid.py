"""Hybrid: an imperfect physics prior plus a residual that is discovered (sparse) or learned (dense).

Source of the sparse form: Mojgani, Chattopadhyay, Hassanzadeh, "Discovery of interpretable structural model errors by
combining Bayesian sparse regression and data assimilation" (MEDIDA, 2022). The regression is the relevance vector
machine's evidence maximisation as scikit-learn's ARDRegression does it (Tipping, "Sparse Bayesian learning and the
relevance vector machine", 2001).
"""

import importlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import Transitions
from learneddyn.models.angles import apart
from learneddyn.models.assimilation import enkf_increments
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import EXACT, spread
from learneddyn.models.terms import evaluate_terms
from learneddyn.spaces import Spaces

_ROUNDING = 1e-30
"""Least variance of a weight, in units of the target: exact data leave none, and certainty is a quotient."""

_RIDGE = 1e-3
"""On the correlations of the MLP's inputs, so that redundant columns can be inverted."""


def persistence(obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b o"]:
    """Return the observation as it was: the prior that knows nothing."""
    return obs


class Hybrid(AbstractRegression):
    """next obs = prior(obs, action) + dt * residual, the residual on the columns that the prior may get wrong.

    The increments (next obs - prior) / dt are regressed on candidate terms (see `learneddyn.models.terms`), which are
    evaluated midway through the step, where the discretisation error is of second order; an answer finds the middle by
    one repetition.
    Terms that automatic relevance determination keeps, that are ``certainty`` standard deviations away from zero, and
    whose share of the increment exceeds ``keep`` of the largest, make the residual; `equations` prints it with error
    bars. With ``observation_noise`` the increments come from an ensemble Kalman filter. ``residual="neural"`` puts a
    small zero-initialised MLP in place of the terms; far from the data, where only the prior knows anything, its
    residual fades (``fade``, ours).

    Deviation: the source prunes by a threshold on the terms' precision alone. The evidence rises with every term that
    is more than one standard deviation away from zero, so that noise brings in about a third of the terms that are not
    there, and each takes from those that it resembles. Terms are therefore dropped one at a time, the least certain
    first, and the others fitted anew; ``certainty=0`` leaves what the evidence keeps.

    Args:
        prior: dotted path of a function (obs [b o], action [b a], **prior_arguments) -> next obs [b o], in torch;
            "learneddyn.world.prior.simulated" is MuJoCo's own simulator with other parameters.
        prior_arguments: its keyword arguments, JSON values.
        dt: seconds a step lasts; coefficients are per second.
        angles: observation columns in radians: their increments and middles are taken the short way round, so that a
            prior and a log may wrap them or not, and the MLP sees them as cosine and sine.
        columns: observation columns the prior may get wrong; None for all. Kinematic ones (angle' = velocity) belong
            left out: their discretisation error would be explained by junk terms.
        residual: "sparse" or "neural".
        terms: candidates; None for 1, every column (of an angle, sine and cosine), every action.
        keep: share of the largest term's contribution below which a term is dropped.
        certainty: posterior standard deviations from zero below which a term is dropped.
        observation_noise: standard deviation per observation column, or one for all; None for exact observations.
        hidden: widths of the MLP.
        epochs: of training it.
        learning_rate: of Adam.
        fade: share of the training rows, ordered by the Mahalanobis distance of the MLP's inputs from their mean, up to
            which the neural residual counts in full; beyond, it falls with the squared distance. Columns that are
            constant in the training data do not count, since nothing tells how far along them is far. None: never.
        learn_reward: add a linear reward head on the same terms (sparse) or an output of the MLP (neural).
        holdout_ratio: share of the rows that measure the noise.

    Raises:
        ValueError: an argument outside its range, or a prior that cannot be imported.
    """

    num_members = 1

    def __init__(
        self,
        prior: str = "learneddyn.models.hybrid.persistence",
        prior_arguments: dict[str, Any] | None = None,
        dt: float = 1.0,
        angles: Sequence[int] = (),
        columns: Sequence[int] | None = None,
        residual: str = "sparse",
        terms: Sequence[str] | None = None,
        keep: float = 0.02,
        certainty: float = 3.0,
        observation_noise: Sequence[float] | float | None = None,
        hidden: Sequence[int] = (64, 64),
        epochs: int = 50,
        learning_rate: float = 3e-3,
        fade: float | None = 0.95,
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("dt", dt > 0, dt, "above 0"),
            ("residual", residual in ("sparse", "neural"), residual, "'sparse' or 'neural'"),
            ("keep", 0 <= keep < 1, keep, "between 0 and 1"),
            ("certainty", certainty >= 0, certainty, "at least 0"),
            ("terms", terms is None or len(terms) > 0, terms, "None or at least one term"),
            ("fade", fade is None or 0 < fade <= 1, fade, "None, or above 0 and at most 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.prior, self.prior_arguments, self.dt = prior, prior_arguments or {}, dt
        self.angles, self.columns = list(angles), None if columns is None else list(columns)
        self.residual, self.terms, self.keep = residual, None if terms is None else list(terms), keep
        self.certainty, self.fade = certainty, fade
        self.observation_noise, self.hidden = observation_noise, list(hidden)
        self.epochs, self.learning_rate = epochs, learning_rate
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio
        self._prior = dotted("prior", prior)

    def _build_members(self, spaces: Spaces) -> None:
        o, a = spaces.obs_dim, spaces.action_dim
        free = list(range(o)) if self.columns is None else self.columns
        if not free or any(not 0 <= column < o for column in free):
            raise ValueError(f"columns must name observation columns 0 to {o - 1}, got {self.columns}")
        self._free = free
        self.register_buffer("free", torch.tensor(free), persistent=False)
        if any(not 0 <= column < o for column in self.angles):
            raise ValueError(f"angles must name observation columns 0 to {o - 1}, got {self.angles}")
        own = [f"{call}(x{i})" if call else f"x{i}" for i in range(o) for call in self._calls(i)]
        self._candidates = self.terms or ["1", *own, *(f"u{i}" for i in range(a))]
        evaluate_terms(self._candidates, torch.zeros(1, o), torch.zeros(1, a))
        outputs = len(free) + self.learn_reward
        if self.residual == "sparse":
            self.register_buffer("coefficients", torch.zeros(len(self._candidates), outputs))
            self.register_buffer("deviations", torch.zeros(len(self._candidates), outputs))
            return
        seen = len(own) + a
        layers: list[nn.Module] = []
        for width, wider in pairwise([seen, *self.hidden, outputs]):
            # `_train` draws the weights from the fit's own generator.
            layers += [nn.utils.skip_init(nn.Linear, width, wider), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])
        self.register_buffer("shift", torch.zeros(seen))
        self.register_buffer("scale", torch.ones(seen))
        self.register_buffer("output_scale", torch.ones(outputs))
        self.register_buffer("precision", torch.eye(seen))
        self.register_buffer("border", torch.ones(()))

    def equations(self, digits: int = 4) -> list[str]:
        """Return the residual of every free column, and of the reward, as text: coefficient +- standard deviation.

        Raises:
            ValueError: not fitted, or the residual is a network.
        """
        self._require_fitted()
        if self.residual != "sparse":
            raise ValueError("a neural residual has no equations: fit with residual='sparse'")
        heads = [f"residual of x{i}" for i in self._free] + ["reward"] * self.learn_reward
        lines = []
        for head, column, deviation in zip(heads, self.coefficients.T, self.deviations.T, strict=True):
            parts = [
                f"({c:.{digits}g} +- {s:.1g}) {term}"
                for c, s, term in zip(column.tolist(), deviation.tolist(), self._candidates, strict=True)
                if c
            ]
            lines.append(f"{head} = {' + '.join(parts) or '0'}")
        return lines

    def _calls(self, column: int) -> tuple[str, ...]:
        """Return the functions of an observation column that the residual is made of; "" is the column itself."""
        return ("sin", "cos") if column in self.angles else ("",)

    def _midway(self, obs: Float[Tensor, "b o"], after: Float[Tensor, "b o"]) -> Float[Tensor, "b o"]:
        return obs + 0.5 * apart(after, obs, self.angles)

    def _inputs(self, midway: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b i"]:
        """Return what the MLP sees: columns, of angles cosine and sine, actions."""
        plain = [column for column in range(midway.shape[1]) if column not in self.angles]
        angle = midway[:, self.angles]
        return torch.cat([midway[:, plain], angle.cos(), angle.sin(), action], dim=1)

    def _answered(self, midway: Tensor, action: Tensor) -> Float[Tensor, "b q"]:
        """Return the residual of the free columns, then the reward."""
        if self.residual == "sparse":
            return evaluate_terms(self._candidates, midway, action) @ self.coefficients
        x = (self._inputs(midway, action) - self.shift) / self.scale
        found = self.network(x) * self.output_scale
        if self.fade is None:
            return found
        # A reward is no correction of a prior's: it does not fade.
        full = torch.ones_like(found[:, len(self._free) :])
        near = (self.border / torch.maximum(self._distance(x), self.border))[:, None]
        return found * torch.cat([near.expand(-1, len(self._free)), full], dim=1)

    def _distance(self, x: Float[Tensor, "b i"]) -> Float[Tensor, " b"]:
        """Return the squared Mahalanobis distance of standardised inputs from the mean of the training rows."""
        return ((x @ self.precision) * x).sum(dim=1)

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        before = mean = self._prior(obs, action, **self.prior_arguments)
        for _ in range(2):
            found = self._answered(self._midway(obs, mean), action)
            mean = before.index_add(1, self.free, self.dt * found[:, : len(self._free)])
        if self.learn_reward:
            mean = torch.cat([mean, found[:, -1:]], dim=1)
        return Answer(mean[None])

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        data, exact = data[rows], self.observation_noise is None
        with torch.no_grad():
            before = self._prior(data.obs, data.action, **self.prior_arguments)
            error = apart(data.next_obs, before, self.angles) if exact else self._filtered(data, rng)
            target = error[:, self._free] / self.dt
            least = EXACT * spread(data.next_obs)[self._free] / self.dt
            if self.learn_reward:
                target = torch.cat([target, data.reward[:, None]], dim=1)
                least = torch.cat([least, EXACT * spread(data.reward[:, None])])
        midway = self._midway(data.obs, data.next_obs)
        if self.residual == "sparse":
            self._regress(evaluate_terms(self._candidates, midway.double(), data.action.double()), target, least)
            return [{"epoch": 1.0, "active_terms": float((self.coefficients != 0).sum())}]
        return self._train(self._inputs(midway, data.action), target, least, rng, progress)

    def _filtered(self, data: Transitions, rng: torch.Generator) -> Float[Tensor, "n o"]:
        noise = torch.as_tensor(self.observation_noise, device=data.device).expand(data.obs.shape[1])

        def step(obs: Tensor, action: Tensor) -> Tensor:
            return self._prior(obs, action, **self.prior_arguments)

        return enkf_increments(step, data.obs, data.action, data.next_obs, noise, rng, angles=self.angles)

    def _regress(self, theta: Float[Tensor, "n p"], target: Float[Tensor, "n q"], least: Float[Tensor, " q"]) -> None:
        """Fit every output by automatic relevance determination on columns of unit scale.

        A target whose root mean square is not above ``least`` is the rounding of a prior that lacks nothing.
        """
        width = theta.square().mean(dim=0).sqrt()
        usable = (width > 0).nonzero().flatten()
        self.coefficients.zero_()
        self.deviations.zero_()
        for output in range(target.shape[1]):
            y = target[:, output].double()
            size = y.square().mean().sqrt()
            if size <= least[output]:
                continue
            terms, weight, deviation = self._select(theta / width.clamp_min(1e-300), y / size, usable)
            self.coefficients[terms, output] = (weight * size / width[terms]).float()
            self.deviations[terms, output] = (deviation * size / width[terms]).float()

    def _select(
        self, x: Float[Tensor, "n p"], y: Float[Tensor, " n"], terms: Int[Tensor, " _"]
    ) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, " k"]]:
        """Return the terms that stay, their weights, and the weights' standard deviations."""
        weight = deviation = x.new_zeros(0)
        while len(terms):
            fitted = _ard().fit(x[:, terms].cpu().numpy(), y.cpu().numpy())
            alive = torch.as_tensor(fitted.lambda_ < fitted.threshold_lambda, device=x.device)
            weight = torch.as_tensor(fitted.coef_, device=x.device)[alive]
            deviation = torch.as_tensor(fitted.sigma_, device=x.device).diagonal().clamp_min(_ROUNDING).sqrt()
            terms, share = terms[alive], weight.abs()
            weak = (share <= self.keep * max(share.tolist(), default=0.0)) | (share < self.certainty * deviation)
            if not bool(weak.any()):
                break
            stays = (
                torch.arange(len(terms), device=x.device) != torch.where(weak, share / deviation, torch.inf).argmin()
            )
            terms, weight, deviation = terms[stays], weight[stays], deviation[stays]
        return terms, weight, deviation

    def _train(
        self, inputs: Tensor, target: Tensor, least: Float[Tensor, " q"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        self.shift.copy_(inputs.mean(dim=0))
        self.scale.copy_(spread(inputs))
        self.output_scale.copy_(torch.maximum(target.square().mean(dim=0).sqrt(), least))
        layers = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        for layer in layers:
            bound = 1.0 / layer.in_features**0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=rng)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(layers[-1].weight)
        x, y = (inputs - self.shift) / self.scale, target / self.output_scale
        if self.fade is not None:
            varies = (x.std(dim=0, correction=0) > 0.5).to(x)  # 1 by the scale, but of constant columns, which keep 0
            ridge = _RIDGE * torch.eye(x.shape[1], device=x.device)
            seen = x * varies
            self.precision.copy_(torch.linalg.inv(seen.T @ seen / len(x) + ridge) * varies.outer(varies))
            self.border.copy_(self._distance(x).quantile(self.fade).clamp_min(_RIDGE))
        optimizer = torch.optim.Adam(self.network.parameters(), self.learning_rate)
        history: list[dict[str, float]] = []
        for epoch in tqdm(range(self.epochs), desc="residual", disable=not progress):
            losses = []
            for batch in torch.randperm(len(x), generator=rng, device=x.device).split(256):
                loss = (self.network(x[batch]) - y[batch]).square().mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            history.append({"epoch": epoch + 1.0, "loss": float(torch.stack(losses).mean())})
        return history

    # Declared for type checkers; `_build_members` registers them.
    free: Tensor
    coefficients: Tensor
    deviations: Tensor
    shift: Tensor
    scale: Tensor
    output_scale: Tensor
    precision: Tensor
    border: Tensor


def dotted(argument: str, path: str) -> Callable[..., Tensor]:
    """Return the function at a dotted path.

    Raises:
        ValueError: there is none (names the argument).
    """
    module, _, name = path.rpartition(".")
    try:
        found: Callable[..., Tensor] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{argument} must be the dotted path of a function, got {path!r} ({error})") from error
    return found


def _ard() -> Any:
    """Return scikit-learn's regression.

    Raises:
        ImportError: scikit-learn is not installed (names the extra).
    """
    try:
        from sklearn.linear_model import ARDRegression
    except ImportError as error:
        raise ImportError("a sparse Hybrid needs scikit-learn: pip install 'learneddyn[models]'") from error
    return ARDRegression(max_iter=500, fit_intercept=False)
