"""A kinematic bicycle with noisy inputs: closed-form spread of its pose against Monte Carlo, given and learned."""

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.core import Json, Transitions, generator
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models import KinematicBicycle
from learneddyn.models.kinematic import COVARIANCES, LowLevel, certain, displacement, drive, propagate
from learneddyn.runs import Notify
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.spaces import Spaces

DT, WHEELBASE, STEPS = 0.1, 2.8, 20
DRAWS = 200_000
SETTINGS = 4
"""Random speeds, headings, inputs and noises per seed."""
HEADING_STDS = (0.05, 0.2, 0.5, 1.0)
Z90 = 1.6449
"""A Gaussian's central 90 % lie within as many standard deviations."""


def commanded(action: Float[Tensor, "n 2"]) -> LowLevel:
    """Return what the real vehicle makes of (throttle, wheel), both in [-1, 1]: curved, and noisier when pushed."""
    throttle, wheel = action.unbind(dim=1)
    mean = torch.stack([3 * throttle - throttle.square(), 0.15 * (1.5 * wheel).tanh()], dim=1)
    return LowLevel(mean, torch.stack([0.3 + 0.5 * throttle.abs(), 0.01 + 0.02 * wheel.abs()], dim=1))


def log(episodes: int, steps: int, seed: int) -> Transitions:
    """Return drives of the real vehicle under commands that are held for a while."""
    rng = generator(seed)
    obs = torch.rand(episodes, 4, generator=rng) * torch.tensor([20.0, 20.0, 10.0, 2 * math.pi])
    obs[:, 2] += 5
    action = torch.zeros(episodes, 2)
    columns: tuple[list[Tensor], ...] = ([], [], [])
    for step in range(steps):
        fresh = 2 * torch.rand(episodes, 2, generator=rng) - 1
        change = torch.rand(episodes, 1, generator=rng) < (0.2 if step else 1.0)
        action = torch.where(change, fresh, action)
        inputs = commanded(action)
        chosen = inputs.mean + inputs.std * torch.randn(episodes, 2, generator=rng)
        after = drive(obs, chosen, dt=DT, wheelbase=WHEELBASE)
        for column, value in zip(columns, (obs, action, after), strict=True):
            column.append(value)
        obs = after
    states, actions, successors = (torch.stack(column, dim=1).flatten(0, 1) for column in columns)
    box = gym.spaces.Box
    spaces = Spaces(box(-np.inf, np.inf, (4,), np.float32), box(-1.0, 1.0, (2,), np.float32))
    nothing, episode = torch.zeros(len(states)), torch.arange(episodes).repeat_interleave(steps)
    return Transitions(states, actions, nothing, successors, nothing.bool(), episode, spaces, "bicycle")


def spread(seed: int) -> Json:
    """Return standard deviations after `STEPS` steps: drawn, and from both recursions."""
    rng = generator(seed)
    low = torch.tensor([5.0, -math.pi, -1.0, -0.1, 0.3, 0.005], dtype=torch.float64)
    high = torch.tensor([20.0, math.pi, 1.0, 0.1, 1.0, 0.03], dtype=torch.float64)
    share = torch.rand(SETTINGS, 6, generator=rng, dtype=torch.float64)
    drawn = low + share * (high - low)
    obs = torch.cat([torch.zeros(SETTINGS, 2).double(), drawn[:, :2]], dim=1)
    inputs = LowLevel(drawn[:, 2:4], drawn[:, 4:])
    cloud = obs.repeat_interleave(DRAWS, dim=0)
    wide = LowLevel(*(part.repeat_interleave(DRAWS, dim=0) for part in inputs))
    beliefs = {cov: certain(obs) for cov in COVARIANCES}
    for _ in range(STEPS):
        noise = torch.randn(wide.mean.shape, generator=rng, dtype=torch.float64)
        cloud = drive(cloud, wide.mean + wide.std * noise, dt=DT, wheelbase=WHEELBASE)
        beliefs = {
            cov: propagate(belief, inputs, dt=DT, wheelbase=WHEELBASE, cov=cov) for cov, belief in beliefs.items()
        }
    truth = cloud.view(SETTINGS, DRAWS, 4).std(dim=1)
    return {"drawn": truth.tolist()} | {cov: belief.std.tolist() for cov, belief in beliefs.items()}


def one_step(seed: int) -> Json:
    """Return Var(v cos h) drawn, exact and by the source's first-order formula; v = 10 +- 1, h = 0.3."""
    noise = torch.randn(2, 5 * DRAWS, generator=generator(seed), dtype=torch.float64)
    mean, std = torch.tensor([10.0, 0.3], dtype=torch.float64), torch.tensor(HEADING_STDS, dtype=torch.float64)
    v, h, one = mean[0].expand(4), mean[1].expand(4), torch.ones(4, dtype=torch.float64)
    drawn = [float(((v[0] + noise[0]) * (h[0] + s * noise[1]).cos()).var()) for s in HEADING_STDS]
    first = h.cos().square() + std.square() * h.sin().square() * (v.square() + 1)
    exact = displacement(v, one, h, std.square()).variance[:, 0]
    return {"drawn": drawn, "first order": first.tolist(), "exact": exact.tolist()}


