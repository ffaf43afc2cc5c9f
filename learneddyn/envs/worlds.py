"""Worlds on disk: a model folder plus ``world.json`` and ``world.safetensors``. Nothing is unpickled.

    model.safetensors, model.json    the model, see `learneddyn.models.base`
    world.json                       format, task, sampler, bounds, penalty, trust, horizon, package version
    world.safetensors                the box of the data (``low``, ``high``) and the start table (``start``), if any

`load_world` also knows the worlds that ship with the package by name, and ``truth:<Gymnasium id>``: MuJoCo itself.
"""

import hashlib
import importlib.resources
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import learneddyn
from learneddyn import tasks
from learneddyn.core import Json, Task, Transitions, generator
from learneddyn.files import replaced_folder, surviving_folder, write_file
from learneddyn.models.base import AbstractDynamics
from learneddyn.world import PENALTIES, SAMPLERS, Bounded, World, all_trusted, require_members, within_box
from learneddyn.world.truth import TruthDynamics

FORMAT = 1
TRUTH = "truth:"


class WorldFileError(ValueError):
    """A world that cannot be found or read: unknown name, missing, truncated or altered files, another format."""


@dataclass(frozen=True)
class LoadedWorld:
    """A world with the settings its environments take from the folder."""

    world: World
    horizon: int | None = None
    start: Float[Tensor, "n o"] | None = None

    def starts(self, start: str | None) -> Float[Tensor, "n o"] | None:
        """Return the saved start table for ``"saved"`` (or None, where there is one), None for the task's start states.

        Raises:
            ValueError: an unknown word, or no table was saved.
        """
        if start not in (None, "task", "saved"):
            raise ValueError(f"unknown start {start!r}, allowed are 'task', 'saved' and None")
        if start == "saved" and self.start is None:
            raise ValueError("this world was saved without a start table: use start='task'")
        return None if start == "task" else self.start


def world_names() -> list[str]:
    """Return the names of the worlds that ship with the package."""
    root = _shipped()
    return sorted(path.name for path in root.iterdir() if (path / "world.json").exists()) if root.is_dir() else []


