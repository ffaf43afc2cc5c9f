"""Does SAC learn the same when its updates are rewritten for speed? FastSAC beside Stable-Baselines3's SAC."""

import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from stable_baselines3 import SAC

from learneddyn.agents import DeviceReplayBuffer, FastSAC
from learneddyn.core import Json
from learneddyn.evaluation.returns import evaluate
from learneddyn.evaluation.stats import bootstrap_difference, bootstrap_interval
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify

STEPS = {"Pendulum-v1": 3000, "InvertedPendulum-v5": 5000}
POINTS, EPISODES = 10, 4
"""Evaluations along a curve, and episodes of each."""
FINAL_EPISODES = 16
SHARED: dict[str, Any] = {
    "learning_rate": 1e-3,
    "tau": 0.02,
    "batch_size": 128,
    "learning_starts": 200,
    "policy_kwargs": {"net_arch": [64, 64]},
    "device": "cpu",
}
METHODS: dict[str, tuple[type[SAC], dict[str, Any]]] = {
    "SB3": (SAC, SHARED),
    "FastSAC": (FastSAC, SHARED | {"replay_buffer_class": DeviceReplayBuffer}),
}


def learn(env_id: str, method: str, seed: int) -> Json:
    """Return the curve of evaluated returns, the final return and the CPU seconds that learning took."""
    kind, options = METHODS[method]
    model = kind("MlpPolicy", env_id, seed=seed, **options)
    curve, spent = [], 0.0
    for _ in range(POINTS):
        begun = time.process_time()
        model.learn(STEPS[env_id] // POINTS, reset_num_timesteps=False)
        spent += time.process_time() - begun
        curve.append(float(np.mean(evaluate(model, env_id, episodes=EPISODES, seed=seed).returns)))
    final = float(np.mean(evaluate(model, env_id, episodes=FINAL_EPISODES, seed=1000 + seed).returns))
    return {"curve": curve, "final": final, "seconds": spent}


def measure(seed: int, folder: Path, notify: Notify) -> Json:
    """Let every method learn both tasks."""
    figures: dict[str, Any] = {}
    plays = [(env_id, method) for env_id in STEPS for method in METHODS]
    for index, (env_id, method) in enumerate(plays):
        notify(f"{env_id}, {method}", index / len(plays))
        figures.setdefault(env_id, {})[method] = learn(env_id, method, seed)
    return figures


def _samples(figures: dict[int, Json], env_id: str, method: str, what: str) -> list[float]:
    """Return one figure per seed; the area under the curve is the mean of its points."""
    entries = [figures[seed][env_id][method] for seed in figures]
    return [float(np.mean(entry["curve"]) if what == "area" else entry[what]) for entry in entries]


def _findings(figures: dict[int, Json]) -> list[Finding]:
    found = []
    for env_id in STEPS:
        for what, told in (("final", "final return"), ("area", "mean return along the curve")):
            fast, slow = (_samples(figures, env_id, method, what) for method in ("FastSAC", "SB3"))
            found.append(Finding(f"{env_id}: {told}, SB3", bootstrap_interval(slow), "reported", None))
            difference = bootstrap_difference(fast, slow, paired=True)
            covers = difference.low <= 0 <= difference.high
            found.append(Finding(f"{env_id}: {told}, FastSAC less SB3", difference, "interval covers 0", covers))
        fast, slow = (_samples(figures, env_id, method, "seconds") for method in ("FastSAC", "SB3"))
        ratio = bootstrap_interval(np.divide(slow, fast))
        found.append(
            Finding(f"{env_id}: CPU time of learning, environment included, SB3 over FastSAC", ratio, "reported", None)
        )
    return found


def _draw(figures: dict[int, Json]) -> Figure:
    figure, axes = panels(len(STEPS))
    for ax, (env_id, steps) in zip(axes, STEPS.items(), strict=True):
        at = np.arange(1, POINTS + 1) * steps / POINTS
        for method, color in zip(METHODS, ("black", "tab:blue"), strict=True):
            curves = np.array([figures[seed][env_id][method]["curve"] for seed in figures])
            points = [bootstrap_interval(column) for column in curves.T]
            ax.plot(at, [point.value for point in points], color=color, label=method)
            ax.fill_between(at, [p.low for p in points], [p.high for p in points], color=color, alpha=0.15, lw=0)
        ax.set_title(env_id, fontsize=9)
        ax.set_xlabel("environment steps", fontsize=8)
    axes[0].set_ylabel("return", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="fast_sac",
    paper=(
        "Haarnoja, Zhou, Abbeel, Levine, Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning "
        "with a Stochastic Actor (2018), as implemented by Raffin, Hill, Gleave, Kanervisto, Ernestus, Dormann, "
        "Stable-Baselines3: Reliable Reinforcement Learning Implementations (2021)"
    ),
    claim=(
        "Soft actor-critic learns continuous control off-policy, and stably over seeds. The claim tested here is ours: "
        "its updates with gradients by hand and a packed replay, as in `FastSAC`, learn what Stable-Baselines3's learn."
    ),
    setting=(
        "Real environments, ten seeds, 2 x 64 nets, batch 128, learning rate 1e-3 and tau 0.02 for both (the defaults, "
        "2 x 256 nets, batch 256, 3e-4 and 0.005, would take hours); curves of "
        f"{POINTS} evaluations of {EPISODES} episodes, final returns of {FINAL_EPISODES} episodes of the last policy. "
        "Equal seeds share the first weights and the starts of the evaluations, so differences are paired; but FastSAC "
        "samples from its replay on the device, and so sees other batches."
    ),
    measure=measure,
    findings=_findings,
    draw=_draw,
    seeds=tuple(range(10)),
)
