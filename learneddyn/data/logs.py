"""Your own logs, no simulator needed: NumPy arrays, CSV and Parquet files to `Transitions`.

A log holds one row a step: what was observed, what was done, the reward, whether the step truly ended the episode, and
which episode it belongs to. Where the log has no next observations, they are read from the following row of the same
episode. The last row of an episode then has none, and yields no transition of its own.

A learned model knows one step size. Name the column of time stamps, and a log whose rows are not evenly spaced is
refused or split at its gaps; `decimate` makes the steps of a fast log longer.
"""

import bz2
import csv
import gzip
import lzma
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike

from learneddyn.core import DataError, Transitions
from learneddyn.spaces import Spaces, encode

LastRow = Literal["state", "drop"]
Gaps = Literal["refuse", "split"]
Columns = dict[str, np.ndarray]
Paths = str | Path | Sequence[str | Path]
_JITTER = 0.05
"""Share of the median time step that a step may differ from it."""


def from_arrays(
    obs: ArrayLike | Sequence[ArrayLike],
    action: ArrayLike | Sequence[ArrayLike],
    reward: ArrayLike | Sequence[ArrayLike] | None = None,
    terminated: ArrayLike | Sequence[ArrayLike] | None = None,
    episode: ArrayLike | None = None,
    *,
    next_obs: ArrayLike | Sequence[ArrayLike] | None = None,
    truncated: ArrayLike | None = None,
    time: ArrayLike | None = None,
    gaps: Gaps = "refuse",
    last_row: LastRow | None = None,
    discrete: bool | int = False,
    spaces: Spaces | None = None,
    device: torch.device | str = "cpu",
    source: str = "arrays",
) -> Transitions:
    """Build transitions from arrays: flat columns, or one array per episode.

    *Flat columns*: ``obs [n, o]``, ``action [n, a]``, and ``[n]`` for the others, one row a step. Rows of one episode
    must be in order of time but may be mixed with those of others. Without ``episode``, a new episode starts after each
    terminated or truncated row.

    *Lists of episodes*: ``obs`` is a list of ``[T + 1, o]``, ``action`` of ``[T, a]``, ``reward`` of ``[T]``,
    ``terminated`` of one truth value or ``[T]`` per episode.

    Observations get an unbounded Box space, since a log shows where the system was and not where it could be. Actions
    get a Box from the least to the largest value of each column, so that an agent stays inside what was tried. Give
    ``spaces`` to say better.

    Args:
        obs: observations.
        action: actions; one column may be one-dimensional.
        reward: rewards; zeros if None, for models that take the reward from a `Task`.
        terminated: True where the step led to a true end of the episode, never for a time-out; all False if None.
        episode: label of each row's episode, numbers or text.
        next_obs: observations after the step, if the log has them; then each row is a transition.
        truncated: True where the episode was cut off; tells episodes apart where there is no ``episode``.
        time: time stamp of each row, in any unit: within an episode all steps must be equal, up to 5 % of the median.
        gaps: what happens where they are not: ``"refuse"`` the log, or ``"split"`` the episode there.
        last_row: what the last row of an episode is where ``next_obs`` is missing. ``"state"``: the final observation
            alone, its ``terminated`` speaks of that observation, its action and reward are not read. ``"drop"``: a step
            whose outcome was not recorded. None: as ``"drop"``, but refuse a log that would lose a termination by it.
        discrete: True: the action is one column of integers, the space runs from the least to the largest; a number n:
            actions are 0 to n - 1. They become one-hot columns.
        spaces: observation and action space, instead of inferred ones.
        device: where the tensors shall live.
        source: where the data came from, in words.

    Raises:
        DataError: unequal lengths, no transition, NaN or infinity (names the row of the log), lost terminations,
            uneven time steps, or actions that are not integers though ``discrete``.
    """
    if isinstance(obs, list | tuple) and obs and np.ndim(obs[0]) == 2:
        given: dict[str, Any] = {"obs": obs, "action": action, "reward": reward, "terminated": terminated}
        if any(part is not None for part in (next_obs, episode, truncated, time)):
            raise DataError("lists of episodes already hold next_obs, episode, truncated and time: leave them out")
        columns, last_row = _join(given), "state"
    else:
        all_columns = {"obs": obs, "action": action, "reward": reward, "terminated": terminated, "episode": episode}
        all_columns |= {"next_obs": next_obs, "truncated": truncated, "time": time}
        columns = {name: np.asarray(column) for name, column in all_columns.items() if column is not None}
    names = {name: [name] for name in columns}
    return _assemble(columns, names, last_row, gaps, discrete, spaces, device, source)


