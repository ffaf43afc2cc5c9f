"""SINDy-RL: Dyna with a sparse polynomial model, and the policy it learns as a formula.

Source: Zolman, Lagemann, Fasel, Kutz, Brunton, "SINDy-RL: Interpretable and Efficient Model-Based Reinforcement
Learning" (2024). An ensemble of sparse regressions (`learneddyn.models.SINDy`, the median of its coefficients) is
fitted to all real transitions and rolled out; rollouts that leave the region of the data stop there; in the end the
policy is regressed on a sparse dictionary (`learneddyn.agents.sparse_policy`).

Deviations: the policy is learned by SAC on short rollouts that branch from real states (there: PPO on whole episodes),
which is the loop of `learneddyn.agents.dyna`. The region is the box of the real data, widened (there: bounds given by
hand, and clipping before). Columns that a model fits as changes need no threshold below the time step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn import tasks
from learneddyn.agents.dyna import Dyna
from learneddyn.agents.sac import FastSAC
from learneddyn.agents.sparse_policy import SparsePolicy, distil
from learneddyn.core import Task
from learneddyn.models import SINDy
from learneddyn.world import World
from learneddyn.world.bounds import Bounded
from learneddyn.world.trust import within_box


class SINDyRL(Dyna, FastSAC):
    """SAC that learns in a sparse model of its own; arguments besides these are those of `Dyna` and of `FastSAC`.

    ``agent.dynamics.equations()`` prints the model, ``agent.distil().formula()`` the policy.

    Args:
        *args: see `Dyna`.
        model: by default `sparse_dynamics` of the environment's task.
        margin: rollouts stop where a column leaves the range of the real data, widened by this share of it.
        unit_pairs: pairs of observation columns (cosine, sine) that are brought back to the unit circle at every step.
        schedule: see `Dyna`; polynomials are cheap to roll out.
        rollout_batch: see `Dyna`.
        **kwargs: see `Dyna`.

    Raises:
        ValueError: a negative margin, or what `Dyna` refuses.
        ImportError: at the first fit: pysindy is not installed.
    """

    def __init__(
        self,
        *args: Any,
        model: Any = None,
        margin: float = 0.2,
        unit_pairs: Sequence[Sequence[int]] = (),
        schedule: Sequence[int] = (0, 1, 10, 10),
        rollout_batch: int = 5000,
        **kwargs: Any,
    ) -> None:
        if not margin >= 0:
            raise ValueError(f"margin must be at least 0, got {margin!r}")
        self.margin, self.unit_pairs = margin, [[cosine, sine] for cosine, sine in unit_pairs]
        super().__init__(*args, model=model, schedule=schedule, rollout_batch=rollout_batch, **kwargs)

    def _setup_model(self) -> None:
        if self.task is None:
            self.task = tasks.of_env(self.env)
        if self._dynamics is None and self._dynamics_card is None:
            self._dynamics = sparse_dynamics(self.task, self.unit_pairs)
        super()._setup_model()

    def make_world(self) -> World:
        """Return the world that imagines: inside the widened box of the real data, on the unit circle of pairs."""
        world = super().make_world()
        if self.unit_pairs:
            world.sampler = Bounded(world.sampler, unit_pairs=[(cosine, sine) for cosine, sine in self.unit_pairs])
        if len(self.replay_buffer.real):
            data = self.real_data()
            seen = torch.cat([data.obs, data.next_obs])
            low, high = seen.amin(dim=0), seen.amax(dim=0)
            slack = self.margin * (high - low)
            low, high = low - slack, high + slack
            for column, least, most in getattr(self.dynamics, "domain", ()):
                low[column], high[column] = low[column].clamp_min(least), high[column].clamp_max(most)
            world.trust = within_box(low, high)
        return world

    @torch.no_grad()
    def distil(
        self,
        student: SparsePolicy | None = None,
        *,
        episodes: int = 400,
        steps: int = 5000,
        copies: int = 2,
        noise: float = 0.1,
    ) -> SparsePolicy:
        """Return the policy as a sparse polynomial of the observation.

        The deterministic policy is rolled out in the learned world from start states of the task, or from the first
        observations of real episodes where the task knows none.

        Args:
            student: fitted in place; by default of degree 3 on the coordinates of the task.
            episodes: imagined, each up to the task's time limit.
            steps: visited states that are kept, drawn at random.
            copies: see `learneddyn.agents.sparse_policy.distil`.
            noise: see there.

        Raises:
            ValueError: the agent has not learned yet, so that there is no world.
        """
        if self.world is None or self.task is None:
            raise ValueError("there is no policy to distil yet: call learn first")
        world = self.make_world()  # of all real steps, those since the last fit and those of a checkpoint too
        if self.task.initial is not None:
            starts = world.initial(episodes, self.rng)
        else:
            data = self.real_data()
            first = data.obs[data.positions() == 0]
            starts = first[torch.randint(len(first), (episodes,), generator=self.rng, device=self.device)]
        self.policy.set_training_mode(False)
        visited = world.rollout(starts, self.act, self.task.max_episode_steps or 1000, self.rng).obs
        chosen = torch.randperm(len(visited), generator=self.rng, device=self.device)[:steps]
        student = SparsePolicy(angles=self.task.angles, unit_pairs=self.unit_pairs) if student is None else student
        return distil(self.act, visited[chosen], self.spaces, rng=self.rng, student=student, copies=copies, noise=noise)

    @torch.no_grad()
    def act(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
        """Return the deterministic policy's actions: flat observations to flat actions, both in environment units."""
        squashed = self.policy._predict(obs.reshape(-1, *self.observation_space.shape), deterministic=True)
        return self._low + (0.5 * squashed + 0.5) * self._range


def sparse_dynamics(task: Task, unit_pairs: Sequence[Sequence[int]] = ()) -> SINDy:
    """Return the published ensemble (20 bootstraps, median, degree 2) on changes, with the angles of the task."""
    reward = task.reward is None
    return SINDy(target="change", threshold=1e-3, angles=task.angles, unit_pairs=unit_pairs, learn_reward=reward)
