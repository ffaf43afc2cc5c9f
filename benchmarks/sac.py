"""Milliseconds per SAC update: Stable-Baselines3's `SAC.train`, and `FastSAC.train`.

    python benchmarks/sac.py [--batch 256] [--width 256] [--obs 17] [--actions 6] [--updates 20] [--rounds 15]

CPU time of this process on one thread, replay sampling included. The contestants take turns within a round, so that a
busy machine slows all of them; a ratio is the median over the rounds of SB3's time in the round over the contestant's,
with the 10 % and 90 % points in brackets. "products" are the matrix products between the two hidden layers that every
update needs, and nothing else: no rewriting can be faster.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure

from learneddyn.agents import DeviceReplayBuffer, FastSAC

ROWS = 20_000


class Noise(gym.Env):
    """Only the sizes of its spaces matter."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode without end."""
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Return noise."""
        return self._obs(), float(self.np_random.normal()), False, False, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.normal(size=self.observation_space.shape).astype(np.float32)


def updates(kind: type[SAC], args: argparse.Namespace, **kwargs: object) -> Callable[[], None]:
    model = kind(
        "MlpPolicy",
        Noise(args.obs, args.actions),
        buffer_size=ROWS,
        learning_starts=10 * ROWS,
        policy_kwargs={"net_arch": [args.width, args.width]},
        seed=0,
        device="cpu",
        **kwargs,
    )
    model.set_logger(configure(None, []))
    model.learn(ROWS)
    return lambda: model.train(args.updates, args.batch)


def products(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], None]:
    """In units of one product of both critics: forward 4 (actor on two batches, targets, critics twice), gradients to
    activations 2.5 (critics twice, actor), to weights 1.5 (critics, actor).
    """
    shape = (2, args.batch, args.width)
    hidden, flow, out = (torch.randn(4, *shape).to(dtype) for _ in range(3))
    weight, grad = (torch.randn(4, 2, args.width, args.width).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(args.updates):
            for turn in range(4):
                torch.bmm(hidden[turn], weight[turn].mT, out=out[turn])
            for turn in range(2):
                torch.bmm(flow[turn], weight[turn], out=out[turn])
                torch.bmm(flow[turn].mT, hidden[turn], out=grad[turn])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 256), ("width", 256), ("obs", 17), ("actions", 6), ("updates", 20), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = {"replay_buffer_class": DeviceReplayBuffer}
    contestants = {
        "SB3 SAC": updates(SAC, args),
        "FastSAC fp32": updates(FastSAC, args),
        "FastSAC fp32, device replay": updates(FastSAC, args, **device),
        "products fp32": products(args, torch.float32),
        "FastSAC bf16": updates(FastSAC, args, precision="bf16"),
        "FastSAC bf16, device replay": updates(FastSAC, args, precision="bf16", **device),
        "products bf16": products(args, torch.bfloat16),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(args.rounds + 1):
        for name, run in contestants.items():
            start = time.process_time()
            run()
            if turn:  # the first turn warms up
                times[name].append((time.process_time() - start) / args.updates * 1e3)
    print(f"batch {args.batch}, net 2 x {args.width}, obs {args.obs}, action {args.actions}, torch {torch.__version__}")
    print(f"{'':28} {'ms/update':>20}    {'x SB3':>18}")
    for name, spent in times.items():
        ratios = [sb3 / mine for sb3, mine in zip(times["SB3 SAC"], spent, strict=True)]
        print(f"{name:28} {_spread(spent):>20}    {_spread(ratios):>18}")


def _spread(values: list[float]) -> str:
    deciles = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.2f} [{deciles[0]:.2f}..{deciles[-1]:.2f}]"


if __name__ == "__main__":
    main()