@torch.no_grad()
def coverage(model: KinematicBicycle, test: Transitions, cov: str) -> float:
    """Return the share of true positions (x, y) after `STEPS` steps within the forecast's central 90 %."""
    obs, action, after = (part.view(-1, STEPS, part.shape[1]) for part in (test.obs, test.action, test.next_obs))
    kept, model.cov = model.cov, cov
    belief = model.forecast(obs[:, 0], action)[-1]
    model.cov = kept
    off = (after[:, -1] - belief.mean).abs() / belief.std
    return float((off[:, :2] < Z90).float().mean())


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Compare the spreads; fit the head in both ways and count how often its forecasts hold."""
    figures: Json = {"spread": spread(seed), "one step": one_step(seed)}
    train, test = log(300, STEPS, seed), log(1000, STEPS, seed + 1000)
    notify("learned inputs", 0.3)
    model = KinematicBicycle(DT, WHEELBASE)
    figures["holdout_nll"] = model.fit(train, rng=generator(seed)).metrics["holdout_nll"]
    figures["coverage"] = {cov: coverage(model, test, cov) for cov in COVARIANCES}
    notify("the source's training", 0.6)
    unrolled = KinematicBicycle(DT, WHEELBASE, cov="independent", horizon=10, updates=600)
    unrolled.fit(train, rng=generator(seed))
    figures["coverage"]["independent, unrolled"] = coverage(unrolled, test, "independent")
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the full covariance and the exact moments; report the source's recursion beside them."""

    def off(entry: Json, cov: str) -> float:
        return float(np.abs(np.array(entry["spread"][cov]) / np.array(entry["spread"]["drawn"]) - 1).max())

    def short(entry: Json) -> float:
        drawn, said = (np.array(entry["spread"][name])[:, :2] for name in ("drawn", "independent"))
        return float(np.median(drawn / said))

    def moment(entry: Json, name: str) -> float:
        return float(np.abs(np.array(entry["one step"][name]) / np.array(entry["one step"]["drawn"]) - 1).max())

    def over_seeds(values: Any) -> Any:
        return bootstrap_interval([values(entry) for entry in figures.values()])

    full, exact = over_seeds(lambda e: off(e, "full")), over_seeds(lambda e: moment(e, "exact"))
    held = over_seeds(lambda e: e["coverage"]["full"])
    return [
        Finding("full covariance, 20 steps: largest relative error of a std", full, "at most 0.01", full.high <= 0.01),
        Finding("source's recursion: true std of the position / its own, median", over_seeds(short), "", None),
        Finding("exact Var(v cos h), heading std up to 1: error", exact, "at most 0.01", exact.high <= 0.01),
        Finding("first-order Var(v cos h): error", over_seeds(lambda e: moment(e, "first order")), "", None),
        Finding(
            "learned inputs, full covariance: positions within the central 90 % after 20 steps",
            held,
            "0.85 to 0.95",
            0.85 <= held.value <= 0.95,
        ),
        Finding("the same inputs, source's recursion", over_seeds(lambda e: e["coverage"]["independent"]), "", None),
        Finding(
            "inputs learned through 10 unrolled steps of the source's recursion, with it",
            over_seeds(lambda e: e["coverage"]["independent, unrolled"]),
            "",
            None,
        ),
    ]


def draw(figures: dict[int, Json]) -> Figure:
    """Draw standard deviations against Monte Carlo, and how often forecasts hold."""
    figure, [left, right] = panels(2, width=3.8, height=3.2)
    for cov, marker in zip(COVARIANCES, "o^", strict=True):
        drawn, said = (
            np.concatenate([np.array(entry["spread"][name])[:, :2].ravel() for entry in figures.values()])
            for name in ("drawn", cov)
        )
        left.loglog(drawn, said, marker, label=cov, alpha=0.7)
    ends = left.get_xlim()
    left.plot(ends, ends, color="grey", linewidth=1)
    left.set_xlabel("std of x and y after 20 steps, Monte Carlo (m)", fontsize=8)
    left.set_ylabel("closed form (m)", fontsize=8)
    left.legend(fontsize=8, frameon=False)
    names = list(next(iter(figures.values()))["coverage"])
    for index, name in enumerate(names):
        values = [entry["coverage"][name] for entry in figures.values()]
        right.plot(values, [-index] * len(values), "o", color="tab:blue", alpha=0.7)
    right.axvline(0.9, color="grey", linewidth=1)
    right.set_yticks([-i for i in range(len(names))], [name.replace(", ", ",\n") for name in names], fontsize=8)
    right.set_xlim(0, 1)
    right.set_xlabel("positions within the central 90 %", fontsize=8)
    return figure


CLAIM = Claim(
    name="kinematic",
    paper="Zheng, Son, Liang, Wang, Clipp, Lin, Deep Stochastic Kinematic Models for Probabilistic Motion Forecasting "
    "in Traffic, 2024",
    claim="Uncertainty of acceleration and steering can be carried through a kinematic bicycle in closed form, step by "
    "step and differentiably.",
    setting="A simulated bicycle (L = 2.8 m, 0.1 s, 20 steps) at 4 random speeds, headings and noises per seed against "
    "200,000 draws; then a head that learns the inputs' means and spreads from 6,000 logged steps. The paper forecasts "
    "traffic (Waymo); its recursion adds variances as if position, speed and heading were independent.",
    measure=measure,
    findings=findings,
    draw=draw,
    notes="The covariances that the source's recursion leaves out are most of the position's variance. A head "
    "that is trained through it makes up for a part of them only.",
)
