"""State-space layers: convolution equals recurrence, initial spectra, conditioning, autoregressions, closed loops."""

import math

import pytest
import torch

from learneddyn.core import generator
from learneddyn.models.state_space import (
    INITS,
    CompanionStateSpace,
    DiagonalStateSpace,
    diagonalise,
    hippo_legs,
    normal_legs,
    perturb_then_diagonalise,
    transfer_function,
    zero_order_hold,
)


def made(layer, seed=0):
    layer.initialise(generator(seed))
    return layer.double()


LAYERS = {init: lambda init=init: made(DiagonalStateSpace(3, 16, init)) for init in INITS} | {
    "companion": lambda: made(CompanionStateSpace(3, 16))
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_convolution_is_the_recurrence(kind):
    layer = LAYERS[kind]()
    u = torch.randn(2, 70, 3, generator=generator(1), dtype=torch.float64)
    state, stepped = torch.zeros(2, layer.state_size, dtype=torch.float64), []
    for now in u.unbind(dim=1):
        y, state = layer.step(now, state)
        stepped.append(y)
    whole, steps = layer(u).detach(), torch.stack(stepped, dim=1).detach()
    assert (whole - steps).abs().max() < 1e-12 * max(1.0, float(steps.abs().max()))


def test_outputs_do_not_look_ahead():
    layer = LAYERS["lin"]()
    u = torch.randn(1, 20, 3, generator=generator(1), dtype=torch.float64)
    late = u.clone()
    late[:, 12:] += 1
    change = (layer(late) - layer(u)).abs().amax(dim=(0, 2))
    assert change[:12].max() < 1e-12
    assert change[12:].min() > 1e-6


def test_zero_order_hold_is_exact_for_constant_inputs():
    """x' = a x + u from 0 under u = 1 is (e^{a t} - 1) / a."""
    a = torch.tensor([-0.3 + 2j, -1e-4 + 0j], dtype=torch.complex128)
    keep, take = zero_order_hold(a, torch.tensor(0.1, dtype=torch.float64))
    x = torch.zeros(2, dtype=torch.complex128)
    for _ in range(50):
        x = keep * x + take
    assert torch.allclose(x, ((a * 5).exp() - 1) / a, rtol=1e-12)


def test_hippo_keeps_the_past_as_warped_legendre_polynomials():
    """The kernel of state n is sqrt(2 n + 1) e^{-t} P_n(2 e^{-t} - 1)."""
    matrix, entry = hippo_legs(3)
    for t in (0.0, 0.4, 2.0):
        kernel = torch.linalg.matrix_exp(matrix * t) @ entry
        z = 2 * math.exp(-t) - 1
        signs = torch.tensor([1.0, z, (3 * z * z - 1) / 2], dtype=torch.float64)
        expected = entry * math.exp(-t) * signs
        assert torch.allclose(kernel, expected)


def test_initial_spectra():
    for init in INITS:
        values = LAYERS[init]().eigenvalues()[0].detach()
        assert len(values) == (16 if init == "ptd" else 8)
        assert values.real.max() < 0
    lin, inv, real = (LAYERS[init]().eigenvalues()[0].detach() for init in ("lin", "inv", "real"))
    assert float(lin.imag[3]) == pytest.approx(3 * math.pi, rel=1e-6)
    assert float(inv.imag[0]) == pytest.approx(16 / math.pi * 15, rel=1e-6)
    assert real.real.tolist() == pytest.approx([-n - 1 for n in range(8)], rel=1e-6)
    matrix, entry = hippo_legs(16)
    expected = torch.linalg.eigvals(matrix + 0.5 * torch.outer(entry, entry)).imag
    assert torch.allclose(normal_legs(16).eigenvalues.imag.sort().values, expected.sort().values, atol=1e-9)


def test_a_perturbation_makes_the_eigenvectors_usable():
    matrix, entry = hippo_legs(16)
    assert diagonalise(matrix, entry).condition > 1e8
    modes = perturb_then_diagonalise(matrix, entry, 0.1, generator(0))
    assert modes.condition < 1e4
    rebuilt = modes.vectors @ (modes.eigenvalues[:, None] * torch.linalg.inv(modes.vectors))
    assert float(torch.linalg.matrix_norm(rebuilt - matrix, ord=2)) == pytest.approx(0.1, rel=1e-6)


def test_large_perturbations_stay_stable():
    matrix, entry = hippo_legs(64)
    size = 1e-2 * float(torch.linalg.matrix_norm(matrix, ord=2))
    assert perturb_then_diagonalise(matrix, entry, size, generator(0)).eigenvalues.real.max() <= -1e-3
    with pytest.raises(ValueError, match="size must be positive"):
        perturb_then_diagonalise(matrix, entry, 0.0, generator(0))


def test_perturbing_is_nearer_than_leaving_out_the_low_rank_part():
    matrix, entry = hippo_legs(64)
    readout = torch.randn(64, generator=generator(0), dtype=torch.float64)
    w = torch.logspace(-2, 3, 400, dtype=torch.float64)
    truth = transfer_function(matrix, entry, readout, w)
    size = truth.abs().max()
    error = {}
    for name, modes in (
        ("ptd", perturb_then_diagonalise(matrix, entry, 0.1, generator(0))),
        ("legs", normal_legs(64)),
    ):
        said = transfer_function(modes.eigenvalues, modes.entry, readout.to(modes.vectors) @ modes.vectors, w)
        error[name] = float((said - truth).abs().max() / size)
    assert error["ptd"] < 0.1
    assert error["legs"] > 5 * error["ptd"]


def autoregression(coefficients, steps):
    series = list(torch.randn(len(coefficients), generator=generator(0), dtype=torch.float64))
    for _ in range(steps):
        series.append(sum(c * series[-1 - lag] for lag, c in enumerate(coefficients)))
    return torch.stack(series)


def test_a_companion_layer_is_an_autoregression_and_runs_on_in_a_closed_loop():
    phi = torch.tensor([1.6, -1.1, 0.5, -0.3], dtype=torch.float64)
    series = autoregression(phi.tolist(), 60)
    layer = CompanionStateSpace(1, 4).double()
    with torch.no_grad():
        layer.entry[0, 0] = 1.0
        layer.readout[0] = phi
        said = layer(series[None, :, None])[0, :, 0]
        assert torch.allclose(said[3:-1], series[4:], atol=1e-12)
        state = torch.zeros(1, 4, dtype=torch.float64)
        for value in series[:30]:
            _, state = layer.step(value.view(1, 1), state)
        inputs, outputs = layer.free_run(state, phi[None], 30)
    assert torch.allclose(inputs[0, :, 0], series[30:60], atol=1e-12)
    assert torch.allclose(outputs[0, :, 0], series[31:61], atol=1e-12)


def test_companion_layers_are_stable():
    layer = CompanionStateSpace(20, 6)
    with torch.no_grad():
        layer.column.copy_(5 * torch.randn(20, 6, generator=generator(0)))
        radius = torch.linalg.eigvals(layer.matrix().double()).abs().max()
    assert float(radius) <= 1 + 1e-6


def test_bad_arguments():
    with pytest.raises(ValueError, match="init must be one of"):
        DiagonalStateSpace(2, init="hippo")
    with pytest.raises(ValueError, match="order must be even"):
        DiagonalStateSpace(2, order=5)
    with pytest.raises(ValueError, match="order must be at least 1"):
        CompanionStateSpace(2, order=0)
