"""MBPO beside Stable-Baselines3's SAC at the same number of real steps, on two pendulums."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from matplotlib.figure import Figure
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from learneddyn.agents import MBPO, FastSAC
from learneddyn.core import Json
from learneddyn.evaluation.stats import bootstrap_difference, bootstrap_interval
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.online import learn_online
from learneddyn.runs.seeds import Notify

STEPS, EPISODES = 5000, 5
TASKS = {"InvertedPendulum-v5": (-0.05, 1000.0), "Pendulum-v1": (-1.0, -250.0)}
"""Target entropy of the policy, and the return that is asked for."""
UPDATES = 5
LABELS = {"mbpo": "MBPO", "sac": "SAC (SB3)", "busy": f"the same SAC, {UPDATES} updates, no model"}


def settings(env_id: str, seed: int) -> dict[str, Any]:
    """Return what MBPO's SAC and the same SAC without a model have in common."""
    return {
        "learning_rate": 1e-3,
        "batch_size": 128,
        "learning_starts": 500,
        "gradient_steps": UPDATES,
        "target_entropy": TASKS[env_id][0],
        "policy_kwargs": {"net_arch": [64, 64]},
        "seed": seed,
        "device": "cpu",
    }


def make(kind: str, env_id: str, seed: int, env: gym.Env[Any, Any]) -> BaseAlgorithm:
    """Return an agent: "mbpo", "sac" with Stable-Baselines3's defaults, or "busy", SAC with MBPO's settings."""
    if kind == "sac":
        return SAC("MlpPolicy", env, seed=seed, device="cpu")
    if kind == "busy":
        return FastSAC("MlpPolicy", env, **settings(env_id, seed))
    model = ProbabilisticEnsemble(
        num_members=5, num_elites=3, hidden=[64, 64], weight_decay=1e-5, batch_size=32, max_epochs=30
    )
    return MBPO("MlpPolicy", env, model=model, rollout_batch=5000, **settings(env_id, seed))


def measure(seed: int, folder: Path, notify: Notify) -> Json:
    """Play one seed of every agent on both tasks."""
    curves: Json = {}
    for env_id in TASKS:
        curves[env_id] = {}
        for kind in LABELS:

            def say(what: str, share: float, told: str = f"{kind} on {env_id}") -> None:
                notify(f"{told}, {what}", share)

            marks = learn_online(
                partial(make, kind, env_id, seed),
                env_id,
                folder / f"{env_id}-{kind}",
                steps=STEPS,
                judge_every=500,
                episodes=EPISODES,
                seed=seed,
                notify=say,
            )
            curves[env_id][kind] = [
                {"steps": mark.real_steps, "return": mark.mean, "cpu_seconds": mark.cpu_seconds} for mark in marks
            ]
    return curves


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the returns at the last step, not the best ones on the way."""
    found = []
    for env_id, (_, asked) in TASKS.items():
        last = {kind: [entry[env_id][kind][-1]["return"] for entry in figures.values()] for kind in LABELS}
        mine = bootstrap_interval(last["mbpo"])
        found.append(
            Finding(f"{env_id}: MBPO's return at {STEPS} real steps", mine, f">= {asked:g}", mine.value >= asked)
        )
        found += [
            Finding(f"{env_id}: {LABELS[kind]}", bootstrap_interval(last[kind]), "beside it", None)
            for kind in ("sac", "busy")
        ]
        more = bootstrap_difference(
            [_mean(entry[env_id]["mbpo"]) for entry in figures.values()],
            [_mean(entry[env_id]["sac"]) for entry in figures.values()],
            paired=True,
        )
        found.append(
            Finding(f"{env_id}: mean return while learning, MBPO less SAC", more, "interval above 0", more.low > 0)
        )
    return found


def draw(figures: dict[int, Json]) -> Figure:
    """Draw every seed's curve."""
    colours = {"mbpo": "#d8495c", "sac": "#2a6f97", "busy": "#8a8a8a"}
    figure, axes = panels(len(TASKS))
    for ax, (env_id, (_, asked)) in zip(axes, TASKS.items(), strict=True):
        for kind, label in LABELS.items():
            for index, entry in enumerate(figures.values()):
                steps, returns = ([mark[name] for mark in entry[env_id][kind]] for name in ("steps", "return"))
                ax.plot(steps, returns, color=colours[kind], linewidth=1.2, label=None if index else label)
        ax.axhline(asked, color="black", linewidth=0.8, linestyle=":")
        ax.set(xlabel="real steps", ylabel="return", title=env_id)
    axes[0].legend(frameon=False, fontsize=7)
    return figure


def _mean(curve: list[dict[str, float]]) -> float:
    return sum(mark["return"] for mark in curve) / len(curve)


CLAIM = Claim(
    name="mbpo",
    paper='Janner, Fu, Zhang, Levine, "When to Trust Your Model: Model-Based Policy Optimization", 2019',
    claim="Short imagined rollouts, branched from real states, let SAC learn from far fewer real steps.",
    setting=f"InvertedPendulum-v5 and Pendulum-v1, {STEPS} real steps, 500 of them random; refit every 250 steps, "
    f"rollouts of one step from 5,000 real states per refit (paper 100,000), {UPDATES} updates per step (paper 10), "
    "5 % real rows, ensemble of 5 members of 2 x 64 (paper 7 of 4 x 200), at most 30 epochs "
    "of batches of 32 per fit, SAC 2 x 64. "
    f"Judged every 500 steps on {EPISODES} episodes of the deterministic policy. Beside it: Stable-Baselines3's SAC "
    "with its defaults (one update per step), and MBPO's SAC with as many updates but no model.",
    measure=measure,
    findings=findings,
    draw=draw,
    notes="Tried first, on one seed: batches of 256 rows and at most 20 epochs for the model. Its first fits then take "
    "some 40 gradient steps, predict a noise several times as large as the change itself, and Pendulum-v1 needs 5,000 "
    "steps to -211. The third agent tells what the model adds to many updates.",
)
