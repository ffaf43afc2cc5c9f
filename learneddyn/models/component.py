"""Known equations with one law in them that is not known: a torque against motion, learned through the equations.

Source: Ma, Chen, Deng, Tenenbaum, Du, Gan, Matusik, "Learning Neural Constitutive Laws from Motion Observations for
Generalizable PDE Dynamics" (NCLaw, 2023): the equations are kept, a small network that cannot break the law's
symmetries takes the place of one component, and its loss is on motion, differentiated through the equations. The source
has elastic solids in a material point solver; here the component is a joint's resistance.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from learneddyn.core import Transitions
from learneddyn.models.angles import apart
from learneddyn.models.hybrid import dotted
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import EXACT, spread
from learneddyn.models.windows import longest_window, window_starts, windows
from learneddyn.spaces import Spaces

Law = Callable[[Float[Tensor, "b j"]], Float[Tensor, "b j"]]
"""Velocities of the joints to torques."""
_STRENGTHS = 10.0 ** torch.arange(-4, 4.5, 0.5)
"""Coefficients that a law may begin with, in units of torque by velocity."""
_ONE = 0.541324854612918
"""softplus of this is 1."""


def pushed(obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], law: Law) -> Float[Tensor, "b o"]:
    """Return a mass of 1 kg one second on: column 0 is its speed, action 0 pushes it, the rest stays as it is."""
    speed = obs[:, :1]
    return torch.cat([speed + action[:, :1].sum(dim=1, keepdim=True) + law(speed), obs[:, 1:]], dim=1)


class ComponentLaw(AbstractRegression):
    """next obs = equations(obs, action, law), where ``law(w) = -c w softplus(g(w^2))`` for every joint's velocity w.

    Whatever the network g says, such a law is odd, zero at rest, and takes energy out. The equations may ask for it as
    often as they like within a step. The constants c begin at the best of several powers of ten, joint after joint, so
    that units do not matter; then networks and constants learn by gradient of the error along ``horizon`` open-loop
    steps, in units of a step's spread.

    Args:
        equations: dotted path of a function (obs [b o], action [b a], law, **equation_arguments) -> next obs [b o], in
            torch and differentiable; ``law`` takes velocities [b j] and returns torques [b j].
        equation_arguments: its keyword arguments, JSON values.
        joints: velocities that the equations ask about, each with a law of its own.
        angles: observation columns in radians, whose errors are taken the short way round.
        hidden: widths of every g (tanh).
        horizon: steps of a training window, or the longest stretch's where that is shorter.
        updates: of training.
        batch_size: windows per update.
        learning_rate: of Adam; falls to zero by a cosine.
        holdout_ratio: share of the rows, the last ones, that measure the noise.

    Raises:
        ValueError: an argument outside its range, or equations that cannot be imported.
    """

    num_members = 1
    learn_reward = False

    def __init__(
        self,
        equations: str = "learneddyn.models.component.pushed",
        equation_arguments: dict[str, Any] | None = None,
        joints: int = 1,
        angles: Sequence[int] = (),
        hidden: Sequence[int] = (16, 16),
        horizon: int = 5,
        updates: int = 500,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("joints", joints >= 1, joints, "at least 1"),
            ("hidden", len(hidden) > 0 and all(width >= 1 for width in hidden), hidden, "one or more positive widths"),
            ("horizon", horizon >= 1, horizon, "at least 1"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.equations, self.equation_arguments, self.joints = equations, equation_arguments or {}, joints
        self.angles, self.hidden, self.horizon, self.updates = list(angles), list(hidden), horizon, updates
        self.batch_size, self.learning_rate, self.holdout_ratio = batch_size, learning_rate, holdout_ratio
        self._equations = dotted("equations", equations)

    def _build_members(self, spaces: Spaces) -> None:
        if any(not 0 <= column < spaces.obs_dim for column in self.angles):
            raise ValueError(f"angles must name observation columns 0 to {spaces.obs_dim - 1}, got {self.angles}")
        widths = [1, *self.hidden, 1]
        self.weights = nn.ParameterList(torch.zeros(self.joints, i, j) for i, j in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(self.joints, 1, j) for j in widths[1:])
        self.log_strength = nn.Parameter(torch.zeros(self.joints))
        self.register_buffer("speed", torch.ones(self.joints))
        self.register_buffer("step_scale", torch.ones(spaces.obs_dim))

    def law(self, velocity: Float[Tensor, "b j"]) -> Float[Tensor, "b j"]:
        """Return the torque of every joint at its velocity, in the units of the equations.

        Raises:
            ValueError: the equations ask about another number of joints.
        """
        if velocity.shape[1] != self.joints:
            raise ValueError(f"the law is of {self.joints} joints, the equations ask about {velocity.shape[1]}")
        x = (velocity / self.speed).square().T[:, :, None]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight).tanh()
        share = softplus(torch.baddbmm(self.biases[-1], x, self.weights[-1]) + _ONE)[:, :, 0].T
        return -self.log_strength.exp() * velocity * share

    def _step(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, "b o"]:
        return self._equations(obs, action, self.law, **self.equation_arguments)

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        return Answer(self._step(obs, action)[None])

    def _held_out(self, rows: int, count: int, rng: torch.Generator) -> Int[Tensor, " h"]:
        """Return the last rows, so that windows of training rows have no gaps."""
        return torch.arange(rows - count, rows, device=rng.device)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        train = data[rows]
        window = longest_window(train, self.horizon)
        starts = window_starts(train, window)
        change, least = apart(train.next_obs, train.obs, self.angles), EXACT * spread(train.obs)
        self.step_scale.copy_(torch.maximum(change.square().mean(dim=0).sqrt(), least))
        self._initialise(train, rng)
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        history = []
        bar = tqdm(range(self.updates), desc="ComponentLaw", disable=not progress)
        for update in bar:
            chosen = starts[torch.randint(len(starts), (self.batch_size,), generator=rng, device=starts.device)]
            obs, action, after = (windows(part, chosen, window) for part in (train.obs, train.action, train.next_obs))
            loss = self._loss(obs[:, 0], action, after)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if (update + 1) % max(1, self.updates // 20) == 0:
                history.append({"epoch": update + 1.0, "loss": loss.item()})
                bar.set_postfix(loss=loss.item())
        return history

    def _loss(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b t a"], after: Float[Tensor, "b t o"]
    ) -> Float[Tensor, ""]:
        """Return the mean squared error along an open-loop rollout, in units of a step's spread."""
        reached = []
        for each in action.unbind(dim=1):
            obs = self._step(obs, each)
            reached.append(obs)
        return (apart(torch.stack(reached, dim=1), after, self.angles) / self.step_scale).square().mean()

    @torch.no_grad()
    def _initialise(self, train: Transitions, rng: torch.Generator) -> None:
        """Learn how fast the joints move; begin every law linear, with the coefficient that fits single steps best."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=rng)
            bias.zero_()
        self.weights[-1].zero_()
        self.speed.fill_(1.0)
        self.log_strength.fill_(-torch.inf)
        asked: list[Tensor] = []

        def listening(velocity: Float[Tensor, "b j"]) -> Float[Tensor, "b j"]:
            asked.append(velocity)
            return self.law(velocity)

        self._equations(train.obs, train.action, listening, **self.equation_arguments)
        fastest = torch.cat(asked).square().mean(dim=0).sqrt()
        self.speed.copy_(torch.where(fastest > 0, fastest, 1.0))
        self.log_strength.fill_(float(_STRENGTHS[0].log()))
        for joint in range(self.joints):
            losses = []
            for strength in _STRENGTHS.tolist():
                self.log_strength[joint] = torch.tensor(strength).log()
                losses.append(self._loss(train.obs, train.action[:, None], train.next_obs[:, None]))
            best = torch.stack(losses).nan_to_num(torch.inf, torch.inf).argmin()
            self.log_strength[joint] = _STRENGTHS[best].log()

    # Declared for type checkers; `_build_members` registers them.
    speed: Tensor
    step_scale: Tensor
