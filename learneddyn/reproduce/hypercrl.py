"""Five cart-poles, met one after the other: whose model of the first is still good after the last?"""

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

from learneddyn.core import Dynamics, Json, Task, Transitions, generator
from learneddyn.evaluation.forgetting import transfer
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.models import AbstractContinual, HyperCRL, MultiHead
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.tasks.cartpole_swingup import swing_up
from learneddyn.world.truth import TruthDynamics

LENGTHS = (0.6, 0.2, 1.2, 0.3, 0.9)
"""Of the poles, m, in the order in which they are met."""
BOX = (1.5, 3.14159, 2.0, 6.0)
"""States are drawn uniformly within plus and minus this: m, rad, m/s, rad/s."""
TRAIN, TEST, UPDATES = 3000, 1000, 600
METHODS: dict[str, Callable[[], AbstractContinual]] = {
    "HyperCRL": lambda: HyperCRL(angles=[1], updates=UPDATES),
    "HyperCRL, chunked": lambda: HyperCRL(angles=[1], updates=UPDATES, chunk=1000, hyper_hidden=(25, 30)),
    "HyperCRL, no look-ahead": lambda: HyperCRL(angles=[1], updates=UPDATES, lookahead=False),
    "HyperCRL, no regulariser": lambda: HyperCRL(angles=[1], updates=UPDATES, beta=0.0),
    "fine-tune": lambda: MultiHead(angles=[1], updates=UPDATES),
    "EWC": lambda: MultiHead(angles=[1], updates=UPDATES, penalty="ewc"),
    "EWC, 100 times as strong": lambda: MultiHead(angles=[1], updates=UPDATES, penalty="ewc", strength=1e4),
    "SI": lambda: MultiHead(angles=[1], updates=UPDATES, penalty="si"),
    "coreset of 30": lambda: MultiHead(angles=[1], updates=UPDATES, memory=30),
    "multi-task": lambda: MultiHead(angles=[1], updates=UPDATES, memory=None),
    "single": lambda: MultiHead(angles=[1], updates=UPDATES, shared_layers=0),
}
FORGETFUL, REMEMBERING = 20.0, 3.0
"""Least ratio of fine-tuning's error to HyperCRL's; largest of HyperCRL's at the end to the one after each task."""


def cart_pole(length: float, steps: int = 200) -> Task:
    """Register the plant with a pole of this length, if need be, and return its task."""
    real_id = f"hypercrl/CartPole{length:g}x{steps}-v0"
    if real_id not in gym.registry:
        entry = "learneddyn.plants.cartpole_swingup:CartPoleSwingUp"
        gym.register(real_id, entry, max_episode_steps=steps, kwargs={"pole_length": length})
    return swing_up(real_id, length)


def transitions(task: Task, rows: int, seed: int) -> Transitions:
    """Return steps of MuJoCo from random states under random actions."""
    rng, truth = generator(seed), TruthDynamics(task, threads=1)
    obs = (2 * torch.rand(rows, 4, generator=rng) - 1) * torch.tensor(BOX)
    action = 6 * torch.rand(rows, 1, generator=rng) - 3
    after = truth.open_loop(obs.double(), action[:, None], judged=False).next_obs[:, 0].float()
    truth.close()
    no, alone = torch.zeros(rows), torch.arange(rows)
    return Transitions(obs, action, no, after, no.bool(), alone, truth.spaces, f"{task.real_id}, random states")


