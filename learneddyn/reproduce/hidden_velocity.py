"""Hybrid Internal Model: velocities that no sensor shows, estimated from the last steps of real systems."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from torch import Tensor

from learneddyn.agents import HIMCallback, HIMExtractor, PrivilegedHistory
from learneddyn.agents.him import HIMTrainer, Successions, rollout_successions
from learneddyn.core import Json, generator
from learneddyn.data import collect
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.runs import Notify
from learneddyn.runs.claims import Claim, Finding, panels

HISTORY = 6
"""Steps that the estimator sees, as in the paper."""
TRAIN, TEST = 20_000, 6000
EPOCHS, BATCH = 15, 512
SHOWN = 17
"""The picture shows one row of so many."""
STEPS = 40
"""Steps of an episode of the pendulum."""
MASSES = (0.4, 2.5)
"""Range of a pendulum's mass, log-uniform: another one in every episode."""
ONLINE, ROLLOUT = 20_480, 2048
"""Real steps of the agent beside which the estimator learns, in all and between two updates."""

PAPER: dict[str, Any] = {
    "learning_rate": 1e-3,
    "n_epochs": 5,
    "batch_size": ROLLOUT // 4,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "ent_coef": 0.01,
    "policy_kwargs": {"features_extractor_class": HIMExtractor},
}
"""The paper's PPO, but for its networks (SB3's are smaller) and its adaptive learning rate."""


class RandomMass(gym.Wrapper[Any, Any, Any, Any]):
    """A pendulum whose mass is drawn anew in every episode (kg)."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode with another mass."""
        obs, info = self.env.reset(seed=seed, options=options)
        low, high = np.log(MASSES)
        self.unwrapped.m = float(np.exp(self.unwrapped.np_random.uniform(low, high)))  # type: ignore[attr-defined]
        return obs, info


class System(NamedTuple):
    """A real system, and what is hidden of it."""

    make: Callable[[], gym.Env[Any, Any]]
    columns: tuple[int, ...]


def pendulum() -> gym.Env[Any, Any]:
    """Return pendulums of all masses."""
    return RandomMass(gym.make("Pendulum-v1", max_episode_steps=STEPS))


SYSTEMS = {
    "pendulums": System(pendulum, (2,)),
    "Hopper's torso": System(lambda: gym.make("Hopper-v5", max_episode_steps=200), (5, 6)),
    "HalfCheetah's torso": System(lambda: gym.make("HalfCheetah-v5", max_episode_steps=200), (8, 9)),
}
VARIANTS = {"a step later": (HISTORY, True), "a step later, from one step": (1, True), "now": (HISTORY, False)}
"""How many steps the estimate looks at, and whether it is of the step after them."""


def watched(system: System) -> PrivilegedHistory:
    """Return the system as the estimator sees it."""
    return PrivilegedHistory(system.make(), system.columns, HISTORY)


def real_rows(system: System, count: int, seed: int) -> dict[str, Successions]:
    """Return real steps under random actions, as every variant sees them."""
    data = collect(lambda: watched(system), steps=count, seed=seed, progress=False)
    v, (_, width) = len(system.columns), watched(system).observation_space["history"].shape  # type: ignore[index]
    history, after = data.obs[:, v:].reshape(len(data), HISTORY, width), data.next_obs[:, -width:].contiguous()
    return {
        name: Successions(history[:, -steps:], after, (data.next_obs if ahead else data.obs)[:, :v])
        for name, (steps, ahead) in VARIANTS.items()
    }


def explained(said: Float[Tensor, "n v"], hidden: Float[Tensor, "n v"]) -> list[float]:
    """Return the share of every hidden column's variance that estimates explain (R^2)."""
    return (1 - (said - hidden).square().mean(dim=0) / hidden.var(dim=0, correction=0)).tolist()


def fit(train: Successions, test: Successions, seed: int) -> Json:
    """Train an estimator on real rows and judge it on those of other episodes."""
    box, (_, steps, width) = gym.spaces.Box, train.history.shape
    space = gym.spaces.Dict({"history": box(-1, 1, (steps, width)), "hidden": box(-1, 1, train.hidden.shape[1:])})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trainer = HIMTrainer(HIMExtractor(space))
    trainer.extractor.observe(train)
    loss = trainer.epochs(train, EPOCHS, BATCH, generator(seed))
    with torch.no_grad():
        said, code = trainer.extractor.estimate(test.history)
        favourite = (code @ trainer.extractor.prototypes.T).argmax(dim=1)
    return {
        "R2": explained(said, test.hidden),
        "prototypes": len(favourite.unique()),
        "swap": float(loss.swap),
        "said": said[::SHOWN, 0].tolist(),
        "true": test.hidden[::SHOWN, 0].tolist(),
    }


