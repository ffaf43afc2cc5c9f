"""Partial observation: with its velocity hidden, a pendulum is predicted by what remembers, in a basis one can compute.

Recurrent cells (GRU, S4D, companion) beside a memoryless network on real steps of Pendulum-v1 that show the angle only;
and what perturb-then-diagonalise does to the conditioning of the basis that state-space layers begin with.
"""

import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from learneddyn.core import Json, Transitions, generator
from learneddyn.data import HideColumns, collect
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models import AbstractDynamics, ProbabilisticEnsemble, RecurrentDynamics
from learneddyn.models.state_space import (
    Modes,
    diagonalise,
    hippo_legs,
    normal_legs,
    perturb_then_diagonalise,
    transfer_function,
)
from learneddyn.runs import Notify
from learneddyn.runs.claims import Claim, Finding, panels

STEPS, TRAIN, TEST = 60, 300, 100
"""Steps of an episode; episodes to learn from, and to judge by."""
SETTLED = 10
"""Steps after which an episode's past says what its observations lack."""
SHOWN = (0, 1, 2, 5)
START, DEPTH = 20, 20
"""Open loops begin at this step of every test episode, and are judged after so many."""
ORDERS, SIZE = (8, 16, 32, 64), 0.1
"""States of HiPPO-LegS; spectral norm of the perturbation."""
CELLS: dict[str, dict[str, Any]] = {
    "GRU": {"cell": "gru", "updates": 800},
    "S4D": {"cell": "s4d", "layers": 2, "updates": 400},
    "companion": {"cell": "companion", "layers": 2, "updates": 400},
}


def models() -> dict[str, AbstractDynamics]:
    """Return the memoryless network and the recurrent ones, not fitted."""
    memoryless = ProbabilisticEnsemble(
        num_members=1, num_elites=1, hidden=[64, 64], scale_targets=True, weight_decay=1e-5, max_epochs=40
    )
    return {"memoryless": memoryless} | {
        name: RecurrentDynamics(width=48, window=STEPS, **arguments) for name, arguments in CELLS.items()
    }


def log(episodes: int, seed: int) -> Transitions:
    """Return episodes of the real pendulum under random torques, seen by cosine and sine alone."""

    def env() -> gym.Env[Any, Any]:
        return HideColumns(gym.make("Pendulum-v1", max_episode_steps=STEPS))

    return collect(env, steps=episodes * STEPS, lanes=1, seed=seed, progress=False)


@torch.no_grad()
def judge(model: AbstractDynamics, test: Transitions) -> Json:
    """Return squared errors in units of the variance of a settled step: by position, settled, and in open loop."""
    position = test.positions()
    settled = position >= SETTLED
    scale = (test.next_obs - test.obs)[settled].var(dim=0)
    memory = model.remembered(test)
    prediction = model.predict(test.obs, test.action, memory)
    error = ((prediction.mean[0] - test.next_obs).square() / scale).mean(dim=1)
    row = (position == START).nonzero().flatten()
    obs, now = test.obs[row], None if memory is None else memory[row]
    for step in range(DEPTH):
        answer = model.predict(obs, test.action[row + step], now)
        obs, now = answer.mean[0], answer.memory
    reached = test.next_obs[row + DEPTH - 1]
    off = (obs - reached).square().mean() / (reached - test.next_obs[settled].mean(dim=0)).square().mean()
    return {
        "by step": [float(error[position == step].mean()) for step in range(STEPS)],
        "settled": float(error[settled].mean()),
        "open loop": float(off),
    }


def conditioning(seed: int) -> Json:
    """Return condition numbers of eigenvectors by order, and the largest errors of transfer functions at the last."""
    figures: Json = {"LegS": [], "PTD": []}
    rng = generator(seed)
    for order in ORDERS:
        matrix, entry = hippo_legs(order)
        figures["LegS"].append(diagonalise(matrix, entry).condition)
        perturbed = perturb_then_diagonalise(matrix, entry, SIZE, rng)
        figures["PTD"].append(perturbed.condition)
    readout = torch.randn(len(entry), generator=rng).double()
    frequencies = torch.logspace(-2, 3, 1000, dtype=torch.float64)
    truth = transfer_function(matrix, entry, readout, frequencies)

    def off(modes: Modes) -> float:
        inside = readout.to(modes.vectors) @ modes.vectors
        said = transfer_function(modes.eigenvalues, modes.entry, inside, frequencies)
        return float((said - truth).abs().max() / truth.abs().max())

    return figures | {"PTD error": off(perturbed), "S4D-LegS error": off(normal_legs(ORDERS[-1]))}


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Fit every model on the same log and judge it on other episodes."""
    train, test = log(TRAIN, seed), log(TEST, seed + 1000)
    figures: Json = {"conditioning": conditioning(seed)}
    for done, (name, model) in enumerate(models().items()):
        notify(name, done / (1 + len(CELLS)))
        busy = time.process_time()
        model.fit(train, rng=generator(seed))
        seconds = time.process_time() - busy
        weights = sum(parameter.numel() for parameter in model.parameters())
        figures[name] = judge(model, test) | {"seconds": seconds, "weights": weights}
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge how much worse it is to have no memory, and the conditioning."""
    entries = list(figures.values())

    def over(values: Any) -> Any:
        return bootstrap_interval([values(entry) for entry in entries])

    def worse(name: str) -> Finding:
        ratio = over(lambda entry: entry["memoryless"]["settled"] / entry[name]["settled"])
        what = f"MSE of a settled step, memoryless / {name}"
        return Finding(what, ratio, "at least 20", ratio.value >= 20)

    sixteen = ORDERS.index(16)
    raw = over(lambda entry: entry["conditioning"]["LegS"][sixteen])
    eased = over(lambda entry: entry["conditioning"]["PTD"][sixteen])
    nearer = over(lambda entry: entry["conditioning"]["S4D-LegS error"] / entry["conditioning"]["PTD error"])
    loop = over(lambda entry: entry["memoryless"]["open loop"] / entry["GRU"]["open loop"])
    return [
        *(worse(name) for name in CELLS),
        Finding(f"MSE after {DEPTH} open-loop steps, memoryless / GRU", loop, "", None),
        Finding("condition number of HiPPO-LegS' eigenvectors, 16 states", raw, "above 1e8", raw.value > 1e8),
        Finding(f"the same after a perturbation of norm {SIZE}", eased, "below 1e4", eased.value < 1e4),
        Finding(
            f"largest error of the transfer function, {ORDERS[-1]} states: S4D-LegS / perturbed",
            nearer,
            "at least 10",
            nearer.value >= 10,
        ),
    ]


