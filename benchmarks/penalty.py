"""A world step that asks every member, for a penalty, beside the same step written as offline libraries write it.

    python benchmarks/penalty.py [--threads 1] [--seconds 0.2] [--rounds 5] [--largest 4096]

Sizes are those of `rollout.py`. The penalty is MOPO's, the largest norm of a member's predicted noise. The reference
does what the step of OfflineRL-Kit's ensemble does: NumPy arrays in and out, the scaler in NumPy, a product and an
activation of fresh memory per layer, noise for every member, one member picked at the end. At 50,000 lanes it wants
more than 2 GiB.
"""

from typing import Any

import floor
import numpy as np
import torch
from contest import Contestant, Row, Turns, lanes_of, main
from rollout import ELITES, FLOP, MEMBERS, OBS, TASK, WIDTHS, ensemble, inputs, world_step
from torch.nn.functional import softplus

from learneddyn.models import ProbabilisticEnsemble
from learneddyn.world import PENALTIES, World

TABLE = "World step with MOPO's penalty"


def as_a_kit(model: ProbabilisticEnsemble, lanes: int) -> Contestant:
    obs, action = (part.numpy() for part in inputs(lanes))
    mean, std = (part.float().numpy() for part in (model.input_mean, model.input_std))
    rng, elites = np.random.default_rng(0), model.elites.numpy()
    weights, biases = list(model.weights), list(model.biases)

    def networks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = torch.einsum("bi,eio->ebo" if x.ndim == 2 else "ebi,eio->ebo", x, weight) + bias
            if layer < len(weights) - 1:
                x = x * torch.sigmoid(x)
        means, logvar = torch.chunk(x, 2, dim=-1)
        logvar = model.max_logvar - softplus(model.max_logvar - logvar)
        return means, model.min_logvar + softplus(logvar - model.min_logvar)

    @torch.no_grad()
    def step() -> tuple[np.ndarray, ...]:
        x = (np.concatenate([obs, action], axis=-1) - mean) / std
        means, logvar = (part.numpy() for part in networks(torch.as_tensor(x)))
        means[..., :-1] += obs
        noise = np.sqrt(np.exp(logvar))
        drawn = (means + rng.normal(size=means.shape) * noise).astype(np.float32)
        row = drawn[elites[rng.integers(ELITES, size=lanes)], np.arange(lanes)]
        penalty = np.amax(np.linalg.norm(noise, axis=2), axis=0)
        return row[:, :OBS], row[:, -1] - penalty, np.zeros(lanes, bool)

    return Contestant("as a kit", lanes_of(lanes), lanes, step, MEMBERS * FLOP, peer=True)


def measure(turns: Turns, largest: int = 4096) -> list[Row]:
    penalty: dict[str, Any] = {"penalty": PENALTIES["max_aleatoric"], "penalty_weight": 1.0}
    full, half = (World(ensemble(precision=name), TASK, **penalty) for name in ("fp32", "bf16"))
    field: list[Contestant] = []
    for count in (count for count in (1, 256, 1024, 4096, 50_000) if count <= largest):
        field.append(world_step("fp32", full, count, MEMBERS))
        field.append(world_step("bf16", half, count, MEMBERS))
        field.append(as_a_kit(full.dynamics, count))
        for name in floor.DTYPES if count > 1 else ():
            call = floor.chain(WIDTHS, MEMBERS, count, name)
            field.append(Contestant(f"{floor.LAYERS} {name}", lanes_of(count), count, call, MEMBERS * FLOP))
    return turns.contest(TABLE, field)


if __name__ == "__main__":
    main(measure, __doc__, largest=4096)
