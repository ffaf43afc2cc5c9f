"""How fast an ensemble imagines and trains, beside a naive reference, mbrl-lib and the machine's matrix products.

    python benchmarks/rollout.py [--threads 1] [--seconds 0.2] [--rounds 5] [--largest 50000]

Sizes are those of HalfCheetah: 7 networks of 4 x 200, 17 observation columns, 6 actions, a reward head, 5 elites of
which one answers per lane and step. A world step is sampling, reward, termination and the checks around them. The
ceiling is the best matrix product of the same table; a step counts the operations of one network per lane (for all
members: of all; for training: three times), so everything around the products lowers the share. `penalty.py` has the
steps that must ask all members.

Once a process has freed a large piece of memory, glibc keeps later ones, and whoever takes fresh memory at every step
gets faster. Steps of very many lanes, and the naive reference (every row through every member), therefore come last, in
tables of their own; the one of many lanes repeats the smaller number after such a piece.

mbrl-lib wants lanes in multiples of the elites: it gets the next smaller one, and rates count its own lanes.
"""

import tempfile
from collections.abc import Callable
from itertools import cycle, pairwise
from typing import Any

import floor
import gymnasium as gym
import numpy as np
import torch
from contest import Contestant, Row, Turns, lanes_of, main, missing
from torch import Tensor

import learneddyn  # noqa: F401  # registers the environments
from learneddyn import tasks
from learneddyn.core import Transitions, generator
from learneddyn.envs.worlds import save_world
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.gradients import Gradients
from learneddyn.spaces import Spaces
from learneddyn.world import World

OBS, ACTION, MEMBERS, ELITES, BATCH = 17, 6, 7, 5, 256
WIDTHS = (OBS + ACTION, 200, 200, 200, 200, 2 * (OBS + 1))
FLOP = 2 * sum(a * b for a, b in pairwise(WIDTHS))
"""Operations of one network and row."""
NAIVE_LANES = 4096  # beyond, the reference wants gigabytes
TASK = tasks.get("HalfCheetah-v5")
STEP, MANY, TRAINING = "World step", "World step of many lanes", "Ensemble training step"
NAIVE = "World step beside all members and a gather"


def ensemble(device: str = "cpu", **options: Any) -> ProbabilisticEnsemble:
    """An ensemble with fresh weights, standardised by random rows; its quality plays no part."""
    spaces = Spaces(
        gym.spaces.Box(-np.inf, np.inf, (OBS,), np.float64), gym.spaces.Box(-1.0, 1.0, (ACTION,), np.float32)
    )
    model = ProbabilisticEnsemble(MEMBERS, ELITES, learn_reward=True, max_epochs=1, **options)
    n, rng = 600, generator(0)
    obs = torch.randn(n, OBS, generator=rng)
    change = 0.1 * torch.randn(n, OBS, generator=rng)
    action = 2 * torch.rand(n, ACTION, generator=rng) - 1
    columns = obs, action, change[:, 0], obs + change, torch.zeros(n, dtype=torch.bool), torch.arange(n)
    model.fit(Transitions(*columns, spaces), rng=rng)
    return model.to(device)


