"""Rollouts of a SINDy model beside rollouts by pysindy's `predict` of a fit to the same data.

    python benchmarks/sindy.py [--threads 1] [--seconds 0.2] [--rounds 5]

Four observation columns and one action, degree 3: 69 candidate terms here (monomials of the observation, the action,
and their products), 56 in pysindy (monomials of all five). A row is one step of one lane, from where the last step led.
pysindy asks for NumPy arrays and gives them; the model here takes and gives tensors.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from contest import Contestant, Row, Turns, lanes_of, main, missing

from learneddyn.core import Transitions, generator
from learneddyn.models import SINDy
from learneddyn.spaces import Spaces

TABLE, OBS, ACTION, DEGREE = "SINDy step", 4, 1, 3


def measure(turns: Turns) -> list[Row]:
    rng = np.random.default_rng(0)
    obs, action = (rng.uniform(-1, 1, (4096, width)).astype(np.float32) for width in (OBS, ACTION))
    after = (0.8 * obs + 0.1 * obs[:, ::-1] ** 3 + 0.05 * action).astype(np.float32)
    try:
        import pysindy
    except ImportError as error:
        return [missing(TABLE, "pysindy", error)]
    boxes = (gym.spaces.Box(-1.0, 1.0, (width,), np.float32) for width in (OBS, ACTION))
    columns = [torch.from_numpy(part) for part in (obs, action, obs[:, 0], after)]
    data = Transitions(*columns, torch.zeros(len(obs), dtype=torch.bool), torch.arange(len(obs)), Spaces(*boxes))
    ours = SINDy(degree=DEGREE, threshold=1e-2)
    ours.fit(data, rng=generator(0))
    theirs = pysindy.DiscreteSINDy(pysindy.STLSQ(1e-2), pysindy.PolynomialLibrary(DEGREE))
    theirs.fit(obs, 1.0, x_next=after, u=action)
    field = []
    for rows in (1, len(obs)):
        field.append(Contestant("SINDy", lanes_of(rows), rows, _ours(ours, data[:rows])))
        field.append(Contestant("pysindy", lanes_of(rows), rows, _theirs(theirs, obs[:rows], action[:rows]), peer=True))
    return turns.contest(TABLE, field)


def _ours(model: SINDy, data: Transitions) -> Callable[[], None]:
    rng, member = generator(0), torch.zeros(len(data), dtype=torch.long)
    obs = data.obs

    @torch.no_grad()
    def step() -> None:
        nonlocal obs
        obs = model.sample(obs, data.action, member, rng, noise=False).next_obs

    return step


def _theirs(model: Any, obs: np.ndarray, action: np.ndarray) -> Callable[[], None]:
    def step() -> None:
        nonlocal obs
        obs = np.asarray(model.predict(obs, action))

    return step


if __name__ == "__main__":
    main(measure, __doc__)
