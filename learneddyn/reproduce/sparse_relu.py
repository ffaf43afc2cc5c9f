"""Few ReLUs suffice, and planning with them is a mixed-integer program with a proven optimum: a load behind a gap."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.agents import MPC
from learneddyn.core import Json, Task, Transitions, generator
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models import SparseReLU
from learneddyn.planners import CEM, MILP
from learneddyn.runs import Notify
from learneddyn.runs.claims import Claim, Finding, panels
from learneddyn.spaces import Spaces
from learneddyn.world import World

DT, GAP, NOISE = 0.2, 0.5, 0.02
"""Seconds of a step; half the play between cart and load, metres; standard deviation of the speed's noise, m/s."""
EFFORT = 0.01
RELUS, HORIZON, STEPS = 4, 10, 20
STARTS = torch.tensor([[1.6, 0.0, 1.2], [-1.4, 0.0, -1.0], [0.9, 0.0, 1.3]])
"""Position and speed of the cart, position of the load: touching it from outside twice, in the gap once."""
PLENTY, SHORT = 10.0, 0.1
"""Time limits of a plan, seconds."""
SLACK = 1.1
"""A plan is late when it takes this many time limits: the solver looks at its clock between pieces of work."""


def move(
    obs: Float[Tensor, "n 3"], action: Float[Tensor, "n 1"], rng: torch.Generator | None = None
) -> Float[Tensor, "n 3"]:
    """Return (cart's position, cart's speed, load's position) one step later.

    A cart pushes a load from inside: the load moves only when the cart stands at an end of the play between them.
    """
    cart, speed, load = obs.unbind(dim=1)
    speed = speed + DT * (4 * action[:, 0] - speed)
    if rng is not None:
        speed = speed + NOISE * torch.randn(len(speed), generator=rng)
    cart = cart + DT * speed
    load = load + (cart - load - GAP).relu() - (load - GAP - cart).relu()
    return torch.stack([cart, speed, load], dim=1)


def log(episodes: int, steps: int, seed: int, *, noisy: bool = True) -> Transitions:
    """Return runs of the plant under pushes that are held for a while."""
    rng = generator(seed)
    load = 4 * torch.rand(episodes, generator=rng) - 2
    cart = load + torch.rand(episodes, generator=rng) - 0.5
    obs = torch.stack([cart, 2 * torch.rand(episodes, generator=rng) - 1, load], dim=1)
    action = torch.zeros(episodes, 1)
    columns: tuple[list[Tensor], ...] = ([], [], [])
    for _ in range(steps):
        fresh = 2 * torch.rand(episodes, 1, generator=rng) - 1
        action = torch.where(torch.rand(episodes, 1, generator=rng) < 0.3, fresh, action)
        after = move(obs, action, rng if noisy else None)
        for column, value in zip(columns, (obs, action, after), strict=True):
            column.append(value)
        obs = after
    states, actions, successors = (torch.stack(column, dim=1).flatten(0, 1) for column in columns)
    box = gym.spaces.Box
    spaces = Spaces(box(-np.inf, np.inf, (3,), np.float32), box(-1.0, 1.0, (1,), np.float32))
    nothing, episode = torch.zeros(len(states)), torch.arange(episodes).repeat_interleave(steps)
    return Transitions(states, actions, nothing, successors, nothing.bool(), episode, spaces, "load behind a gap")


TASK = Task(
    "LoadBehindGap",
    lambda obs, action, after: -(after[:, 2].abs() + EFFORT * action.abs().sum(dim=1)),
    lambda after: torch.zeros(len(after), dtype=torch.bool, device=after.device),
)
"""Bring the load to 0."""


def planner(model: SparseReLU, spaces: Spaces, horizon: int, limit: float) -> MILP:
    """Return the mixed-integer planner of `TASK`."""
    goal, weights = [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]
    return MILP(
        model.cascade(), spaces, goal=goal, weights=weights, effort=EFFORT, horizon=horizon, time_limit=limit
    )  # fmt: skip


