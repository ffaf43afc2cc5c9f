"""When an offline learner must stay near its data, and when that only holds it back: pendulum logs, wide and narrow."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from learneddyn.core import Json, Transitions
from learneddyn.data import collect
from learneddyn.evaluation.returns import evaluate
from learneddyn.evaluation.stats import bootstrap_difference, bootstrap_interval
from learneddyn.offline import BC, IQL, TD3BC, OfflineAlgorithm
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify

ENV = "Pendulum-v1"
STEPS, EPISODE = 40_000, 200
UPDATES, EPISODES = 8000, 20
SHARED: dict[str, Any] = {"policy_kwargs": {"net_arch": (64, 64)}, "device": "cpu"}
METHODS: dict[str, Callable[[Transitions, int], OfflineAlgorithm]] = {
    "BC": lambda data, seed: BC("MlpPolicy", data, seed=seed, **SHARED),
    "TD3+BC": lambda data, seed: TD3BC("MlpPolicy", data, reward_scale=0.1, seed=seed, **SHARED),
    "IQL": lambda data, seed: IQL("MlpPolicy", data, reward_scale=0.1, seed=seed, **SHARED),
    "TD3": lambda data, seed: TD3BC("MlpPolicy", data, alpha=math.inf, reward_scale=0.1, seed=seed, **SHARED),
}
QUALITIES = {"wide": np.linspace(0.0, 0.8, 9), "narrow": np.array([0.8])}
"""Shares of the good controller's torque; a log draws one per episode."""


class Swinger:
    """Energy pumping, and a linear controller near the top, weakened and noisy: torque q u*(s) + σ ε.

    Args:
        quality: q, 0 (noise alone) to 1.
        seed: of the noise.
        noise: its standard deviation σ in N m; None for 2.4 (1 - q).
    """

    def __init__(self, quality: float, seed: int, noise: float | None = None) -> None:
        self.quality, self.noise = quality, 2.4 * (1 - quality) if noise is None else noise
        self.rng = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Return the torque of every row."""
        cosine, sine, velocity = np.asarray(observation, float).reshape(-1, 3).T
        missing = 15.0 - (0.5 * velocity**2 + 15.0 * cosine)
        pump = np.clip(missing, -2, 2) * np.sign(velocity + 1e-9)
        hold = -(10.0 * np.arctan2(sine, cosine) + 2.0 * velocity)
        torque = self.quality * np.clip(np.where(cosine > 0.9, hold, pump), -2, 2)
        torque = np.clip(torque + self.noise * self.rng.normal(size=len(torque)), -2, 2)
        return torque.astype(np.float32).reshape(*np.shape(observation)[:-1], 1), state


def log_of(kind: str, seed: int) -> Transitions:
    """Collect 200 episodes of the real pendulum."""
    noise = None if kind == "wide" else 0.1
    mixture = [(1.0, Swinger(q, 100 * seed + index, noise)) for index, q in enumerate(QUALITIES[kind])]
    return collect(ENV, steps=STEPS, behaviour=mixture, lanes=8, seed=seed, progress=False)


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Learn on both logs by every method; return mean real returns, and those of the logs."""
    figures: Json = {}
    jobs = [(kind, name) for kind in QUALITIES for name in METHODS]
    logs = {kind: log_of(kind, seed) for kind in QUALITIES}
    for kind, data in logs.items():
        figures[f"{kind}, log"] = float(data.reward.view(-1, EPISODE).sum(1).mean())
    for done, (kind, name) in enumerate(jobs):
        notify(f"{name} on the {kind} log", done / len(jobs))
        agent = METHODS[name](logs[kind], seed).learn(UPDATES)
        figures[f"{kind}, {name}"] = evaluate(agent, ENV, episodes=EPISODES, seed=seed).mean
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the order of the methods on both logs."""

    def over_seeds(name: str) -> np.ndarray:
        return np.array([seed[name] for seed in figures.values()])

    def ahead(kind: str, one: str, other: str, least: float) -> Finding:
        gap = bootstrap_difference(over_seeds(f"{kind}, {one}"), over_seeds(f"{kind}, {other}"), paired=True)
        return Finding(f"{kind} log: {one} minus {other}", gap, f"above {least:g}", gap.low > least)

    plain = bootstrap_interval(over_seeds("narrow, TD3"))
    rows = [
        Finding("narrow log: return of TD3", plain, "below -1000", plain.high < -1000),
        ahead("narrow", "IQL", "BC", -15.0),
        ahead("wide", "TD3", "IQL", 0.0),
        ahead("wide", "TD3", "TD3+BC", 0.0),
        ahead("wide", "TD3+BC", "BC", 0.0),
        ahead("wide", "IQL", "BC", 0.0),
    ]
    judged = {"narrow, TD3"}
    for name in next(iter(figures.values())):
        if name not in judged:
            what = name.replace(", log", " log itself: return").replace(", ", " log: return of ")
            rows.append(Finding(what, bootstrap_interval(over_seeds(name)), "reported", None))
    return rows


def draw(figures: dict[int, Json]) -> Figure:
    """Show every seed's return by method, on both logs."""
    figure, axes = panels(2, width=4.2, height=3.0)
    names = ["log", *METHODS]
    for ax, kind in zip(axes, QUALITIES, strict=True):
        for index, name in enumerate(names):
            values = [seed[f"{kind}, {name}"] for seed in figures.values()]
            ax.plot([index] * len(values), values, "o", color="grey" if name == "log" else "tab:blue", alpha=0.7)
            ax.plot([index - 0.25, index + 0.25], [np.mean(values)] * 2, color="black", linewidth=1)
        ax.set_title(f"{kind} log", fontsize=9)
        ax.set_xticks(range(len(names)), names, fontsize=8)
        ax.set_ylim(-1700, 0)
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("return in the real pendulum", fontsize=8)
    return figure


CLAIM = Claim(
    name="conservatism",
    paper="Fujimoto, Gu, A Minimalist Approach to Offline Reinforcement Learning, 2021; Kostrikov, Nair, Levine, "
    "Offline Reinforcement Learning with Implicit Q-Learning, 2021",
    claim="Off-policy learning fails on logs of a narrow policy, where nothing corrects the values of other actions; "
    "staying near the logged actions prevents that.",
    setting="Pendulum-v1: 200 logged episodes of a hand-written controller, executed with 0 to 0.8 of its torque and "
    "strong noise (wide) or 0.8 and weak noise (narrow); nets 2 x 64, rewards / 10, returns of 20 real episodes.",
    measure=measure,
    findings=findings,
    draw=draw,
)
