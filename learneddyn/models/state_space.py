"""Linear state-space layers: parallel over a sequence by FFT, step by step in a rollout, equal to rounding.

    diagonal    x' = A x + B u with diagonal complex A, discretised by zero-order hold (S4D)
    companion   x_t = A x_{t-1} + b u_t with A a shift plus one learned column (SpaceTime)

Sources: Gu, Gupta, Goel, Re, "On the Parameterization and Initialization of Diagonal State Space Models" (2022), for
S4D and its initialisations; Gu, Johnson, Timalsina, Rudra, Re, "How to Train Your HiPPO: State Space Models with
Generalized Orthogonal Basis Projections" (2022); Yu, Nigmetov, Morozov, Mahoney, Erichson, "Robustifying State-space
Models for Long Sequences via Approximate Diagonalization" (2024), for perturb-then-diagonalise; Zhang, Saab, Poli, Dao,
Goel, Re, "Effectively Modeling Time Series with Simple Discrete State Spaces" (2023), for the companion form.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

INITS = ("lin", "inv", "legs", "real", "ptd")
"""How the eigenvalues of a diagonal layer begin, see `DiagonalStateSpace`."""
_SLOWEST = 1e-3
"""Eigenvalues have at most minus this as their real part: a perturbed matrix may be unstable."""


class Modes(NamedTuple):
    """A linear system in the basis of its eigenvectors."""

    eigenvalues: Complex[Tensor, " n"]
    entry: Complex[Tensor, " n"]
    """How the input enters: the inverse of ``vectors`` times B."""
    vectors: Complex[Tensor, "n n"]
    """One column per eigenvalue, each of norm 1."""

    @property
    def condition(self) -> float:
        """Condition number of the eigenvectors: by how much rounding grows on the way into this basis."""
        return float(torch.linalg.cond(self.vectors))


def hippo_legs(order: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Return A and B of HiPPO-LegS, in double precision.

    The state holds the input's past in the basis ``e^-t L_n(e^-t)``: Legendre polynomials, warped exponentially.
    """
    n = torch.arange(order, dtype=torch.float64)
    entry = (2 * n + 1).sqrt()
    return -torch.tril(torch.outer(entry, entry), diagonal=-1) - torch.diag(n + 1), entry


def diagonalise(matrix: Float[Tensor, "n n"], entry: Float[Tensor, " n"]) -> Modes:
    """Return a system in the basis of its eigenvectors."""
    eigenvalues, vectors = torch.linalg.eig(matrix)
    return Modes(eigenvalues, torch.linalg.solve(vectors, entry.to(vectors.dtype)), vectors)


def perturb_then_diagonalise(
    matrix: Float[Tensor, "n n"], entry: Float[Tensor, " n"], size: float, rng: torch.Generator
) -> Modes:
    """Diagonalise a matrix near the given one, whose own eigenvectors may be too ill-conditioned to compute with.

    The backward error is exactly ``size``: the spectral norm of the Gaussian perturbation. The source minimises over
    perturbations, here the first one drawn is taken. Real parts are brought to at most -0.001.

    Raises:
        ValueError: size is not positive.
    """
    if size <= 0:
        raise ValueError(f"size must be positive, got {size}")
    noise = torch.randn(matrix.shape, generator=rng, device=rng.device).to(matrix)
    modes = diagonalise(matrix + size * noise / torch.linalg.matrix_norm(noise, ord=2), entry)
    stable = torch.complex(modes.eigenvalues.real.clamp_max(-_SLOWEST), modes.eigenvalues.imag)
    return modes._replace(eigenvalues=stable)


def normal_legs(order: int) -> Modes:
    """Return S4D-LegS: HiPPO-LegS without its part of rank one, which leaves a normal matrix; the input enters by B/2.

    Its kernels converge to those of HiPPO-LegS with the order, but only weakly: see `transfer_function`.
    """
    matrix, entry = hippo_legs(order)
    normal = matrix + 0.5 * torch.outer(entry, entry)  # -1/2 plus a skew-symmetric matrix
    symmetric = -1j * (normal + 0.5 * torch.eye(order, dtype=normal.dtype)).to(torch.complex128)
    frequency, vectors = torch.linalg.eigh(symmetric)
    eigenvalues = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return Modes(eigenvalues, vectors.mH @ (0.5 * entry).to(vectors.dtype), vectors)


