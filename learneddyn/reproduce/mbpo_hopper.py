"""MBPO on Hopper: the curve of one seed, from one command that can be killed and resumed.

``learneddyn reproduce mbpo_hopper --resume true`` goes on where the last call was stopped.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
from matplotlib.figure import Figure

from learneddyn.agents import MBPO
from learneddyn.core import Json
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.online import learn_online
from learneddyn.runs.seeds import Notify

ENV = "Hopper-v5"
STEPS = 30_000
EPISODES = 5


def agent(env: gym.Env[Any, Any], seed: int) -> MBPO:
    """Return MBPO with the paper's loop and smaller nets."""
    model = ProbabilisticEnsemble(
        num_members=5,
        num_elites=3,
        hidden=[128, 128, 128],
        learn_reward=True,
        weight_decay=5e-5,
        batch_size=64,
        max_epochs=10,
        scale_targets=True,
    )
    return MBPO(
        "MlpPolicy",
        env,
        model=model,
        schedule=(20, 150, 1, 15),
        rollout_batch=20_000,
        learning_starts=5000,
        gradient_steps=10,
        target_entropy=-1.0,
        policy_kwargs={"net_arch": [128, 128]},
        seed=seed,
        device="cpu",
    )


def measure(seed: int, folder: Path, notify: Notify) -> Json:
    """Play one seed, or what is left of it."""
    marks = learn_online(
        lambda env: agent(env, seed), ENV, folder, steps=STEPS, episodes=EPISODES, seed=seed, notify=notify
    )
    return {"curve": [mark._asdict() for mark in marks]}


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Report the last judgements; one seed says nothing about other seeds."""
    curve = next(iter(figures.values()))["curve"]
    last = curve[-1]
    best = max(curve, key=lambda mark: sum(mark["returns"]))
    what = f"return of seed 0 at {last['real_steps']} real steps (interval: over {EPISODES} episodes)"
    return [
        Finding(what, bootstrap_interval(last["returns"]), "reported as it is", None),
        Finding(
            f"its best judgement, at {best['real_steps']} real steps",
            bootstrap_interval(best["returns"]),
            "reported as it is",
            None,
        ),
    ]


def draw(figures: dict[int, Json]) -> Figure:
    """Draw return and model error over real steps."""
    figure, (returns, error) = panels(2)
    for seed, entry in figures.items():
        curve = entry["curve"]
        steps = [mark["real_steps"] for mark in curve]
        means = [sum(mark["returns"]) / len(mark["returns"]) for mark in curve]
        low, high = ([function(mark["returns"]) for mark in curve] for function in (min, max))
        returns.plot(steps, means, color="#2a6f97", label=f"seed {seed}")
        returns.fill_between(steps, low, high, color="#2a6f97", alpha=0.2, linewidth=0)
        known = [mark for mark in curve if "model/fresh_mse" in mark["figures"]]
        error.plot(
            [mark["real_steps"] for mark in known],
            [mark["figures"]["model/fresh_mse"] for mark in known],
            color="#d8495c",
        )
    returns.set(xlabel="real steps", ylabel="return, mean and range", title="Hopper-v5")
    returns.legend(frameon=False, fontsize=7)
    error.set(xlabel="real steps", ylabel="error² on fresh steps", yscale="log", title="one-step model error")
    return figure


CLAIM = Claim(
    name="mbpo_hopper",
    paper='Janner, Fu, Zhang, Levine, "When to Trust Your Model: Model-Based Policy Optimization", 2019',
    claim="Short imagined rollouts let SAC learn to hop from some ten thousand real steps.",
    setting="Hopper-v5, one seed, 30,000 real steps, 5,000 of them random; the paper's loop (refit every 250 steps, "
    "5 % real rows, rollout lengths [20, 150, 1, 15]) with smaller parts: 5 members of 3 x 128 (paper 7 of 4 x 200), "
    "targets standardised (paper: not), at most 10 epochs of batches of 64 per fit, 20,000 rollouts per refit (paper "
    "100,000), 10 updates per step (paper 20), SAC 2 x 128 (paper 2 x 256).",
    measure=measure,
    findings=findings,
    draw=draw,
    seeds=(0,),
)