def table(figures: dict[int, Json]) -> str:
    """Return the models' errors by step of the episode, means over seeds, and the conditioning by order."""
    names = ["memoryless", *CELLS]
    heads = [*(f"step {step}" for step in SHOWN), f"steps {SETTLED}-{STEPS - 1}", f"{DEPTH} open-loop steps"]
    lines = [
        "Mean squared error in units of the variance (of a settled step's increment; of the observation in open loop):",
        "",
        "| model | " + " | ".join(heads) + " | weights | CPU s of the fit |",
        "|---" * (len(heads) + 3) + "|",
    ]

    def mean(name: str, value: Any) -> float:
        return float(np.mean([value(entry[name]) for entry in figures.values()]))

    for name in names:
        early = [mean(name, lambda entry, step=step: entry["by step"][step]) for step in SHOWN]
        late = [mean(name, lambda entry, key=key: entry[key]) for key in ("settled", "open loop")]
        numbers = " | ".join(f"{value:.3g}" for value in (*early, *late))
        cost = mean(name, lambda entry: entry["seconds"])
        lines.append(f"| {name} | {numbers} | {mean(name, lambda entry: entry['weights']):.0f} | {cost:.0f} |")
    lines += ["", "| states | condition of HiPPO-LegS' eigenvectors | perturbed |", "|---|---|---|"]
    for index, order in enumerate(ORDERS):
        raw, eased = (mean("conditioning", lambda entry, key=key, i=index: entry[key][i]) for key in ("LegS", "PTD"))
        lines.append(f"| {order} | {raw:.1e} | {eased:.1e} |")
    return "\n".join(lines)


def draw(figures: dict[int, Json]) -> Figure:
    """Draw the error along an episode, and the conditioning by order."""
    figure, [left, right] = panels(2, width=4.0, height=3.2)
    for index, name in enumerate(["memoryless", *CELLS]):
        for entry in figures.values():
            label = name if entry is next(iter(figures.values())) else None
            left.semilogy(entry[name]["by step"], color=f"C{index}", linewidth=0.9, label=label)
    left.axvline(SETTLED, color="grey", linewidth=0.7, linestyle=":")
    left.set_xlabel("step of the episode", fontsize=8)
    left.set_ylabel("MSE / variance of a settled increment", fontsize=8)
    left.set_ylim(top=30)
    left.legend(fontsize=7, frameon=False, ncols=2, loc="upper right")
    for name, label, marker in (("LegS", "HiPPO-LegS", "o"), ("PTD", f"perturbed by {SIZE}", "^")):
        for entry in figures.values():
            mark = label if entry is next(iter(figures.values())) else None
            colour = "tab:grey" if name == "LegS" else "tab:blue"
            right.loglog(ORDERS, entry["conditioning"][name], marker + "-", color=colour, label=mark, alpha=0.7)
    right.xaxis.set_minor_locator(NullLocator())
    right.set_xticks(ORDERS, [str(order) for order in ORDERS])
    right.set_xlabel("states", fontsize=8)
    right.set_ylabel("condition number of the eigenvectors", fontsize=8)
    right.legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="partial_observation",
    paper="Gu, Gupta, Goel, Re, On the Parameterization and Initialization of Diagonal State Space Models, 2022; Yu, "
    "Nigmetov, Morozov, Mahoney, Erichson, Robustifying State-space Models for Long Sequences via Approximate "
    "Diagonalization, 2024",
    claim="A layer of diagonal linear systems, trained by convolution and run by recurrence, remembers what a sequence "
    "model must; a small perturbation of HiPPO makes its eigenvectors computable, and stays nearer to it than a "
    "diagonal approximation.",
    setting=f"Pendulum-v1 with only the angle's cosine and sine observed, random torques, {TRAIN} episodes of {STEPS} "
    f"real steps to learn from and {TEST} others to judge by; an MLP that sees the last observation and action beside "
    "recurrent models of width 48. The papers classify long sequences (Long Range Arena); the conditioning is theirs.",
    measure=measure,
    findings=findings,
    draw=draw,
    table=table,
    notes="All models learn a Gaussian by its likelihood. A settled step is one from step "
    f"{SETTLED} of its episode on. The perturbation is the first Gaussian one drawn, scaled to its norm; the paper "
    "optimises it.",
)
