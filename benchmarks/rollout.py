"""How fast an ensemble imagines and trains, beside a naive reference, mbrl-lib and the machine's matrix products.

    PYTHONPATH=. python benchmarks/rollout.py [--lanes 1 256 1024 4096 50000] [--seconds 0.3] [--rounds 7]

Sizes are those of HalfCheetah: 7 networks of 4 x 200, 17 observation columns, 6 actions, a reward head, 5 elites of
which one answers per lane and step. A world step is sampling, reward, termination and the checks around them. Times are
CPU times of this process on one thread; contestants of a table take turns, and the tables show medians, so that a busy
machine slows all of them. The peak is the best matrix product of the same table; a step counts the operations of one
network per lane (for all members: of all; for training: three times), so everything around the products lowers the
share. The naive reference has a table of its own, because its large allocations make those of all others cheaper.

mbrl-lib runs if it can be imported, for instance after
``pip install --target DIR --no-deps mbrl==0.2.0 hydra-core omegaconf antlr4-python3-runtime==4.9.3 termcolor``
with DIR on
PYTHONPATH. It wants lanes in multiples of the elites: it gets the next smaller one, and rates count its own lanes.
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from env_steps import Contestant, measure
from torch import Tensor

import learneddyn  # noqa: F401  # registers the environments
from learneddyn import tasks
from learneddyn.core import Transitions, generator
from learneddyn.envs.worlds import save_world
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.gradients import Gradients
from learneddyn.spaces import Spaces
from learneddyn.world import PENALTIES, World

OBS, ACTION, MEMBERS, ELITES, BATCH = 17, 6, 7, 5, 256
WIDTHS = (OBS + ACTION, 200, 200, 200, 200, 2 * (OBS + 1))
FLOP = 2 * sum(a * b for a, b in pairwise(WIDTHS))
"""Operations of one network and row."""
NAIVE_LANES = 4096  # beyond, the reference wants gigabytes
TASK = tasks.get("HalfCheetah-v5")


def ensemble(**options: Any) -> ProbabilisticEnsemble:
    """An ensemble with fresh weights, standardised by random rows; its quality plays no part."""
    spaces = Spaces(
        gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float32), gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    )
    model = ProbabilisticEnsemble(MEMBERS, ELITES, learn_reward=True, max_epochs=1, **options)
    n, rng = 600, generator(0)
    obs = torch.randn(n, OBS, generator=rng)
    change = 0.1 * torch.randn(n, OBS, generator=rng)
    action = 2 * torch.rand(n, ACTION, generator=rng) - 1
    columns = obs, action, change[:, 0], obs + change, torch.zeros(n, dtype=torch.bool), torch.arange(n)
    model.fit(Transitions(*columns, spaces), rng=rng)
    return model


def inputs(lanes: int) -> tuple[Tensor, Tensor]:
    rng = generator(1)
    return torch.randn(lanes, OBS, generator=rng), 2 * torch.rand(lanes, ACTION, generator=rng) - 1


def world_step(world: World, lanes: int) -> Contestant:
    (obs, action), rng = inputs(lanes), generator(0)
    state = world.start(obs, rng)

    @torch.no_grad()
    def step() -> None:
        world.step(state, action, rng)

    return lanes, step


def naive_step(model: ProbabilisticEnsemble, lanes: int, penalised: bool = False) -> Contestant:
    """Every row through every member, fresh memory everywhere, one member picked at the end."""
    (obs, action), rng, lane = inputs(lanes), generator(0), torch.arange(lanes)

    @torch.no_grad()
    def step() -> Tensor:
        x = ((torch.cat([obs, action], dim=1) - model.input_mean.float()) / model.input_std.float()).expand(7, -1, -1)
        for weight, bias in zip(model.weights[:-1], model.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight)
            x = x * x.sigmoid()
        heads = model._heads(torch.baddbmm(model.biases[-1], x, model.weights[-1]))
        std = (0.5 * heads.logvar).exp()
        drawn = heads.mean + std * torch.randn(std.shape, generator=rng)
        after = drawn[model.elites[torch.randint(ELITES, (lanes,), generator=rng)], lane]
        penalty = std.norm(dim=2).amax(dim=0) if penalised else 0.0
        return after[:, -1] - penalty

    return lanes, step


def through_gym(model: ProbabilisticEnsemble, folder: str) -> Contestant:
    save_world(folder, model, task=TASK)
    env = gym.make("LearnedDyn-v0", world=folder)
    env.reset(seed=0)
    actions = cycle([env.action_space.sample() for _ in range(64)])

    def step() -> None:
        *_, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return 1, step


def training(model: ProbabilisticEnsemble, half: bool) -> Contestant:
    optimizer, rows = model._optimizer(), _packed(model)
    step = Gradients(
        list(model.weights), list(model.biases), model.max_logvar, model.min_logvar, model.learned, half=half
    )

    def update() -> None:
        batch = torch.randint(len(rows), (MEMBERS, BATCH))
        x, target, _ = model._unpack(rows.index_select(0, batch.flatten()).view(*batch.shape, -1))
        step(x, target, None)
        optimizer.step()

    return MEMBERS * BATCH, update


def training_by_autograd(model: ProbabilisticEnsemble) -> Contestant:
    optimizer, rows = model._optimizer(), _packed(model)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        model._loss(rows[torch.randint(len(rows), (MEMBERS, BATCH))]).backward()
        optimizer.step()

    return MEMBERS * BATCH, update


def _packed(model: ProbabilisticEnsemble) -> Tensor:
    return torch.randn(100_000, WIDTHS[0] + WIDTHS[-1] // 2 + 1, generator=generator(0))


def mbrl_lib(lanes: list[int]) -> tuple[dict[str, Contestant], dict[str, Contestant]]:
    """Steps and the training step of mbrl-lib with the same sizes; none where it cannot be imported."""
    try:
        import omegaconf
        from mbrl.models import GaussianMLP, ModelEnv, ModelTrainer, OneDTransitionRewardModel
        from mbrl.util.replay_buffer import BootstrapIterator, TransitionBatch
    except ImportError as error:
        print(f"mbrl-lib is left out: {error}\n")
        return {}, {}
    activation = omegaconf.OmegaConf.create({"_target_": "torch.nn.SiLU"})
    net = GaussianMLP(
        WIDTHS[0],
        OBS + 1,
        "cpu",
        num_layers=4,
        ensemble_size=MEMBERS,
        hid_size=200,
        deterministic=False,
        propagation_method="random_model",
        activation_fn_cfg=activation,
    )
    model = OneDTransitionRewardModel(
        net, target_is_delta=True, normalize=True, learned_rewards=True, num_elites=ELITES
    )
    n = 20_000
    obs, action = (part.numpy() for part in inputs(n))
    reward, never = np.zeros(n, np.float32), np.zeros(n, bool)
    batch = TransitionBatch(obs, action, obs + 0.1, reward, never, never)
    model.update_normalizer(batch)
    net.set_elite(list(range(ELITES)))
    spaces = gym.spaces.Box(-np.inf, np.inf, (OBS,)), gym.spaces.Box(-1.0, 1.0, (ACTION,))
    real = type("Spaces", (), {"observation_space": spaces[0], "action_space": spaces[1]})()
    calls: dict[str, Contestant] = {}
    for wanted in lanes:
        count = wanted - wanted % ELITES
        if count:
            env = ModelEnv(
                real, model, lambda act, after: torch.zeros(len(after), 1, dtype=torch.bool), None, generator(0)
            )
            calls[f"mbrl-lib, {wanted}"] = count, _mbrl_step(env, count)
    trainer = ModelTrainer(model, optim_lr=1e-3, weight_decay=5e-5)
    batches = cycle(BootstrapIterator(batch, BATCH, MEMBERS, shuffle_each_epoch=True, rng=np.random.default_rng(0)))
    return calls, {"mbrl-lib training": (MEMBERS * BATCH, lambda: model.update(next(batches), trainer.optimizer))}


def _mbrl_step(env: Any, lanes: int) -> Callable[[], Any]:
    obs, action = inputs(lanes)
    state = env.reset(obs.numpy(), return_as_np=False)
    return lambda: env.step(action, state, sample=True)


def products() -> dict[str, Contestant]:
    """Square matrix products, as many operations per row as one network has."""
    calls: dict[str, Contestant] = {}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for size in (256, 512, 1024):
            one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            out = torch.empty_like(one)

            def multiply(one: Tensor = one, other: Tensor = other, out: Tensor = out) -> None:
                torch.mm(one, other, out=out)

            calls[f"{kind} product, {size}"] = round(2 * size**3 / FLOP), multiply
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 256, 1024, 4096, 50_000])
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    full, half = ensemble(), ensemble(precision="bf16")
    penalised = World(full, TASK, penalty=PENALTIES["max_aleatoric"], penalty_weight=1.0)
    peer_steps, peer_training = mbrl_lib(args.lanes)
    print(f"{torch.get_num_threads()} thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    with tempfile.TemporaryDirectory() as folder:
        steps = {"gym.make, 1": through_gym(full, f"{folder}/world")}
    for lanes in args.lanes:
        steps[f"fp32, {lanes}"] = world_step(World(full, TASK), lanes)
        steps[f"bf16, {lanes}"] = world_step(World(half, TASK), lanes)
    table("world step, lanes", steps | peer_steps, args.seconds, args.rounds)
    calls = {
        "fp32 training": training(ensemble(), half=False),
        "bf16 training": training(ensemble(), half=True),
        "autograd training": training_by_autograd(ensemble()),
    }
    table("training step, 7 x 256 rows", calls | peer_training, args.seconds, args.rounds)
    calls = {}
    for lanes in (lanes for lanes in args.lanes if lanes <= NAIVE_LANES):
        calls[f"fp32, {lanes}"] = world_step(World(full, TASK), lanes)
        calls[f"naive, {lanes}"] = naive_step(full, lanes)
    table("world step beside all members and a gather, lanes", calls, args.seconds, args.rounds)
    calls = {}
    for lanes in (lanes for lanes in args.lanes if lanes <= NAIVE_LANES):
        calls[f"penalised, {lanes}"] = world_step(penalised, lanes)
        calls[f"naive, {lanes}"] = naive_step(full, lanes, penalised=True)
    table("world step with a penalty, all members, lanes", calls, args.seconds, args.rounds)


def table(title: str, calls: dict[str, Contestant], seconds: float, rounds: int) -> None:
    """Measure and print; a contestant is named ``kind, lanes``, and ratios compare equal lanes."""
    squares = products()
    spent = measure(squares | calls, seconds, rounds)
    rate = {name: rows / spent[name] for name, (rows, _) in (squares | calls).items()}
    peak = {kind: max(rate[name] for name in squares if name.startswith(kind)) for kind in ("fp32", "bf16")}
    print(f"\nProducts: {peak['fp32'] * FLOP / 1e9:.0f} GFLOP/s fp32 (the peak), {peak['bf16'] * FLOP / 1e9:.0f} bf16")
    print(
        f"{title:50} {'us/call':>10} {'rows/s':>9} {'of peak':>8} {'x naive':>8} {'x autograd':>10} {'x mbrl-lib':>10}"
    )
    for name in calls:
        kind, _, lanes = name.partition(", ")
        work = 3 if "training" in name else MEMBERS if "penalty" in title or kind == "naive" else 1
        ratios = [rate[name] / rate[other] if other != name and other in rate else None for other in (
            f"naive, {lanes}", "autograd training", "mbrl-lib training" if "training" in name else f"mbrl-lib, {lanes}"
        )]  # fmt: skip
        shown = [
            f"{ratio:{width}.2f}" if ratio else " " * width for ratio, width in zip(ratios, (8, 10, 10), strict=True)
        ]
        print(f"{name:50} {spent[name] * 1e6:10.1f} {rate[name]:9,.0f} {rate[name] * work / peak['fp32']:8.0%}", *shown)


if __name__ == "__main__":
    main()