def from_csv(
    path: Paths,
    *,
    obs: Sequence[str],
    action: Sequence[str] = (),
    reward: str | None = None,
    terminated: str | None = None,
    episode: str | None = None,
    next_obs: Sequence[str] | None = None,
    truncated: str | None = None,
    time: str | None = None,
    gaps: Gaps = "refuse",
    last_row: LastRow | None = None,
    discrete: bool | int = False,
    spaces: Spaces | None = None,
    device: torch.device | str = "cpu",
    delimiter: str = ",",
) -> Transitions:
    """Read CSV files with a header line; ``.gz``, ``.bz2`` and ``.xz`` are unpacked on the way.

    Arguments name columns; for their meaning, and for the spaces, see `from_arrays`. An empty cell is NaN, truth values
    may be written 0/1 or true/false, episode labels may be text. An episode never goes on in the next file. Without
    ``action`` the log is that of a system that nobody acts on.

    Raises:
        DataError: as `from_arrays`, and: a column that is not there (lists those that are), a cell that is no number.
        FileNotFoundError: no such file.
    """
    wanted = _wanted(obs, action, reward, terminated, episode, next_obs, truncated, time)

    def read(path: Path, names: list[str]) -> Columns:
        return _read_csv(path, names, delimiter)

    return _from_files(path, wanted, read, last_row, gaps, discrete, spaces, device)


def from_parquet(
    path: Paths,
    *,
    obs: Sequence[str],
    action: Sequence[str] = (),
    reward: str | None = None,
    terminated: str | None = None,
    episode: str | None = None,
    next_obs: Sequence[str] | None = None,
    truncated: str | None = None,
    time: str | None = None,
    gaps: Gaps = "refuse",
    last_row: LastRow | None = None,
    discrete: bool | int = False,
    spaces: Spaces | None = None,
    device: torch.device | str = "cpu",
) -> Transitions:
    """Read Parquet files. Arguments name columns; see `from_csv`, and for their meaning and the spaces `from_arrays`.

    Raises:
        ImportError: pyarrow is not installed.
        DataError: as `from_arrays`, and: a column that is not there (lists those that are), or one that is not numeric.
        FileNotFoundError: no such file.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install learneddyn[parquet]") from error
    wanted = _wanted(obs, action, reward, terminated, episode, next_obs, truncated, time)

    def read(path: Path, names: list[str]) -> Columns:
        _refuse_missing(path, names, parquet.read_schema(path).names)
        arrow = parquet.read_table(path, columns=list(dict.fromkeys(names)))
        return {name: arrow.column(name).to_numpy() for name in names}

    return _from_files(path, wanted, read, last_row, gaps, discrete, spaces, device)


def decimate(data: Transitions, every: int) -> Transitions:
    """Return a log whose steps last ``every`` times as long: a model of a fast log sees next to no change in a step.

    Of each unbroken stretch of an episode every ``every``-th observation is kept, counted from its first row, or where
    it ends in a termination from that; rows left over at the other end are dropped. The action is the mean over the
    step, the reward the sum.

    Raises:
        ValueError: ``every`` below 1, or actions that are no Box, which have no mean.
        DataError: no stretch is ``every`` rows long.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if every == 1:
        return data
    if data.spaces is not None and not isinstance(data.spaces.action, gym.spaces.Box):
        raise ValueError(f"a step of several rows needs the mean of their actions, and {data.spaces.action} has none")
    broken = torch.ones(len(data), dtype=torch.bool, device=data.device)
    broken[1:] = (data.episode[1:] != data.episode[:-1]) | (data.obs[1:] != data.next_obs[:-1]).any(dim=1)
    stretch, row = broken.cumsum(0) - 1, torch.arange(len(data), device=data.device)
    first = broken.nonzero().flatten()
    end = torch.cat([first[1:], torch.tensor([len(data)], device=data.device)])
    anchor = torch.where(data.terminated[end - 1], end, first)
    begins = row[((row - anchor[stretch]) % every == 0) & (row + every <= end[stretch])]
    if not len(begins):
        raise DataError(f"no unbroken stretch of the log holds {every} rows: take a smaller every")
    rows, last = begins[:, None] + torch.arange(every, device=data.device), begins + every - 1
    return replace(
        data[begins],
        action=data.action[rows].mean(dim=1),
        reward=data.reward[rows].sum(dim=1),
        next_obs=data.next_obs[last],
        terminated=data.terminated[last],
    )


