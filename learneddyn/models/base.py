"""What every learned model shares: fit, and a file format that nothing has to unpickle; and what dynamics add to it."""

import hashlib
import importlib
import inspect
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import learneddyn
from learneddyn.core import Dynamics, Json, Outcome, Prediction, Transitions
from learneddyn.files import replaced_folder, surviving_folder, write_file
from learneddyn.models.windows import along
from learneddyn.spaces import Spaces

FORMAT = 1
Model = TypeVar("Model", bound="AbstractModel")


class ModelFileError(ValueError):
    """A model folder that cannot be read: missing, truncated, from another format version, or for another class."""


@dataclass
class FitReport:
    """What a fit did: ``history`` holds one entry per epoch, ``metrics`` the final figures (hold-out MSE, NLL ...)."""

    epochs: int
    seconds: float
    metrics: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)


class AbstractModel(nn.Module, ABC):
    """A model that is learned from Transitions and kept in a folder.

    The constructor takes hyper-parameters only, all of them JSON values; sizes come from the data at `fit`. Subclasses
    implement `fit` and `_build`, which creates the parameters once the spaces are known.
    """

    spaces: Spaces | None
    source: str

    def __init__(self) -> None:
        super().__init__()
        self.spaces = None
        self.source = ""

    @abstractmethod
    def _build(self, spaces: Spaces) -> None:
        """Create parameters and buffers for these spaces; called once before the first fit and by `load`."""

    @abstractmethod
    def fit(self, data: Transitions, *, rng: torch.Generator, progress: bool = False) -> FitReport:
        """Learn from the data; a second call goes on from the weights at hand (warm start).

        The first call makes the parameters on the data's device, where ``rng`` must be too.
        """

    def config(self) -> Json:
        """Return the constructor's arguments, read back from the attributes of the same names."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``.

        The new folder is written beside the old one and then swapped in, so a kill at any moment leaves either the old
        or the new model readable by `load`.

        Raises:
            ModelFileError: the model has not been fitted.
        """
        if self.spaces is None:
            raise ModelFileError(f"{type(self).__name__} has not been fitted: there is nothing to save")
        target, blob = Path(folder), self._blob()
        card = {
            "format": FORMAT,
            "class": f"{type(self).__module__}.{type(self).__qualname__}",
            "config": self.config(),
            "spaces": self.spaces.to_json(),
            "source": self.source,
            "version": learneddyn.__version__,
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        with replaced_folder(target) as fresh:
            write_file(fresh / "model.safetensors", blob)
            write_file(fresh / "model.json", json.dumps(card, indent=2).encode())

    def digest(self) -> str:
        """Return the SHA-256 of the weights in hexadecimal, the one that `save` writes into ``model.json``."""
        return hashlib.sha256(self._blob()).hexdigest()

    def _blob(self) -> bytes:
        return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()})

    @classmethod
    def load(cls: type[Model], folder: str | Path, device: torch.device | str = "cpu") -> Model:
        """Read a folder written by `save`; ``AbstractModel.load`` returns whatever class the folder holds.

        Raises:
            ModelFileError: missing, truncated, of another format version, of another class, or not fitting that class.
        """
        source = surviving_folder(Path(folder))
        card, blob = _read(source)
        module, _, name = card["class"].rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ModelFileError(
                f"{source} holds a {card['class']}: cannot import {card['class']} ({error})"
            ) from error
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise ModelFileError(f"{source} holds a {card['class']}, not a {cls.__name__}")
        try:
            model = found(**card["config"])
        except (TypeError, ValueError) as error:
            raise ModelFileError(f"{card['class']} does not take the arguments that {source} names: {error}") from error
        try:
            model.spaces, model.source = Spaces.from_json(card["spaces"]), card["source"]
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            raise ModelFileError(f"{source}/model.json names no readable spaces: {error}") from error
        try:
            model._build(model.spaces)
            model.load_state_dict(load_tensors(blob))
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelFileError(f"{source}/model.safetensors does not fit {card['class']}: {error}") from error
        return model.to(device)

    def check_spaces(self, data: Transitions) -> Spaces:
        """Return the spaces of ``data`` after building on its device (first fit) or comparing (later fits).

        Raises:
            ValueError: the data names no spaces, or others than the ones this model was fitted on.
        """
        if data.spaces is None:
            raise ValueError("the data names no spaces: load it with learneddyn.data, or give it spaces=Spaces(...)")
        if self.spaces is None:
            self._build(data.spaces)
            self.to(data.device)
            self.spaces = data.spaces
        elif self.spaces != data.spaces:
            raise ValueError(f"this model was fitted on {self.spaces}, the data has {data.spaces}")
        self.source = data.source
        return self.spaces


