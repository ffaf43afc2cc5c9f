"""Minari data sets to `Transitions` and back, without loss and without half-written folders.

Minari keeps an episode as T + 1 observations and T actions, rewards, terminations and truncations. A transition takes
its next observation from inside its own episode, and ``terminated`` from the terminations only: a time-out is not an
end. Saving is the exact inverse.

Logs of states alone. Minari asks for actions in every episode, so a row without an action is written as NaN in every
column, which a bounded Box of actions holds and every reader of Minari can read; `load_action_free` reads it, `load`
refuses it. Episodes that were written with no actions at all (``EpisodeBuffer(actions=None)``, which Minari writes but
cannot iterate over) are read the same way.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage import get_dataset_path

from learneddyn.core import DataError, Json, Transitions
from learneddyn.files import replaced_folder, surviving_folder
from learneddyn.spaces import Spaces, decode, encode

GRADES = ("random", "medium", "expert", "replay")
"""Data grades that `learneddyn.data.collect_grade` regenerates."""


class DatasetNotFound(FileNotFoundError):
    """The data set is neither on this machine nor could it be downloaded; the message says how to build a stand-in."""


class DatasetExists(FileExistsError):
    """A save would replace a data set that is already there."""


def load(
    dataset_id: str | Sequence[str], *, device: torch.device | str = "cpu", max_episodes: int | None = None
) -> Transitions:
    """Load one Minari data set, or several of the same spaces, joined in the order given.

    A data set that is not on this machine is fetched through ``minari.download_dataset``. Episodes without a
    transition are left out with a warning that counts them. Discrete parts of a space become one-hot columns.

    Memory: the result takes ``4 (2 o + a + 1) + 9`` bytes a transition (o, a: flat columns of observation and action);
    while loading, about three times that is held.

    Args:
        dataset_id: ``(namespace/)name-v0``, or a sequence of such ids.
        device: where the tensors shall live.
        max_episodes: take the first so many episodes of each data set, all if None.

    Raises:
        DatasetNotFound: not local and not downloadable; names the ``learneddyn collect`` command for a stand-in.
        DataError: no transition, NaN or infinity, a damaged folder, or data sets of different spaces.
        ValueError: no id, or a malformed one.
    """
    return _load_all(dataset_id, max_episodes, actions=True).to(device)


def load_action_free(
    dataset_id: str | Sequence[str], *, device: torch.device | str = "cpu", max_episodes: int | None = None
) -> Transitions:
    """Load Minari data sets some or all of whose rows hold no action; such rows hold NaN in ``action``.

    `Transitions.labelled` tells the rows apart. Everything else is as in `load`.

    Args:
        dataset_id: ``(namespace/)name-v0``, or a sequence of such ids.
        device: where the tensors shall live.
        max_episodes: take the first so many episodes of each data set, all if None.

    Raises:
        DatasetNotFound: not local and not downloadable.
        DataError: no transition, NaN or infinity elsewhere than in whole actions, a damaged folder, or data sets of
            different spaces.
        ValueError: no id, or a malformed one.
    """
    return _load_all(dataset_id, max_episodes, actions=False).to(device)


def without_actions(data: Transitions) -> Transitions:
    """Return the same rows with no action in any of them: NaN in every column."""
    return replace(data, action=torch.full_like(data.action, torch.nan))


def _load_all(dataset_id: str | Sequence[str], max_episodes: int | None, *, actions: bool) -> Transitions:
    ids = [dataset_id] if isinstance(dataset_id, str) else list(dataset_id)
    if not ids:
        raise ValueError("dataset_id must name at least one data set, got []")
    if max_episodes is not None and max_episodes < 1:
        raise ValueError(f"max_episodes must be at least 1 or None, got {max_episodes}")
    return Transitions.cat([_load(name, max_episodes, actions) for name in ids])


def save(
    transitions: Transitions,
    dataset_id: str,
    *,
    env_id: str | EnvSpec | None = None,
    eval_env: str | EnvSpec | None = None,
    algorithm: str | None = None,
    description: str | None = None,
    author: str | None = None,
    seeds: Sequence[int | None] | None = None,
    provenance: Json | None = None,
    action_free: bool = False,
    overwrite: bool = False,
) -> minari.MinariDataset:
    """Write transitions as a Minari data set: `load` gives the same rows back, bit for bit, episodes numbered from 0.

    The last row of an episode is stored as truncated unless it is terminated. A save that is killed leaves what was
    there before; the new folder takes the old one's place only when it is whole.

    Args:
        transitions: whole episodes, rows in order; needs ``spaces``.
        dataset_id: ``(namespace/)name-v0``.
        env_id: environment that ``recover_environment()`` shall make. None: it cannot be recovered.
        eval_env: environment for ``recover_environment(eval_env=True)``, if another one.
        algorithm: what acted, in words.
        description: one sentence for the reader of the data set.
        author: who collected it.
        seeds: reset seed of each episode, in the order of the episodes.
        provenance: where rows that no environment made come from, kept under "provenance" in Minari's metadata.
        action_free: rows may hold no action (NaN in every column, see `without_actions`).
        overwrite: replace a data set of the same id.

    Raises:
        DatasetExists: the id is taken and ``overwrite`` is False.
        DataError: no spaces, rows of one episode that do not follow on each other or do not stand together, values
            that the spaces cannot hold exactly, NaN or infinity.
        ValueError: a malformed id, or not one seed per episode.
    """
    target = check_free(dataset_id, overwrite=overwrite)
    if transitions.spaces is None:
        raise DataError("saving needs the spaces: use dataclasses.replace(transitions, spaces=Spaces(obs, action))")
    transitions.check(actions=not action_free)
    columns = {name: tensor.cpu().numpy() for name, tensor in transitions.tensors().items()}
    starts = _episode_starts(columns)
    if seeds is not None and len(seeds) != len(starts):
        raise ValueError(f"seeds must hold one entry per episode, got {len(seeds)} for {len(starts)} episodes")
    spec = gym.spec(env_id) if isinstance(env_id, str) else env_id
    eval_spec = gym.spec(eval_env) if isinstance(eval_env, str) else eval_env

    metadata: dict[str, Any] = {
        "dataset_id": dataset_id,
        "minari_version": minari.__version__,
        "algorithm_name": algorithm,
        "description": description,
        "author": {author} if author else None,
        "eval_env_spec": eval_spec.to_json() if eval_spec else None,
        "provenance": provenance,
        "steps_without_action": int((~transitions.labelled()).sum()) or None,
    }
    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)
    with replaced_folder(target) as folder:
        storage = MinariStorage.new(
            folder / "data",
            observation_space=transitions.spaces.observation,
            action_space=transitions.spaces.action,
            env_spec=spec,
            jpeg_encoding=False,
        )
        storage.update_metadata({key: value for key, value in metadata.items() if value is not None})
        storage.update_episodes(_buffers(columns, starts, transitions.spaces, seeds))
    return minari.MinariDataset(target / "data")


def read_provenance(dataset_id: str) -> Json | None:
    """Return what `save` was told about where a local data set comes from, None where it was told nothing.

    Raises:
        DatasetNotFound: there is no such data set on this machine.
        ValueError: a malformed id.
    """
    folder = surviving_folder(_folder(dataset_id))
    if not (folder / "data" / METADATA_FILE_NAME).exists():
        raise DatasetNotFound(f"data set '{dataset_id}' is not at {folder}")
    return MinariStorage.read_raw_metadata(folder / "data").get("provenance")


def check_free(dataset_id: str, *, overwrite: bool = False) -> Path:
    """Return the folder of a data set that may be written.

    Raises:
        DatasetExists: there is one already and ``overwrite`` is False.
        ValueError: a malformed id.
    """
    target = _folder(dataset_id)
    if surviving_folder(target).exists() and not overwrite:
        raise DatasetExists(
            f"data set '{dataset_id}' is already at {target}; pass overwrite=True to replace it, or choose another id"
        )
    return target


def _folder(dataset_id: str) -> Path:
    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match["version"] is None:
        raise ValueError(
            f"a Minari id has the form (namespace/)name-v0, for example 'mine/hopper-v0', got '{dataset_id}'"
        )
    return get_dataset_path(dataset_id)


def _load(dataset_id: str, max_episodes: int | None, actions: bool) -> Transitions:
    folder = surviving_folder(_folder(dataset_id))
    if not (folder / "data" / METADATA_FILE_NAME).exists():
        _download(dataset_id, folder)
    try:
        dataset = minari.MinariDataset(folder / "data")
        spaces = Spaces(dataset.observation_space, dataset.action_space)
        episodes = [_episode(episode, spaces) for episode in _episodes(dataset, range(len(dataset))[:max_episodes])]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"data set '{dataset_id}' at {folder} cannot be read ({error}); delete it and fetch it again"
        ) from error
    whole = [episode for episode in episodes if len(episode["reward"])]
    if len(whole) < len(episodes):
        count = f"{len(episodes) - len(whole)} of {len(episodes)}"
        warnings.warn(f"{count} episodes of '{dataset_id}' have no transition and are left out", stacklevel=4)
    if not whole:
        raise DataError(f"data set '{dataset_id}' at {folder} has no transition in any of its {len(episodes)} episodes")
    if max_episodes is None and (rows := sum(len(e["reward"]) for e in whole)) != dataset.total_steps:
        raise DataError(
            f"data set '{dataset_id}' at {folder} holds {rows} of its {dataset.total_steps} steps; fetch it again"
        )
    columns: dict[str, Any] = {name: np.concatenate([episode[name] for episode in whole]) for name in whole[0]}
    number = np.repeat(np.arange(len(whole)), [len(episode["reward"]) for episode in whole])
    data = Transitions.from_numpy(**columns, episode=number, spaces=spaces, source=dataset_id)
    missing = int((~data.labelled()).sum())
    if actions and missing:
        raise DataError(
            f"data set '{dataset_id}' holds no action in {missing} of its {len(data)} steps: fill them in by "
            "--label_actions true of learneddyn offline and sweep, in code by learneddyn.data.load_action_free and "
            "learneddyn.offline.semi_supervised"
        )
    try:
        return data.check(actions=actions)
    except DataError as error:
        raise DataError(f"data set '{dataset_id}': {error}") from error


def _episodes(dataset: minari.MinariDataset, numbers: range) -> Iterator[minari.EpisodeData]:
    """Yield episodes; ``actions`` is None where none were written, which Minari's own reader takes for damage."""
    done = 0
    while done < len(numbers):
        try:
            for episode in dataset.iterate_episodes(numbers[done:]):
                done += 1
                yield episode
        except KeyError as error:
            if dataset.storage.FORMAT != "hdf5" or "actions" not in str(error):
                raise
            yield _states_alone(dataset.storage, numbers[done])
            done += 1


