"""A learned dynamics reward filters what a model imagines: rollouts of a refrigerator under policies not logged."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.core import ActionFn, Json, Task, Transitions, generator
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import DynamicsReward, TransitionFilter
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.world import Sampler, World

EPISODES, STEPS = 60, 60
"""Of the log."""
STARTS, HORIZON = 100, 50
NOISE = 0.02
SPACES = Spaces(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(0.0, 1.0, (1,), np.float32))
MODEL: dict[str, Any] = {"num_members": 5, "num_elites": 5, "hidden": (64, 64), "max_epochs": 60, "scale_targets": True}
REWARD: dict[str, Any] = {
    "snapshots": 10,
    "games": 4,
    "updates": 5000,
    "hidden": (128, 128),
    "generator_hidden": (64, 64),
    "warm_up": 200,
    "scaling": "deviation",
}


def keep(temperature: Float[Tensor, "b 1"], target: float) -> Float[Tensor, "b 1"]:
    """Return the cooling power of the logged controller, whose set point is ``target`` in degrees Celsius."""
    return (0.15 * (temperature - target + 4.0)).clamp(0, 1)


POLICIES: dict[str, ActionFn] = {
    "logged": lambda obs: keep(obs, 2.0),
    "set point + 8": lambda obs: keep(obs, 10.0),
    "full cooling": torch.ones_like,
    "off": torch.zeros_like,
}
SELECTORS: dict[str, Callable[[DynamicsReward], str | Sampler]] = {
    "random elite": lambda reward: "elite",
    "softmax": lambda reward: TransitionFilter(reward, temperature=0.1),
    "argmax": lambda reward: TransitionFilter(reward, temperature=0.0),
    "argmax, last only": lambda reward: TransitionFilter(reward.thinned(reward.snapshots), temperature=0.0),
    "argmax, clipped": lambda reward: TransitionFilter(clipped(reward), temperature=0.0),
    "perfect reward": lambda reward: TransitionFilter(nearness, temperature=0.0),
}
COLOURS = dict(zip(SELECTORS, ("tab:grey", "tab:orange", "tab:blue", "tab:cyan", "tab:pink", "tab:green"), strict=True))
OFFSETS = np.linspace(-1.0, 1.0, 201)
"""Distances from the true next temperature at which the picture shows the reward."""


def after(temperature: Float[Tensor, "b 1"], power: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
    """Return the mean of the next temperature: heat leaks in from a room of 20 degrees, cooling takes it out."""
    return temperature + 0.05 * (20 - temperature) - 1.5 * power


def nearness(
    temperature: Float[Tensor, "b 1"], power: Float[Tensor, "b 1"], following: Float[Tensor, "b 1"]
) -> Float[Tensor, " b"]:
    """Return what a perfect reward would choose by: how near a step is to the true one, 0 at most, in °C."""
    return -(following - after(temperature, power)).abs()[:, 0]


def log_of(seed: int) -> Transitions:
    """Run the noisy controller in the real refrigerator, from starts around 10 degrees."""
    rng = generator(seed)
    temperature, rows = 10 + torch.randn(EPISODES, 1, generator=rng), []
    for _ in range(STEPS):
        noise = torch.randn(2, EPISODES, 1, generator=rng)
        power = (keep(temperature, 2.0) + 0.05 * noise[0]).clamp(0, 1)
        following = after(temperature, power) + NOISE * noise[1]
        rows.append((temperature, power, following))
        temperature = following
    obs, action, next_obs = (torch.stack(column, 1).view(-1, 1) for column in zip(*rows, strict=True))
    episode = torch.arange(EPISODES).repeat_interleave(STEPS)
    return Transitions(obs, action, -obs[:, 0].abs(), next_obs, episode < 0, episode, SPACES, "refrigerator")


TASK = Task("Refrigerator-v0", reward=lambda obs, action, next_obs: -obs[:, 0].abs(), terminated=never)


def clipped(reward: DynamicsReward) -> DynamicsReward:
    """Return the same networks under the calibration of the published code."""
    other = copy.deepcopy(reward)
    other.calibration = "clip"
    return other


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Learn model and reward from one log; return errors of imagined temperatures by policy and selector."""
    data, rng = log_of(seed), generator(1000 + seed)
    notify("learn the model", 0.0)
    model = ProbabilisticEnsemble(**MODEL)
    model.fit(data, rng=rng)
    notify("learn the dynamics reward", 0.1)
    reward = DynamicsReward(**REWARD)
    report = reward.fit(data, rng=rng)
    notify("imagine", 0.9)
    start = 10 + torch.randn(STARTS, 1, generator=rng)
    figures: Json = {"error": {}, "path": {}, "logged rows": [float(data.obs.min()), float(data.obs.max())]}
    for policy, act in POLICIES.items():
        true = [start]
        for _ in range(HORIZON):
            true.append(after(true[-1], act(true[-1])))
        truth = torch.cat(true[1:], 1)
        figures["path"][policy] = {"true": truth.mean(0).tolist()}
        for name, make in SELECTORS.items():
            world = World(model, TASK, sampler=make(reward))
            found = world.rollout(start, act, HORIZON, generator(seed)).next_obs.view(STARTS, HORIZON)
            figures["error"][f"{policy}, {name}"] = float((found - truth).abs().mean())
            figures["path"][policy][name] = found.mean(0).tolist()
    figures["curve"] = {str(at): curve(reward, at) for at in (5.0, 0.0, -5.0)}
    figures["reward"] = report.metrics
    return figures