class Held(HIMCallback):
    """Judge the estimator on every rollout before it has learned from it."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []

    def _on_rollout_end(self) -> None:
        assert isinstance(self.model, PPO)
        rows = rollout_successions(self.model)
        extractor = self.model.policy.features_extractor
        assert isinstance(extractor, HIMExtractor)
        with torch.no_grad():
            self.scores += explained(extractor.estimate(rows.history)[0], rows.hidden)
        super()._on_rollout_end()


def beside_an_agent(seed: int) -> list[float]:
    """Return R^2 on every rollout of a PPO agent that acts on the features, before it is learned from."""
    env = PrivilegedHistory(pendulum(), (2,), HISTORY)
    callback = Held()
    with torch.random.fork_rng():
        agent = PPO("MultiInputPolicy", env, n_steps=ROLLOUT, seed=seed, device="cpu", **PAPER)
        agent.learn(ONLINE, callback=callback)
    return callback.scores


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Estimate velocities on logs of every system, then beside an agent."""
    figures: Json = {}
    for done, (name, system) in enumerate(SYSTEMS.items()):
        notify(name, done / (1 + len(SYSTEMS)))
        train, test = (real_rows(system, count, s) for count, s in ((TRAIN, seed), (TEST, seed + 1000)))
        figures[name] = {variant: fit(train[variant], test[variant], seed) for variant in VARIANTS}
    notify("beside PPO", len(SYSTEMS) / (1 + len(SYSTEMS)))
    return figures | {"online": beside_an_agent(seed)}


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the estimates on pendulums, on logs and beside the agent; report the robots' beside them."""
    entries = list(figures.values())
    first, *robots = SYSTEMS
    later, single, now = VARIANTS

    def over(values: Any) -> Any:
        return bootstrap_interval([float(values(entry)) for entry in entries])

    def least(name: str, variant: str) -> Any:
        return over(lambda entry: min(entry[name][variant]["R2"]))

    full, online = least(first, later), over(lambda entry: entry["online"][-1])
    used = over(lambda entry: entry[first][later]["prototypes"])
    return [
        Finding(f"{first}: R2 of the velocity {later}, held-out steps", full, "at least 0.95", full.value >= 0.95),
        Finding(f"{first}: R2 {single}", least(first, single), "", None),
        Finding(
            f"{first}, beside PPO: R2 on the last rollout, before it is learned from",
            online,
            "at least 0.95",
            online.value >= 0.95,
        ),
        Finding(f"{first}: prototypes in use, of 32", used, "at least 8", used.value >= 8),
        *(
            Finding(f"{name}: R2 of the velocity {variant}, lower of two columns", least(name, variant), "", None)
            for name in robots
            for variant in (later, now)
        ),
    ]


def table(figures: dict[int, Json]) -> str:
    """Return R2 by system, column and variant, means over seeds."""
    lines = ["| R2 | " + " | ".join(VARIANTS) + " |", "|---" * (1 + len(VARIANTS)) + "|"]
    for name, system in SYSTEMS.items():
        for index, column in enumerate(system.columns):
            values = [np.mean([entry[name][v]["R2"][index] for entry in figures.values()]) for v in VARIANTS]
            lines.append(f"| {name}, column {column} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines)


def draw(figures: dict[int, Json]) -> Figure:
    """Draw estimates against the truth, and R2 beside the agent."""
    figure, axes = panels(1 + len(SYSTEMS), width=3.0, height=3.0)
    first = next(iter(figures.values()))
    for ax, name in zip(axes, SYSTEMS, strict=False):
        for variant, colour in zip(VARIANTS, ("tab:blue", "tab:grey", "tab:orange"), strict=True):
            if variant != "now" or name != next(iter(SYSTEMS)):
                points = first[name][variant]
                ax.plot(points["true"], points["said"], ".", color=colour, markersize=3, label=variant, alpha=0.7)
        ends = ax.get_xlim()
        ax.plot(ends, ends, color="black", linewidth=0.7)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("hidden velocity", fontsize=8)
        ax.set_ylabel("estimate", fontsize=8)
        ax.legend(fontsize=6, frameon=False)
    for entry in figures.values():
        rollouts = ROLLOUT * (1 + np.arange(len(entry["online"])))
        axes[-1].plot(rollouts, np.maximum(entry["online"], -0.1), "o-", color="tab:blue", markersize=3)
    axes[-1].axhline(0.95, color="grey", linewidth=0.7, linestyle=":")
    axes[-1].set_title("pendulums, beside PPO", fontsize=9)
    axes[-1].set_xlabel("real steps", fontsize=8)
    axes[-1].set_ylabel("R2 on a new rollout (at least -0.1)", fontsize=8)
    return figure


CLAIM = Claim(
    name="hidden_velocity",
    paper="Long, Wang, Li, Cao, Gao, Pang, Hybrid Internal Model: Learning Agile Legged Locomotion with Simulated "
    "Robot Response, 2024",
    claim="From a short history of what its sensors show, an agent can estimate the velocity that they do not, and a "
    "code of how the system responds, beside its policy.",
    setting=f"Pendulum-v1 with a mass from {MASSES[0]} to {MASSES[1]} kg in every episode, its angular velocity "
    f"hidden; Hopper-v5 and HalfCheetah-v5 with the torso's linear velocity hidden, as on the paper's robots: {TRAIN} "
    f"steps under random actions each, judged on {TEST} steps of other episodes. Then PPO on the pendulums for "
    f"{ONLINE} steps, the estimator beside it. The paper trains legged robots in thousands of parallel simulations.",
    measure=measure,
    findings=findings,
    draw=draw,
    table=table,
    notes="The source estimates the velocity one step after the history, which at 0.008 s (Hopper) or 0.05 s "
    "(HalfCheetah) a step depends on an action that the history does not hold; random actions show how much. "
    "`HIMCallback(ahead=False)` estimates the velocity at the newest step instead.",
)
