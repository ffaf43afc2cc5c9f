"""Replay memory on the device: one packed row a transition, so that a batch is one ``index_select``."""

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from learneddyn.core import Transitions
from learneddyn.files import write_file

FORMAT = "1"


class ReplayFileError(ValueError):
    """A replay file that cannot be read: missing, truncated, or not written by `Replay.save`."""


class Batch(NamedTuple):
    """Sampled transitions: views of one packed tensor. ``terminated`` is 1 where the episode truly ended, else 0."""

    obs: Float[Tensor, "b o"]
    action: Float[Tensor, "b a"]
    next_obs: Float[Tensor, "b o"]
    reward: Float[Tensor, " b"]
    terminated: Float[Tensor, " b"]


class Replay:
    """A ring of the newest ``capacity`` transitions in one float32 tensor ``[capacity, 2 o + a + 2]``.

    A row is observation, action, next observation, reward, terminated. Memory: ``4 (2 o + a + 2)`` bytes a row, taken
    from the system as rows are written.

    Raises:
        ValueError: a capacity below 1.
    """

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, *, device: torch.device | str = "cpu") -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self._widths = (obs_dim, action_dim, obs_dim, 1, 1)
        self._rows = torch.empty(capacity, sum(self._widths), device=device)
        self._next = self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def capacity(self) -> int:
        """The number of rows it can hold."""
        return len(self._rows)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._rows.device

    def add(self, data: Transitions) -> None:
        """Append transitions, in order; the oldest rows give way.

        Raises:
            ValueError: other numbers of columns than this replay holds.
        """
        flags = data.terminated.float()[:, None]
        self.add_rows(torch.cat((data.obs, data.action, data.next_obs, data.reward[:, None], flags), dim=1))

    def add_rows(self, rows: Float[Tensor, "n w"]) -> None:
        """Append packed rows, in order; the oldest rows give way.

        Raises:
            ValueError: another width than this replay's rows.
        """
        if rows.shape[1] != self._rows.shape[1]:
            raise ValueError(
                f"a row of this replay has {self._rows.shape[1]} columns (obs {self.obs_dim}, action "
                f"{self.action_dim}, next_obs {self.obs_dim}, reward 1, terminated 1), got {rows.shape[1]}"
            )
        rows = rows[-self.capacity :]
        before_wrap = min(len(rows), self.capacity - self._next)
        self._rows[self._next : self._next + before_wrap] = rows[:before_wrap]
        self._rows[: len(rows) - before_wrap] = rows[before_wrap:]
        self._next = (self._next + len(rows)) % self.capacity
        self._size = min(self._size + len(rows), self.capacity)

    def rows(self) -> Float[Tensor, "n w"]:
        """Return a copy of all rows, the oldest first."""
        start = self._next if self._size == self.capacity else 0
        return self._rows[: self._size].roll(-start, dims=0)

    def draw(self, rows: int, rng: torch.Generator) -> Float[Tensor, "{rows} w"]:
        """Return packed rows drawn uniformly with replacement; ``rng`` is on this replay's device.

        Raises:
            ValueError: the replay is empty.
        """
        if not self._size:
            raise ValueError("cannot sample from an empty replay")
        return self._rows.index_select(0, self._indices(rows, rng))

    def sample(self, rows: int, rng: torch.Generator) -> Batch:
        """Return transitions drawn uniformly with replacement; ``rng`` is on this replay's device.

        Raises:
            ValueError: the replay is empty.
        """
        return self.unpack(self.draw(rows, rng))

    def unpack(self, rows: Float[Tensor, "b w"]) -> Batch:
        """Return the columns of packed rows, as views."""
        obs, action, next_obs, reward, terminated = rows.split(self._widths, dim=1)
        return Batch(obs, action, next_obs, reward[:, 0], terminated[:, 0])

    def resize(self, capacity: int) -> None:
        """Change the capacity; the newest rows stay.

        Raises:
            ValueError: a capacity below 1.
        """
        other = Replay(capacity, self.obs_dim, self.action_dim, device=self.device)
        other.add_rows(self.rows())
        self.become(other)

    def become(self, other: "Replay") -> None:
        """Take over the rows and the capacity of another replay, which must not be used any more."""
        self._rows, self._next, self._size = other._rows, other._next, other._size

    def clear(self) -> None:
        """Forget all rows."""
        self._next = self._size = 0

    def save(self, path: str | Path) -> None:
        """Write the rows to a safetensors file; a kill at any moment leaves the old file or the new one.

        Every row keeps its place in the ring, so that one seed draws the same batches after `load`.
        """
        target = Path(path)
        card = {"format": FORMAT, "capacity": self.capacity, "next": self._next}
        card |= {"obs_dim": self.obs_dim, "action_dim": self.action_dim}
        fresh = target.with_name(f".{target.name}.new")
        rows = self._rows[: self._size].cpu()
        write_file(fresh, save_tensors({"rows": rows}, {key: str(value) for key, value in card.items()}))
        fresh.replace(target)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Replay":
        """Read a file written by `save`.

        Raises:
            ReplayFileError: missing, truncated, of another format, or not a replay.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                card, rows = file.metadata() or {}, file.get_tensor("rows")
        except (OSError, SafetensorError) as error:
            raise ReplayFileError(f"{path} is not a readable replay file: {error}") from error
        if card.get("format") != FORMAT:
            raise ReplayFileError(f"{path} has replay format {card.get('format')!r}, this version reads {FORMAT!r}")
        replay = cls(int(card["capacity"]), int(card["obs_dim"]), int(card["action_dim"]), device=device)
        replay.add_rows(rows.to(device))
        replay._next = int(card.get("next", replay._next))
        return replay

    def _indices(self, rows: int, rng: torch.Generator) -> Int[Tensor, "{rows}"]:
        return torch.randint(self._size, (rows,), generator=rng, device=self.device)


class MixedReplay:
    """Real and imagined transitions, the real ones at a fixed share of every batch.

    Model-based policy optimisation trains its policy on 5 % real rows (Janner, Fu, Zhang and Levine, When to Trust Your
    Model, 2019). Each batch of b rows starts with exactly ``round(real_share * b)`` real ones. While one of the two is
    empty, the other gives the whole batch.

    Raises:
        ValueError: a share outside [0, 1], or two replays whose rows differ or are on different devices.
    """

    def __init__(self, real: Replay, imagined: Replay, real_share: float = 0.05) -> None:
        if not 0 <= real_share <= 1:
            raise ValueError(f"real_share must be in [0, 1], got {real_share}")
        columns = [(part.obs_dim, part.action_dim, part.device) for part in (real, imagined)]
        if columns[0] != columns[1]:
            raise ValueError(f"(obs_dim, action_dim, device) of the two replays differ: {columns[0]} and {columns[1]}")
        self.real, self.imagined, self.real_share = real, imagined, real_share

    def __len__(self) -> int:
        return len(self.real) + len(self.imagined)

    def sample(self, rows: int, rng: torch.Generator) -> Batch:
        """Return transitions, the real ones first; ``rng`` is on the device of the replays.

        Raises:
            ValueError: both replays are empty.
        """
        share = 1.0 if not len(self.imagined) else self.real_share if len(self.real) else 0.0
        real = round(share * rows)
        parts = [part.draw(count, rng) for part, count in ((self.real, real), (self.imagined, rows - real)) if count]
        return self.real.unpack(parts[0] if len(parts) == 1 else torch.cat(parts))
