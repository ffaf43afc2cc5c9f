"""OFQL: an average velocity makes actions in one step where plain flow matching cannot, and faster than denoising."""

import math
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from learneddyn.core import Json, Transitions, generator
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.offline import DQL, OFQL, GenerativeQL
from learneddyn.offline.base import descend
from learneddyn.offline.flow import FlowActor
from learneddyn.offline.policy import Normaliser
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify, one_thread
from learneddyn.spaces import Spaces

RADIUS, WIDTH, NEAR = 1.5, 0.1, 0.35
"""Eight Gaussians on a circle, their deviation, and how near a sample must be to count as theirs."""
UPDATES, BATCH, HIDDEN = 3000, 512, (64, 64, 64)
SAMPLES, DIRECTIONS, SHOWN = 4000, 128, 400
EULER = (1, 2, 5, 10)
"""Steps of plain flow matching that are compared."""
OBS, ACTION, DECISIONS, ROUNDS = 11, 3, 2500, 12
"""Columns of Hopper's observation and action, actions per timing, and timings."""
TIMED = 4
"""Updates per timing."""
DENOISING = (5, 10, 20)
"""Steps of DQL that are compared; its source takes 5."""


def eight(rows: int, rng: torch.Generator) -> Float[Tensor, "{rows} 2"]:
    """Draw from eight Gaussians on a circle."""
    angle = torch.randint(8, (rows,), generator=rng) * (math.pi / 4)
    return RADIUS * torch.stack((angle.cos(), angle.sin()), 1) + WIDTH * torch.randn(rows, 2, generator=rng)


def learned(flow_ratio: float, seed: int) -> FlowActor:
    """Return an actor that has learned the eight Gaussians; there is nothing to observe."""
    actor, rng = FlowActor(HIDDEN, Normaliser(0), 2, rng=generator(seed)), generator(1000 + seed)
    optimizer, nothing = torch.optim.Adam(actor.parameters(), 1e-3, fused=True), torch.empty(BATCH, 0)
    for _ in range(UPDATES):
        descend(actor.imitation(nothing, eight(BATCH, rng), rng, flow_ratio=flow_ratio), optimizer)
    return actor


def sliced_w2(one: Float[Tensor, "n 2"], two: Float[Tensor, "n 2"]) -> float:
    """Return the root mean square, over directions, of the Wasserstein-2 distance of the projections."""
    angle = torch.arange(DIRECTIONS) * (math.pi / DIRECTIONS)
    along = torch.stack((angle.cos(), angle.sin()))
    return float(((one @ along).sort(0).values - (two @ along).sort(0).values).square().mean().sqrt())


def on_a_mode(samples: Float[Tensor, "n 2"]) -> float:
    """Return the share of samples near the centre of one of the Gaussians."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = RADIUS * torch.stack((angle.cos(), angle.sin()), 1)
    return float((torch.cdist(samples, centres).amin(1) < NEAR).float().mean())


def quality(seed: int, notify: Notify) -> Json:
    """Learn with and without the average, and compare what one or more steps draw."""
    rng = generator(2000 + seed)
    truth, nothing = eight(SAMPLES, rng), torch.empty(SAMPLES, 0)
    notify("average velocity", 0.0)
    average = learned(0.5, seed)
    notify("plain flow matching", 0.5)
    plain = learned(1.0, seed)
    with torch.no_grad():
        drawn = {"average, 1": average.at(nothing, average.noise(SAMPLES, rng)), "data": eight(SAMPLES, rng)}
        for steps in EULER:
            drawn[f"plain, {steps}"] = plain.integrate(nothing, plain.noise(SAMPLES, rng), steps, average=False)
    return {
        "distance": {name: sliced_w2(samples, truth) for name, samples in drawn.items()},
        "share": {name: on_a_mode(samples) for name, samples in drawn.items()},
        "shown": {name: drawn[name][:SHOWN].T.tolist() for name in ("plain, 1", "average, 1")},
    }


def log_of(seed: int) -> Transitions:
    """Return noise of Hopper's shapes: what is timed does not depend on what is learned."""
    rng, rows = generator(seed), 2000
    obs, action = torch.randn(rows, OBS, generator=rng), 2 * torch.rand(rows, ACTION, generator=rng) - 1
    box = gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    number = torch.arange(rows) // 100
    return Transitions(obs, action, action[:, 0], obs.roll(-1, 0), number < 0, number, Spaces(*box), "noise")


