"""Reference returns of the real tasks, each with its source, and the normalised score made from them.

Minari's MuJoCo data sets carry no reference returns. A score of 0 is the random policy, 100 the expert. Benchmarks
normalise the same task by other returns, so a score goes with its table (`TABLES`). The random returns measured here
are printed by ``python -m learneddyn.data.scores --episodes 100``.
"""

import argparse
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np


class UnknownReference(KeyError):
    """There is no reference return of that kind for the task."""

    def __str__(self) -> str:
        return str(self.args[0])


class Reference(NamedTuple):
    """Undiscounted returns of an episode under a random and an expert policy; None where nobody stated one."""

    random: float
    expert: float | None
    source: str


_MEASURED = "random: mean of 100 episodes, seeds 0 to 99, by `python -m learneddyn.data.scores --episodes 100`"
_THRESHOLD = f"{_MEASURED}; expert: the return at which Gymnasium calls the task solved (EnvSpec.reward_threshold)"
_NOBODY = f"{_MEASURED}; expert: no citable figure"


def _d4rl(measured: float) -> str:
    return (
        "random, expert: D4RL (Fu et al., 2020), d4rl/infos.py, from the MuJoCo tasks of OpenAI Gym; customary for "
        "later versions too, though their rewards differ (random on this version, measured as for the other tasks: "
        f"{measured})"
    )


def _cap(reason: str) -> str:
    return f"{_MEASURED}; expert: the most that can be had, {reason}"


REFERENCES: dict[str, Reference] = {
    "Ant-v5": Reference(-47.5, 6000.0, _THRESHOLD),
    "CartPole-v1": Reference(25.0, 500.0, _cap("a reward of 1 in each of 500 steps")),
    "HalfCheetah-v5": Reference(-280.178953, 12135.0, _d4rl(-267.7)),
    "Hopper-v5": Reference(-20.272305, 3234.3, _d4rl(17.0)),
    "Humanoid-v5": Reference(109.9, None, _NOBODY),
    "HumanoidStandup-v5": Reference(33361.0, None, _NOBODY),
    "InvertedDoublePendulum-v5": Reference(50.1, 9100.0, _THRESHOLD),
    "InvertedPendulum-v5": Reference(5.63, 1000.0, _cap("a reward of 1 in each of 1000 steps")),
    "MountainCarContinuous-v0": Reference(-33.3, 90.0, _THRESHOLD),
    "Pendulum-v1": Reference(-1197.2, None, _NOBODY),
    "Pusher-v5": Reference(-148.5, 0.0, _THRESHOLD),
    "Reacher-v5": Reference(-42.9, -3.75, _THRESHOLD),
    "Swimmer-v5": Reference(3.16, 360.0, _THRESHOLD),
    "Walker2d-v5": Reference(1.629008, 4592.3, _d4rl(1.9)),
}
"""Reference returns by Gymnasium id; where D4RL states them, D4RL's."""

_NEORL = (
    "random, expert: NeoRL (Qin et al., 2021) as in the published code of MOBILE and MOREC, from the MuJoCo tasks of "
    "OpenAI Gym"
)
_NEORL2 = "random, expert: NeoRL-2 (Gao et al., 2025), the least and the largest score of its published code"

TABLES: dict[str, dict[str, Reference]] = {
    "gymnasium": REFERENCES,
    "neorl": {
        "HalfCheetah-v5": Reference(-298.0, 12284.0, _NEORL),
        "Hopper-v5": Reference(5.0, 3294.0, _NEORL),
        "Walker2d-v5": Reference(1.0, 5143.0, _NEORL),
    },
    "neorl2": {
        "DMSD": Reference(30.6, 849.51, _NEORL2),
        "Fusion": Reference(-107.601, 98.05, _NEORL2),
        "Pipeline": Reference(-296.0, 751.0, _NEORL2),
        "RandomFrictionHopper": Reference(-3.0, 503.0, _NEORL2),
        "RocketRecovery": Reference(-176.0, 208.0, _NEORL2),
        "SafetyHalfCheetah": Reference(-283.0, 2507.0, _NEORL2),
        "Salespromotion": Reference(357.62, 602.21, _NEORL2),
        "Simglucose": Reference(9.75, 475.0, _NEORL2),
    },
}
"""Tables by name: "gymnasium" is `REFERENCES`; "neorl" has other references for the same ids; the tasks of "neorl2",
under its own names, are no environments of Gymnasium."""


def reference(real_id: str, table: str = "gymnasium") -> Reference:
    """Return the reference returns of a task in one of the `TABLES`.

    Raises:
        UnknownReference: no such table, or it has no such task (lists those there are).
    """
    if table not in TABLES:
        raise UnknownReference(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    if real_id not in TABLES[table]:
        where = "" if table == "gymnasium" else f" in the table {table!r}"
        raise UnknownReference(
            f"no reference returns for '{real_id}'{where}; there are some for {', '.join(sorted(TABLES[table]))}"
        )
    return TABLES[table][real_id]


def normalized_score(real_id: str, returns: Any, table: str = "gymnasium") -> Any:
    """Return ``100 (return - random) / (expert - random)`` for one return or an array of them, by one of the `TABLES`.

    Raises:
        UnknownReference: no such table or task, or the table has no expert return for it.
    """
    entry = reference(real_id, table)
    if entry.expert is None:
        raise UnknownReference(f"'{real_id}' has no expert return to normalise by ({entry.source}); report raw returns")
    score = 100.0 * (np.asarray(returns, float) - entry.random) / (entry.expert - entry.random)
    return float(score) if score.ndim == 0 else score


def measure_random(real_id: str, episodes: int) -> np.ndarray:
    """Return the returns of so many episodes of the uniform random policy; episode k has seed k."""
    env = gym.make(real_id)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        env.reset(seed=episode)
        env.action_space.seed(episode)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[episode] += float(reward)
            over = terminated or truncated
    env.close()
    return returns


def main() -> None:
    """Print the measured random return of every task of the table beside the one in use."""
    parser = argparse.ArgumentParser(prog="python -m learneddyn.data.scores", description=main.__doc__)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("tasks", nargs="*", default=sorted(REFERENCES))
    args = parser.parse_args()
    print(f"{'task':28}{'measured':>12}{'+- std. error':>15}{'in use':>12}{'expert':>10}")
    for real_id in args.tasks:
        returns, entry = measure_random(real_id, args.episodes), reference(real_id)
        error = returns.std(ddof=1) / np.sqrt(len(returns))
        print(
            f"{real_id:28}{returns.mean():12.3f}{error:15.3f}{entry.random:12.3f}{entry.expert or '-':>10}", flush=True
        )


if __name__ == "__main__":
    main()
