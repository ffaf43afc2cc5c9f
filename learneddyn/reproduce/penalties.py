"""Which penalty knows where a model errs? The six of offline model-based RL against the true error, in two ways."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn import tasks
from learneddyn.core import Json, State, Transitions, generator
from learneddyn.evaluation.stats import bootstrap_interval, correlation
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import OfflineMBPO
from learneddyn.offline.dataset import bounds
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.world import PENALTIES, elite
from learneddyn.world.truth import TruthDynamics


class Place(NamedTuple):
    """A task, and the boxes of simulator states (positions, then velocities) that rows are drawn from."""

    real_id: str
    logged: tuple[list[float], list[float]]
    wide: tuple[list[float], list[float]]


PLACES = {
    "Pendulum": Place("Pendulum-v1", ([math.pi / 2, -3.0], [1.5 * math.pi, 3.0]), ([-math.pi, -8.0], [math.pi, 8.0])),
    "InvertedPendulum": Place(
        "InvertedPendulum-v5",
        ([-0.3, -0.18, -0.5, -1.5], [0.3, 0.18, 0.5, 1.5]),
        ([-0.9, -0.5, -3.0, -6.0], [0.9, 0.5, 3.0, 6.0]),
    ),
}
PROTOCOLS = ("transfer", "true model")
COLUMNS = ("AUROC", "Spearman")
JUDGED, BASE = ("max_pairwise_diff", "ensemble_std"), "max_aleatoric"
NOISE = 0.01
"""Of the sensors, in the units of every column."""
ROWS, ASKED = 6000, 2000
MODEL: dict[str, Any] = {"num_members": 7, "num_elites": 5, "hidden": (64, 64, 64), "max_epochs": 80}
STAGES = (1, 400, 1200)
"""Updates after which the policy's play in the model is kept."""
AGENT: dict[str, Any] = {
    "policy_kwargs": {"net_arch": (64, 64)},
    "batch_size": 128,
    "horizon": 40,
    "rollout_batch": 200,
    "rollout_every": 200,
    "actor_learning_rate": 1e-3,
    "ent_coef_learning_rate": 1e-3,
    "device": "cpu",
}


def rows_of(
    place: Place, box: tuple[list[float], list[float]], truth: TruthDynamics, rng: torch.Generator
) -> Transitions:
    """Draw states and actions of a box, and step the real system once from each; the sensors are noisy."""
    corner, opposite = (torch.tensor(side, dtype=torch.float64) for side in box)
    share = torch.rand(ROWS, len(corner), generator=rng, dtype=torch.float64)
    states = (corner + (opposite - corner) * share).numpy()
    half, task, spaces = len(corner) // 2, truth.task, truth.spaces
    assert task.codec is not None
    assert task.reward is not None
    assert task.terminated is not None
    assert spaces is not None
    obs = task.codec.from_simulator(states[:, :half], states[:, half:])
    assert obs is not None
    low, high = bounds(spaces.action, obs.device)
    action = low + (high - low) * torch.rand(ROWS, len(low), generator=rng)
    after = stepped(truth, obs, action)
    after = after + NOISE * torch.randn(after.shape, generator=rng)
    ended = task.terminated(after)
    return Transitions(obs, action, task.reward(obs, action, after), after, ended, torch.arange(ROWS), spaces)