def save_world(
    folder: str | Path,
    model: AbstractDynamics,
    *,
    task: Task | str,
    sampler: str = "elite",
    bounds: Json | None = None,
    penalty: str | None = None,
    penalty_weight: float = 0.0,
    data: Transitions | None = None,
    trust_margin: float | None = 0.5,
    halt_reward: float | None = None,
    horizon: int | None = None,
    start: Float[Tensor, "n o"] | None = None,
) -> None:
    """Write a world that `load_world`, ``gym.make`` and ``gym.make_vec`` open by its folder.

    The folder is written beside the old one and swapped in: a kill leaves the old world or the new one.

    Args:
        folder: where to; replaced if it holds a world or a model.
        model: fitted.
        task: a Task or its real id; it is restored by that id, so it must be one of `learneddyn.tasks.names`.
        sampler: one of ``mean``, ``ts1``, ``tsinf``, ``elite``.
        bounds: what brings its draws back: arguments of `learneddyn.world.bounds.Bounded` (``low``, ``high``,
            ``unit_pairs``, ``angles``), or None.
        penalty: a name of `learneddyn.world.penalties.PENALTIES`, or None.
        penalty_weight: reward units per penalty unit.
        data: what the model was fitted on; with a margin, steps that leave its box are not trusted.
        trust_margin: widening of each side of that box, as a share of the column's range; None trusts every step.
        halt_reward: reward of a step that is not trusted, which then terminates; None truncates there. See `World`.
        horizon: steps of an episode; None is the task's time limit.
        start: observations that episodes begin at; None leaves it to the task.

    Raises:
        ValueError: an unknown sampler or penalty, a penalty that compares members of a model of one, a horizon or
            margin out of range, bounds that `Bounded` does not take, tables or bounds with the wrong columns, or a
            model that is not fitted.
        FileExistsError: the folder holds something else.
    """
    card = check_settings(
        folder,
        task=task,
        sampler=sampler,
        bounds=bounds,
        penalty=penalty,
        penalty_weight=penalty_weight,
        trust_margin=trust_margin,
        halt_reward=halt_reward,
        horizon=horizon,
    )
    tables = {} if start is None else {"start": start}
    if data is not None and trust_margin is not None:
        seen = torch.cat([data.check().obs, data.next_obs])
        tables |= {"low": seen.amin(dim=0), "high": seen.amax(dim=0)}
    tables = {name: table.detach().cpu().float().contiguous() for name, table in tables.items()}
    _assemble(model, card, tables)
    blob = save_tensors(tables)
    card |= {
        "format": FORMAT,
        "version": learneddyn.__version__,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    with replaced_folder(Path(folder)) as fresh:
        model.save(fresh)
        write_file(fresh / "world.safetensors", blob)
        write_file(fresh / "world.json", json.dumps(card, indent=2).encode())


def check_settings(
    folder: str | Path,
    *,
    task: Task | str,
    sampler: str = "elite",
    bounds: Json | None = None,
    penalty: str | None = None,
    penalty_weight: float = 0.0,
    trust_margin: float | None = 0.5,
    halt_reward: float | None = None,
    horizon: int | None = None,
    model: AbstractDynamics | None = None,
) -> Json:
    """Return the card of a world that `save_world` may write: what can be refused before a model is fitted for it.

    Raises:
        ValueError: an unknown sampler or penalty, a number out of its range, bounds that `Bounded` does not take, or a
            penalty that compares members where ``model`` has only one.
        UnknownTask: the task is not one of `learneddyn.tasks.names`.
        FileExistsError: the folder holds something else.
    """
    target = Path(folder)
    if target.exists() and not (target / "model.json").exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and holds no world or model: it will not be replaced, name another folder"
        )
    card: Json = {
        "task": task if isinstance(task, str) else task.real_id,
        "sampler": sampler,
        "bounds": bounds,
        "penalty": penalty,
        "penalty_weight": penalty_weight,
        "trust_margin": trust_margin,
        "halt_reward": halt_reward,
        "horizon": horizon,
    }
    _check_card(card, "")
    if bounds is not None:
        card["bounds"] = Bounded(sampler, **bounds).arguments
    if model is not None and penalty is not None:
        require_members(PENALTIES[penalty], model.num_members)
    return card


def load_world(name_or_folder: str | Path, device: torch.device | str = "cpu") -> LoadedWorld:
    """Open a shipped world by name, a folder written by `save_world`, or ``truth:<Gymnasium id>``.

    Raises:
        WorldFileError: unknown name, no world in the folder, truncated or altered files, or another format version.
        ModelFileError: the model in the folder cannot be read.
        UnknownTask: the task is not one of `learneddyn.tasks.names`.
    """
    name = str(name_or_folder)
    if name.startswith(TRUTH):
        task = tasks.get(name.removeprefix(TRUTH))
        return LoadedWorld(World(TruthDynamics(task, device=device), task), task.max_episode_steps)
    folder = _shipped() / name if name in world_names() else surviving_folder(Path(name_or_folder))
    if not folder.is_dir():
        raise WorldFileError(
            f"there is no world {name!r}: shipped worlds are {world_names()}; otherwise name a folder that save_world "
            f"wrote, or '{TRUTH}<Gymnasium id>' for the simulator itself"
        )
    card, tables = _read(folder)
    model = AbstractDynamics.load(folder, device)
    return _assemble(model, card, {key: table.to(device) for key, table in tables.items()}, folder)