def _wanted(
    obs: Sequence[str],
    action: Sequence[str],
    reward: str | None,
    terminated: str | None,
    episode: str | None,
    next_obs: Sequence[str] | None,
    truncated: str | None,
    time: str | None,
) -> dict[str, list[str]]:
    groups = {"obs": obs, "action": action, "next_obs": next_obs}
    groups |= {"reward": reward, "terminated": terminated, "episode": episode, "truncated": truncated, "time": time}
    if not obs:
        raise DataError("name at least one obs column")
    return {key: [names] if isinstance(names, str) else list(names) for key, names in groups.items() if names}


def _refuse_missing(path: str | Path, wanted: Sequence[str], present: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in present]
    if missing:
        raise DataError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, present))}")


def _read_csv(path: Path, wanted: list[str], delimiter: str) -> Columns:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)

    def read(kind: type) -> np.ndarray:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            header = [name.strip() for name in next(csv.reader(file, delimiter=delimiter), [])]
            _refuse_missing(path, wanted, header)
            index = [header.index(name) for name in wanted]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loadtxt: input contained no data")
                return np.loadtxt(file, kind, None, delimiter, usecols=index, ndmin=2, quotechar='"')

    try:
        # The fast way first; words and empty cells need the slow one.
        table = read(float)
    except DataError:
        raise
    except ValueError:
        try:
            table = read(str)
        except ValueError as error:
            raise DataError(f"{path} is not a table of {len(wanted)} or more columns: {error}") from error
    return {name: table[:, index] for index, name in enumerate(wanted)}


def _from_files(
    paths: Paths,
    wanted: dict[str, list[str]],
    read: Callable[[Path, list[str]], Columns],
    last_row: LastRow | None,
    gaps: Gaps,
    discrete: bool | int,
    spaces: Spaces | None,
    device: torch.device | str,
) -> Transitions:
    chosen = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    if not chosen:
        raise DataError("name at least one file, got []")
    names = [name for group in wanted.values() for name in group]
    parts = [_typed(read(path, names), wanted, str(path)) for path in chosen]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    columns["file"] = np.repeat(np.arange(len(parts)), [len(part["obs"]) for part in parts])
    return _assemble(columns, wanted, last_row, gaps, discrete, spaces, device, ", ".join(map(str, chosen)))


def _typed(table: Columns, wanted: dict[str, list[str]], source: str) -> Columns:
    columns: Columns = {}
    for key, names in wanted.items():
        if key == "episode":
            columns[key] = table[names[0]].astype(str)
        elif key in ("obs", "action", "next_obs"):
            columns[key] = np.stack([_numbers(table[name], name, source) for name in names], axis=1)
        else:
            columns[key] = _numbers(table[names[0]], names[0], source)
    columns.setdefault("action", np.zeros((len(columns["obs"]), 0)))
    return columns


_WORDS = {"": np.nan, "true": 1.0, "false": 0.0, "none": np.nan, "null": np.nan, "na": np.nan}


def _numbers(column: np.ndarray, name: str, source: str) -> np.ndarray:
    if column.dtype.kind in "biuf":
        return column.astype(float)
    numbers = np.empty(len(column))
    for row, cell in enumerate(column):
        text = str(cell).strip()
        try:
            numbers[row] = _WORDS[text.lower()] if text.lower() in _WORDS else float(text)
        except ValueError as error:
            raise DataError(f"{source}: column '{name}' holds {text!r} in row {row}, which is no number") from error
    return numbers