def _states_alone(storage: Any, number: int) -> minari.EpisodeData:
    import h5py

    with h5py.File(storage.data_path / "main_data.hdf5") as file:
        group = file[f"episode_{number}"]
        observations = storage._decode_space(group["observations"], storage.observation_space)
        rest = {key: group[key][:] for key in ("rewards", "terminations", "truncations")}
    return minari.EpisodeData(id=number, observations=observations, actions=None, infos={}, **rest)


def _episode(episode: minari.EpisodeData, spaces: Spaces) -> dict[str, np.ndarray]:
    rows = len(episode.rewards)
    if rows == 0:
        return {"reward": np.empty(0, np.float32)}
    obs = encode(spaces.observation, episode.observations)
    if episode.actions is None:
        action = np.full((rows, spaces.action_dim), np.nan, np.float32)
    else:
        action = encode(spaces.action, episode.actions)
    if (len(obs), len(action)) != (rows + 1, rows):
        raise ValueError(f"episode {episode.id}: {len(obs)} observations, {len(action)} actions, {rows} rewards")
    return {
        "obs": obs[:-1],
        "action": action,
        "reward": episode.rewards.astype(np.float32),
        "next_obs": obs[1:],
        "terminated": episode.terminations.astype(bool),
    }


def _download(dataset_id: str, folder: Path) -> None:
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:
        # A transfer that broke off must not be taken for a data set by the next call.
        shutil.rmtree(folder, ignore_errors=True)
        reason = f"{type(error).__name__}: {error}"
        raise DatasetNotFound(
            f"data set '{dataset_id}' is not at {folder} and could not be downloaded ({reason}). "
            f"Build a stand-in from the real environment with:\n    {collect_command(dataset_id)}"
        ) from error