class Clock(BaseCallback):
    """Notes the CPU time after every update, so that what `learn` does before and after them is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def _on_step(self) -> bool:
        self.times.append(time.process_time())
        return True


def seconds_per_update(agent: GenerativeQL) -> float:
    """Let an agent learn and return the CPU seconds of an update; the last one writes the log and does not count."""
    clock = Clock()
    agent.learn(TIMED + 2, callback=clock, reset_num_timesteps=False)
    return (clock.times[TIMED] - clock.times[0]) / TIMED


def speed(seed: int) -> Json:
    """Return CPU seconds of actors and of updates, all in turn in every round; the median of the rounds."""
    data = log_of(seed)
    agents: dict[str, GenerativeQL] = {"OFQL": OFQL("MlpPolicy", data, seed=seed, device="cpu")}
    for steps in DENOISING:
        agents[f"DQL-{steps}"] = DQL("MlpPolicy", data, denoising_steps=steps, seed=seed, device="cpu")
    obs, rng = torch.randn(DECISIONS, OBS, generator=generator(seed)), generator(seed)
    spent: dict[str, dict[str, list[float]]] = {"decide": {}, "update": {}}
    for agent in agents.values():
        agent.learn(2)  # what is done once, at the first update
    for _ in range(ROUNDS):
        for name, agent in agents.items():
            begun = time.process_time()
            with torch.no_grad():
                agent.policy.actor.sample(obs, rng)
            spent["decide"].setdefault(name, []).append(time.process_time() - begun)
            spent["update"].setdefault(name, []).append(seconds_per_update(agent))
    return {what: {name: float(np.median(times)) for name, times in by.items()} for what, by in spent.items()}


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Measure quality and speed."""
    with one_thread():
        return quality(seed, notify) | speed(seed)


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge one step of both flows, and decisions per second; report the rest."""
    seeds = list(figures.values())

    def distance(name: str) -> Estimate:
        return bootstrap_interval([seed["distance"][name] for seed in seeds])

    def row(name: str, wanted: str = "reported", holds: bool | None = None) -> Finding:
        return Finding(f"sliced Wasserstein-2 distance: {LABELS[name]}", distance(name), wanted, holds)

    rows = [
        row("average, 1", "at most 0.25", distance("average, 1").high <= 0.25),
        row("plain, 1", "above 0.7", distance("plain, 1").low > 0.7),
        *(row(f"plain, {steps}") for steps in EULER[1:]),
        row("data"),
    ]
    for name in ("average, 1", "plain, 1", "plain, 10"):
        share = bootstrap_interval([seed["share"][name] for seed in seeds])
        rows.append(Finding(f"share of samples on a mode: {LABELS[name]}", share, "reported", None))
    for steps in DENOISING:
        faster = bootstrap_interval([seed["decide"][f"DQL-{steps}"] / seed["decide"]["OFQL"] for seed in seeds])
        bound, holds = ("at least 3", faster.low >= 3) if steps == 5 else ("reported", None)
        rows.append(Finding(f"decisions per CPU second, OFQL over DQL of {steps} steps", faster, bound, holds))
    learn = bootstrap_interval([seed["update"]["DQL-5"] / seed["update"]["OFQL"] for seed in seeds])
    rows.append(Finding("updates per CPU second, OFQL over DQL of 5 steps", learn, "reported", None))
    each = bootstrap_interval([DECISIONS / seed["decide"]["OFQL"] for seed in seeds])
    rows.append(Finding(f"OFQL: actions per CPU second, {DECISIONS} at once", each, "reported", None))
    return rows


LABELS = {
    "average, 1": "average velocity, 1 step",
    "data": "another draw of the data",
    **{f"plain, {steps}": f"flow matching, {steps} step" + "s" * (steps > 1) for steps in EULER},
}


def draw(figures: dict[int, Json]) -> Figure:
    """Show one-step samples of the first seed, and the times of actions."""
    figure, axes = panels(3, width=3.2, height=3.0)
    first = next(iter(figures.values()))
    for ax, (name, (x, y)) in zip(axes, first["shown"].items(), strict=False):
        angle = np.arange(8) * np.pi / 4
        ax.scatter(x, y, s=3, alpha=0.5, color="tab:red" if name.startswith("plain") else "tab:blue")
        ax.scatter(RADIUS * np.cos(angle), RADIUS * np.sin(angle), s=160, facecolors="none", edgecolors="0.5")
        ax.set_aspect("equal")
        ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2))
        ax.set_title(LABELS[name], fontsize=9)
    names = list(first["decide"])
    for number, (what, colour) in enumerate((("decide", "tab:blue"), ("update", "0.6"))):
        times = [[1000 * seed[what][name] for seed in figures.values()] for name in names]
        at = np.arange(len(names)) + 0.4 * number
        label = f"{DECISIONS} actions" if what == "decide" else "one update"
        axes[2].bar(at, [np.mean(entry) for entry in times], width=0.38, color=colour, label=label)
    axes[2].set_xticks(np.arange(len(names)) + 0.2, names)
    axes[2].set_title("CPU milliseconds", fontsize=9)
    axes[2].legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="ofql",
    paper="Nguyen, Yoo, Revisiting Diffusion Q-Learning: From Iterative Denoising to One-Step Action Generation, 2026",
    claim="A flow policy that learns the average velocity generates actions in one step, where plain flow matching "
    "fails in one step; so acting, targets and gradients need one evaluation of the net instead of a denoising chain.",
    setting=f"Quality: eight Gaussians of deviation {WIDTH} on a circle of radius {RADIUS}, nets 3 x 64, {UPDATES} "
    f"updates of {BATCH}; {SAMPLES} samples against the data by the sliced Wasserstein-2 distance. Flow matching is "
    "the same net and code with r = t always. Speed: `OFQL` and `DQL` with nets 3 x 256 on Hopper's shapes, timed in "
    f"turn by CPU time on one thread, {DECISIONS} actions at once without choosing among candidates. The paper's "
    "scores on D4RL are not tested.",
    measure=measure,
    findings=findings,
    draw=draw,
)