def _join(given: dict[str, Any]) -> Columns:
    """Join lists of episodes into flat columns in which the last row of an episode is its final observation."""
    obs = [np.asarray(part) for part in given["obs"]]
    steps = [len(part) - 1 for part in obs]
    columns: Columns = {"obs": np.concatenate(obs), "episode": np.repeat(np.arange(len(obs)), [n + 1 for n in steps])}
    for name in ("action", "reward", "terminated"):
        if given[name] is None:
            continue
        if len(given[name]) != len(obs):
            raise DataError(f"{name} has {len(given[name])} episodes, obs has {len(obs)}")
        parts = []
        for number, (part, count) in enumerate(zip(given[name], steps, strict=True)):
            part = np.asarray(part)
            if name == "terminated":
                part = part if part.ndim else (np.arange(count) == count - 1) & bool(part)
            if len(part) == count:
                part = np.concatenate([part, np.zeros((1, *part.shape[1:]), part.dtype)])
            if len(part) != count + 1:
                raise DataError(f"episode {number} has {count + 1} observations, so its {name} must have {count} rows")
            parts.append(part)
        columns[name] = np.concatenate(parts)
    return columns


def _assemble(
    columns: Columns,
    names: dict[str, list[str]],
    last_row: LastRow | None,
    gaps: Gaps,
    discrete: bool | int,
    spaces: Spaces | None,
    device: torch.device | str,
    source: str,
) -> Transitions:
    lengths = {name: len(column) for name, column in columns.items()}
    rows = lengths["obs"]
    if len(set(lengths.values())) != 1:
        raise DataError(f"{source}: all columns must have the same number of rows, got {lengths}")
    if last_row not in (None, "state", "drop") or gaps not in ("refuse", "split"):
        raise DataError(
            f"last_row must be 'state', 'drop' or None, and gaps 'refuse' or 'split', got {last_row!r} and {gaps!r}"
        )
    terminated = _flags(columns, "terminated", rows, last_row, source)
    truncated = _flags(columns, "truncated", rows, last_row, source)
    label = columns.get("episode")
    if label is None:
        label = np.concatenate([[0], np.cumsum(terminated | truncated)[:-1]])[:rows]
    if "file" in columns:
        inverse = np.unique(label, return_inverse=True)[1]
        label = columns["file"] * (inverse.max(initial=0) + 1) + inverse
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    episode = np.argsort(np.argsort(first))[inverse]
    order = np.argsort(episode, kind="stable")
    episode, terminated = episode[order], terminated[order]
    if "time" in columns:
        episode = _even(columns["time"].reshape(rows)[order].astype(float), episode, order, gaps, source)

    if "next_obs" in columns:
        now, after = order, order
        next_name = "next_obs"
    else:
        follows = episode[1:] == episode[:-1]
        now, after = order[:-1][follows], order[1:][follows]
        next_name = "obs"
        last = np.concatenate([~follows, [True]])[:rows]
        if last_row is None and (lost := terminated & last).any():
            raise DataError(
                f"{source}: {int(lost.sum())} episodes end with a terminated row, and the log does not hold the "
                f"observation after it (the first is row {order[lost.argmax()]}). Give next_obs; or last_row='state' "
                "if such a row is the final observation itself; or last_row='drop' to lose these terminations"
            )
        ends = np.concatenate([last[1:] & terminated[1:], [False]])[:rows]
        terminated = (terminated | ends if last_row == "state" else terminated)[:-1][follows]
        episode = episode[:-1][follows]
        if alone := int((last & np.concatenate([[True], ~follows])[:rows]).sum()):
            warnings.warn(f"{source}: {alone} episodes of one row yield no transition and are left out", stacklevel=3)

    if not len(now):
        raise DataError(f"{source}: {rows} rows hold no transition; an episode needs at least two rows, or next_obs")
    reward = columns.get("reward", np.zeros(rows))
    for key, column, used in (
        ("obs", columns["obs"], now),
        ("action", columns["action"], now),
        ("reward", reward, now),
    ):
        _refuse_gaps(column, used, key, names, source)
    _refuse_gaps(columns[next_name], after, next_name, names, source)
    spaces = spaces or _infer(columns, now, discrete, source)
    return Transitions.from_numpy(
        encode(spaces.observation, _shaped(columns["obs"], spaces.observation)[now]),
        encode(spaces.action, _shaped(columns["action"], spaces.action)[now]),
        reward.reshape(rows)[now],
        encode(spaces.observation, _shaped(columns[next_name], spaces.observation)[after]),
        terminated,
        np.unique(episode, return_inverse=True)[1],
        spaces=spaces,
        source=source,
        device=device,
    ).check()


