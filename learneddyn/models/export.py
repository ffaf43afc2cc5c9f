"""One step of an ensemble, and policies, as programs that run without this package.

    step = export_step(model)                   # a torch.export program with any number of lanes
    torch.export.save(step, "step.pt2")         # torch.export.load("step.pt2").module()(obs, action, member, noise)
    save_onnx(step, "step.onnx")                # needs the extra "export"
    compile_ahead(step, "step_compiled.pt2")    # AOTInductor: needs a C++ compiler, takes tens of seconds

Programs are functions without a state: noise and members are inputs.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export import Dim, ExportedProgram

from learneddyn.models.ensemble import ProbabilisticEnsemble


class ExportError(RuntimeError):
    """A program that cannot be written here. The message names what is missing."""


class EnsembleStep(nn.Module):
    """`ProbabilisticEnsemble.sample` with its randomness as inputs, in float32.

    Every member answers every row and one is picked, so that the graph is static: in a process that has this package,
    `ProbabilisticEnsemble.sample` costs a fraction.

    Args:
        model: fitted.
    """

    def __init__(self, model: ProbabilisticEnsemble) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        obs: Float[Tensor, "b o"],
        action: Float[Tensor, "b a"],
        member: Int[Tensor, " b"],
        noise: Float[Tensor, "b q"],
    ) -> tuple[Tensor, ...]:
        """Return next observation ``[b o]`` and, where the model has the heads, reward ``[b]``, termination ``[b]``.

        Args:
            obs: observations.
            action: actions.
            member: who answers each row, one of ``model.elites``.
            noise: standard normal draws, one column per observation and one for a reward head; zeros give the mean.
        """
        said = self.model.predict(obs, action)
        rows = member, torch.arange(obs.shape[0], device=obs.device)
        o = obs.shape[1]
        answer = [said.mean[rows] + said.std[rows] * noise[:, :o]]
        if said.reward_mean is not None and said.reward_std is not None:
            answer.append(said.reward_mean[rows] + said.reward_std[rows] * noise[:, o])
        if said.terminated is not None:
            answer.append(said.terminated[rows])
        return tuple(answer)


class PolicyStep(nn.Module):
    """What ``predict(obs, deterministic=True)`` of a Stable-Baselines3 policy answers, from tensor to tensor.

    Args:
        policy: the ``policy`` of an SB3 agent with flat observations, and without a normalising wrapper.
    """

    low: Tensor
    high: Tensor

    def __init__(self, policy: Any) -> None:
        super().__init__()
        # Distributions remember the last tensors they saw, and those of a trace are no real ones.
        self.policy = copy.deepcopy(policy).cpu().eval()
        space = policy.action_space
        self._bounded = hasattr(space, "low")
        self.register_buffer("low", torch.as_tensor(space.low if self._bounded else 0.0))
        self.register_buffer("high", torch.as_tensor(space.high if self._bounded else 0.0))

    def forward(self, obs: Float[Tensor, "b o"]) -> Tensor:
        """Return actions as the environment takes them: in their bounds, or their numbers."""
        action = self.policy._predict(obs, deterministic=True)
        if not self._bounded:
            return action
        if self.policy.squash_output:
            return self.low + 0.5 * (action + 1) * (self.high - self.low)
        return torch.clamp(action, self.low, self.high)


def export_step(model: ProbabilisticEnsemble) -> ExportedProgram:
    """Return one step of a fitted ensemble as a program; see `EnsembleStep` for its inputs and outputs.

    Raises:
        ValueError: the ensemble has not been fitted.
    """
    if model.spaces is None:
        raise ValueError("only a fitted ensemble has a step to export: call fit(data) or ProbabilisticEnsemble.load")
    o, a = model.spaces.obs_dim, model.spaces.action_dim
    columns = o + model.learn_reward
    device = model.elites.device
    rows = [torch.zeros(3, width, device=device) for width in (o, a, columns)]
    return _exported(EnsembleStep(model), rows[0], rows[1], model.elites[:1].repeat(3), rows[2])


def export_policy(policy: Any) -> ExportedProgram:
    """Return the deterministic actions of a Stable-Baselines3 policy as a program ``obs [b o] -> action``.

    Raises:
        ValueError: observations that are not flat.
    """
    shape = policy.observation_space.shape
    if shape is None or len(shape) != 1:
        raise ValueError(f"only policies of flat observations can be exported, got {policy.observation_space}")
    validate = Distribution._validate_args
    # A distribution that checks its arguments makes the graph depend on their values.
    Distribution.set_default_validate_args(False)
    try:
        return _exported(PolicyStep(policy), torch.zeros(3, *shape))
    finally:
        Distribution.set_default_validate_args(validate)


def save_onnx(program: ExportedProgram, path: str | Path) -> None:
    """Write a program in the format of ONNX, with a free number of rows.

    Raises:
        ExportError: onnx or onnxscript is missing.
    """
    try:
        with _quiet():
            torch.onnx.export(program, (), str(path), dynamo=True, external_data=False, verbose=False)
    except ImportError as error:  # torch names its own kind of it
        raise ExportError(f"writing ONNX needs more packages ({error}): pip install 'learneddyn[export]'") from error


def compile_ahead(program: ExportedProgram, path: str | Path) -> None:
    """Compile a program for this machine's processor; `torch._inductor.aoti_load_package` loads the file.

    Args:
        program: from `export_step` or `export_policy`.
        path: ends with ``.pt2``.

    Raises:
        ExportError: there is no C++ compiler, or it fails.
        ValueError: another ending.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if Path(path).suffix != ".pt2":
        raise ValueError(f"a compiled program is a file that ends with .pt2, got {str(path)!r}")
    try:
        with _quiet():
            aoti_compile_and_package(program, package_path=str(path))
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise ExportError(f"compiling ahead of time needs a working C++ compiler such as g++: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what PyTorch warns about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@torch.no_grad()
def _exported(module: nn.Module, *rows: Tensor) -> ExportedProgram:
    lanes = Dim("lanes", min=1)
    return torch.export.export(module.eval(), rows, dynamic_shapes=({0: lanes},) * len(rows), strict=False)
