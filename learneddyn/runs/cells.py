"""The cells of a table: the smallest units that a killed experiment keeps, each beside the settings that made it.

``Cells(home, notify, 40).play("medium, IQL", settings, work)`` returns what ``work()`` returned, or what it returned
when it was played with the same settings before. So a table can be given more rows later without losing the others.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from learneddyn.core import Json
from learneddyn.files import replace_file
from learneddyn.runs.seeds import Notify

FAILED = "failed"
"""The key of a cell that could not be played; its value says why."""
UNPLAYED = "not played yet"


class Cells:
    """The cells of one seed, a JSON file each in ``home/cells``.

    What a method cannot do is a result too: a `ValueError` or `ArithmeticError` of ``work`` (data that the method
    refuses, a loss that is not finite) is kept as ``{"failed": message}``. Remove the file to try again.

    Args:
        home: folder of the seed.
        notify: told which cell is being played.
        total: cells there will be, for the share that is done.
        frozen: play nothing; a cell that is not there is ``{"failed": UNPLAYED}``, and no file is written of it.
    """

    def __init__(self, home: Path, notify: Notify, total: int, *, frozen: bool = False) -> None:
        self.folder, self.notify, self.total, self.begun = home / "cells", notify, total, 0
        self.frozen, self._names = frozen, dict[Path, str]()
        self.folder.mkdir(parents=True, exist_ok=True)

    def play(self, name: str, settings: Json, work: Callable[[], Json], *, anew: bool = False) -> Json:
        """Return the plain JSON of a cell, from its file if that was made with the same settings.

        ``anew`` plays it in any case: what it left elsewhere (a data set, a model) is gone.

        Raises:
            ValueError: another cell, played before, has the same file: names may not differ in case, blanks and
                punctuation alone.
        """
        path = self.folder / f"{file_stem(name)}.json"
        if (other := self._names.setdefault(path, name)) != name:
            raise ValueError(f"the cells {other!r} and {name!r} would share the file {path.name}: rename one of them")
        self.notify(name, self.begun / self.total)
        self.begun += 1
        settings = json.loads(json.dumps(settings))
        if not anew and path.exists() and (kept := json.loads(path.read_text()))["settings"] == settings:
            return kept["result"]
        if self.frozen:
            return {FAILED: UNPLAYED}
        begun, busy = time.perf_counter(), time.process_time()
        try:
            result = work()
        except (ValueError, ArithmeticError) as error:
            result = {FAILED: f"{type(error).__name__}: {error}"}
        seconds = {"wall": round(time.perf_counter() - begun, 1), "cpu": round(time.process_time() - busy, 1)}
        entry = {"name": name, "settings": settings, "result": result, "seconds": seconds}
        replace_file(path, json.dumps(entry, allow_nan=False, indent=1).encode())
        return json.loads(json.dumps(result))


def file_stem(name: str) -> str:
    """Return what the file of a cell is called: its name without case, blanks and punctuation."""
    return re.sub(r"[^a-z0-9+]+", "-", name.lower())


def spent(home: Path) -> dict[str, float]:
    """Return the seconds that all cells of a seed took, wall and CPU."""
    times = [json.loads(path.read_text())["seconds"] for path in (home / "cells").glob("*.json")]
    return {kind: round(sum(entry[kind] for entry in times), 1) for kind in ("wall", "cpu")}
