"""Every model class on seven logs that are made here: two bodies, a runner in two grades, chaos, a pendulum, a car.

The comparison itself is `learneddyn.runs.comparison`; ``learneddyn compare`` makes the same table for logs of yours.
Every model is a cell of its own (`learneddyn.runs.cells`): a killed run goes on where it stopped, and a model class
that joins the package later is played without the others.
"""

from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from learneddyn.core import Json, Transitions, generator
from learneddyn.data import collect, from_arrays
from learneddyn.data.collect import Behaviour, Mixture
from learneddyn.evaluation.stats import bootstrap_interval
from learneddyn.models.component import Law
from learneddyn.offline.objectives import split_log
from learneddyn.plants.chaos import FlowDynamics, lorenz63
from learneddyn.reproduce import kinematic
from learneddyn.runs.cells import FAILED, Cells
from learneddyn.runs.claims import Claim, Finding
from learneddyn.runs.comparison import BUDGET, EXCLUDED, Log, best, compare, count, draw, still, table
from learneddyn.runs.seeds import Notify

ROWS = 5000
STEPS = 200
"""Of an episode, at most."""
LORENZ_STEP = 0.02
WRONG_RHO, WRONG_MASS = 20.0, 1.5
"""What those who know the physics believe: rho is 28, and the mass a factor of the true one, of the parts `HEAVY`."""
HEAVY = {"InvertedPendulum": ("pole",), "Hopper": ("torso",), "HalfCheetah": ("torso",)}
SWING_STEP, SWING_SUBSTEPS, GRAVITY = 0.02, 4, 19.62
DAMPING, FRICTION, SMOOTH = 0.4, 1.0, 0.1
"""Of the pendulum: 1/s, rad/s^2, and the speed in rad/s below which friction fades."""
SENSORS = torch.tensor([0.002, 0.05])
"""Standard deviations of its measured angle (rad) and velocity (rad/s)."""
ANGLES = {"noisy pendulum": (0,), "bicycle": (3,)}
CANDIDATES, STARTS = 60, 4
"""Linear policies of the cheetah, of which the fastest collects the medium log; episodes that judge each."""


class Linear:
    """A policy that is linear in the observation, clipped to [-limit, limit]."""

    def __init__(self, gain: Float[np.ndarray, "a o"], limit: float = 1.0) -> None:
        self.gain, self.limit = gain, limit

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Return the action for every row."""
        return np.clip(observation @ self.gain.T, -self.limit, self.limit).astype(np.float32), state


def balance() -> Linear:
    """Return a gain that keeps the inverted pendulum up (found by hand)."""
    return Linear(np.array([[0.3, 8.0, 0.5, 1.2]]), limit=3.0)


def stand() -> Linear:
    """Return springs and dampers that hold the hopper's joints straight, as far as noise lets them."""
    gain = np.zeros((3, 11))
    gain[range(3), range(2, 5)], gain[range(3), range(8, 11)] = -2.0, -0.2
    return Linear(gain)


def run(seed: int) -> Linear:
    """Return the cheetah's fastest of some linear policies: half of them random, half near the fastest so far."""
    rng, best, highest = np.random.default_rng(seed), np.zeros((6, 17)), -np.inf
    with closing(gym.make("HalfCheetah-v5", max_episode_steps=STEPS)) as env:
        for number in range(CANDIDATES):
            centre, spread = (0.0, 0.5) if number < CANDIDATES // 2 else (best, 0.17)
            gain = centre + rng.normal(0.0, spread, best.shape)
            earned = sum(_return(env, Linear(gain), STARTS * seed + start) for start in range(STARTS))
            if earned > highest:
                best, highest = gain, earned
    return Linear(best)


def _return(env: gym.Env[Any, Any], policy: Linear, seed: int) -> float:
    obs, earned, ended = env.reset(seed=seed)[0], 0.0, False
    while not ended:
        obs, reward, _, ended, _ = env.step(policy.predict(obs)[0])
        earned += float(reward)
    return earned


