"""Runge-Kutta: orders of convergence, closed forms, and what the embedded step says of itself."""

import pytest
import torch

from learneddyn.core import generator
from learneddyn.integrate import STABILITY, embedded_step, rk4


def test_the_classical_method_is_its_taylor_polynomial_and_of_order_four():
    start = torch.ones(1, 1, dtype=torch.float64)
    assert float(rk4(lambda x: -x, start, 0.5)) == pytest.approx(1 - 0.5 + 0.5**2 / 2 - 0.5**3 / 6 + 0.5**4 / 24)
    exact = torch.tensor(1.0, dtype=torch.float64).neg().exp()
    errors = [abs(float(rk4(lambda x: -x, start, 1.0, n) - exact)) for n in (4, 8)]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.15)


def test_the_embedded_steps_error_is_the_difference_of_its_two_solutions():
    """On x' = -x the orders 5 and 4 are polynomials in h; their difference is -h^5 / 120 ... in closed form."""
    h, start = 0.3, torch.ones(1, 1, dtype=torch.float64)
    step = embedded_step(lambda x: -x, start, h)
    taylor = sum((-h) ** k / f for k, f in enumerate((1, 1, 2, 6, 24, 120)))
    assert float(step.after) == pytest.approx(taylor + h**6 / 600, abs=1e-14)
    lower = sum((-h) ** k / f for k, f in enumerate((1, 1, 2, 6, 24))) - 1097 / 120000 * h**5 + 161 / 120000 * h**6
    assert float(step.error) == pytest.approx(float(step.after) - lower + h**7 / 24000, abs=1e-12)
    small = embedded_step(lambda x: -x, start, h / 2)
    assert float(step.error / small.error) == pytest.approx(32, rel=0.2)


def test_stiffness_is_the_rate_of_a_linear_flow():
    matrix = torch.diag(torch.tensor([-7.0, -7.0], dtype=torch.float64))
    start = torch.randn(5, 2, dtype=torch.float64, generator=generator(0))
    assert torch.allclose(embedded_step(lambda x: x @ matrix, start, 0.1).stiffness, torch.tensor(7.0).double())


def test_a_constant_slope_has_no_error_and_no_stiffness_and_their_gradients_are_finite():
    drift = torch.tensor([0.3, -2.0], requires_grad=True)
    step = embedded_step(lambda x: drift.expand_as(x), torch.zeros(4, 2), 0.5)
    assert step.error.abs().max() < 1e-6
    assert step.stiffness.max() == 0
    (gradient,) = torch.autograd.grad(step.stiffness.sum() + step.error.sum(), drift)
    assert gradient.isfinite().all()


def test_the_stability_length_is_where_a_real_mode_begins_to_grow():
    start = torch.ones(1, 1, dtype=torch.float64)
    sizes = [abs(float(embedded_step(lambda x: -x, start, STABILITY + d).after)) for d in (-1e-3, 1e-3)]
    assert sizes[0] < 1 < sizes[1]