def transfer_function(
    matrix: Tensor, entry: Tensor, readout: Tensor, frequencies: Float[Tensor, " f"]
) -> Complex[Tensor, " f"]:
    """Return ``readout (i w - matrix)^-1 entry`` at every angular frequency w; a vector ``matrix`` is a diagonal."""
    s = 1j * frequencies.to(torch.complex128)
    entry, readout = entry.to(s.dtype), readout.to(s.dtype)
    if matrix.ndim == 1:
        return (readout * entry / (s[:, None] - matrix)).sum(dim=1)
    eye = torch.eye(len(matrix), dtype=s.dtype, device=matrix.device)
    return torch.linalg.solve(s[:, None, None] * eye - matrix, entry.expand(len(s), -1)) @ readout


def zero_order_hold(
    eigenvalues: Complex[Tensor, "*s"], dt: Float[Tensor, "*#s"]
) -> tuple[Complex[Tensor, "*s"], Complex[Tensor, "*s"]]:
    """Return the factors of state and input over a step of length dt during which the input stays as it is."""
    growth = torch.expm1(eigenvalues * dt)
    return growth + 1, growth / eigenvalues


class AbstractStateSpace(nn.Module, ABC):
    """``channels`` independent linear systems with one input and one output each.

    ``layer(u)`` answers a whole sequence that begins in the zero state, by FFT; `step` goes on from a state. Subclasses
    give the impulse response and the step. Parameters are made empty: call `initialise`, or load them.

    Args:
        channels: systems.
        state_size: floats that the state of all channels takes.
    """

    def __init__(self, channels: int, state_size: int) -> None:
        super().__init__()
        self.channels, self.state_size = channels, state_size
        self.skip = nn.Parameter(torch.zeros(channels))

    @abstractmethod
    def initialise(self, rng: torch.Generator) -> None:
        """Draw the parameters."""

    @abstractmethod
    def poles(self) -> list[nn.Parameter]:
        """Return the parameters that place the eigenvalues: they ask for small learning rates, and no weight decay."""

    @abstractmethod
    def kernel(self, length: int) -> Float[Tensor, "h t"]:
        """Return every channel's response to an impulse at the first step, the direct share ``skip`` left out."""

    @abstractmethod
    def step(self, u: Float[Tensor, "b h"], state: Float[Tensor, "b s"]) -> tuple[Tensor, Tensor]:
        """Return the outputs ``[b h]`` and the state ``[b s]`` after one more input."""

    def forward(self, u: Float[Tensor, "b t h"]) -> Float[Tensor, "b t h"]:
        """Return the outputs along sequences; an input acts on the output of its own step already."""
        length = u.shape[1]
        padded = 2 * length  # a circular convolution of this length does not wrap around
        response = torch.fft.rfft(self.kernel(length), padded)
        y = torch.fft.irfft(torch.fft.rfft(u.transpose(1, 2), padded) * response, padded)[..., :length]
        return y.transpose(1, 2) + self.skip * u


