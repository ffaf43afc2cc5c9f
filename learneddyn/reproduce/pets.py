"""Swing a cart-pole up within a dozen trials, by planning in a model learned from nothing but those trials."""

from pathlib import Path

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure

from learneddyn import tasks
from learneddyn.agents import MPC, PETS
from learneddyn.core import Json
from learneddyn.evaluation.stats import Estimate, bootstrap_interval, plain
from learneddyn.files import surviving_folder
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import ICEM
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

ENV = "learneddyn/CartPoleSwingUp-v0"
STEPS, TRIALS = 200, 12
LAST = 3
"""Trials whose mean return a seed is judged by: one trial alone is a single start."""
SOLVED = 150.0


def planner() -> ICEM:
    """Return the planner of both, on the truth and in the model: 50, 40 and 32 sequences a step."""
    return ICEM(horizon=25, candidates=50, elites=10, iterations=3, beta=2.0)


def model() -> ProbabilisticEnsemble:
    """Return five small networks; `scale_targets` lets slow columns count as much as fast ones."""
    return ProbabilisticEnsemble(
        5,
        5,
        hidden=(64, 64),
        angles=tasks.get(ENV).angles,
        scale_targets=True,
        weight_decay=1e-5,
        batch_size=64,
        patience=10,
        max_epochs=60,
    )


def oracle(seed: int) -> float:
    """Return what the planner earns in one trial if it plans in the simulator itself."""
    truth = TruthDynamics(ENV, threads=1)
    policy = MPC(World(truth, tasks.get(ENV)), planner(), seed=seed)
    env, state, total = gym.make(ENV), None, 0.0
    obs, _ = env.reset(seed=seed)
    for _ in range(STEPS):
        action, state = policy.predict(obs, state, deterministic=True)
        obs, reward, *_ = env.step(action)
        total += float(reward)
    env.close()
    truth.close()
    return total


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Play the oracle's trial, then learn for twelve; a killed seed goes on after its last finished trial."""
    env, folder = gym.make(ENV), home / "agent"
    if surviving_folder(folder).exists():
        agent = PETS.load(folder, env, device="cpu")
    else:
        agent = PETS(env, model(), planner(), particles=5, sampler="tsinf", seed=seed, device="cpu")
    while agent.trials < TRIALS:
        notify(
            f"trial {agent.trials + 1}, returns {[round(earned) for earned in agent.returns]}", agent.trials / TRIALS
        )
        agent.learn(STEPS, reset_num_timesteps=False, log_interval=0, checkpoint=folder)
    env.close()
    notify("planning on the true simulator", 1.0)
    trials = [{name: plain(value) for name, value in trial.items()} for trial in agent.history]
    return {"oracle": oracle(seed), "returns": agent.returns, "trials": trials}


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the oracle and the last trials; report how fast, and what the model knew."""
    seeds = list(figures.values())
    best = bootstrap_interval([seed["oracle"] for seed in seeds])
    late = bootstrap_interval([float(np.mean(seed["returns"][-LAST:])) for seed in seeds], np.median)
    first = bootstrap_interval([_first(seed["returns"]) for seed in seeds], np.median)
    found = [
        Finding("iCEM on the true simulator: return of a trial", best, "at least 175", best.value >= 175),
        Finding(
            f"PETS, median over seeds of the mean return of trials {TRIALS - LAST + 1} to {TRIALS} (2,400 real steps)",
            late,
            f"at least {SOLVED:g}",
            late.value >= SOLVED,
        ),
        Finding(f"real steps until the first trial with {SOLVED:g} (2,600: never)", first, "reported", None),
    ]
    for what, name in (
        ("steps until the model's open loop is no better than no change, last trial (at most 25)", "model/break_even"),
        ("return of 25 steps as imagined along the actions of the last trial", "imagined/return"),
        ("the real return of the same steps", "real/return"),
        ("share of the wall time spent planning", "time/plan_share"),
    ):
        found.append(Finding(what, _over_seeds(seeds, name), "reported", None))
    return found


def draw(figures: dict[int, Json]) -> Figure:
    """Draw returns and what the model knew, per trial."""
    figure, (returns, known) = panels(2, width=4.2)
    for index, (seed, entry) in enumerate(figures.items()):
        steps = STEPS * np.arange(1, len(entry["returns"]) + 1)
        returns.plot(steps, entry["returns"], "o-", color=f"C{index}", markersize=3, label=f"PETS, seed {seed}")
        told = [
            (at, trial["model/fresh_mse"])
            for at, trial in zip(steps, entry["trials"], strict=True)
            if "model/fresh_mse" in trial
        ]
        known.plot(*zip(*told, strict=True), "o-", color=f"C{index}", markersize=3)
    oracle = float(np.mean([entry["oracle"] for entry in figures.values()]))
    returns.axhline(oracle, color="grey", linewidth=1, label=f"same planner, true simulator: {oracle:.0f}")
    returns.axhline(SOLVED, color="grey", linewidth=1, linestyle=":")
    returns.set_xlabel("real steps", fontsize=8)
    returns.set_ylabel("return of the trial", fontsize=8)
    returns.legend(fontsize=7, frameon=False, loc="lower right")
    known.set_yscale("log")
    known.set_xlabel("real steps", fontsize=8)
    known.set_ylabel("squared error of one step on the new trial,\nbefore fitting it (1: mean change)", fontsize=8)
    return figure


def _first(returns: list[float]) -> float:
    """Return the real steps up to the end of the first trial that is solved."""
    solved = [index for index, earned in enumerate(returns, start=1) if earned >= SOLVED]
    return float(STEPS * (solved[0] if solved else TRIALS + 1))


def _over_seeds(seeds: list[Json], name: str) -> Estimate:
    return bootstrap_interval([seed["trials"][-1][name] for seed in seeds])


CLAIM = Claim(
    name="pets",
    paper="Chua, Calandra, McAllister, Levine, Deep Reinforcement Learning in a Handful of Trials using Probabilistic "
    "Dynamics Models, 2018",
    claim="An ensemble of probabilistic networks, planned in by sampled trajectories, learns to control a system in a "
    "handful of trials.",
    setting="The paper's cart-pole swing-up in MuJoCo, 200 steps a trial, the first one random, twelve in all. Lighter "
    "than the paper: five networks of 2 x 64 (3 x 500 there), 5 particles that keep their network (20), and iCEM with "
    "122 sequences over 25 steps (CEM with 2,000); targets are scaled, and a fit takes up to 60 epochs (5).",
    measure=measure,
    findings=findings,
    draw=draw,
)
