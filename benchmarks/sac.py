"""Milliseconds per SAC update: `FastSAC` beside Stable-Baselines3, SBX (JAX) and TorchRL.

    python benchmarks/sac.py [--threads 1] [--rounds 5] [--batch 256] [--width 256] [--obs 17] [--actions 6]

A row is an update, replay sampling included; a call is 20 updates. "hidden products" are the matrix products between
the two hidden layers that every update needs, and nothing else: no rewriting can be faster. The operations counted are
those of all layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from contest import Contestant, Row, Turns, main, missing
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from torch import nn

from learneddyn.agents import DeviceReplayBuffer, FastSAC

ROWS, UPDATES = 20_000, 20
TABLE = "SAC update"


class Sizes(NamedTuple):
    """Of the problem, the nets (two hidden layers) and the batch."""

    obs: int
    actions: int
    width: int
    batch: int

    @property
    def flop(self) -> int:
        """Operations of one update: the actor forward on two batches and backward on one, each critic forward on three
        and its target on one, backward to its weights once and to its inputs twice.
        """
        o, a, w = self.obs, self.actions, self.width
        actor = o * w + w * w + 2 * a * w, 2 * a * w + w * w  # forward and to the weights; to the activations
        critic = (o + a) * w + w * w + w, w + w * w
        return 2 * self.batch * (3 * actor[0] + actor[1] + 2 * (4 * critic[0] + 2 * critic[1] + a * w))


class Sized(gym.Env[np.ndarray, np.ndarray]):
    """An environment of which only the sizes of its spaces are asked."""

    def __init__(self, sizes: Sizes) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (sizes.obs,), np.float32)
        self.action_space = spaces.Box(-1, 1, (sizes.actions,), np.float32)


def updates(kind: type[Any], sizes: Sizes, device: str, **options: Any) -> Callable[[], None]:
    """Twenty updates of an agent with Stable-Baselines3's interface."""
    model = kind(
        "MlpPolicy",
        Sized(sizes),
        buffer_size=ROWS,
        policy_kwargs={"net_arch": [sizes.width, sizes.width]},
        seed=0,
        device=device,
        **options,
    )
    model.set_logger(configure(None, []))
    rng = np.random.default_rng(0)
    obs, after = rng.normal(size=(2, ROWS, 1, sizes.obs)).astype(np.float32)
    action, reward = rng.uniform(-1, 1, (ROWS, 1, sizes.actions)), rng.normal(size=(ROWS, 1))
    for row in range(ROWS):
        model.replay_buffer.add(obs[row], after[row], action[row], reward[row], np.zeros(1), [{}])
    return lambda: model.train(UPDATES, sizes.batch)


def sbx(sizes: Sizes) -> Callable[[], None]:
    """Stable-Baselines3's interface on JAX: twenty updates are one compiled program."""
    from sbx import SAC as SBX

    return updates(SBX, sizes, "auto")


def torchrl(sizes: Sizes, device: str) -> Callable[[], None]:
    """TorchRL's replay, loss and target update, put together as in its SAC example, with a fused Adam."""
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.tensor_specs import Bounded
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import SACLoss, SoftUpdate

    shape = {"num_cells": [sizes.width] * 2, "activation_class": nn.ReLU, "device": device}
    net = nn.Sequential(
        MLP(in_features=sizes.obs, out_features=2 * sizes.actions, **shape),
        NormalParamExtractor(scale_mapping="biased_softplus_1.0", scale_lb=0.1),
    )
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        spec=Bounded(-1, 1, (sizes.actions,), device=device),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0, "tanh_loc": False},
        return_log_prob=True,
    )
    value = ValueOperator(
        MLP(in_features=sizes.obs + sizes.actions, out_features=1, **shape), in_keys=["observation", "action"]
    )
    loss = SACLoss(actor, value, num_qvalue_nets=2, loss_function="l2", delay_actor=False, delay_qvalue=True)
    loss.make_value_estimator(gamma=0.99)
    target = SoftUpdate(loss, eps=0.995)
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=3e-4, fused=True)
    noise, done = torch.randn(ROWS, 2 * sizes.obs, device=device), torch.zeros(ROWS, 1, dtype=torch.bool, device=device)
    after = {"observation": noise[:, sizes.obs :], "reward": noise[:, :1], "done": done, "terminated": done}
    rows = {
        "observation": noise[:, : sizes.obs],
        "action": 2 * torch.rand(ROWS, sizes.actions, device=device) - 1,
        "next": TensorDict(after, [ROWS], device=device),
    }
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(ROWS, device=device), batch_size=sizes.batch)
    replay.extend(TensorDict(rows, [ROWS], device=device))

    def run() -> None:
        for _ in range(UPDATES):
            parts = loss(replay.sample())
            (parts["loss_actor"] + parts["loss_qvalue"] + parts["loss_alpha"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()

    return run


def products(sizes: Sizes, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """In units of one product of both critics: forward 4 (actor on two batches, targets, critics twice), gradients to
    activations 2.5 (critics twice, actor), to weights 1.5 (critics, actor).
    """
    shape = (2, sizes.batch, sizes.width)
    hidden, flow, out = (torch.randn(4, *shape, device=device).to(dtype) for _ in range(3))
    weight, grad = (torch.randn(4, 2, sizes.width, sizes.width, device=device).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(UPDATES):
            for turn in range(4):
                torch.bmm(hidden[turn], weight[turn].mT, out=out[turn])
            for turn in range(2):
                torch.bmm(flow[turn], weight[turn], out=out[turn])
                torch.bmm(flow[turn].mT, hidden[turn], out=grad[turn])

    return run


def measure(turns: Turns, batch: int = 256, width: int = 256, obs: int = 17, actions: int = 6) -> list[Row]:
    sizes = Sizes(obs, actions, width, batch)
    case, device = f"batch {batch}, 2 x {width}", turns.device
    hidden = 2 * batch * width**2 * 16.0

    def contestant(name: str, call: Callable[[], None], peer: bool = False, flop: float = sizes.flop) -> Contestant:
        return Contestant(name, case, UPDATES, call, flop, peer)

    field, absent = [contestant("SB3", updates(SAC, sizes, device), peer=True)], []
    for name, make in (("sbx (JAX)", lambda: sbx(sizes)), ("torchrl", lambda: torchrl(sizes, device))):
        try:
            field.append(contestant(name, make(), peer=True))
        except ImportError as error:
            absent.append(missing(TABLE, name, error))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for kind, options in (("", {}), (", device replay", {"replay_buffer_class": DeviceReplayBuffer})):
            call = updates(FastSAC, sizes, device, precision=precision, **options)
            field.append(contestant(f"FastSAC {precision}{kind}", call))
        field.append(contestant(f"hidden products alone {precision}", products(sizes, dtype, device), flop=hidden))
    return turns.contest(TABLE, field) + absent


if __name__ == "__main__":
    main(measure, __doc__, batch=256, width=256, obs=17, actions=6)