def stepped(truth: TruthDynamics, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b o"]:
    """Return where the real simulator, set to the observations, goes."""
    return truth.sample(obs, action, torch.zeros(len(obs), dtype=torch.long), generator(0)).next_obs


def auroc(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Return the chance that a positive row scores above a negative one; ties count half."""
    values, negatives = score[positive].double(), score[~positive].double().sort().values
    below = torch.searchsorted(negatives, values) + torch.searchsorted(negatives, values, right=True)
    return float(below.double().mean() / (2 * len(negatives)))


@torch.no_grad()
def judged(
    model: ProbabilisticEnsemble,
    truth: TruthDynamics,
    obs: Float[Tensor, "b o"],
    action: Float[Tensor, "b a"],
    rng: torch.Generator,
) -> tuple[dict[str, Tensor], Float[Tensor, " b"]]:
    """Return every penalty of the steps, and the distance of the elites' mean from the truth, in environment units."""
    prediction = model.predict(obs, action)
    after, _ = elite(State(obs, prediction.elites[:1].expand(len(obs))), action, model, rng)
    error = (stepped(truth, obs, action) - prediction.mean[prediction.elites].mean(0)).norm(dim=1)
    return {name: penalty(obs, action, prediction, after) for name, penalty in PENALTIES.items()}, error


def table(penalties: dict[str, Tensor], error: Tensor, positive: Tensor, ranked: Tensor) -> Json:
    """Return both columns of every penalty: AUROC of the positive rows, Spearman's correlation over the ranked ones."""
    return {
        name: {
            "AUROC": auroc(value, positive),
            "Spearman": correlation(value[ranked].numpy(), error[ranked].numpy(), resamples=2).value,
            "tail": float(value.max() / value.median()),
        }
        for name, value in penalties.items()
    }


def played(model: ProbabilisticEnsemble, data: Transitions, place: Place, seed: int) -> Transitions:
    """Train a policy in the model without any penalty; return what it does there at several stages."""
    task = tasks.get(place.real_id)
    agent = OfflineMBPO("MlpPolicy", data, model=model, task=task, penalty_weight=0.0, seed=seed, **AGENT)
    parts: list[Transitions] = []
    for before, stage in pairwise((0, *STAGES)):
        agent.learn(stage - before, reset_num_timesteps=not parts)
        parts.append(agent.imagine())
    return Transitions.cat(parts)


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Fit a model of each task on the narrow box; ask it about the wide one, and about what a policy does in it."""
    figures: Json = {}
    for number, (name, place) in enumerate(PLACES.items()):
        notify(f"{name}: model", number / len(PLACES))
        rng, truth = generator(1000 * number + seed), TruthDynamics(place.real_id, threads=1)
        data, held_out, wide = (rows_of(place, box, truth, rng) for box in (place.logged, place.logged, place.wide))
        model = ProbabilisticEnsemble(**MODEL)
        model.fit(data, rng=generator(seed))
        both = Transitions.cat([held_out[:ASKED], wide[:ASKED]])
        penalties, error = judged(model, truth, both.obs, both.action, rng)
        new = torch.arange(2 * ASKED) >= ASKED
        figures[f"{name}, transfer"] = table(penalties, error, new, new)
        figures[f"{name}, known"] = table(penalties, error, new, ~new)
        notify(f"{name}: policy in the model", (number + 0.6) / len(PLACES))
        rows = played(model, data, place, seed)
        some = rows[torch.randperm(len(rows), generator=rng)[:ASKED]]
        penalties, error = judged(model, truth, some.obs, some.action, rng)
        everywhere = torch.ones(len(some), dtype=torch.bool)
        figures[f"{name}, true model"] = table(penalties, error, error >= error.quantile(0.75), everywhere)
        truth.close()
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge two penalties against the aleatoric one; report all six."""

    def column(case: str, penalty: str, name: str) -> np.ndarray:
        return np.array([seed[case][penalty][name] for seed in figures.values()])

    rows = []
    for place in PLACES:
        for protocol in PROTOCOLS:
            for name in COLUMNS:
                case = f"{place}, {protocol}"
                lead = np.min([column(case, penalty, name) for penalty in JUDGED], axis=0) - column(case, BASE, name)
                gap = bootstrap_interval(lead)
                what = f"{case}: {name} of pairwise difference and ensemble std, less that of aleatoric"
                rows.append(Finding(what, gap, "above 0", gap.low > 0))
    for place in PLACES:
        for protocol in PROTOCOLS:
            for penalty in PENALTIES:
                for name in COLUMNS:
                    case = f"{place}, {protocol}"
                    value = bootstrap_interval(column(case, penalty, name))
                    rows.append(Finding(f"{case}: {name} of {penalty}", value, "reported", None))
        for penalty in PENALTIES:
            value = bootstrap_interval(column(f"{place}, known", penalty, "Spearman"))
            rows.append(Finding(f"{place}, held-out narrow box: Spearman of {penalty}", value, "reported", None))
    for place in PLACES:
        tail = bootstrap_interval(column(f"{place}, transfer", "ll_var", "tail"))
        rows.append(Finding(f"{place}, transfer: largest / median ll_var", tail, "reported", None))
    return rows


def draw(figures: dict[int, Json]) -> Figure:
    """Show both columns of every penalty and seed, a panel per task and protocol."""
    cases = [f"{place}, {protocol}" for place in PLACES for protocol in PROTOCOLS]
    figure, axes = panels(len(cases), width=3.2, height=3.2)
    for ax, case in zip(axes, cases, strict=True):
        for at, penalty in enumerate(PENALTIES):
            for shift, colour, name in ((-0.12, "tab:blue", "AUROC"), (0.12, "tab:orange", "Spearman")):
                values = [seed[case][penalty][name] for seed in figures.values()]
                label = name if at == 0 else None
                ax.plot(values, [at + shift] * len(values), "o", color=colour, ms=4, alpha=0.8, label=label)
        ax.set_yticks(range(len(PENALTIES)), list(PENALTIES) if ax is axes[0] else [""] * len(PENALTIES), fontsize=8)
        ax.invert_yaxis()
        ax.axvline(0.0, color="tab:orange", linewidth=0.7, linestyle=":")
        ax.axvline(0.5, color="tab:blue", linewidth=0.7, linestyle=":")
        ax.set_xlim(-1.02, 1.02)
        ax.grid(axis="x", alpha=0.3)
        ax.set_title(case, fontsize=9)
    axes[0].legend(fontsize=7, frameon=False, loc="lower left")
    return figure


CLAIM = Claim(
    name="penalties",
    paper="Lu, Ball, Parker-Holder, Osborne, Roberts, Revisiting Design Choices in Offline Model-Based Reinforcement "
    "Learning, 2022",
    claim="The uncertainty penalties of offline model-based methods differ in how well they find a model's errors; "
    "disagreement of the ensemble, and its mixture's deviation, find them better than the noise it predicts.",
    setting="Pendulum-v1 and InvertedPendulum-v5 with sensor noise 0.01: seven nets fitted on 6000 steps from a narrow "
    "box of states. Transfer: steps from a box of all states; AUROC tells them from held-out steps of the narrow box, "
    "Spearman is the rank correlation with the true error on the wide ones. True model: a policy trained in the model "
    "without penalty plays there, and the simulator is reset to every imagined state; AUROC tells the quarter of "
    "largest errors. The aleatoric column is the largest predicted deviation of a member.",
    measure=measure,
    findings=findings,
    draw=draw,
    seeds=(0, 1, 2, 3, 4),
)
