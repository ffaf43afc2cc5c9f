"""How much of what targets bootstrap from lies at the edge of reach of imagined rollouts.

A rollout that is cut after k steps ends in a state that is only ever a next state: unless other rollouts, or the log,
pass near it, nothing corrects its value. Source of the problem: Sims, Lu, Foerster, Teh, "The Edge-of-Reach Problem in
Offline Model-Based Reinforcement Learning", 2024. They define the edge by a density that is not known; the estimate
here, this package's own, is by nearest neighbours.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from learneddyn.core import Transitions

VISITED, JUDGED = 1000, 500
"""States of the imagination, and as many of the log, that are looked among; cut states that are looked up."""
FAR = 0.99
"""Quantile of the distance of visited states from the nearest other one, beyond which a cut state is at the edge."""


@torch.no_grad()
def edge_of_reach_share(imagined: Transitions, log: Transitions) -> float:
    """Return the share of the states that targets of imagined rows bootstrap from that are at the edge of reach.

    A state at the edge is one that a rollout was cut in, and that is farther from all visited states (columns in units
    of their standard deviation) than all but a hundredth of the visited states are from their nearest neighbour. So a
    hundredth of the cut states, which are a share 1/k of all, are counted where none is at the edge.

    Args:
        imagined: rows as `learneddyn.world.World.rollout` gives them, episode by episode.
        log: logged rows.
    """
    goes_on = ~imagined.terminated
    last = torch.ones_like(goes_on)
    last[:-1] = imagined.episode[1:] != imagined.episode[:-1]
    cut = (goes_on & last).nonzero().flatten()
    if not len(cut):
        return 0.0
    states = [rows.obs[_spread(len(rows), 2 * VISITED, rows.device)] for rows in (imagined, log)]
    visited, others = (torch.cat([part[start::2] for part in states]) for start in (0, 1))
    if not len(others):
        return 0.0
    scale = torch.cat(states).std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    some = imagined.next_obs[cut[_spread(len(cut), JUDGED, cut.device)]]
    usual = _nearest(others / scale, visited / scale).quantile(FAR)
    far = (_nearest(some / scale, visited / scale) > usual).float().mean()
    return float(far) * len(cut) / int(goes_on.sum())


def _nearest(points: Float[Tensor, "n o"], among: Float[Tensor, "m o"]) -> Float[Tensor, " n"]:
    return torch.cdist(points, among).amin(1)


def _spread(rows: int, most: int, device: torch.device) -> Int[Tensor, " m"]:
    return torch.linspace(0, rows - 1, min(rows, most), device=device).long()