def collect_command(dataset_id: str) -> str:
    """Return the command that builds a stand-in of a data set; words in capitals are what its id does not tell."""
    words = re.split(r"[/_-]", dataset_id.lower())
    newest: dict[str, EnvSpec] = {}
    for spec in gym.registry.values():
        name = spec.name.lower()
        real = spec.namespace is None and spec.name != "LearnedDyn"
        if real and (name not in newest or (spec.version or 0) > (newest[name].version or 0)):
            newest[name] = spec
    env_id = next((newest[word].id for word in words if word in newest), "ENV_ID")
    known = [grade for grade in GRADES if grade in words]
    grade = "replay" if "replay" in known else known[0] if len(known) == 1 else "|".join(GRADES)
    return f"learneddyn collect {env_id} {dataset_id} --grade {grade} --steps 100000"


def _episode_starts(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Return the first row of each episode, after making sure that the rows are whole episodes."""
    episode = columns["episode"]
    same = episode[1:] == episode[:-1]
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    if len(np.unique(episode)) != len(starts):
        raise DataError("the rows of an episode must stand together: sort by episode before saving")
    broken = same & (columns["next_obs"][:-1] != columns["obs"][1:]).any(axis=1)
    if broken.any():
        row = int(np.flatnonzero(broken)[0])
        raise DataError(
            f"{int(broken.sum())} rows do not lead to the next row of their episode (the first is row {row} of episode "
            f"{episode[row]}: its next_obs is not the obs of row {row + 1}); Minari keeps whole episodes only, so give "
            "each unbroken piece its own episode number"
        )
    return starts


def _buffers(
    columns: dict[str, np.ndarray], starts: np.ndarray, spaces: Spaces, seeds: Sequence[int | None] | None
) -> Iterator[EpisodeBuffer]:
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(columns["reward"])], strict=True)):
        terminated = columns["terminated"][start:stop]
        truncated = np.zeros_like(terminated)
        truncated[-1] = not terminated[-1]
        obs = np.concatenate([columns["obs"][start:stop], columns["next_obs"][stop - 1 : stop]])
        yield EpisodeBuffer(
            id=number,
            seed=seeds[number] if seeds is not None else None,
            observations=_exact(spaces.observation, obs, "obs", number),
            actions=_exact(spaces.action, columns["action"][start:stop], "action", number),
            rewards=columns["reward"][start:stop],
            terminations=terminated,
            truncations=truncated,
        )


def _exact(space: gym.Space[Any], flat: np.ndarray, name: str, episode: int) -> Any:
    batch = decode(space, flat)
    if not np.array_equal(encode(space, batch), flat, equal_nan=True):
        raise DataError(f"{name} of episode {episode} holds values that {space} cannot hold exactly")
    return batch
