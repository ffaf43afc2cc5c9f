"""One folder per run: configuration, seed, versions, data, model, agent, records. A killed run can be resumed."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from learneddyn.core import DataError, Json, Transitions
from learneddyn.evaluation.report import versions
from learneddyn.files import replace_file
from learneddyn.spaces import Spaces


class RunExists(FileExistsError):
    """The folder holds a run already, and the caller did not ask to resume it, or asked with other settings."""


class RunFolder:
    """A folder that a run writes into; every file is written whole or not at all.

    Args:
        path: of the folder; made if missing.
        config: plain JSON settings that define the run, the seeds among them.
        resume: go on with what is there. False refuses a folder that holds a run; one that failed before it wrote
            anything counts as none.

    Raises:
        RunExists: there is a run and ``resume`` is False, or the run there has other settings.
    """

    def __init__(self, path: str | Path, config: Json, *, resume: bool = False) -> None:
        self.path = Path(path)
        settings = json.loads(json.dumps(config))
        if (self.path / "config.json").exists() and self._holds_work():
            before = self.read("config.json")["config"]
            if not resume:
                raise RunExists(f"{self.path} holds a run: pass --resume to go on with it, or another --out")
            changed = {key for key in before | settings if before.get(key) != settings.get(key)}
            if changed:
                told = ", ".join(f"{key}: {before.get(key)!r} -> {settings.get(key)!r}" for key in sorted(changed))
                raise RunExists(
                    f"{self.path} was run with other settings ({told}): resume with the same, or another --out"
                )
        elif self._holds_work():
            raise RunExists(f"{self.path} exists and holds no run: name an empty or new folder with --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self.write("config.json", {"config": settings, "versions": versions()})

    def _holds_work(self) -> bool:
        """Tell whether anything but the settings was written: a run that failed before that may begin anew."""
        settings = {"config.json", ".config.json.new"}
        return any(entry.is_file() and entry.name not in settings for entry in self.path.rglob("*"))

    def child(self, name: str) -> Path:
        """Return a folder inside, made if missing."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def read(self, name: str) -> Any:
        """Return the JSON content of a file."""
        return json.loads((self.path / name).read_text())

    def write(self, name: str, content: Any) -> None:
        """Write JSON content."""
        replace_file(self.path / name, json.dumps(content, indent=2).encode())


def save_transitions(path: Path, data: Transitions) -> None:
    """Write transitions as one safetensors file with their spaces in its header.

    Raises:
        DataError: the data names no spaces.
    """
    if data.spaces is None:
        raise DataError("transitions without spaces cannot be saved: give them spaces=Spaces(...)")
    header = {"spaces": json.dumps(data.spaces.to_json()), "source": data.source}
    columns = {name: column.cpu().contiguous() for name, column in data.tensors().items()}
    replace_file(path, save_tensors(columns, header))


def load_transitions(path: Path, device: torch.device | str = "cpu") -> Transitions:
    """Read what `save_transitions` wrote.

    Raises:
        DataError: missing, truncated, or not written by `save_transitions`.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        columns = load_file(path, device=str(device))
        spaces = Spaces.from_json(json.loads(header["spaces"]))
        return Transitions(**columns, spaces=spaces, source=header["source"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no readable transitions: {error}") from error
