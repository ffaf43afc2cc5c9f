"""Transitions as one file: columns as safetensors, spaces in its header. Nothing unpickles."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors

from learneddyn.core import DataError, Transitions
from learneddyn.files import replace_file
from learneddyn.spaces import Spaces


def save_transitions(path: Path, data: Transitions) -> None:
    """Write transitions as one safetensors file with their spaces in its header; whole or not at all.

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
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        columns = load_file(path, device=str(device))
        spaces = Spaces.from_json(json.loads(header["spaces"]))
        return Transitions(**columns, spaces=spaces, source=header["source"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no readable transitions: {error}") from error
