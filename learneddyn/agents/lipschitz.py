"""Critics that vary slowly: a cap on the layers' spectral norms, noise chosen by an adversary, a gradient penalty.

Source: Zheng, Wang, Xu, Huang, "Is Model Ensemble Necessary? Model-based RL via a Single Model with Lipschitz
Regularized Value Function", 2023. With |V(x) - V(y)| <= L |x - y| the error of a model p̂ moves the Bellman target by

    |E_p̂ V(s') - E_p V(s')| <= L W1(p̂(.|s, a), p(.|s, a)),        |V̂ - V| <= γ L W1 / (1 - γ) at the fixed point,

so one model and a small L may do what an ensemble does. The paper's text was not at hand when this was written: the
forms below are the standard ones of its two variants and an extension of ours, and all weights are to be tuned.

    SpectralCap      every layer's spectral norm at most β, or a price λ Σ (σ - β)₊² on what is above
    AdversarialNoise λ mean (Q(s + δ, a) - Q(s, a))² at the worst δ of a box
    GradientPenalty  λ mean |∇_s Q|²                                                  (ours)

A regulariser is an option of `learneddyn.agents.FastSAC`: ``critic_regulariser=SpectralCap(5.0)``. A wider critic layer
is stacked over the twin critics, ``weight [n, out, in]`` and ``bias [n, 1, out]``.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from stable_baselines3 import SAC
from torch import Tensor

from learneddyn.core import Json, generator

Layer = tuple[Float[Tensor, "n _ _"], Float[Tensor, "n 1 _"]]
"""Weight ``[n, out, in]`` and bias ``[n, 1, out]`` of one layer of n critics."""

FIRST_ITERATIONS = 20
"""Power iterations from a random start, before one an update is enough."""


class CriticRegulariser:
    """What a critic's update does beside the Bellman error: a loss, a constraint on the weights, or both.

    Subclasses are dataclasses of JSON values. Every model works on a copy of its own, so one object may be given to
    several.
    """

    def loss(
        self, layers: Sequence[Layer], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, ""] | None:
        """Return what to add to the critics' loss, differentiable in the layers; None: nothing."""
        return None

    def constrain(self, layers: Sequence[Layer]) -> None:
        """Bring the weights, in place, to where they may be; called after every step of the critics."""

    def state(self) -> list[Any]:
        """Return what `constrain` and `loss` remember, as JSON."""
        return []

    def restore(self, state: list[Any]) -> None:
        """Take up what `state` returned."""

    def card(self) -> Json:
        """Return class, settings and state as JSON."""
        config = {item.name: getattr(self, item.name) for item in fields(self) if item.init}  # type: ignore[arg-type]
        kind = type(self)
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "config": config, "state": self.state()}

    @staticmethod
    def from_card(card: Json) -> "CriticRegulariser":
        """Build what a `card` describes; without a state it is a fresh one.

        Raises:
            ValueError: the card names no regulariser that can be imported, or arguments that it does not take.
        """
        name = str(card.get("class"))
        module, _, kind_name = name.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), kind_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"cannot import the critic regulariser {name!r}: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, CriticRegulariser)):
            raise ValueError(f"{name} is no CriticRegulariser")
        try:
            regulariser = kind(**card.get("config", {}))
        except TypeError as error:
            raise ValueError(f"{name} does not take the arguments {card.get('config')}: {error}") from error
        regulariser.restore(card.get("state", []))
        return regulariser


@dataclass
class SpectralCap(CriticRegulariser):
    """Hold every layer's spectral norm σ at most ``cap``: the critics' Lipschitz constant is at most its product.

    With ``weight=None`` every update divides each W by max(1, σ/cap), σ by one power iteration from the singular vector
    of the update before. This projects the weights themselves, where the usual parametrisation W / max(1, σ/cap) keeps
    raw weights and differentiates through the quotient. Files then hold the critics as they are used, Stable-Baselines3
    reads them, and the targets, averages of capped weights, are capped with no vectors of their own. σ is estimated
    from below, so a norm may exceed the cap by the estimate's error (below 2 % in the tests).

    With a ``weight`` the price ``weight Σ max(0, σ - cap)²`` over layers and critics is added to the loss instead.

    Args:
        cap: β, for all layers, or one per layer; ``inf`` leaves a layer free. A critic whose values span v over states
            at a distance d needs a product of at least v / d; with a discount of 0.99 that is often hundreds.
        weight: λ of the price; None: a hard cap.

    Raises:
        ValueError: a cap or weight that is not positive.
    """

    cap: float | list[float]
    weight: float | None = None
    _vectors: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for cap in self.cap if isinstance(self.cap, list) else [self.cap]:
            _positive("cap", cap)
        if self.weight is not None:
            _positive("weight", self.weight)

    def loss(
        self, layers: Sequence[Layer], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, ""] | None:
        """Return the price of what is above the cap, or None where the cap is hard."""
        if self.weight is None:
            return None
        excess = [
            (norm - cap).relu()
            for norm, cap in zip(self.norms(layers), self._caps(layers), strict=True)
            if cap < math.inf
        ]
        return self.weight * torch.stack(excess).square().sum()

    def constrain(self, layers: Sequence[Layer]) -> None:
        """Divide each weight by max(1, σ/cap), where the cap is hard."""
        if self.weight is not None:
            return
        norms = self.norms(layers)
        for (weight, _), norm, cap in zip(layers, norms, self._caps(layers), strict=True):
            weight.mul_((cap / norm).clamp_max(1)[:, None, None])

    def norms(self, layers: Sequence[Layer]) -> list[Float[Tensor, " n"]]:
        """Return the spectral norms of every layer after one more power iteration, differentiable in the weights.

        The first call makes `FIRST_ITERATIONS` from vectors that depend on nothing else.
        """
        rounds = 1
        if not self._vectors:
            rounds = FIRST_ITERATIONS
            rng = generator(0)
            self._vectors = [torch.randn(*weight.shape[:2], 1, generator=rng) for weight, _ in layers]
        norms = []
        for index, (weight, _) in enumerate(layers):
            fixed, left = weight.detach(), self._vectors[index].to(weight)
            for _ in range(rounds):
                right = torch.nn.functional.normalize(fixed.mT @ left, dim=1)
                left = torch.nn.functional.normalize(fixed @ right, dim=1)
            self._vectors[index] = left
            norms.append((left.mT @ weight @ right)[:, 0, 0])
        return norms

    def state(self) -> list[Any]:
        """Return the singular vectors found so far."""
        return [vector.tolist() for vector in self._vectors]

    def restore(self, state: list[Any]) -> None:
        """Go on from these singular vectors."""
        self._vectors = [torch.tensor(vector) for vector in state]

    def _caps(self, layers: Sequence[Layer]) -> list[float]:
        caps = self.cap if isinstance(self.cap, list) else list(repeat(self.cap, len(layers)))
        if len(caps) != len(layers):
            raise ValueError(f"cap must be one number or one per layer of the critic ({len(layers)}), got {self.cap}")
        return caps