def _assemble(
    model: AbstractDynamics, card: dict[str, Any], tables: dict[str, Tensor], folder: Path | None = None
) -> LoadedWorld:
    where = "" if folder is None else f"{folder}: "
    _check_card(card, where)
    width = None if model.spaces is None else model.spaces.obs_dim
    task = tasks.get(card["task"])
    if width is not None and task.initial is not None:
        columns = task.initial(1, generator(0)).shape[1]
        if columns != width:
            raise WorldFileError(
                f"{where}{card['task']} is observed in {columns} columns, the model was fitted on {width}"
            )
    for name, table in tables.items():
        if width is not None and (table.shape[-1] != width or not table.isfinite().all()):
            raise WorldFileError(
                f"{where}the table '{name}' must be finite and have the model's {width} columns, got {table}"
            )
    sampler = _sampler(card, where)
    if isinstance(sampler, Bounded) and width is not None:
        try:
            sampler.check_columns(width)
        except ValueError as error:
            raise WorldFileError(f"{where}bounds: {error}") from error
    boxed = card["trust_margin"] is not None and "low" in tables
    world = World(
        model,
        task,
        sampler=sampler,
        penalty=None if card["penalty"] is None else PENALTIES[card["penalty"]],
        penalty_weight=card["penalty_weight"],
        trust=within_box(tables["low"], tables["high"], card["trust_margin"]) if boxed else all_trusted,
        halt_reward=card["halt_reward"],
    )
    return LoadedWorld(world, card["horizon"], tables.get("start"))


def _check_card(card: Json, where: str) -> None:
    """Refuse settings that no world can have."""
    tasks.get(card["task"])
    horizon, margin = card["horizon"], card["trust_margin"]
    if horizon is not None and (not isinstance(horizon, int) or horizon < 1):
        raise WorldFileError(f"{where}horizon must be None or an integer of at least 1, got {horizon!r}")
    if margin is not None and (not isinstance(margin, int | float) or not 0 <= margin < math.inf):
        raise WorldFileError(f"{where}trust_margin must be None or a finite number of at least 0, got {margin!r}")
    for name, allowed in (("sampler", set(SAMPLERS)), ("penalty", set(PENALTIES) | {None})):
        if card[name] not in allowed:
            raise WorldFileError(f"{where}unknown {name} {card[name]!r}, allowed are {sorted(allowed, key=str)}")
    if card["penalty_weight"] and card["penalty"] is None:
        raise WorldFileError(f"{where}penalty_weight is {card['penalty_weight']} but no penalty is given")
    _sampler(card, where)


def _sampler(card: Json, where: str) -> str | Bounded:
    """Return the sampler that a card names; cards written before there were bounds have no such entry."""
    bounds = card.get("bounds")
    if bounds is None:
        return str(card["sampler"])
    allowed = list(inspect.signature(Bounded).parameters)[1:]
    if not isinstance(bounds, dict) or not bounds or set(bounds) - set(allowed):
        raise WorldFileError(f"{where}bounds must be null or hold some of {allowed}, got {bounds!r}")
    try:
        return Bounded(card["sampler"], **bounds)
    except (TypeError, ValueError) as error:
        raise WorldFileError(f"{where}bounds: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        card = json.loads((folder / "world.json").read_text())
        blob = (folder / "world.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise WorldFileError(f"{folder} is not a readable world folder: {error}") from error
    found = card.get("format") if isinstance(card, dict) else None
    if found != FORMAT:
        raise WorldFileError(
            f"{folder} has world format {found!r}, this version ({learneddyn.__version__}) reads format {FORMAT}; save "
            "the world again or install the version that wrote it"
        )
    missing = {
        "task",
        "sampler",
        "penalty",
        "penalty_weight",
        "trust_margin",
        "halt_reward",
        "horizon",
        "sha256",
    } - set(card)
    if missing:
        raise WorldFileError(f"{folder}/world.json lacks {sorted(missing)}")
    if hashlib.sha256(blob).hexdigest() != card["sha256"]:
        raise WorldFileError(f"{folder}/world.safetensors is truncated or altered ({len(blob)} bytes, wrong checksum)")
    return card, load_tensors(blob)


def _shipped() -> Path:
    return Path(str(importlib.resources.files("learneddyn") / "configs" / "worlds"))
