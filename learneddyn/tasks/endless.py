"""Termination of environments that have none."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def never(next_obs: Float[Tensor, "b o"]) -> Bool[Tensor, " b"]:
    """Terminate no row."""
    return torch.zeros(len(next_obs), dtype=torch.bool, device=next_obs.device)
