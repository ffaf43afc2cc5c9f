"""Losses over several steps: teacher forcing that keeps gradients of chaotic systems bounded, and causal weights.

Sources: Hess, Monfared, Brenner, Durstewitz, "Generalized Teacher Forcing for Learning Chaotic Dynamics" (2023); sparse
forcing as in Mikhaeil, Monfared, Durstewitz, "On the difficulty of learning chaotic dynamics with RNNs" (2022). Usable
for any recurrent model that can begin a latent state, advance it, and force it towards data (`Cell`).

    z_1 = embed(x_1);   z_{t+1} = advance(force(z_t, x_t, alpha), u_t);   loss: x_{t+1} against observe(z_{t+1})

The loss looks at the state before it is forced; every step of backpropagation meets the factor (1 - alpha), so that the
product of Jacobians stays bounded for alpha >= 1 - 1 / sigma, sigma bounding their norms. alpha = 1 is one-step
training, alpha = 0 is backpropagation through time.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Cell(Protocol):
    """A recurrent model as forcing sees it: latent states z [b, m], standardised observations x [b, d], inputs u."""

    def embed(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Return the latent state of sequences that start at x."""
        ...

    def advance(self, z: Float[Tensor, "b m"], u: Float[Tensor, "b a"]) -> Float[Tensor, "b m"]:
        """Return the next latent state."""
        ...

    def observe(self, z: Float[Tensor, "b m"]) -> Float[Tensor, "b q"]:
        """Return what the latent state says: the observation first, then anything else that is learned."""
        ...

    def force(self, z: Float[Tensor, "b m"], x: Float[Tensor, "b d"], alpha: float) -> Float[Tensor, "b m"]:
        """Return the state moved by the share alpha towards one that shows x."""
        ...


@runtime_checkable
class UnrolledCell(Cell, Protocol):
    """A cell that follows a whole sequence faster than step by step."""

    def unroll(
        self, x: Float[Tensor, "b t d"], u: Float[Tensor, "b t a"], alphas: Sequence[float]
    ) -> Float[Tensor, "b t m"]:
        """Return the states after every step, before they are forced; ``alphas`` hold the strength before each step."""
        ...


