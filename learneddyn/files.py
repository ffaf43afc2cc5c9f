"""Writes that a kill cannot tear: a reader finds the old content or the new one, never half of either."""

import os
import shutil
from pathlib import Path


class replaced_folder:
    """Context manager: yields a fresh sibling folder, and on success swaps it in place of ``target``."""

    def __init__(self, target: Path) -> None:
        self.target, self.fresh = target, target.with_name(f".{target.name}.new")
        self.old = target.with_name(f".{target.name}.old")

    def __enter__(self) -> Path:
        if not self.target.exists() and self.old.exists():
            self.old.rename(self.target)
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)
            return
        shutil.rmtree(self.old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(self.old)
        self.fresh.rename(self.target)
        shutil.rmtree(self.old, ignore_errors=True)


def surviving_folder(folder: Path) -> Path:
    """Return ``folder``, or the copy that a save killed between its two renames left beside it."""
    old = folder.with_name(f".{folder.name}.old")
    return old if not folder.exists() and old.exists() else folder


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside the old one and move it into place."""
    fresh = path.with_name(f".{path.name}.new")
    write_file(fresh, content)
    os.replace(fresh, path)


def write_file(path: Path, content: bytes) -> None:
    """Write and flush to disk, so that a later rename cannot outrun the content."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
