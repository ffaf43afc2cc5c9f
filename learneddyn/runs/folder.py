"""One folder per run: configuration, seed, versions, data, model, agent, records. A killed run can be resumed."""

import json
from pathlib import Path
from typing import Any

from learneddyn.core import Json
from learneddyn.evaluation.report import versions
from learneddyn.files import replace_file


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