@torch.no_grad()
def rmse(model: SparseReLU, data: Transitions) -> float:
    """Return the root mean squared error of one step, in units of a column's spread over steps."""
    error = (model.predict(data.obs, data.action).mean[0] - data.next_obs) / (data.next_obs - data.obs).std(dim=0)
    return float(error.square().mean().sqrt())


@torch.no_grad()
def encoding_error(model: SparseReLU, spaces: Spaces, seed: int) -> float:
    """Return the largest difference between the program and the network (in float64) on 200 observations and plans."""
    exact, milp, rng = copy.deepcopy(model).double(), planner(model, spaces, 2, PLENTY), generator(seed)
    obs = 3 * torch.rand(200, 3, generator=rng, dtype=torch.float64) - 1.5
    plans = 2 * torch.rand(200, 2, 1, generator=rng, dtype=torch.float64) - 1
    state, said = obs, []
    for action in plans.unbind(dim=1):
        state = exact.predict(state, action).mean[0]
        said.append(state)
    network = torch.stack(said, dim=1).numpy()
    return max(
        float(np.abs(milp.encoded(*pair) - after).max())
        for *pair, after in zip(obs.numpy(), plans.numpy(), network, strict=True)
    )


@torch.no_grad()
def excess(model: SparseReLU, spaces: Spaces, seed: int) -> list[float]:
    """Return what the program's optimum costs more than a refined grid search, relative, from 5 observations."""
    horizon, world, rng = 3, World(model, TASK, sampler="mean"), generator(seed)
    milp, grid = planner(model, spaces, horizon, PLENTY), torch.linspace(-1.0, 1.0, 41)
    around = torch.cartesian_prod(*[torch.linspace(-2.0, 2.0, 7)] * horizon)
    found = []
    for obs in 3 * torch.rand(5, 3, generator=rng) - 1.5:

        def costs(plans: Tensor, obs: Tensor = obs) -> Tensor:
            return -world.returns(obs[None], plans.view(1, -1, horizon, 1), rng).view(plans.shape[:-1])

        plans = torch.cartesian_prod(*[grid] * horizon)
        best = plans[costs(plans).topk(40, largest=False).indices]
        for halving in range(16):
            tried = (best[:, None] + 0.05 * 0.5**halving * around).clamp(-1, 1)
            tried = torch.cat([best[:, None], tried], dim=1)
            best = tried[torch.arange(len(best)), costs(tried).argmin(dim=1)]
        best = best[costs(best).argmin()]
        solved = milp.plan(obs.double().numpy())
        least = milp.cost(obs.double().numpy(), best.double().numpy()[:, None])
        found.append((solved.cost - least) / least)
    return found


def closed_loop(act: Callable[[Tensor, Any, bool], tuple[Tensor, Any]]) -> tuple[list[float], float]:
    """Return the cost from every start, and CPU seconds per decision; ``act``: (obs, state, first) -> action, state."""
    obs, state, cost, busy = STARTS, None, torch.zeros(len(STARTS)), time.process_time()
    for step in range(STEPS):
        action, state = act(obs, state, step == 0)
        obs = move(obs, action)
        cost -= TASK.reward(obs, action, obs) if TASK.reward else 0.0
    return cost.tolist(), (time.process_time() - busy) / (STEPS * len(STARTS))


def mixed_integer(model: SparseReLU, spaces: Spaces, limit: float) -> Json:
    """Return the closed loop of the mixed-integer planner, and how its plans ended.

    ``stopped``: share of the plans that the time limit ended before the proof; ``fallback``: share that were stopped
    and are the plan the search began from; ``late``: share that took more than `SLACK` limits; ``longest``: in limits.
    """
    milp, stopped, fallback, times = planner(model, spaces, HORIZON, limit), [], [], []

    def act(obs: Tensor, state: Any, first: bool) -> tuple[Tensor, Any]:
        plans = []
        for lane, row in enumerate(obs.double().numpy()):
            warm = np.zeros((HORIZON, 1)) if first else state[lane]
            solved = milp.plan(row, warm)
            stopped.append(not solved.optimal)
            fallback.append(not solved.optimal and np.array_equal(solved.actions, warm))
            times.append(solved.seconds / limit)
            plans.append(solved.actions)
        after = [np.concatenate([plan[1:], plan[-1:]]) for plan in plans]
        return torch.tensor(np.stack(plans)[:, 0], dtype=torch.float32), after

    costs, seconds = closed_loop(act)
    return {
        "costs": costs,
        "seconds": seconds,
        "stopped": float(np.mean(stopped)),
        "fallback": float(np.mean(fallback)),
        "late": float(np.mean(np.array(times) > SLACK)),
        "longest": max(times),
    }


