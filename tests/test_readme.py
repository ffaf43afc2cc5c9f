"""The README keeps its word: its example runs as printed, its picture is there, its commands exist."""

import re
from pathlib import Path

import pytest

from learneddyn.cli import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs_and_reaches_what_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    [example] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(example.strip().splitlines()) <= 32
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    value, low, high = (float(word) for word in re.findall(r"[-\d.]+", capsys.readouterr().out.splitlines()[-1])[:3])
    assert low <= value <= high
    assert value >= 950


def test_pictures_and_links_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^ *learneddyn (\w+)", TEXT, re.MULTILINE))))
def test_commands_exist(command):
    assert command in COMMANDS