def forced_loss(
    cell: Cell,
    x: Float[Tensor, "b t d"],
    u: Float[Tensor, "b t a"],
    target: Float[Tensor, "b t q"],
    alpha: float,
    *,
    every: int = 1,
    weigh: Callable[[Float[Tensor, " t"]], Float[Tensor, " t"]] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error along sequences.

    Args:
        cell: the model.
        x: observations before each step, standardised.
        u: inputs of each step.
        target: what `Cell.observe` should say after each step.
        alpha: strength of forcing, 0 to 1.
        every: force only at every n-th step (sparse teacher forcing with ``alpha=1``).
        weigh: see `stepwise_loss`.

    Raises:
        ValueError: alpha or every out of range.
    """
    _check(("alpha", 0 <= alpha <= 1, alpha, "between 0 and 1"), ("every", every >= 1, every, "at least 1"))
    alphas = [alpha if step and step % every == 0 else 0.0 for step in range(x.shape[1])]
    if isinstance(cell, UnrolledCell):
        states = cell.unroll(x, u, alphas)
        said = cell.observe(states.flatten(0, 1)).view(*states.shape[:2], -1)
    else:
        said = step_by_step(cell, x, u, alphas)
    return stepwise_loss(said, target, weigh)


def step_by_step(
    cell: Cell, x: Float[Tensor, "b t d"], u: Float[Tensor, "b t a"], alphas: Sequence[float]
) -> Float[Tensor, "b t q"]:
    """Return what a cell says after every step, forced by its alpha before each."""
    z = cell.embed(x[:, 0])
    said = []
    for step, alpha in enumerate(alphas):
        if alpha:
            z = cell.force(z, x[:, step], alpha)
        z = cell.advance(z, u[:, step])
        said.append(cell.observe(z))
    return torch.stack(said, dim=1)


def stepwise_loss(
    said: Float[Tensor, "b t q"],
    target: Float[Tensor, "b t q"],
    weigh: Callable[[Float[Tensor, " t"]], Float[Tensor, " t"]] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error of sequences, whose steps ``weigh`` may weigh by their losses (`CausalWeights`)."""
    error = (said - target).square()
    if weigh is None:
        return error.mean()
    losses = error.mean(dim=(0, 2))
    return (weigh(losses) * losses).mean()


class CausalWeights:
    """Weights of the steps of a sequence: a step counts once those before it are learned.

    ``w_i = exp(-sharpness * sum of the losses of the steps before i)``, as a constant of the gradient. The sharpness
    goes on to the next one when every weight is above ``learned``.

    Source: Wang, Sankaran, Perdikaris, "Respecting causality is all you need for training physics-informed neural
    networks" (2022), which weighs residuals of a differential equation; here they are errors of a free run.

    Args:
        sharpnesses: in the order of training.
        learned: least weight at which the next sharpness comes.

    Raises:
        ValueError: no sharpness, or one that is not positive.
    """

    def __init__(self, sharpnesses: Sequence[float] = (1e-2, 1e-1, 1.0, 1e1, 1e2), learned: float = 0.99) -> None:
        if not sharpnesses or any(not sharpness > 0 for sharpness in sharpnesses):
            raise ValueError(f"sharpnesses must be positive numbers, one at least, got {list(sharpnesses)}")
        self._ahead, self.learned = list(sharpnesses), learned

    @property
    def sharpness(self) -> float:
        """The one in use."""
        return self._ahead[0]

    def __call__(self, losses: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
        """Return the weights for these losses, and move on where all steps are learned."""
        losses = losses.detach()
        before = torch.cat([losses.new_zeros(1), losses[:-1].cumsum(dim=0)])
        weights = (-self.sharpness * before).exp()
        if len(self._ahead) > 1 and bool(weights.amin() > self.learned):
            self._ahead.pop(0)
        return weights


@torch.no_grad()
def needed_forcing(cell: Cell, x: Float[Tensor, "b t d"], u: Float[Tensor, "b t a"]) -> float:
    """Return max(0, 1 - 1 / sigma), sigma the largest geometric mean over a sequence of the Jacobians' norms.

    The Jacobians are taken at states forced to the data, as the source's "product upper bound" does.
    """

    def one(z: Tensor, v: Tensor) -> Tensor:
        return cell.advance(z[None], v[None])[0]

    z = cell.embed(x[:, 0])
    logs = []
    for step in range(x.shape[1]):
        z = cell.force(z, x[:, step], 1.0)
        jacobians = torch.vmap(torch.func.jacrev(one))(z, u[:, step])
        if not bool(jacobians.isfinite().all()):
            return 1.0
        logs.append(torch.linalg.matrix_norm(jacobians, ord=2).log())
        z = cell.advance(z, u[:, step])
    sigma = float(torch.stack(logs).mean(dim=0).max().exp())
    return 1.0 - 1.0 / sigma if sigma > 1 else 0.0


class AdaptiveForcing:
    """alpha that follows what the Jacobians need: up at once, down slowly.

    Args:
        decay: of alpha towards a lower estimate, per update of the estimate.
        interval: training batches between two estimates.
        start: first alpha.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(self, decay: float, interval: int = 5, start: float = 1.0) -> None:
        _check(
            ("decay", 0 <= decay < 1, decay, "at least 0 and below 1"),
            ("interval", interval >= 1, interval, "at least 1"),
            ("start", 0 <= start <= 1, start, "between 0 and 1"),
        )
        self.decay, self.interval, self.alpha, self._batches = decay, interval, start, 0

    def update(self, cell: Cell, x: Float[Tensor, "b t d"], u: Float[Tensor, "b t a"]) -> float:
        """Return the alpha for this batch."""
        if self._batches % self.interval == 0:
            needed = needed_forcing(cell, x, u)
            slow = self.decay * self.alpha + (1 - self.decay) * needed
            self.alpha = needed if needed > self.alpha else slow
        self._batches += 1
        return self.alpha


def _check(*arguments: tuple[str, bool, object, str]) -> None:
    for name, ok, value, allowed in arguments:
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")
