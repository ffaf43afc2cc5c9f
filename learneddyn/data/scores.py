"""Reference returns of the real tasks, each with its source, and the normalised score made from them.

Minari's MuJoCo data sets carry no reference returns. A score of 0 is the random policy, 100 the expert. The random
returns measured here are printed by ``python -m learneddyn.data.scores --episodes 100``.
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


_D4RL = (
    "random and expert: D4RL (Fu et al., 2020), d4rl/infos.py, measured on the older MuJoCo tasks of OpenAI Gym; "
    "customary for the later versions of the task, whose reward differs slightly"
)
_MEASURED = "random: mean of 100 episodes, seeds 0 to 99, by `python -m learneddyn.data.scores --episodes 100`"
_THRESHOLD = "expert: the return at which Gymnasium calls the task solved (EnvSpec.reward_threshold)"
_NO_EXPERT = "expert: no citable figure"

REFERENCES: dict[str, Reference] = {}


def reference(real_id: str) -> Reference:
    """Return the reference returns of a task.

    Raises:
        UnknownReference: the table has no such task (lists those it has).
    """
    if real_id not in REFERENCES:
        raise UnknownReference(
            f"no reference returns for '{real_id}'; there are some for {', '.join(sorted(REFERENCES))}"
        )
    return REFERENCES[real_id]


def normalized_score(real_id: str, returns: Any) -> Any:
    """Return ``100 (return - random) / (expert - random)`` for one return or an array of them.

    Raises:
        UnknownReference: no such task, or the table has no expert return for it.
    """
    entry = reference(real_id)
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