def sampled(model: SparseReLU, seconds: float | None, seed: int) -> Json:
    """Return the closed loop of CEM on the same model, with as many plans as fit into ``seconds`` of CPU time."""

    def loop(candidates: int) -> Json:
        cem = CEM(HORIZON, candidates, max(10, candidates // 20), 5, execute="best")
        policy = MPC(World(model, TASK, sampler="mean"), cem, seed=seed)

        def act(obs: Tensor, state: Any, first: bool) -> tuple[Tensor, Any]:
            action, after = policy.predict(obs.numpy(), state, np.full(len(obs), first), deterministic=True)
            return torch.as_tensor(action), after

        costs, spent = closed_loop(act)
        return {"costs": costs, "seconds": spent, "candidates": candidates}

    if seconds is None:
        return loop(500)
    pilot = loop(5000)  # few plans cost more apiece
    return loop(max(500, int(5000 * seconds / pilot["seconds"])))


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Fit a dense and a sparse network, check the program, and control the plant."""
    train, clean = log(300, 20, seed), log(100, 20, seed + 1000, noisy=False)
    test, figures = log(100, 20, seed + 1000), Json()
    assert train.spaces is not None
    models = {}
    for name, relus in (("dense", None), ("sparse", RELUS)):
        notify(name, 0.1)
        model = models[name] = SparseReLU(relus=relus, horizon=1, updates=4000)
        model.fit(train, rng=generator(seed))
        figures[name] = {"rmse": rmse(model, test), "without noise": rmse(model, clean), "counts": model.counts}
    notify("program", 0.4)
    sparse = models["sparse"]
    figures["encoding"] = encoding_error(sparse, train.spaces, seed)
    figures["excess"] = excess(sparse, train.spaces, seed)
    notify("closed loop", 0.5)
    figures["MILP"] = mixed_integer(sparse, train.spaces, PLENTY)
    figures["MILP, short"] = mixed_integer(sparse, train.spaces, SHORT)
    figures["CEM"] = sampled(sparse, figures["MILP"]["seconds"], seed)
    figures["CEM, small"] = sampled(sparse, None, seed)
    return figures


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Judge sparsity, the program and the closed loop."""

    def over_seeds(values: Callable[[Json], float]) -> Any:
        return bootstrap_interval([values(entry) for entry in figures.values()])

    def cost(entry: Json, name: str) -> float:
        return float(np.mean(entry[name]["costs"]))

    def worst(values: Callable[[Json], float]) -> Any:
        return bootstrap_interval([max(values(entry) for entry in figures.values())])

    gone = over_seeds(lambda e: 1 - e["sparse"]["counts"]["relu"] / sum(e["sparse"]["counts"].values()))
    error = over_seeds(lambda e: e["sparse"]["rmse"] / e["dense"]["rmse"])
    clean = over_seeds(lambda e: e["sparse"]["without noise"] / e["dense"]["without noise"])
    encoding, excess = worst(lambda e: e["encoding"]), worst(lambda e: max(abs(x) for x in e["excess"]))
    ratio = over_seeds(lambda e: cost(e, "MILP") / cost(e, "CEM"))
    milliseconds = f"{1000 * SHORT:.0f} ms"
    ends = [
        Finding(f"plans in {text}: {what}", bootstrap_interval([e[name][key] for e in figures.values()]), "", None)
        for name, text in (("MILP, short", milliseconds), ("MILP", f"{PLENTY:.0f} s"))
        for key, what in (
            ("stopped", "share that the limit stopped before the proof"),
            ("fallback", "share that fell back on the plan they began from"),
            ("late", f"share over {SLACK:g} times the limit"),
            ("longest", "longest, in limits"),
        )
    ]
    return [
        Finding("share of the ReLUs that are gone", gone, "at least 0.5", gone.value >= 0.5),
        Finding("RMSE on held-out logs, sparse / dense", error, "at most 1.5", error.value <= 1.5),
        Finding("the same on noise-free rows", clean, "", None),
        Finding("program against network, 200 plans: largest error", encoding, "at most 1e-6", encoding.value <= 1e-6),
        Finding("optimum against refined grid: cost off by", excess, "at most 1e-3", excess.value <= 1e-3),
        Finding("closed-loop cost, MILP / CEM with the same CPU time", ratio, "at most 1.02", ratio.value <= 1.02),
        Finding("closed-loop cost, MILP", over_seeds(lambda e: cost(e, "MILP")), "", None),
        Finding(
            f"closed-loop cost, MILP with {milliseconds} per plan",
            over_seeds(lambda e: cost(e, "MILP, short")),
            "",
            None,
        ),
        *ends,
        Finding("closed-loop cost, CEM with 5 x 500 plans", over_seeds(lambda e: cost(e, "CEM, small")), "", None),
        Finding("CPU seconds per decision, MILP", over_seeds(lambda e: e["MILP"]["seconds"]), "", None),
        Finding("CPU seconds per decision, CEM beside it", over_seeds(lambda e: e["CEM"]["seconds"]), "", None),
    ]


def draw(figures: dict[int, Json]) -> Figure:
    """Draw closed-loop costs and errors."""
    figure, [left, right] = panels(2, width=4.0, height=3.0)
    names = ["MILP", "CEM", "MILP, short", "CEM, small"]
    labels = ["MILP", "CEM, same time", f"MILP, {1000 * SHORT:.0f} ms", "CEM, 5 x 500"]
    for index, name in enumerate(names):
        for start, marker in enumerate("os^"):
            values = [entry[name]["costs"][start] for entry in figures.values()]
            height = [-index + 0.15 * (start - 1)] * len(values)
            label = f"start {start + 1}" if index == 0 else None
            left.plot(values, height, marker, color=f"C{start}", alpha=0.7, markersize=4, label=label)
    left.set_yticks([-i for i in range(len(names))], labels, fontsize=8)
    left.set_xlabel(f"cost of {STEPS} steps on the plant", fontsize=8)
    left.legend(fontsize=7, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for index, name in enumerate(("dense", "sparse")):
        for key, marker in (("rmse", "o"), ("without noise", "x")):
            values = [entry[name][key] for entry in figures.values()]
            label = {"rmse": "held-out logs", "without noise": "noise-free"}[key] if index == 0 else None
            right.plot([index] * len(values), values, marker, color="tab:blue", alpha=0.7, label=label)
    right.set_xticks([0, 1], ["64 ReLUs", f"at most {RELUS}"], fontsize=8)
    right.set_xlim(-0.5, 1.5)
    right.set_ylim(bottom=0)
    right.set_ylabel("RMSE of a step (its spread is 1)", fontsize=8)
    right.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


CLAIM = Claim(
    name="sparse_relu",
    paper="Liu, Zhou, He, Marcucci, Fei-Fei, Wu, Li, Model-Based Control with Sparse Neural Dynamics, NeurIPS 2023",
    claim="Most ReLUs of a dynamics network can be replaced by identity or zero at little loss; planning with the rest "
    "is a mixed-integer program, whose optimum controls better than sampled plans, above all through contacts.",
    setting="A cart that drags a load through a gap of 1 m (3 observations, one force, noise on the speed); 2 x 32 "
    f"hidden units, at most {RELUS} ReLUs, {HORIZON} steps of planning, absolute costs, HiGHS. The paper has pushing, "
    "sorting and rope, Gym's cart-pole and reacher, quadratic costs and Gurobi. CEM (5 iterations) gets as many plans "
    "as take the CPU time of the mixed-integer planner, all starts in one batch, on the same network. Time limits are "
    "of the wall clock, for each plan alone.",
    measure=measure,
    findings=findings,
    draw=draw,
    notes="On noise-free rows the dense network is more accurate by a factor that the noise of the logs hides: four "
    "units place the edge of the contact less sharply than 64.",
)