def inputs(lanes: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    rng = generator(1, device)
    obs = torch.randn(lanes, OBS, generator=rng, device=device)
    return obs, 2 * torch.rand(lanes, ACTION, generator=rng, device=device) - 1


def world_step(name: str, world: World, lanes: int, members: int = 1) -> Contestant:
    device = world.dynamics.elites.device
    (obs, action), rng = inputs(lanes, device), generator(0, device)
    state = world.start(obs, rng)

    @torch.no_grad()
    def step() -> None:
        world.step(state, action, rng)

    return Contestant(name, lanes_of(lanes), lanes, step, members * FLOP)


def naive_step(model: ProbabilisticEnsemble, lanes: int) -> Contestant:
    """Every row through every member, fresh memory everywhere, one member picked at the end."""
    device = model.elites.device
    (obs, action), rng, lane = inputs(lanes, device), generator(0, device), torch.arange(lanes, device=device)

    @torch.no_grad()
    def step() -> Tensor:
        x = ((torch.cat([obs, action], dim=1) - model.input_mean.float()) / model.input_std.float()).expand(7, -1, -1)
        for weight, bias in zip(model.weights[:-1], model.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight)
            x = x * x.sigmoid()
        heads = model._heads(torch.baddbmm(model.biases[-1], x, model.weights[-1]))
        std = (0.5 * heads.logvar).exp()
        drawn = heads.mean + std * torch.randn(std.shape, generator=rng, device=device)
        after = drawn[model.elites[torch.randint(ELITES, (lanes,), generator=rng, device=device)], lane]
        return after[:, -1]

    return Contestant("all members and a gather", lanes_of(lanes), lanes, step, MEMBERS * FLOP, peer=True)


def layers_alone(lanes: int, device: str) -> list[Contestant]:
    """Only the layers of a step: elites answer equal shares of the lanes."""
    rows = -(-lanes // ELITES)
    return [
        Contestant(
            f"{floor.LAYERS} {precision}",
            lanes_of(lanes),
            rows * ELITES,
            floor.chain(WIDTHS, ELITES, rows, precision, device),
            FLOP,
        )
        for precision in floor.DTYPES
    ]


def through_gym(model: ProbabilisticEnsemble, folder: str) -> Contestant:
    save_world(folder, model, task=TASK)
    env = gym.make("LearnedDyn-v0", world=folder)
    env.reset(seed=0)
    actions = cycle([env.action_space.sample() for _ in range(64)])

    def step() -> None:
        *_, terminated, truncated, _ = env.step(next(actions))
        if terminated or truncated:
            env.reset()

    return Contestant("fp32 through gym.make", lanes_of(1), 1, step, FLOP)


def training(name: str, model: ProbabilisticEnsemble, half: bool) -> Contestant:
    optimizer, rows = model._optimizer(), _packed(model)
    step = Gradients(
        list(model.weights), list(model.biases), model.max_logvar, model.min_logvar, model.learned, half=half
    )

    def update() -> None:
        batch = torch.randint(len(rows), (MEMBERS, BATCH), device=rows.device)
        x, target, _ = model._unpack(rows.index_select(0, batch.flatten()).view(*batch.shape, -1))
        step(x, target, None)
        optimizer.step()

    return _trained(name, update)


def training_by_autograd(model: ProbabilisticEnsemble) -> Contestant:
    optimizer, rows = model._optimizer(), _packed(model)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        model._loss(rows[torch.randint(len(rows), (MEMBERS, BATCH), device=rows.device)]).backward()
        optimizer.step()

    return _trained("autograd", update, peer=True)


def _trained(name: str, update: Callable[[], Any], peer: bool = False) -> Contestant:
    return Contestant(name, f"{MEMBERS} x {BATCH} rows", MEMBERS * BATCH, update, 3 * FLOP, peer)


def _packed(model: ProbabilisticEnsemble) -> Tensor:
    device = model.elites.device
    return torch.randn(100_000, WIDTHS[0] + WIDTHS[-1] // 2 + 1, generator=generator(0, device), device=device)


def mbrl_model(device: str = "cpu") -> tuple[Any, Any]:
    """The same ensemble by mbrl-lib with fresh weights, and 20 000 random rows in a batch of its own kind.

    Raises:
        ImportError: it is not installed.
    """
    import omegaconf
    from mbrl.models import GaussianMLP, OneDTransitionRewardModel
    from mbrl.util.replay_buffer import TransitionBatch

    activation = omegaconf.OmegaConf.create({"_target_": "torch.nn.SiLU"})
    net = GaussianMLP(
        WIDTHS[0],
        OBS + 1,
        device,
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
    obs, action = (part.numpy() for part in inputs(20_000))
    reward, never = np.zeros(len(obs), np.float32), np.zeros(len(obs), bool)
    batch = TransitionBatch(obs, action, obs + 0.1, reward, never, never)
    model.update_normalizer(batch)
    net.set_elite(list(range(ELITES)))
    return model, batch


def mbrl_env(model: Any) -> Any:
    from mbrl.models import ModelEnv

    spaces = gym.spaces.Box(-np.inf, np.inf, (OBS,)), gym.spaces.Box(-1.0, 1.0, (ACTION,))
    real = type("Spaces", (), {"observation_space": spaces[0], "action_space": spaces[1]})()

    def never(action: Tensor, after: Tensor) -> Tensor:
        return torch.zeros(len(after), 1, dtype=torch.bool, device=after.device)

    return ModelEnv(real, model, never, None, generator(0, model.device))


def mbrl_lib(lanes: list[int], device: str) -> tuple[dict[int, Contestant], Contestant]:
    """Steps of mbrl-lib by the number of lanes, and its training step.

    Raises:
        ImportError: it is not installed.
    """
    model, batch = mbrl_model(device)
    from mbrl.models import ModelTrainer
    from mbrl.util.replay_buffer import BootstrapIterator

    steps = {}
    for wanted in lanes:
        count = wanted - wanted % ELITES
        if count:
            call = _mbrl_step(mbrl_env(model), count)
            steps[wanted] = Contestant("mbrl-lib", lanes_of(wanted), count, call, FLOP, peer=True)
    trainer = ModelTrainer(model, optim_lr=1e-3, weight_decay=5e-5)
    batches = cycle(BootstrapIterator(batch, BATCH, MEMBERS, shuffle_each_epoch=True, rng=np.random.default_rng(0)))
    return steps, _trained("mbrl-lib", lambda: model.update(next(batches), trainer.optimizer), peer=True)


def _mbrl_step(env: Any, lanes: int) -> Callable[[], Any]:
    obs, action = inputs(lanes, env.device)
    state = env.reset(obs.cpu().numpy(), return_as_np=False)
    return lambda: env.step(action, state, sample=True)


def measure(turns: Turns, largest: int = 50_000) -> list[Row]:
    lanes = [count for count in (1, 256, 1024, 4096, 50_000) if count <= largest]
    few = [count for count in lanes if count <= NAIVE_LANES]
    full, half = ensemble(turns.device), ensemble(turns.device, precision="bf16")
    absent: list[Row] = []
    peer_steps: dict[int, Contestant] = {}
    peers = []
    try:
        peer_steps, peer_training = mbrl_lib(lanes, turns.device)
        peers = [peer_training]
    except ImportError as error:
        absent = [missing(table, "mbrl-lib", error) for table in (STEP, TRAINING)]

    def steps(counts: list[int]) -> list[Contestant]:
        field = []
        for count in counts:
            field += [world_step(name, World(model, TASK), count) for name, model in (("fp32", full), ("bf16", half))]
            field += layers_alone(count, turns.device) if count > 1 else []
            field += [peer_steps[count]] if count in peer_steps else []
        return field

    with tempfile.TemporaryDirectory() as folder:
        single = through_gym(full, f"{folder}/world")
    rows = turns.contest(STEP, [single, *steps(few)])
    updates = [training(name, ensemble(turns.device), half=name == "bf16") for name in ("fp32", "bf16")]
    updates.append(training_by_autograd(ensemble(turns.device)))
    for name in floor.DTYPES:
        updates.append(_trained(f"{floor.PRODUCTS} {name}", floor.update(WIDTHS, MEMBERS, BATCH, name, turns.device)))
    rows += turns.contest(TRAINING, [*updates, *peers])
    rows += turns.contest(MANY, steps(lanes[-2:])) if lanes != few else []
    naive = []
    for count in few:
        naive += [world_step(name, World(model, TASK), count) for name, model in (("fp32", full), ("bf16", half))]
        naive.append(naive_step(full, count))
    return rows + turns.contest(NAIVE, naive) + absent


if __name__ == "__main__":
    main(measure, __doc__, largest=50_000)