class DiagonalStateSpace(AbstractStateSpace):
    """S4D: ``x' = A x + B u, y = 2 Re(C x) + D u`` with diagonal A, B fixed, C, D, A and the time step learned.

    The eigenvalues begin as

        lin    -1/2 + i pi n
        inv    -1/2 + i N/pi (N / (2 n + 1) - 1)
        legs   those of `normal_legs`
        real   -(n + 1)
        ptd    those of HiPPO-LegS after `perturb_then_diagonalise`

    in units of 1/dt; a channel remembers about ``1 / dt`` steps. The first four keep one of each conjugate pair, N/2 in
    all, with B = 1; ptd keeps all N with their own B, and is therefore twice as large.

    Args:
        channels: systems.
        order: real states N of a system, even.
        init: one of `INITS`.
        shortest: lower end of the time steps drawn (log-uniform), in steps of the sequence.
        longest: their upper end.
        perturbation: spectral norm of ptd's perturbation.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        channels: int,
        order: int = 32,
        init: str = "lin",
        shortest: float = 0.01,
        longest: float = 0.5,
        perturbation: float = 0.1,
    ) -> None:
        for name, ok, value, allowed in (
            ("init", init in INITS, init, f"one of {INITS}"),
            ("order", order >= 2 and order % 2 == 0, order, "even and at least 2"),
            ("shortest", 0 < shortest <= longest, shortest, f"positive and at most longest = {longest}"),
            ("perturbation", perturbation > 0, perturbation, "positive"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        kept = order if init == "ptd" else order // 2
        super().__init__(channels, channels * kept * 2)
        self.order, self.init, self.perturbation = order, init, perturbation
        self.shortest, self.longest = shortest, longest
        self.log_dt = nn.Parameter(torch.zeros(channels))
        self.log_decay = nn.Parameter(torch.zeros(channels, kept))
        self.frequency = nn.Parameter(torch.zeros(channels, kept))
        self.readout = nn.Parameter(torch.zeros(channels, kept, 2))
        self.register_buffer("entry", torch.zeros(kept, 2))

    @torch.no_grad()
    def initialise(self, rng: torch.Generator) -> None:
        """Draw the parameters; D and the real and imaginary parts of C are Gaussian, ptd's C is so before its basis."""
        h, kept, device = self.channels, self.log_decay.shape[1], rng.device
        readout = torch.randn(h, kept, 2, generator=rng, device=device) * 0.5**0.5
        modes = self._modes(rng)
        if modes is None:
            eigenvalues, entry = self._closed_form(), torch.ones(kept, dtype=torch.complex64)
        else:  # no partner is left out, so that 2 Re counts every mode twice
            eigenvalues, entry = modes.eigenvalues, 0.5 * modes.entry
            real = torch.randn(h, kept, generator=rng, device=device)
            readout = torch.view_as_real(real.to(modes.vectors) @ modes.vectors)
        self.log_decay.copy_((-eigenvalues.real).log().expand(h, -1))
        self.frequency.copy_(eigenvalues.imag.expand(h, -1))
        self.entry.copy_(torch.view_as_real(entry))
        self.readout.copy_(readout)
        share = torch.rand(h, generator=rng, device=device)
        self.log_dt.copy_(math.log(self.shortest) + share * math.log(self.longest / self.shortest))
        self.skip.copy_(torch.randn(h, generator=rng, device=device))

    def _modes(self, rng: torch.Generator) -> Modes | None:
        return perturb_then_diagonalise(*hippo_legs(self.order), self.perturbation, rng) if self.init == "ptd" else None

    def _closed_form(self) -> Complex[Tensor, " p"]:
        n, order = torch.arange(self.order // 2, dtype=torch.float64), self.order
        half = torch.full_like(n, -0.5)
        if self.init == "lin":
            return torch.complex(half, math.pi * n)
        if self.init == "inv":
            return torch.complex(half, order / math.pi * (order / (2 * n + 1) - 1))
        if self.init == "legs":
            eigenvalues = normal_legs(order).eigenvalues
            return eigenvalues[eigenvalues.imag > 0]
        return torch.complex(-(n + 1), torch.zeros_like(n))

    def poles(self) -> list[nn.Parameter]:
        """Return A's parameters and the time steps."""
        return [self.log_dt, self.log_decay, self.frequency]

    def eigenvalues(self) -> Complex[Tensor, "h p"]:
        """Return the eigenvalues of A."""
        return torch.complex(-self.log_decay.exp(), self.frequency)

    def discretised(self) -> tuple[Complex[Tensor, "h p"], Complex[Tensor, "h p"]]:
        """Return the factors of state and input in one step."""
        state, held = zero_order_hold(self.eigenvalues(), self.log_dt.exp()[:, None])
        return state, held * torch.view_as_complex(self.entry)

    def kernel(self, length: int) -> Float[Tensor, "h t"]:
        """Return every channel's response to an impulse at the first step."""
        exponent = self.eigenvalues() * self.log_dt.exp()[:, None]
        steps = torch.arange(length, device=exponent.device, dtype=exponent.real.dtype)
        weight = torch.view_as_complex(self.readout) * self.discretised()[1]
        return 2 * torch.einsum("hp,hpt->ht", weight, (exponent[..., None] * steps).exp()).real

    def step(self, u: Float[Tensor, "b h"], state: Float[Tensor, "b s"]) -> tuple[Tensor, Tensor]:
        """Return outputs and state after one more input; the state's floats are real and imaginary parts in turn."""
        keep, take = self.discretised()
        x = torch.view_as_complex(state.view(len(u), *self.readout.shape)) * keep + u[..., None] * take
        y = 2 * (torch.view_as_complex(self.readout) * x).sum(dim=-1).real + self.skip * u
        return y, torch.view_as_real(x).flatten(1)

    # Declared for type checkers; the constructor registers it.
    entry: Tensor


class CompanionStateSpace(AbstractStateSpace):
    """SpaceTime: ``x_t = A x_{t-1} + b u_t, y_t = c x_t + D u_t``; A shifts the state and adds the last entry times a.

    It holds every autoregression exactly: with a = 0, b = (1, 0, ...) and c the coefficients, y_t is what they say
    about u_{t+1}. A column whose absolute sum is above 1 is scaled to 1, which keeps all eigenvalues within the unit
    circle. The source always scales a, and b and c too, which leaves out most autoregressions.

    Args:
        channels: systems.
        order: states n of a system.

    Raises:
        ValueError: order below 1.
    """

    def __init__(self, channels: int, order: int = 64) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        super().__init__(channels, channels * order)
        self.order = order
        self.column = nn.Parameter(torch.zeros(channels, order))
        self.entry = nn.Parameter(torch.zeros(channels, order))
        self.readout = nn.Parameter(torch.zeros(channels, order))

    @torch.no_grad()
    def initialise(self, rng: torch.Generator) -> None:
        """Draw the parameters: about a moving average of ``order`` inputs with random weights."""
        for parameter, scale in ((self.column, 0.5 / self.order), (self.entry, 0.1), (self.readout, self.order**-0.5)):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=rng, device=rng.device))
        self.entry[:, 0] += 1
        self.skip.copy_(torch.randn(self.channels, generator=rng, device=rng.device))

    def poles(self) -> list[nn.Parameter]:
        """Return the learned column."""
        return [self.column]

    def _stable_column(self) -> Float[Tensor, "h n"]:
        return self.column / self.column.abs().sum(dim=1, keepdim=True).clamp_min(1.0)

    def matrix(self) -> Float[Tensor, "h n n"]:
        """Return A of every channel."""
        column = self._stable_column()
        shift = torch.eye(self.order, dtype=column.dtype, device=column.device).roll(1, dims=0)
        shift[0, -1] = 0.0
        last = torch.eye(self.order, dtype=column.dtype, device=column.device)[-1]
        return shift + column[:, :, None] * last

    def kernel(self, length: int) -> Float[Tensor, "h t"]:
        """Return c b, c A b, c A^2 b, ...: by squaring A as often as the length doubles."""
        power, krylov = self.matrix(), self.entry[..., None]
        while krylov.shape[2] < length:
            krylov = torch.cat([krylov, power @ krylov], dim=2)
            power = power @ power
        return torch.einsum("hn,hnt->ht", self.readout, krylov[..., :length])

    def step(self, u: Float[Tensor, "b h"], state: Float[Tensor, "b s"]) -> tuple[Tensor, Tensor]:
        """Return outputs and state after one more input."""
        x = self._moved(state.view(len(u), *self.column.shape), u)
        return (self.readout * x).sum(dim=-1) + self.skip * u, x.flatten(1)

    def free_run(
        self, state: Float[Tensor, "b s"], gain: Float[Tensor, "h n"], steps: int
    ) -> tuple[Float[Tensor, "b t h"], Float[Tensor, "b t h"]]:
        """Return inputs and outputs of a closed loop, in which the next input is ``gain`` times the state.

        Args:
            state: after the last input that is known.
            gain: K; the loop's matrix is A + b K.
            steps: to go.
        """
        x, inputs, outputs = state.view(len(state), *self.column.shape), [], []
        for _ in range(steps):
            inputs.append((gain * x).sum(dim=-1))
            x = self._moved(x, inputs[-1])
            outputs.append((self.readout * x).sum(dim=-1) + self.skip * inputs[-1])
        return torch.stack(inputs, dim=1), torch.stack(outputs, dim=1)

    def _moved(self, x: Float[Tensor, "b h n"], u: Float[Tensor, "b h"]) -> Float[Tensor, "b h n"]:
        shifted = nn.functional.pad(x[..., :-1], (1, 0))
        return shifted + self._stable_column() * x[..., -1:] + self.entry * u[..., None]
