"""The nouns that travel between the rooms, and the protocols that rooms ask of each other.

Axes: n rows, b lanes, e members, h horizon, s candidates, o observation, a action, m memory. Observations and actions
are flat float32 columns (`learneddyn.spaces`), in the units of the environment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from learneddyn.spaces import Spaces

RewardFn = Callable[[Float[Tensor, "b o"], Float[Tensor, "b a"], Float[Tensor, "b o"]], Float[Tensor, " b"]]
TerminationFn = Callable[[Float[Tensor, "b o"]], Bool[Tensor, " b"]]
InitialFn = Callable[[int, torch.Generator], Float[Tensor, "b o"]]
ActionFn = Callable[[Float[Tensor, "b o"]], Float[Tensor, "b a"]]
"""A policy inside a rollout: flat observations to flat actions, tensors on one device, no NumPy."""


class DataError(ValueError):
    """Logged experience that cannot be learned from: wrong shapes, NaN or infinite entries, no rows."""


@dataclass(frozen=True, slots=True)
class Transitions:
    """Logged experience, one row a transition, in flat contiguous tensors on one device.

    ``terminated`` marks true terminations only, never a time-out. ``next_obs`` always comes from the same episode as
    ``obs``. ``episode`` numbers the episodes; rows of one episode stand together and in order.

    Memory: ``4 (2 o + a + 1) + 9`` bytes a row (o, a: columns of observation and action).

    Raises:
        DataError: the tensors disagree in their number of rows or columns.
    """

    obs: Float[Tensor, "n o"]
    action: Float[Tensor, "n a"]
    reward: Float[Tensor, " n"]
    next_obs: Float[Tensor, "n o"]
    terminated: Bool[Tensor, " n"]
    episode: Int[Tensor, " n"]
    spaces: Spaces | None = None
    source: str = ""

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in self.tensors().items()}
        if len(set(rows.values())) != 1:
            raise DataError(f"all columns of Transitions must have the same number of rows, got {rows}")
        if self.obs.shape != self.next_obs.shape:
            raise DataError(f"obs has shape {tuple(self.obs.shape)} but next_obs {tuple(self.next_obs.shape)}")
        if self.spaces is not None:
            for name, got, want in (
                ("obs", self.obs.shape[1], self.spaces.obs_dim),
                ("action", self.action.shape[1], self.spaces.action_dim),
            ):
                if got != want:
                    raise DataError(f"{name} has {got} columns, but its space {self.spaces} has {want}")

    def __len__(self) -> int:
        return len(self.obs)

    def __getitem__(self, rows: slice | Tensor) -> "Transitions":
        """Return the chosen rows (a slice, a boolean mask or an index tensor)."""
        return self._map(lambda tensor: tensor[rows])

    def tensors(self) -> dict[str, Tensor]:
        """Return the six columns by name."""
        return {name: getattr(self, name) for name in _COLUMNS}

    @property
    def device(self) -> torch.device:
        """The device all columns live on."""
        return self.obs.device

    def positions(self) -> Int[Tensor, " n"]:
        """Return how many rows of its episode stand before each row."""
        row = torch.arange(len(self), device=self.device)
        begins = torch.ones(len(self), dtype=torch.bool, device=self.device)
        begins[1:] = self.episode[1:] != self.episode[:-1]
        return row - torch.where(begins, row, 0).cummax(dim=0).values

    def labelled(self) -> Bool[Tensor, " n"]:
        """Return which rows hold an action. A log of states alone holds NaN in every column of ``action``.

        A system that nobody acts on has no column of actions, and lacks none.
        """
        return ~self.action.isnan().all(dim=1) | (self.action.shape[1] == 0)

    def to(self, device: torch.device | str) -> "Transitions":
        """Return the same rows on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Transitions":
        columns: dict[str, Any] = {name: change(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **columns)

    def check(self, *, actions: bool = True) -> "Transitions":
        """Return self if it can be learned from.

        Args:
            actions: whether every row must hold an action, see `labelled`.

        Raises:
            DataError: there is no row, or a row holds NaN or infinity (names the column, the first row, the count).
        """
        if len(self) == 0:
            raise DataError("the data set has no transitions (empty, or every episode has fewer than two observations)")
        for name in ("obs", "action", "reward", "next_obs"):
            finite = getattr(self, name).isfinite().reshape(len(self), -1).all(dim=1)
            if name == "action" and not actions:
                finite |= ~self.labelled()
            if not finite.all():
                bad = (~finite).nonzero().flatten()
                raise DataError(
                    f"{len(bad)} of {len(self)} rows hold NaN or infinity in '{name}', the first is row {int(bad[0])}; "
                    f"drop them with data[data.{name}.isfinite()...] or repair the log"
                )
        return self

    @classmethod
    def cat(cls, parts: Sequence["Transitions"]) -> "Transitions":
        """Join data sets of the same spaces; episodes are renumbered so that they stay apart.

        Raises:
            DataError: nothing to join, or different spaces.
        """
        if not parts:
            raise DataError("Transitions.cat needs at least one part")
        if any(part.spaces != parts[0].spaces for part in parts):
            raise DataError(f"cannot join data of different spaces: {[part.spaces for part in parts]}")
        episodes, offset = [], 0
        for part in parts:
            if len(part):
                episodes.append(part.episode - part.episode.min() + offset)
                offset = int(episodes[-1].max()) + 1
            else:
                episodes.append(part.episode)
        columns = {name: torch.cat([getattr(part, name) for part in parts]) for name in _COLUMNS if name != "episode"}
        source = " + ".join(dict.fromkeys(part.source for part in parts if part.source))
        return cls(**columns, episode=torch.cat(episodes), spaces=parts[0].spaces, source=source)

    @classmethod
    def from_numpy(
        cls,
        obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        next_obs: np.ndarray,
        terminated: np.ndarray,
        episode: np.ndarray,
        *,
        spaces: Spaces | None = None,
        source: str = "",
        device: torch.device | str = "cpu",
    ) -> "Transitions":
        """Build from flat NumPy columns, cast to float32 / bool / int64."""

        def column(values: np.ndarray, dtype: type) -> Tensor:
            return torch.as_tensor(np.asarray(values, dtype), device=device)

        return cls(
            obs=column(obs, np.float32),
            action=column(action, np.float32),
            reward=column(reward, np.float32),
            next_obs=column(next_obs, np.float32),
            terminated=column(terminated, bool),
            episode=column(episode, np.int64),
            spaces=spaces,
            source=source,
        )


_COLUMNS = tuple(f.name for f in fields(Transitions) if f.name not in ("spaces", "source"))


class Prediction(NamedTuple):
    """What every member of a model says about the next step, in environment units.

    ``std`` is the standard deviation of the next observation (aleatoric). Heads the model does not have are None.
    """

    mean: Float[Tensor, "e b o"]
    std: Float[Tensor, "e b o"]
    elites: Int[Tensor, " k"]
    reward_mean: Float[Tensor, "e b"] | None = None
    reward_std: Float[Tensor, "e b"] | None = None
    terminated: Float[Tensor, "e b"] | None = None
    """Probability that the step ends the episode."""
    memory: Float[Tensor, "b m"] | None = None


class Outcome(NamedTuple):
    """One sampled next step per row, by the member of that row. Heads the model does not have are None."""

    next_obs: Float[Tensor, "b o"]
    reward: Float[Tensor, " b"] | None = None
    terminated: Bool[Tensor, " b"] | None = None
    memory: Float[Tensor, "b m"] | None = None


class State(NamedTuple):
    """Where the lanes of a world stand. ``memory`` is the hidden state of a recurrent model, owned by that model."""

    obs: Float[Tensor, "b o"]
    member: Int[Tensor, " b"]
    memory: Float[Tensor, "b m"] | None = None


class Step(NamedTuple):
    """What a step says besides the new state. A row that is not trusted stops in rollouts and truncates in envs."""

    reward: Float[Tensor, " b"]
    terminated: Bool[Tensor, " b"]
    trusted: Bool[Tensor, " b"]


@runtime_checkable
class Dynamics(Protocol):
    """What a World asks of a model: p(next_obs, reward, terminated | obs, action).

    ``predict`` asks every member; ``sample`` pays for ONE member per row and is the fast path. A model that is one
    member is an ensemble of one. ``noise=False`` gives the mean of the row's member.
    """

    spaces: Spaces | None
    num_members: int

    @property
    def elites(self) -> Int[Tensor, " k"]:
        """Indices of the members that rollouts may use."""
        ...

    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Ask every member."""
        ...

    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Ask one member per row."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Observation <-> simulator state of a task, batched.

    ``lost`` says in words what the observation does not hold; ``exact`` lists the observation columns that are
    functions of ``qpos`` and ``qvel`` as they stand, so that `from_simulator` gives them as the environment does.
    """

    lost: str

    @property
    def exact(self) -> tuple[int, ...]:
        """Columns that `from_simulator` gives as the environment does."""
        ...

    def to_simulator(self, obs: Float[Tensor, "b o"]) -> tuple[np.ndarray, np.ndarray]:
        """Return ``qpos [b, nq]`` and ``qvel [b, nv]``, float64, with neutral values where the obs holds nothing."""
        ...

    def from_simulator(
        self, qpos: np.ndarray, qvel: np.ndarray, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "b o"] | None:
        """Return the observation of a simulator state, or None where it needs more than ``qpos`` and ``qvel``."""
        ...


@dataclass(frozen=True)
class Task:
    """What is asked of an agent in one environment, in batched torch. None: the model's own head must answer.

    Args:
        real_id: Gymnasium id of the real environment, the judge of everything learned here.
        reward: r(obs, action, next_obs), or None where the observation does not determine it.
        terminated: true terminations of next_obs, or None where the observation does not determine them.
        initial: start states of the real environment.
        codec: observation <-> simulator state, or None.
        angles: observation columns that are angles in radians, for models that feed cos and sin.
        max_episode_steps: the real environment's time limit.
        notes: what the observation lacks and what follows, in words a user reads.
    """

    real_id: str
    reward: RewardFn | None = None
    terminated: TerminationFn | None = None
    initial: InitialFn | None = None
    codec: Codec | None = None
    angles: tuple[int, ...] = ()
    max_episode_steps: int | None = None
    notes: str = field(default="", compare=False)


@runtime_checkable
class Policy(Protocol):
    """Word for word SB3's ``PolicyPredictor``: every SB3 algorithm is one."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return the action for an observation, and the next hidden state."""
        ...


Penalty = Callable[[Float[Tensor, "b o"], Float[Tensor, "b a"], Prediction, State], Float[Tensor, " b"]]
"""Uncertainty of a step (obs, action, every member's prediction, the state it led to): larger is less certain.

The last argument is the `State` after the step: its ``obs`` is the drawn next observation and its ``member`` the one
that drew it, which some penalties judge.
"""


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a seeded random generator on ``device``."""
    return torch.Generator(device=device).manual_seed(seed)


Json = dict[str, Any]
