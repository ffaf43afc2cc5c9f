"""Imagination as MBPO does it: a policy acts inside the ensemble, and the rows go into the pool it learns from.

    python benchmarks/imagine.py [--threads 1] [--seconds 0.2] [--rounds 5] [--starts 20000]

Sizes are those of HalfCheetah, as in `rollout.py`, with a policy of 2 x 256 and rollouts of 5 steps. A row is an
imagined transition; starts are drawn from the replay of real rows. The operations counted are those of one network and
of the policy. mbrl-lib's is `rollout_model_and_populate_sac_buffer`.
"""

from types import SimpleNamespace

import floor
import torch
from contest import Contestant, Row, Turns, main, missing
from rollout import ACTION, ELITES, FLOP, OBS, WIDTHS, ensemble, inputs, mbrl_env, mbrl_model
from stable_baselines3.common.logger import configure

from learneddyn.agents import MBPO
from learneddyn.core import Transitions

TABLE, STEPS, WIDTH = "Imagination with the policy in the loop", 5, 256
POLICY = 2 * WIDTH * (OBS + WIDTH + 2 * ACTION)


def ours(starts: int, precision: str, device: str) -> Contestant:
    agent = MBPO(
        "MlpPolicy",
        "HalfCheetah-v5",
        model=ensemble(device, precision=precision),
        rollout_batch=starts,
        schedule=(0, 1, STEPS, STEPS),
        diagnose=False,
        device=device,
        seed=0,
    )
    agent.set_logger(configure(None, []))
    (obs, action), never = inputs(starts, device), torch.zeros(starts, dtype=torch.bool, device=device)
    episode = torch.arange(starts, device=device)
    agent.replay_buffer.real.add(Transitions(obs, action, obs[:, 0], obs, never, episode, agent.spaces))
    return Contestant(precision, _case(starts), STEPS * starts, agent.imagine, FLOP + POLICY)


def mbrl_lib(starts: int, device: str) -> Contestant:
    """Imagination by mbrl-lib.

    Raises:
        ImportError: it is not installed.
    """
    model, batch = mbrl_model(device)
    from mbrl.algorithms.mbpo import rollout_model_and_populate_sac_buffer
    from mbrl.planning.sac_wrapper import SACAgent
    from mbrl.third_party.pytorch_sac_pranz24 import SAC
    from mbrl.util import ReplayBuffer

    env = mbrl_env(model)
    settings = SimpleNamespace(
        gamma=0.99,
        tau=0.005,
        alpha=0.2,
        policy="Gaussian",
        target_update_interval=1,
        automatic_entropy_tuning=True,
        target_entropy=None,
        hidden_size=WIDTH,
        lr=3e-4,
        device=torch.device(device),
    )
    agent = SACAgent(SAC(OBS, env.action_space, settings))
    real, pool = ReplayBuffer(starts, (OBS,), (ACTION,)), ReplayBuffer(STEPS * starts, (OBS,), (ACTION,))
    real.add_batch(*(part[:starts] for part in batch.astuple()))

    def imagine() -> None:
        rollout_model_and_populate_sac_buffer(env, real, agent, pool, True, STEPS, starts)

    return Contestant("mbrl-lib", _case(starts), STEPS * starts, imagine, FLOP + POLICY, peer=True)


def layers_alone(starts: int, precision: str, device: str) -> Contestant:
    """Only the layers: of the model in ``precision``, of the policy always in fp32, as agents have it."""
    model = floor.chain(WIDTHS, ELITES, -(-starts // ELITES), precision, device, times=STEPS)
    policy = floor.chain((OBS, WIDTH, WIDTH, 2 * ACTION), 1, starts, "fp32", device, times=STEPS, activation="relu")

    def imagine() -> None:
        model()
        policy()

    return Contestant(f"{floor.LAYERS} {precision}", _case(starts), STEPS * starts, imagine, FLOP + POLICY)


def _case(starts: int) -> str:
    return f"{starts} starts x {STEPS} steps"


def measure(turns: Turns, starts: int = 20_000) -> list[Row]:
    field, absent = [ours(starts, precision, turns.device) for precision in floor.DTYPES], []
    field += [layers_alone(starts, precision, turns.device) for precision in floor.DTYPES]
    try:
        field.append(mbrl_lib(starts, turns.device))
    except ImportError as error:
        absent = [missing(TABLE, "mbrl-lib", error)]
    return turns.contest(TABLE, field) + absent


if __name__ == "__main__":
    main(measure, __doc__, starts=20_000)
