"""The edge of reach: rollouts that are cut leave states whose value nothing corrects, however true the model."""

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.core import Json, Outcome, Prediction, Task, Transitions, generator
from learneddyn.evaluation.stats import Estimate, bootstrap_interval
from learneddyn.offline import RAVL, OfflineMBPO
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.runs.seeds import Notify
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.world import World

START, EPISODE = 2.0, 30
"""Starts are uniform in the square of this half width; evaluation lasts so many steps."""
EPOCHS, ROLLOUTS, UPDATES = 40, 200, 100


def reward(obs: Float[Tensor, "b 2"], action: Float[Tensor, "b 2"], next_obs: Float[Tensor, "b 2"]) -> Tensor:
    """Grow with the distance from the origin up to about 6.3, and fall steeply beyond 8."""
    far = next_obs.norm(dim=1)
    return (far / 4).tanh() - 2 * (3 * (far - 8)).sigmoid()


class Mover:
    """The plant, and its own error-free model: the next position is the position plus the action."""

    num_members = 1

    def __init__(self) -> None:
        space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.spaces: Spaces | None = Spaces(space, gym.spaces.Box(-1.0, 1.0, (2,), np.float32))

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """The one member."""
        return torch.zeros(1, dtype=torch.long)

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Return the step, without noise."""
        after = (obs + action)[None]
        return Prediction(after, torch.zeros_like(after), self.elites)

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Step every row."""
        return Outcome(obs + action)


TASK = Task("Mover-v0", reward=reward, terminated=never)
BASE = {3: "cut at 3", 5: "cut at 5", 10: "cut at 10"}
"""Plain SAC critics, by the length of rollouts."""
ENSEMBLES = {"10 critics, η 1": (10, 1.0), "10 critics, η 10": (10, 10.0), "30 critics, η 0": (30, 0.0)}
"""(critics, diversity) of RAVL, all with rollouts cut at 5."""
CHAIN = (1, 2, 10, 50)
"""Critics of the tabular chain."""


def squares(lanes: int, rng: torch.Generator) -> Float[Tensor, "b 2"]:
    """Draw starts."""
    return START * (2 * torch.rand(lanes, 2, generator=rng) - 1)


def log_of(seed: int, rows: int = 2000) -> Transitions:
    """Return single random steps from the start square; only their starts are used."""
    rng = generator(seed)
    obs, action = squares(rows, rng), 2 * torch.rand(rows, 2, generator=rng) - 1
    after, number = obs + action, torch.arange(rows)
    return Transitions(obs, action, reward(obs, action, after), after, number < 0, number, Mover().spaces, "mover")


def history(agent: OfflineMBPO, data: Transitions, notify: Notify, what: str, done: float, share: float) -> Json:
    """Learn, and return by epoch: real return, value of the logged steps, share of next states beyond all others.

    Before their last step rollouts reach the square of half width ``START + horizon - 1``; what lies outside it is
    never a state of any row, only a next state.
    """
    world, rng = World(Mover(), TASK), generator(7)
    starts = squares(200, rng)
    curves: Json = {"return": [], "value": [], "edge": []}
    for epoch in range(EPOCHS):
        if epoch % 10 == 0:
            notify(what, done + share * epoch / EPOCHS)
        agent.learn(UPDATES, reset_num_timesteps=epoch == 0)
        rows = world.rollout(starts, agent.policy.actor.mode, EPISODE, rng)
        pool = agent.imagined.unpack(agent.imagined.rows())
        with torch.no_grad():
            value = agent.policy.critic(data.obs, data.action).mean()
        beyond = pool.next_obs.abs().amax(1) > START + agent.horizon - 1
        for name, figure in (("return", rows.reward.sum() / 200), ("value", value), ("edge", beyond.float().mean())):
            curves[name].append(float(figure))
    return curves


