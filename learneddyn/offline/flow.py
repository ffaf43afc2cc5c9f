"""Average velocity: a flow that turns noise into an action in one step.

Noise ε at time 1 becomes an action a at time 0 along a_t = (1 - t) a + t ε, with velocity v = ε - a. The average
velocity between two times, u(a_t, r, t) = 1/(t - r) ∫_r^t v dτ, jumps over all of it: a = ε - u(ε, 0, 1). It obeys

    u = v - (t - r) d/dt u,     d/dt u = ∂_a u · v + ∂_t u,

and the derivative along (v, 0, 1) is one forward-mode pass. With r = t this is plain flow matching.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.offline.generative import GenerativeActor

LOGIT_MEAN = -0.4
"""Times are sigmoids of normal draws with this mean and deviation 1."""

AverageVelocity = Callable[
    [Float[Tensor, "b a"], Float[Tensor, "b 1"], Float[Tensor, "b 1"]],
    Float[Tensor, "b a"],
]
"""u(a_t, r, t)."""


def mean_flow(
    net: AverageVelocity,
    action: Float[Tensor, "b a"],
    noise: Float[Tensor, "b a"],
    r: Float[Tensor, "b 1"],
    t: Float[Tensor, "b 1"],
) -> tuple[Float[Tensor, "b a"], Float[Tensor, "b a"]]:
    """Return u(a_t, r, t) and its target v - (t - r) d/dt u; no gradient flows through the target.

    Source: Geng, Deng, Bai, Kolter, He, "Mean Flows for One-step Generative Modeling", 2025.
    """
    velocity = noise - action
    at = (1 - t) * action + t * noise
    u, slope = torch.func.jvp(net, (at, r, t), (velocity, torch.zeros_like(r), torch.ones_like(t)))[:2]
    return u, (velocity - (t - r) * slope).detach()


def draw_times(
    rows: int, rng: torch.Generator, *, flow_ratio: float = 0.5, p01: float = 0.0
) -> tuple[Float[Tensor, "{rows} 1"], Float[Tensor, "{rows} 1"]]:
    """Return (r, t) with r ≤ t, two logistic-normal times in order.

    Args:
        rows: pairs.
        rng: its device is that of the times.
        flow_ratio: probability of r = t.
        p01: probability of (0, 1), the pair that acting asks for and that the other draws hardly visit.
    """
    device = rng.device
    pair = (torch.randn(rows, 2, generator=rng, device=device) + LOGIT_MEAN).sigmoid()
    equal, whole = torch.rand(2, rows, 1, generator=rng, device=device)
    t = pair.amax(1, keepdim=True)
    r = torch.where(equal < flow_ratio, t, pair.amin(1, keepdim=True))
    return torch.where(whole < p01, 0.0, r), torch.where(whole < p01, 1.0, t)


class FlowActor(GenerativeActor):
    """Average velocity of the flow from noise to actions; one net evaluation is one action.

    The net reads both times as they are, in [0, 1]: multiplied by 1000, as diffusion models do, ∂_t u is so large that
    the target is noise.
    """

    times = 2
    draws = 1

    def at(self, obs: Float[Tensor, "b o"], noise: Float[Tensor, "d b a"]) -> Float[Tensor, "b a"]:
        """Return ε - u(ε, 0, 1)."""
        return self.integrate(obs, noise)

    def integrate(
        self, obs: Float[Tensor, "b o"], noise: Float[Tensor, "d b a"], steps: int = 1, *, average: bool = True
    ) -> Float[Tensor, "b a"]:
        """Return the action after equal steps from time 1 to 0.

        Each goes along the average velocity u(a_t, r, t), or, as plain flow matching does, along u(a_t, t, t).
        """
        features, action = self.features(obs), noise[0]
        times = torch.linspace(1, 0, steps + 1, device=obs.device).expand(len(obs), -1).split(1, 1)
        for t, r in pairwise(times):
            action = action - (t - r) * self.ask(features, action, r if average else t, t)
        return action

    def imitation(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        rng: torch.Generator,
        *,
        flow_ratio: float = 0.5,
        p01: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return mean |u - target|², summed over action columns; `draw_times` explains the arguments."""
        features = self.features(obs)
        r, t = draw_times(len(obs), rng, flow_ratio=flow_ratio, p01=p01)
        noise = torch.randn(action.shape, generator=rng, device=action.device)
        u, target = mean_flow(lambda at, r, t: self.ask(features, at, r, t), action, noise, r, t)
        return (u - target).square().sum(1).mean()