@dataclass
class AdversarialNoise(CriticRegulariser):
    """Make the critics agree with themselves under the worst noise on the observation.

    Adds ``weight Σ_i mean_b (Q_i(s + δ, a) - q)²``, where q = Q_i(s, a) has no gradient. δ is the adversary's: from a
    uniform draw of the box it goes up the gradient's sign ``steps`` times by ``2 radius / steps``, back into the box
    after each. One step is the fast gradient sign method (Goodfellow, Shlens, Szegedy, "Explaining and Harnessing
    Adversarial Examples", 2015) and ends in a corner of the box, more are projected gradient descent (Madry et al.,
    "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018). The usual step of ``radius / steps`` could
    not cross the box.

    Args:
        weight: λ.
        radius: half the side of the box, in standard deviations of each observation column in the batch at hand.
        steps: of the adversary.

    Raises:
        ValueError: a weight or radius that is not positive, or fewer than one step.
    """

    weight: float
    radius: float
    steps: int = 1

    def __post_init__(self) -> None:
        _positive("weight", self.weight)
        _positive("radius", self.radius)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def loss(
        self, layers: Sequence[Layer], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, ""]:
        """Return the weighted square of how far the worst noise moves the critics."""
        noise = self.noise(layers, obs, action)
        fixed = q_values([(weight.detach(), bias.detach()) for weight, bias in layers], obs, action)
        moved = q_values(layers, obs + noise, action) - fixed
        return self.weight * moved.square().mean(1).sum()

    def noise(
        self, layers: Sequence[Layer], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, "n b o"]:
        """Return δ, the adversary's noise for every critic and row, in units of the observation."""
        layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
        fixed, box = q_values(layers, obs, action), self.radius * _scale(obs)
        noise = (2 * torch.rand(len(fixed), *obs.shape, device=obs.device) - 1) * box
        for _ in range(self.steps):
            noise.requires_grad_()
            with torch.enable_grad():
                moved = (q_values(layers, obs + noise, action) - fixed).square().sum()
                uphill = torch.autograd.grad(moved, noise)[0].sign()
            noise = (noise.detach() + 2 / self.steps * box * uphill).clamp(-box, box)
        return noise


@dataclass
class GradientPenalty(CriticRegulariser):
    """Add ``weight Σ_i mean_b |∇_s Q_i(s, a)|²``, s in standard deviations of the batch at hand. An extension of ours.

    Args:
        weight: λ.

    Raises:
        ValueError: a weight that is not positive.
    """

    weight: float

    def __post_init__(self) -> None:
        _positive("weight", self.weight)

    def loss(
        self, layers: Sequence[Layer], obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]
    ) -> Float[Tensor, ""]:
        """Return the weighted square of the critics' gradients with respect to the observation."""
        x = obs.expand(len(layers[0][0]), -1, -1).clone().requires_grad_()
        slope = torch.autograd.grad(q_values(layers, x, action).sum(), x, create_graph=True)[0]
        return self.weight * (slope * _scale(obs)).square().sum(2).mean(1).sum()


def q_values(
    layers: Sequence[Layer], obs: Float[Tensor, "*n b o"], action: Float[Tensor, "b a"]
) -> Float[Tensor, "m b"]:
    """Return the values of m ReLU critics, for one batch of observations or one batch per critic."""
    count = len(layers[0][0])
    x = torch.cat((obs.expand(count, -1, -1), action.expand(count, -1, -1)), dim=2)
    for index, (weight, bias) in enumerate(layers):
        x = torch.baddbmm(bias, x.relu() if index else x, weight.mT)
    return x[:, :, 0]


def value_slopes(model: SAC, obs: Float[Tensor, "b o"]) -> Float[Tensor, " b"]:
    """Return |∇V(s)| in every row, V(s) = min_i Q_i(s, π(s)) with the policy's deterministic action.

    The gradient is taken in standard deviations of the rows' columns; the largest row is a lower bound of V's Lipschitz
    constant.
    """
    x = obs.clone().requires_grad_()
    with torch.enable_grad():
        action = model.actor(x, deterministic=True)
        value = torch.cat([net(torch.cat((x, action), dim=1)) for net in model.critic.q_networks], dim=1).amin(1)
        slope = torch.autograd.grad(value.sum(), x)[0]
    return torch.linalg.vector_norm(slope * _scale(obs), dim=1)


def _scale(obs: Float[Tensor, "b o"]) -> Float[Tensor, " o"]:
    return obs.std(dim=0, correction=0)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
