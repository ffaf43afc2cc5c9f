"""Planning alone, on the true pendulum: what a planner finds with few simulated sequences."""

import math
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn import tasks
from learneddyn.agents import MPC
from learneddyn.core import Json, Outcome, Prediction
from learneddyn.evaluation.stats import Estimate, bootstrap_difference, bootstrap_interval
from learneddyn.planners import CEM, ICEM, MPPI, AbstractPlanner, GradientPlanner, RandomShooting
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.spaces import Spaces
from learneddyn.world import World

ENV = "Pendulum-v1"
STEPS = 200
HANGING, RANDOM = 4, 6
"""Episodes of each kind per seed and planner, planned for side by side."""
NUDGE = 0.1
"""Largest angle, and velocity, by which a hanging start is off rest, so that its episodes differ."""
PLANNERS: dict[str, Callable[[int], AbstractPlanner]] = {
    "CEM, 2000, executes mean": lambda horizon: CEM(horizon, 400, 40, 5),
    "CEM, 100, executes mean": lambda horizon: CEM(horizon, 33, 10, 3),
    "CEM, 100, executes best": lambda horizon: CEM(horizon, 33, 10, 3, execute="best"),
    "iCEM, 100": lambda horizon: ICEM.of_budget(100, horizon=horizon, beta=2.0),
    "iCEM, 300": lambda horizon: ICEM.of_budget(300, horizon=horizon, beta=2.0),
    "MPPI, 100, information": lambda horizon: MPPI(horizon, 100),
    "MPPI, 100, smoothed": lambda horizon: MPPI(horizon, 33, 3, form="smoothed"),
    "random shooting, 100": lambda horizon: RandomShooting(horizon, 100),
    "gradient, 50 and backward": lambda horizon: GradientPlanner(horizon, 5, 9),
}
"""By name and the sequences scored per step."""
HORIZONS = (15, 30)


class TruePendulum:
    """The equations of Gymnasium's Pendulum-v1 as `learneddyn.core.Dynamics`, in batched torch, differentiable.

    The same numbers as ``env.step`` up to float32 rounding, which the environment's own observation has too.
    """

    num_members = 1

    def __init__(self) -> None:
        env = gym.make(ENV)
        self.spaces: Spaces | None = Spaces(env.observation_space, env.action_space)
        env.close()

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return torch.zeros(1, dtype=torch.long)

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Step every row; ``member``, ``rng`` and ``noise`` change nothing."""
        cosine, sine, velocity = obs.unbind(dim=1)
        torque = action[:, 0].clamp(-2.0, 2.0)
        velocity = (velocity + (15.0 * sine + 3.0 * torque) * 0.05).clamp(-8.0, 8.0)
        angle = torch.atan2(sine, cosine) + velocity * 0.05
        return Outcome(torch.stack([angle.cos(), angle.sin(), velocity], dim=1))

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Return the step of `sample` without noise."""
        after = self.sample(obs, action, torch.zeros(len(obs), dtype=torch.long), torch.Generator()).next_obs
        return Prediction(after[None], torch.zeros_like(after)[None], self.elites)