def _real(env_id: str, behaviour: Behaviour | Mixture, noise: float, rows: int, seed: int) -> Transitions:
    kwargs, lanes = {"max_episode_steps": STEPS}, max(1, rows // 1000)
    return collect(
        env_id, steps=rows, behaviour=behaviour, noise=noise, lanes=lanes, seed=seed, env_kwargs=kwargs, progress=False
    )


def lorenz(rows: int, seed: int) -> Transitions:
    """Return stretches of the attractor, a system that nobody acts on."""
    return FlowDynamics("Lorenz63", dt=LORENZ_STEP).log(-(-rows // STEPS), STEPS, generator(seed))[:rows]


def wrong_lorenz(obs: Float[Tensor, "b 3"], action: Float[Tensor, "b 0"]) -> Float[Tensor, "b 3"]:
    """Return the next state of Lorenz's system for whoever takes its parameter rho for another."""

    def slope(state: Tensor) -> Tensor:
        x, y, z = state.unbind(dim=1)
        return torch.stack([10 * (y - x), x * (WRONG_RHO - z) - y, x * y - 8 / 3 * z], dim=1)

    return FlowDynamics(lorenz63()._replace(slope=slope), dt=LORENZ_STEP).step(obs)


def swing(obs: Float[Tensor, "b 2"], action: Float[Tensor, "b 1"], law: Law | None = None) -> Float[Tensor, "b 2"]:
    """Return a hanging pendulum (angle rad, velocity rad/s; action: acceleration by the motor, rad/s^2) 0.02 s later.

    Whoever writes its physics down knows gravity and motor; the bearing's drag is the law (rad/s^2 by velocity).
    """
    angle, speed = obs[:, :1], obs[:, 1:]
    for _ in range(SWING_SUBSTEPS):
        drag = 0.0 if law is None else law(speed)
        speed = speed + SWING_STEP / SWING_SUBSTEPS * (action - GRAVITY * angle.sin() + drag)
        angle = angle + SWING_STEP / SWING_SUBSTEPS * speed
    return torch.cat([angle, speed], dim=1)


def bearing(speed: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
    """Return what slows the pendulum down: viscous and dry friction, rad/s^2."""
    return -DAMPING * speed - FRICTION * (speed / SMOOTH).tanh()


def pendulum(rows: int, seed: int) -> Transitions:
    """Return recordings of a driven pendulum with friction through noisy sensors, 200 steps each."""
    rng, episodes = generator(seed), -(-rows // STEPS)
    x = torch.rand(episodes, 2, generator=rng) * torch.tensor([4.0, 6.0]) - torch.tensor([2.0, 3.0])
    held = (torch.rand(episodes, STEPS // 10, 1, generator=rng) * 2 - 1) * 15.0
    action, states = held.repeat_interleave(10, dim=1), [x]
    for t in range(STEPS):
        states.append(swing(states[-1], action[:, t], bearing))
    path = torch.stack(states, dim=1)
    seen = path + SENSORS * torch.randn(path.shape, generator=rng)
    recorded = from_arrays(
        list(seen.numpy()), list(action.numpy()), source="a simulated pendulum through noisy sensors"
    )
    return recorded[:rows]


@cache
def logs(seed: int, rows: int = ROWS) -> tuple[Log, ...]:
    """Return the logs of a seed, a fifth of the episodes held out of each."""
    made = {
        "InvertedPendulum": _real("InvertedPendulum-v5", [(0.5, balance()), (0.5, "random")], 0.3, rows, seed),
        "Hopper": _real("Hopper-v5", [(0.5, stand()), (0.5, "random")], 0.5, rows, seed),
        "HalfCheetah random": _real("HalfCheetah-v5", "random", 0.0, rows, seed),
        "HalfCheetah medium": _real("HalfCheetah-v5", run(seed), 0.2, rows, seed),
        "Lorenz": lorenz(rows, seed),
        "noisy pendulum": pendulum(rows, seed),
        "bicycle": kinematic.log(-(-rows // STEPS), STEPS, seed)[:rows],
    }
    return tuple(
        Log(name, *split_log(data, seed=seed), angles=ANGLES.get(name, ()), known=known(name))
        for name, data in made.items()
    )


def known(name: str) -> dict[str, Json]:
    """Return what is known of a system, and not exactly: arguments of the model classes that ask for it."""
    here = __name__
    match name.split():
        case ["Lorenz"]:
            return {"Hybrid": {"prior": f"{here}.wrong_lorenz", "dt": LORENZ_STEP}}
        case ["noisy", "pendulum"]:
            return {
                "Hybrid": {"prior": f"{here}.swing", "dt": SWING_STEP},
                "ComponentLaw": {"equations": f"{here}.swing"},
            }
        case ["bicycle"]:
            return {"KinematicBicycle": {"dt": kinematic.DT, "wheelbase": kinematic.WHEELBASE}}
        case [body, *_]:
            task, bodies = f"{body}-v5", {part: {"mass": WRONG_MASS} for part in HEAVY[body]}
            return {
                "Hybrid": {
                    "prior": "learneddyn.world.prior.simulated",
                    "prior_arguments": {"task": task, "bodies": bodies},
                }
            }
    return {}


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Play all cells of one seed."""
    made = logs(seed)
    cells = Cells(home, notify, count(made))
    return {log.name: compare(log, seed, cells) for log in made}


def findings(figures: dict[int, Json]) -> list[Finding]:
    """Report the best class per log; every class that can take part must have figures."""
    rows = []
    for log in next(iter(figures.values())):
        if bars := still(figures, log):
            for name, bar, what in (("one", bars[0], "one step"), ("far", bars[1], f"{bars[2]} steps")):
                if found := best(figures, log, name):
                    wanted = f"reported (no change: {bar.value:.3g})"
                    rows.append(Finding(f"{log}: smallest error after {what} (sd), {found[0]}", found[1], wanted, None))
    shares = [
        float(np.mean([FAILED not in cell for log in seed.values() for cell in log.values() if EXCLUDED not in cell]))
        for seed in figures.values()
    ]
    played = bootstrap_interval(shares)
    return [Finding("share of classes and logs that could be fitted", played, "1", played.value == 1.0), *rows]


def picture(figures: dict[int, Json]) -> Figure:
    """Show one-step error against k-step error, a panel per log."""
    return draw(figures)


CLAIM = Claim(
    name="models_table",
    paper="All model classes of this package, each of its own paper (see its docstring)",
    claim="No model class is the best for all systems: sparse and linear models need little, networks go further.",
    setting=f"Logs of {ROWS:,} rows, a fifth of the episodes held out: InvertedPendulum-v5 and Hopper-v5 (half the "
    "episodes random, half a stabilising linear policy with noise), HalfCheetah-v5 (random; medium: the fastest of "
    f"{CANDIDATES} linear policies that were drawn at random, with noise), Lorenz-63 (no actions, steps of "
    f"{LORENZ_STEP}), a simulated pendulum with friction through noisy sensors (random motor), and the car of "
    f"`reproduce kinematic`. One setting a class for all logs; short fits ({BUDGET} and below), so a class that needs "
    f"long training shows less than it can. The physics that Hybrid starts from: MuJoCo with {WRONG_MASS:g} times the "
    f"mass of one part, Lorenz-63 with rho = {WRONG_RHO:g} for 28, a pendulum without friction, whose law ComponentLaw "
    "learns. KinematicBicycle knows the car's equations.",
    measure=measure,
    findings=findings,
    draw=picture,
    notes="Errors are in standard deviations of the training data's columns. The inverted pendulum was held up when "
    "it was recorded; open loop it falls, every error grows without bound, and classes that hardly move do best after "
    "50 steps. A measured system: learneddyn import and learneddyn compare make this table for a log of yours.",
    table=table,
    cells=True,
)