def _even(time: np.ndarray, episode: np.ndarray, order: np.ndarray, gaps: Gaps, source: str) -> np.ndarray:
    """Return the episode of each row of an ordered log: a new one after each uneven time step."""
    step, same = np.diff(time), episode[1:] == episode[:-1]
    if not same.any():
        return episode
    usual = float(np.median(step[same]))
    odd = same & ~(np.abs(step - usual) <= _JITTER * abs(usual))
    if usual <= 0 or (gaps == "refuse" and odd.any()):
        row = int(np.argmax(odd if usual > 0 else same))
        raise DataError(
            f"{source}: {int(odd.sum())} of {int(same.sum())} time steps differ by more than {_JITTER:.0%} from the "
            f"median, {usual:g}, the first from row {order[row]} to {order[row + 1]} ({step[row]:g}). A model knows "
            "one step size: resample the log, or split its episodes there with gaps='split'; files of different rates "
            "are data sets of their own"
        )
    return episode + np.concatenate([[0], np.cumsum(odd)])


def _flags(columns: Columns, name: str, rows: int, last_row: LastRow | None, source: str) -> np.ndarray:
    if name not in columns:
        return np.zeros(rows, bool)
    flags = columns[name].reshape(rows).astype(float)
    # The final observation of an episode is no step: its cell may be empty.
    flags = np.nan_to_num(flags) if last_row == "state" else flags
    odd = (flags != 0) & (flags != 1)
    if odd.any():
        row = int(odd.argmax())
        raise DataError(f"{source}: '{name}' must be 0 or 1 (false or true), got {flags[row]} in row {row}")
    return flags.astype(bool)


def _refuse_gaps(column: np.ndarray, used: np.ndarray, key: str, names: dict[str, list[str]], source: str) -> None:
    if column.dtype.kind != "f":
        return
    bad = ~np.isfinite(column[used].reshape(len(used), -1))
    if bad.any():
        row, index = np.argwhere(bad)[0]
        name = names[key][index] if len(names.get(key, [])) > 1 else names.get(key, [key])[0]
        raise DataError(
            f"{source}: {int(bad.any(axis=1).sum())} of {len(used)} rows hold NaN or infinity in '{key}', the first is "
            f"row {used[row]} (column '{name}'); repair the log, or leave such rows out and split the episode there"
        )


def _shaped(column: np.ndarray, space: gym.Space[Any]) -> np.ndarray:
    return column.reshape(len(column), *space.shape) if isinstance(space, gym.spaces.Box) else column


def _infer(columns: Columns, used: np.ndarray, discrete: bool | int, source: str) -> Spaces:
    width = columns["obs"].reshape(len(columns["obs"]), -1).shape[1]
    observation = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
    action = columns["action"].reshape(len(columns["action"]), -1)[used]
    low, high = action.min(axis=0), action.max(axis=0)
    if discrete is False:
        return Spaces(observation, gym.spaces.Box(low.astype(np.float32), high.astype(np.float32)))
    if action.shape[1] != 1 or (action != np.round(action)).any():
        raise DataError(
            f"{source}: a discrete action is one column of integers, got {action.shape[1]} columns: {action[:3]}"
        )
    if discrete is True:
        return Spaces(observation, gym.spaces.Discrete(int(high[0] - low[0]) + 1, start=int(low[0])))
    if low[0] < 0 or high[0] >= discrete:
        raise DataError(
            f"{source}: actions run from {low[0]:g} to {high[0]:g}, discrete={discrete} allows 0 to {discrete - 1}"
        )
    return Spaces(observation, gym.spaces.Discrete(discrete))
