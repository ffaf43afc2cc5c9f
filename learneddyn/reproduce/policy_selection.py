"""Choosing a policy before anything is played: what the log and a model of it say, against what the plant pays."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from learneddyn import tasks
from learneddyn.core import Json, Transitions, generator
from learneddyn.data import collect
from learneddyn.evaluation.returns import evaluate
from learneddyn.evaluation.stats import Estimate, bootstrap_interval, correlation
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import BC, IQL, TD3BC, OfflineAlgorithm, rank
from learneddyn.offline.policy import OfflinePolicy
from learneddyn.reproduce.conservatism import ENV, EPISODE, QUALITIES, Swinger
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.world import World

STEPS, HELD_OUT = 16_000, 20
"""Rows of the log, and its last episodes, which the model does not see."""
CHECKPOINTS, EPISODES = (500, 4000), 20
"""Updates after which a learner is a candidate, and real episodes that judge it."""
SHARED: dict[str, Any] = {"policy_kwargs": {"net_arch": (64, 64)}, "device": "cpu"}
METHODS: dict[str, Callable[[Transitions, int], OfflineAlgorithm]] = {
    "BC": lambda data, seed: BC("MlpPolicy", data, seed=seed, **SHARED),
    "IQL": lambda data, seed: IQL("MlpPolicy", data, reward_scale=0.1, seed=seed, **SHARED),
    "TD3+BC": lambda data, seed: TD3BC("MlpPolicy", data, reward_scale=0.1, seed=seed, **SHARED),
    "TD3": lambda data, seed: TD3BC("MlpPolicy", data, alpha=math.inf, reward_scale=0.1, seed=seed, **SHARED),
}
MODEL: dict[str, Any] = {"num_members": 5, "num_elites": 4, "hidden": (64, 64), "scale_targets": True, "max_epochs": 40}
FQE: dict[str, Any] = {"gamma": 0.97, "members": 3, "hidden": (64, 64), "updates": 3000, "starts": 40}
JUDGES = ("fitted Q evaluation", "return in the model", "one-step error near the policy")


def candidates(data: Transitions, seed: int, notify: Notify) -> dict[str, OfflinePolicy]:
    """Return every method's policy after few and after many updates."""
    found = {}
    for index, (name, make) in enumerate(METHODS.items()):
        notify(name, 0.5 * index / len(METHODS))
        agent = make(data, seed)
        for updates in CHECKPOINTS:
            agent.learn(updates - agent.num_timesteps, reset_num_timesteps=False)
            found[f"{name}, {updates}"] = _copied(agent.policy)
    return found


def _copied(policy: OfflinePolicy) -> OfflinePolicy:
    copy = type(policy)(**policy._get_constructor_parameters())
    copy.load_state_dict(policy.state_dict())
    copy.set_training_mode(False)
    return copy


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Return every candidate's figures, the judges' and the plant's."""
    mixture = [(1.0, Swinger(quality, 100 * seed + index)) for index, quality in enumerate(QUALITIES["wide"])]
    log = collect(ENV, steps=STEPS, behaviour=mixture, lanes=8, seed=seed, progress=False)
    cut = len(log) - HELD_OUT * EPISODE
    policies = candidates(log[:cut], seed, notify)
    notify("model", 0.5)
    model = ProbabilisticEnsemble(**MODEL)
    model.fit(log[:cut], rng=generator(seed))
    notify("judges", 0.6)
    world = World(model, tasks.get(ENV))
    ranking = rank(policies, log[:cut], worlds=world, held_out=log[cut:], seed=seed, **FQE)
    notify("plant", 0.9)
    figures: Json = {}
    for row in ranking.candidates:
        real = evaluate(policies[row.name], ENV, episodes=EPISODES, seed=seed).mean
        error = None if row.model_error is None or math.isinf(row.model_error) else row.model_error
        inside = None if row.in_model is None else row.in_model.to_json()
        figures[row.name] = {"real": real, "fqe": row.fqe.to_json(), "in_model": inside, "model_error": error}
    return figures


def judged_by(figures: Json, judge: str) -> np.ndarray:
    """Return a judge's figure for every candidate, larger for a policy that it would rather choose."""
    rows = figures.values()
    if judge == JUDGES[0]:
        return np.array([row["fqe"]["value"] for row in rows])
    if judge == JUDGES[1]:
        return np.array([row["in_model"]["value"] for row in rows])
    errors = [math.inf if row["model_error"] is None else row["model_error"] for row in rows]
    most = max(error for error in errors if math.isfinite(error))
    return np.array([-min(error, 2 * most) for error in errors])


def agreement(figures: Json, judge: str) -> float:
    """Return the rank correlation of a judge with the plant over the candidates of one seed."""
    real = [row["real"] for row in figures.values()]
    return correlation(judged_by(figures, judge), real).value


def regret(figures: Json, judge: str) -> float:
    """Return what the judge's choice loses to the best candidate, as a share of the spread of all candidates."""
    real = np.array([row["real"] for row in figures.values()])
    return float((real.max() - real[judged_by(figures, judge).argmax()]) / np.ptp(real))


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge the judges."""
    seeds = list(figures.values())

    def over_seeds(of: Callable[[Json, str], float], judge: str) -> Estimate:
        return bootstrap_interval([of(seed, judge) for seed in seeds])

    rows = []
    for judge in JUDGES[:2]:
        order, loss = over_seeds(agreement, judge), over_seeds(regret, judge)
        rows.append(Finding(f"{judge}: rank correlation with the real return", order, "above 0.5", order.low > 0.5))
        rows.append(Finding(f"{judge}: regret of its choice, of the spread", loss, "below 0.2", loss.high < 0.2))
    order = over_seeds(agreement, JUDGES[2])
    rows.append(Finding(f"{JUDGES[2]}: rank correlation of its negative", order, "reported", None))
    for name in seeds[0]:
        real = bootstrap_interval([seed[name]["real"] for seed in seeds])
        rows.append(Finding(f"real return of {name} updates", real, "reported", None))
    return rows


def draw(figures: dict[int, Json]) -> Figure:
    """Show judge against plant, a dot for each candidate and seed."""
    figure, axes = panels(3, width=3.4, height=3.0)
    for ax, judge in zip(axes, JUDGES, strict=True):
        for colour, seed in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), figures.values(), strict=False):
            ax.plot(judged_by(seed, judge), [row["real"] for row in seed.values()], "o", color=colour, alpha=0.6)
        ax.set_xlabel(judge if judge != JUDGES[2] else f"minus {judge}", fontsize=8)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("real return", fontsize=8)
    return figure


CLAIM = Claim(
    name="policy_selection",
    paper="Paine, Paduraru, Michi, Gulcehre, Zolna, Novikov, Wang, de Freitas, Hyperparameter Selection for Offline "
    "Reinforcement Learning, 2020; Le, Voloshin, Yue, Batch Policy Learning under Constraints, 2019",
    claim="Policies learned offline can be ranked, and a good one chosen, without playing any of them.",
    setting=f"Pendulum-v1: one log of {STEPS} steps by controllers of mixed quality with strong noise; BC, IQL, TD3+BC "
    "and TD3, each after few and after many updates, are judged by fitted Q evaluation (discount 0.97), by an "
    "ensemble's return and its one-step error near their actions, and by 20 real episodes.",
    measure=measure,
    findings=findings,
    draw=draw,
)