def error(model: Dynamics, data: Transitions) -> float:
    """Return the squared error of one step, per column in units of the variance of its change (1: the mean change)."""
    with torch.no_grad():
        missed = model.predict(data.obs, data.action).mean[0] - data.next_obs
    return float((missed / (data.next_obs - data.obs).std(dim=0)).square().mean())


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Let every method meet the five; return its errors ``[task learned][task asked]``, lower triangle."""
    plants = [cart_pole(length) for length in LENGTHS]
    train = [transitions(task, TRAIN, 1000 * seed + index) for index, task in enumerate(plants)]
    test = [transitions(task, TEST, 1000 * seed + 100 + index) for index, task in enumerate(plants)]
    figures: Json = {}
    for done, (name, make) in enumerate(METHODS.items()):
        model, rng, errors = make(), generator(seed), []
        for task, data in enumerate(train):
            notify(f"{name}, task {task + 1}", (done + task / len(train)) / len(METHODS))
            model.fit_task(task, data, rng=rng)
            errors.append([error(model.on(asked), test[asked]) for asked in range(task + 1)])
        figures[name] = errors
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge what was forgotten; report every method's errors."""

    def over_seeds(name: str, what: str) -> list[float]:
        return [getattr(transfer(square(seed[name]), lower_is_better=True), what) for seed in figures.values()]

    def ratio(above: list[float], below: list[float]) -> Estimate:
        return bootstrap_interval(np.array(above) / np.array(below))

    ours = over_seeds("HyperCRL", "final")
    gap = ratio(over_seeds("fine-tune", "final"), ours)
    kept = ratio(ours, over_seeds("HyperCRL", "learned"))
    found = [
        Finding(
            "mean error after the last task: fine-tune / HyperCRL", gap, f"at least {FORGETFUL:g}", gap[0] >= FORGETFUL
        ),
        Finding(
            "HyperCRL: mean error after the last task / right after each task",
            kept,
            f"at most {REMEMBERING:g}",
            kept[0] <= REMEMBERING,
        ),
    ]
    bare = ratio(over_seeds("HyperCRL, no regulariser", "final"), ours)
    what = "mean error after the last task: HyperCRL without its regulariser / with it"
    found.append(Finding(what, bare, f"at least {FORGETFUL:g}", bare[0] >= FORGETFUL))
    for name in METHODS:
        for what, when in (("learned", "right after each task"), ("final", "after the last task")):
            found.append(
                Finding(f"{name}: mean error {when}", bootstrap_interval(over_seeds(name, what)), "reported", None)
            )
    return found


def square(rows: list[list[float]]) -> np.ndarray:
    """Return the rows of a lower triangle as a square matrix with NaN above the diagonal."""
    table = np.full((len(rows), len(rows)), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def draw(figures: dict[int, Json]) -> Figure:
    """Draw errors after each task and at the end by method, and the first task's error as others are learned."""
    figure, (bars, time) = panels(2, width=4.8, height=3.4)
    for index, name in enumerate(METHODS):
        for what, marker, offset in (("learned", "o", 0.14), ("final", "s", -0.14)):
            values = [getattr(transfer(square(seed[name]), lower_is_better=True), what) for seed in figures.values()]
            colour = "tab:blue" if what == "learned" else "tab:orange"
            label = {"learned": "right after each task", "final": "after the last task"}[what] if index == 0 else None
            bars.plot(
                values, [-index + offset] * len(values), marker, color=colour, markersize=4, alpha=0.7, label=label
            )
    for index, name in enumerate(("HyperCRL", "HyperCRL, no regulariser", "fine-tune", "EWC", "SI", "coreset of 30")):
        first = np.array([[row[0] for row in seed[name]] for seed in figures.values()])
        time.plot(range(1, len(LENGTHS) + 1), first.mean(axis=0), "o-", color=f"C{index}", markersize=3, label=name)
    bars.set_xscale("log")
    bars.set_xlabel("mean squared error of one step (1: the mean change)", fontsize=8)
    bars.set_yticks([-index for index in range(len(METHODS))], list(METHODS))
    bars.grid(axis="x", alpha=0.3)
    bars.legend(fontsize=7, frameon=False)
    time.set_yscale("log")
    time.set_xticks(range(1, len(LENGTHS) + 1))
    time.set_xlabel("tasks learned", fontsize=8)
    time.set_ylabel("error on the first task", fontsize=8)
    time.legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="hypercrl",
    paper="Huang, Xie, Bharadhwaj, Shkurti, Continual Model-Based Reinforcement Learning with Hypernetworks, 2021",
    claim="A hypernetwork that generates a dynamics network per task, held by its outputs for earlier tasks, learns a "
    "sequence of tasks without forgetting and without their data; what tasks share otherwise is overwritten.",
    setting=f"The dynamics alone: cart-poles in MuJoCo with poles of {', '.join(map(str, LENGTHS))} m, met in this "
    f"order, {TRAIN} steps from random states each, {UPDATES} updates of 100 rows, networks of 2 x 64; errors are "
    f"those of one step on {TEST} fresh ones, per column in variances of its change. Baselines share the first two "
    "layers and have a last layer per task, with the paper's strengths unless named otherwise; the hypernetwork learns "
    "at 1e-3 (1e-4 in the paper, which trains for longer).",
    measure=measure,
    findings=findings,
    draw=draw,
    notes="What HyperCRL keeps without data of earlier tasks, rehearsal keeps with it. At the published strength EWC "
    "holds little here, where errors, and with them squared gradients, are small; the stronger one holds, and learns "
    "later tasks less well.",
)