def episodes(planner: AbstractPlanner, seed: int) -> list[float]:
    """Return the returns of `HANGING` and then `RANDOM` full episodes of the real environment."""
    policy = MPC(World(TruePendulum(), tasks.get(ENV), sampler="tsinf"), planner, seed=seed)
    envs = [gym.make(ENV) for _ in range(HANGING + RANDOM)]
    rng = np.random.default_rng(seed)
    observations = []
    for lane, env in enumerate(envs):
        obs, _ = env.reset(seed=1000 * seed + lane)
        if lane < HANGING:
            angle, velocity = np.array([math.pi, 0.0]) + rng.uniform(-NUDGE, NUDGE, 2)
            env.unwrapped.state = np.array([angle, velocity])  # type: ignore[attr-defined]
            obs = np.array([math.cos(angle), math.sin(angle), velocity], np.float32)
        observations.append(obs)
    returns, state = np.zeros(len(envs)), None
    for step in range(STEPS):
        starts = np.full(len(envs), step == 0)
        actions, state = policy.predict(np.stack(observations), state, starts, deterministic=True)
        for lane, env in enumerate(envs):
            observations[lane], reward, *_ = env.step(actions[lane])
            returns[lane] += float(reward)
    for env in envs:
        env.close()
    return returns.tolist()


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Play every planner with both horizons; return mean returns by start."""
    figures: Json = {}
    settings = [(name, horizon) for horizon in HORIZONS for name in PLANNERS]
    for done, (name, horizon) in enumerate(settings):
        notify(f"{name}, H{horizon}", done / len(settings))
        returns = np.array(episodes(PLANNERS[name](horizon), seed))
        figures[f"{name}, H{horizon}"] = {
            "hanging": float(returns[:HANGING].mean()),
            "random": float(returns[HANGING:].mean()),
        }
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the claim at horizon 15; report the other planners."""

    def of(name: str, start: str = "hanging", horizon: int = 15) -> list[float]:
        return [seed[f"{name}, H{horizon}"][start] for seed in figures.values()]

    few = of("iCEM, 100")
    found = [_least("iCEM with 100 sequences, H15, from hanging: return", bootstrap_interval(few), -450.0)]
    for rival in ("CEM, 100, executes mean", "CEM, 2000, executes mean"):
        ahead = bootstrap_difference(few, of(rival), paired=True)
        found.append(_least(f"iCEM with 100 sequences minus {rival}, H15, from hanging", ahead, 200.0))
    for name in ("iCEM, 100", "CEM, 2000, executes mean"):
        far = bootstrap_interval(of(name, horizon=30))
        found.append(_least(f"{name}, H30, from hanging: return", far, -450.0))
    for name in PLANNERS:
        if name != "iCEM, 100":
            told = bootstrap_interval(of(name))
            found.append(Finding(f"{name}, H15, from hanging: return", told, "reported", None))
    told = bootstrap_difference(of("iCEM, 100", "random"), of("CEM, 100, executes mean", "random"), paired=True)
    found.append(Finding("iCEM minus CEM (mean), 100 sequences, H15, from random starts", told, "reported", None))
    return found


def draw(figures: dict[int, Json]) -> Figure:
    """Draw every planner's return, a point per seed, by horizon and start."""
    figure, axes = panels(2, width=4.6, height=3.6)
    for ax, start in zip(axes, ("hanging", "random"), strict=True):
        for index, name in enumerate(PLANNERS):
            for horizon, marker, offset in ((15, "o", 0.12), (30, "s", -0.12)):
                values = [seed[f"{name}, H{horizon}"][start] for seed in figures.values()]
                colour = "tab:blue" if horizon == 15 else "tab:orange"
                label = f"horizon {horizon}" if index == 0 else None
                height = [-index + offset] * len(values)
                ax.plot(values, height, marker, color=colour, alpha=0.7, markersize=4, label=label)
        ax.set_title(f"start: {start}", fontsize=9)
        ax.set_xlabel("return of 200 steps", fontsize=8)
        ax.set_yticks([-i for i in range(len(PLANNERS))], list(PLANNERS) if start == "hanging" else [])
        ax.grid(axis="x", alpha=0.3)
    axes[0].axvline(-450, color="grey", linestyle=":", linewidth=1)
    axes[1].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 0.22), numpoints=1)
    return figure


def _least(what: str, measured: Estimate, bound: float) -> Finding:
    return Finding(what, measured, f"at least {bound:g}", measured.value >= bound)


CLAIM = Claim(
    name="icem",
    paper="Pinneri, Sawant, Blaes, Achterhold, Stueckler, Rolinek, Martius, Sample-efficient Cross-Entropy Method for "
    "Real-time Planning, 2020",
    claim="With noise that is correlated in time, elites kept from step to step and the best plan executed, the "
    "cross-entropy method needs a fraction of the sequences that the usual one simulates for a better return.",
    setting="Pendulum-v1, 200 steps, executed in Gymnasium's environment; planners search in the true equations, so "
    "that nothing but planning is compared. Per seed 4 episodes that start hanging (within 0.1 rad and rad/s of rest) "
    "and 6 from random starts; numbers in names are sequences per step. The paper has robots in MuJoCo.",
    measure=measure,
    findings=findings,
    draw=draw,
    seeds=(0, 1, 2, 3, 4),
    notes="Executing the best plan instead of the mean changes little for CEM here: what swings the pendulum up in 15 "
    "steps is noise that is correlated in time, and the smoothed MPPI, which has it too, does as well as iCEM. From "
    "random starts the planners lie closer together, and one seed of five has starts where iCEM is the worse one. At "
    "30 steps all but random shooting succeed, the gradient planner too, which only finds the nearest optimum.",
)