class AbstractDynamics(AbstractModel):
    """p(next_obs, reward, terminated | obs, action), learned from Transitions.

    Subclasses implement `predict` and `sample` besides what `AbstractModel` asks for. A model with memory also says in
    `begin` what it remembers where an episode starts; it takes ``obs`` for what is seen now, and from its memory only
    what ``obs`` does not show.
    """

    num_members: int

    def begin(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b m"] | None:
        """Return the memory of episodes that start at ``obs``; None, as here, for a model that keeps none.

        Without memory, `predict` and `sample` answer as with this one.
        """
        return None

    @torch.no_grad()
    def remembered(self, data: Transitions) -> Float[Tensor, "n m"] | None:
        """Return what the model remembers before each row of a log, on its device; None for a model without memory.

        Memory grows along unbroken stretches (`learneddyn.models.windows`): it begins afresh where an episode starts or
        rows are missing. The cost is one prediction per row, in as many calls as the longest stretch has rows.

        Raises:
            ValueError: the model has not been fitted.
        """
        if self.spaces is None:
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit(data) or load a model first")
        stretches, data = along(data), data.to(self.elites.device)
        memory = self.begin(data.obs)
        if memory is None:
            return None
        for rows in stretches:
            before = rows - 1
            after = self.predict(data.obs[before], data.action[before], memory[before]).memory
            if after is None:
                raise ValueError(f"{type(self).__name__} begins with a memory, but its predictions hold none")
            memory[rows] = after
        return memory

    @property
    @abstractmethod
    def elites(self) -> Int[Tensor, " k"]:
        """Indices of the members that rollouts may use."""

    @abstractmethod
    def predict(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Float[Tensor, "b m"] | None = None
    ) -> Prediction:
        """Ask every member."""

    @abstractmethod
    def sample(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        rng: torch.Generator,
        memory: Float[Tensor, "b m"] | None = None,
        *,
        noise: bool = True,
    ) -> Outcome:
        """Ask one member per row: the fast path of every rollout."""


def memory_of(dynamics: Dynamics, data: Transitions) -> Float[Tensor, "n m"] | None:
    """Return what a model remembers before each row of a log; None where it is no AbstractDynamics, or keeps none."""
    return dynamics.remembered(data) if isinstance(dynamics, AbstractDynamics) else None


def blueprint(model: AbstractModel) -> Json:
    """Return what rebuilds a model without its weights: class, arguments, and whether it has been fitted."""
    kind = type(model)
    return {
        "class": [kind.__module__, kind.__qualname__],
        "config": model.config(),
        "fitted": model.spaces is not None,
    }


def from_blueprint(card: Json, spaces: Spaces) -> Any:
    """Return the model on a card; where it was fitted its parameters are made, for weights to be loaded."""
    module, name = card["class"]
    model = getattr(importlib.import_module(module), name)(**card["config"])
    if card["fitted"]:
        model._build(spaces)
        model.spaces = spaces
    return model


def _read(source: Path) -> tuple[dict[str, Any], bytes]:
    try:
        card = json.loads((source / "model.json").read_text())
        blob = (source / "model.safetensors").read_bytes()
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{source} is not a readable model folder: {error}") from error
    if not isinstance(card, dict):
        raise ModelFileError(f"{source}/model.json must hold a JSON object, got a {type(card).__name__}")
    if card.get("format") != FORMAT:
        raise ModelFileError(
            f"{source} has model format {card.get('format')!r} (written by learneddyn {card.get('version')}), this "
            f"version reads format {FORMAT}; fit the model again or install that version"
        )
    if missing := {"class", "config", "spaces", "source", "sha256"} - set(card):
        raise ModelFileError(f"{source}/model.json lacks {sorted(missing)}")
    if hashlib.sha256(blob).hexdigest() != card["sha256"]:
        raise ModelFileError(f"{source}/model.safetensors is truncated or altered ({len(blob)} bytes, wrong checksum)")
    return card, blob