def chain(critics: int, seed: int, *, patched: bool = False, length: int = 5, actions: int = 20) -> float:
    """Return the value of the first state of a chain without rewards, whose last state is never updated.

    Every action leads one state on, so the true value is 0. Tables start from normal noise, targets are
    ``γ max_a min_n Q_n(s + 1, a)``; ``patched`` gives the last state its true value.
    """
    q = np.random.default_rng(seed).normal(size=(critics, length + 1, actions))
    if patched:
        q[:, -1] = 0.0
    for _ in range(length):
        q[:, :-1] = 0.99 * q.min(axis=0).max(axis=-1)[None, 1:, None]
    return float(q[:, 0].min(axis=0).max())


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Learn in the true model with plain critics and with RAVL's; solve the chain."""
    data = log_of(seed)
    common: dict[str, Any] = {
        "model": Mover(),
        "task": TASK,
        "rollout_batch": ROLLOUTS,
        "rollout_every": UPDATES,
        "real_ratio": 0.0,
        "batch_size": 128,
        "policy_kwargs": {"net_arch": (64, 64)},
        "actor_learning_rate": 3e-4,
        "ent_coef_learning_rate": 3e-4,
        "max_ent_coef": math.inf,
        "seed": seed,
        "device": "cpu",
    }
    agents = {name: OfflineMBPO("MlpPolicy", data, horizon=cut, **common) for cut, name in BASE.items()}
    for name, (critics, diversity) in ENSEMBLES.items():
        agents[name] = RAVL("MlpPolicy", data, horizon=5, n_critics=critics, diversity=diversity, **common)
    figures: Json = {
        name: history(agent, data, notify, name, index / len(agents), 1 / len(agents))
        for index, (name, agent) in enumerate(agents.items())
    }
    trials = range(1000 * seed, 1000 * seed + 300)
    figures["chain"] = {str(count): float(np.mean([chain(count, trial) for trial in trials])) for count in CHAIN}
    figures["chain"]["patched"] = chain(2, seed, patched=True)
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge short against long rollouts and the chain; report what ensembles change."""
    seeds = list(figures.values())

    def last(name: str, curve: str = "return", epoch: int = -1) -> Estimate:
        return bootstrap_interval([seed[name][curve][epoch] for seed in seeds])

    def of_chain(count: str) -> Estimate:
        return bootstrap_interval([seed["chain"][count] for seed in seeds])

    long, short = last("cut at 10"), last("cut at 5")
    growth = bootstrap_interval([min(np.diff(seed["cut at 5"]["value"][9::10])) for seed in seeds])
    few, many = of_chain("2"), of_chain("10")
    patched = of_chain("patched")
    rows = [
        Finding("rollouts of 10 steps: real return of 30 steps", long, "at least 24", long.low >= 24),
        Finding("rollouts of 5 steps: the same", short, "at most -10", short.high <= -10),
        Finding("rollouts of 5 steps: least growth of values in ten epochs", growth, "above 0", growth.low > 0),
        Finding("chain, 2 critics: value of the start (true: 0)", few, "above 0.5", few.low > 0.5),
        Finding("chain, 10 critics: the same", many, "below 0", many.high < 0),
        Finding("chain, edge of reach given its true value", patched, "0", patched.low == patched.high == 0),
    ]
    for name in ENSEMBLES:
        rows.append(Finding(f"{name}: return after 20 epochs", last(name, epoch=19), "reported", None))
        rows.append(Finding(f"{name}: return after 40 epochs", last(name), "reported", None))
    for name in (BASE[5], *ENSEMBLES):
        share = last(name, "edge")
        rows.append(Finding(f"{name}: share of next states at the edge of reach", share, "reported", None))
    return rows


def draw(figures: dict[int, Json]) -> Figure:
    """Show real returns and learned values by epoch, every seed a line."""
    figure, axes = panels(3, width=3.6, height=3.0)
    groups = ((axes[0], "return", BASE.values()), (axes[1], "return", ENSEMBLES), (axes[2], "value", BASE.values()))
    for ax, curve, names in groups:
        for name, colour in zip(names, ("tab:orange", "tab:red", "tab:blue"), strict=True):
            for number, seed in enumerate(figures.values()):
                label = name if number == 0 else None
                ax.plot(range(1, EPOCHS + 1), seed[name][curve], color=colour, alpha=0.7, linewidth=1, label=label)
        ax.legend(fontsize=7, frameon=False)
        ax.set_xlabel("epoch of 100 updates", fontsize=8)
        ax.grid(axis="y", alpha=0.3)
    for ax, title in zip(
        axes, ("plain critics: real return", "RAVL, cut at 5: real return", "plain: value"), strict=True
    ):
        ax.set_title(title, fontsize=9)
    return figure


CLAIM = Claim(
    name="edge_of_reach",
    paper="Sims, Lu, Foerster, Teh, The Edge-of-Reach Problem in Offline Model-Based Reinforcement Learning, 2024",
    claim="With an error-free model, rollouts that are cut still ruin offline learning: states met only at the cut get "
    "their values from nowhere, and maximisation seeks the overestimated ones. Pessimistic ensembles of critics help "
    "where no penalty on the model can.",
    setting="Positions in the plane, s' = s + a, known exactly; starts within 2 of the origin, the reward falls "
    "steeply beyond 8; SAC, 2 x 64, rollouts of 3, 5 and 10 steps, judged over 30 true steps. And a chain of 6 states "
    "with 20 actions, no reward, its last state never updated, 300 draws per seed.",
    measure=measure,
    findings=findings,
    draw=draw,
)