def curve(reward: DynamicsReward, temperature: float) -> list[float]:
    """Return r^D of full cooling at a temperature, over the distance of the next one from the truth."""
    obs = torch.full((len(OFFSETS), 1), temperature)
    power = torch.ones_like(obs)
    offset = torch.as_tensor(OFFSETS, dtype=torch.float32)[:, None]
    return reward(obs, power, after(obs, power) + offset).tolist()


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the selectors against the random elite."""

    def errors(policy: str, selector: str) -> np.ndarray:
        return np.array([seed["error"][f"{policy}, {selector}"] for seed in figures.values()])

    def share(policy: str, selector: str, over: str = "random elite") -> Estimate:
        return bootstrap_interval(errors(policy, selector) / errors(policy, over))

    cooling = share("full cooling", "argmax")
    between = [
        share("full cooling", "softmax"),
        share("full cooling", "argmax", "softmax"),
    ]
    worst = bootstrap_interval(
        np.max([errors(policy, "softmax") - errors(policy, "random elite") for policy in POLICIES], axis=0)
    )
    reachable = share("full cooling", "perfect reward")
    rows = [
        Finding("full cooling: error of argmax / random elite", cooling, "at most 0.5", cooling.high <= 0.5),
        Finding("full cooling: error of softmax / random elite", between[0], "below 1", between[0].high < 1),
        Finding("full cooling: error of argmax / softmax", between[1], "below 1", between[1].high < 1),
        Finding("worst policy: error of softmax - random elite", worst, "at most 0.1 °C", worst.high <= 0.1),
        Finding("full cooling: error of a perfect reward's argmax / random elite", reachable, "reported", None),
    ]
    for at in next(iter(figures.values()))["curve"]:
        peaks = bootstrap_interval(np.array([OFFSETS[np.argmax(seed["curve"][at])] for seed in figures.values()]))
        rows.append(Finding(f"r^D's peak less the truth, full cooling at {float(at):g} °C", peaks, "reported", None))
    for policy in POLICIES:
        for selector in SELECTORS:
            rows.append(
                Finding(
                    f"{policy}: error of {selector}, °C", bootstrap_interval(errors(policy, selector)), "reported", None
                )
            )
    return rows


def draw(figures: dict[int, Json]) -> Figure:
    """Show errors of every seed, the mean temperatures of the first, and its reward around the truth."""
    figure, axes = panels(3, width=4.0, height=3.2)
    for at, policy in enumerate(POLICIES):
        for shift, (name, colour) in enumerate(COLOURS.items()):
            values = [seed["error"][f"{policy}, {name}"] for seed in figures.values()]
            place = at + 0.14 * (shift - 2.5)
            axes[0].plot([place] * len(values), values, "o", color=colour, ms=4, label=name if at == 0 else None)
    axes[0].set_xticks(range(len(POLICIES)), POLICIES, fontsize=7)
    axes[0].set_yscale("log")
    axes[0].set_title("mean error over 50 steps, °C", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    first = next(iter(figures.values()))
    steps = np.arange(1, HORIZON + 1)
    for policy in ("full cooling", "off"):
        path = first["path"][policy]
        axes[1].plot(steps, path["true"], color="black", linewidth=2, label="truth" if policy == "off" else None)
        for name in list(SELECTORS)[:3]:
            label = name if policy == "off" else None
            axes[1].plot(steps, path[name], color=COLOURS[name], linewidth=1.2, label=label)
    axes[1].axhspan(*first["logged rows"], color="tab:green", alpha=0.12, linewidth=0, label="logged")
    axes[1].set_title("temperature, full cooling (down) and off (up)", fontsize=9)
    axes[1].legend(fontsize=7, frameon=False)
    for at, values in first["curve"].items():
        axes[2].plot(OFFSETS, values, linewidth=1.2, label=f"at {float(at):g} °C")
    axes[2].axvline(0, color="black", linewidth=0.8)
    axes[2].set_title("r^D of full cooling, by distance from the truth, °C", fontsize=9)
    axes[2].legend(fontsize=7, frameon=False)
    return figure


CLAIM = Claim(
    name="morec",
    paper="Luo, Xu, Cao, Yu, Reward-Consistent Dynamics Models are Strongly Generalizable for Offline Reinforcement "
    "Learning, 2024",
    claim="A reward of real dynamics, learned adversarially from the log, still knows true steps where the model errs; "
    "choosing imagined steps by it keeps long rollouts of policies that were never logged near the truth.",
    setting="A stand-in of our own for the paper's refrigerator, whose equations we do not have: T' = T + 0.05 (20 - T)"
    " - 1.5 u + noise 0.02, logged under one noisy controller (60 episodes of 60 steps); five nets 2 x 64, ten "
    "candidates; four adversarial games of 5000 updates with ten snapshots each, states and actions scaled "
    "by their deviation; 100 rollouts of 50 steps, mean distance from the noise-free true temperature.",
    notes="Networks, games, calibration and scales of the reward are ours, see learneddyn/offline/dynamics_reward.py. "
    "'Last only' asks the last snapshot of each game; 'clipped' asks the same networks under the published "
    "calibration, which divides by the distance of the mean logits of log and generator: with our generator it nearly "
    "vanishes. 'Perfect reward' takes the candidate nearest to the truth, as no learned reward can know: where all "
    "elites err to one side, choosing among them helps little. An earlier run scaled states and actions by their "
    "range, as the published code does, and failed: in seed 2 argmax lost to the random elite under full cooling. "
    "(Before it a single game, a narrower and a much broader generator, and changes of the state on half the scale "
    "were tried on seeds 0 and 1.) The cause: below 5 °C the log shows no full cooling; temperature and power move "
    "together there, and only the controller's small noise tells their effects apart. In those units that noise is "
    "narrow, the discriminator learned it last or not at all, and far from the log its peak lay below the truth in "
    "nearly all games and snapshots. On some of seeds 10 to 13 we then tried, mostly with smaller networks: changes of "
    "the state on three to four times the scale, rates from 0.0003 to 0.002, constant and decaying to 0, weight decay "
    "0.1 to 3, SiLU, one hidden layer, generators kept from much broader to narrower than the log, half of the "
    "generated steps drawn broader still, no entropy bonus. None brought the peak back in all seeds. Scaling state and "
    "action by their deviation did, with all else equal: at -5 °C the peak came from 0.1 to 0.2 °C off the truth to "
    "within 0.03 °C in seeds 10, 11 and 13. That probe had one game, weight decay, decaying rates and broader "
    "generated steps; networks, rates, games and updates here are those of the earlier run, with the new scale alone.",
    measure=measure,
    findings=findings,
    draw=draw,
)
