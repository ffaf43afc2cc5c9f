"""How long one plan takes: CEM beside mbrl-lib's at one budget, and iCEM at one that fits a control loop.

    python benchmarks/plan.py [--threads 1] [--seconds 0.2] [--rounds 5] [--iterations 1]

Sizes are those of HalfCheetah, as in `rollout.py`; a row is an imagined transition, and the operations counted are
those of one network. Both CEMs draw 400 plans of 30 steps per iteration, score each with 20 particles that draw a new
elite at every step, and refit to the best 40. PETS takes five such iterations; all cost the same, so one is timed.
mbrl-lib asks for particles in multiples of the elites.

iCEM runs as `learneddyn.agents.MPC` calls it, with the paper's settings for 100 sequences a step and 5 particles, first
action to last array: its time is the time of a step of control.
"""

import math
from typing import Any

import floor
import numpy as np
import torch
from contest import Contestant, Row, Turns, main, missing
from rollout import ACTION, FLOP, TASK, WIDTHS, ensemble, inputs, mbrl_env, mbrl_model
from rollout import ELITES as NETWORKS

from learneddyn.agents import MPC
from learneddyn.planners import CEM, ICEM, AbstractPlanner
from learneddyn.world import World

CEM_TABLE, ICEM_TABLE = "CEM plan at equal budget", "A step of control by iCEM"
HORIZON, CANDIDATES, ELITES, PARTICLES = 30, 400, 40, 20


def ours(name: str, world: World, planner: AbstractPlanner, particles: int) -> Contestant:
    policy, obs = MPC(world, planner, particles=particles), inputs(1)[0].numpy()
    _, state = policy.predict(obs)

    def plan() -> Any:
        return policy.predict(obs, state, np.zeros(1, bool))

    return Contestant(name, _case(planner, particles), policy.evaluations, plan, FLOP)


def mbrl_lib(planner: CEM, device: str) -> Contestant:
    """The same search by mbrl-lib.

    Raises:
        ImportError: it is not installed.
    """
    env = mbrl_env(mbrl_model(device)[0])
    from mbrl.planning import CEMOptimizer

    bound = [[1.0] * ACTION] * HORIZON
    search = CEMOptimizer(
        planner.iterations,
        ELITES / CANDIDATES,
        CANDIDATES,
        [[-each for each in row] for row in bound],
        bound,
        planner.momentum,
        torch.device(device),
        return_mean_elites=True,
    )
    obs, start = inputs(1)[0][0].numpy(), torch.zeros(HORIZON, ACTION, device=device)

    def plan() -> Any:
        return search.optimize(lambda plans: env.evaluate_action_sequences(plans, obs, PARTICLES), x0=start)

    rows = planner.sequences * HORIZON * PARTICLES
    return Contestant("mbrl-lib", _case(planner, PARTICLES), rows, plan, FLOP, peer=True)


def layers_alone(precision: str, planner: AbstractPlanner, particles: int, device: str) -> Contestant:
    """Only the layers of a plan: in every step of every iteration, elites answer equal shares of all particles."""
    plans = [planner.sequences]
    if isinstance(planner, ICEM):
        plans = [planner.candidates * planner.decay**-iteration for iteration in range(planner.iterations)]
    rows = [math.ceil(each * particles / NETWORKS) for each in plans]
    calls = [floor.chain(WIDTHS, NETWORKS, each, precision, device, times=planner.horizon) for each in rows]

    def plan() -> None:
        for call in calls:
            call()

    name = f"{floor.LAYERS} {precision}"
    return Contestant(name, _case(planner, particles), sum(rows) * NETWORKS * planner.horizon, plan, FLOP)


def _case(planner: AbstractPlanner, particles: int) -> str:
    return f"{planner.sequences} plans x {planner.horizon} steps x {particles} particles"


def measure(turns: Turns, iterations: int = 1) -> list[Row]:
    worlds = {precision: World(ensemble(turns.device, precision=precision), TASK) for precision in ("fp32", "bf16")}
    cem = CEM(HORIZON, CANDIDATES, ELITES, iterations, min_variance=0.0)
    field, absent = [ours(name, world, cem, PARTICLES) for name, world in worlds.items()], []
    field += [layers_alone(name, cem, PARTICLES, turns.device) for name in worlds]
    try:
        field.append(mbrl_lib(cem, turns.device))
    except ImportError as error:
        absent = [missing(CEM_TABLE, "mbrl-lib", error)]
    icem = ICEM.of_budget(100, horizon=HORIZON, beta=0.25)
    control = [ours(name, world, icem, 5) for name, world in worlds.items()]
    control += [layers_alone(name, icem, 5, turns.device) for name in worlds]
    return turns.contest(CEM_TABLE, field) + absent + turns.contest(ICEM_TABLE, control)


if __name__ == "__main__":
    main(measure, __doc__, iterations=1)
