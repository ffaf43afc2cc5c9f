"""Forgetting and transfer on matrices made by hand."""

import numpy as np
import pytest

from learneddyn.evaluation.forgetting import transfer

NAN = float("nan")
RETURNS = [[10.0, 1.0, 2.0], [8.0, 20.0, 3.0], [4.0, 25.0, 30.0]]


def test_by_hand():
    found = transfer(RETURNS, untrained=[0.0, 0.5, 1.0], alone=[9.0, 16.0, 33.0])
    assert found.final == pytest.approx((4 + 25 + 30) / 3)
    assert found.learned == pytest.approx((10 + 20 + 30) / 3)
    assert found.backward == pytest.approx(((4 - 10) + (25 - 20)) / 2)
    assert found.forgetting == pytest.approx((10 - 4, 20 - 25))
    assert found.retention == pytest.approx((0.4, 1.25, 1.0))
    assert found.zero_shot == pytest.approx(((1.0 - 0.5) + (3.0 - 1.0)) / 2)
    assert found.forward == pytest.approx(((20 - 16) + (30 - 33)) / 2)


def test_the_best_need_not_be_the_first():
    """Forgetting counts from the best before the end; backward transfer from right after learning."""
    found = transfer([[5.0, NAN, NAN], [9.0, 1.0, NAN], [6.0, 1.0, 1.0]])
    assert found.forgetting[0] == pytest.approx(3.0)
    assert found.backward == pytest.approx(0.5)
    assert (found.zero_shot, found.forward) == (None, None)


def test_errors_are_returns_upside_down():
    table = np.array(RETURNS)
    returns = transfer(table, untrained=[0.0, 0.5, 1.0], alone=[9.0, 16.0, 33.0])
    errors = transfer(-table, lower_is_better=True, untrained=[0.0, -0.5, -1.0], alone=[-9.0, -16.0, -33.0])
    for name in ("backward", "forgetting", "zero_shot", "forward"):
        assert getattr(errors, name) == pytest.approx(getattr(returns, name))
    assert errors.final == -returns.final
    assert transfer([[1.0, NAN], [4.0, 1.0]], lower_is_better=True).retention == pytest.approx((0.25, 1.0))


def test_nothing_forgotten():
    found = transfer(np.tile([3.0, 7.0, 5.0], (3, 1)))
    assert found.backward == 0
    assert found.forgetting == (0.0, 0.0)
    assert found.retention == (1.0, 1.0, 1.0)
    assert found.final == found.learned == 5.0


def test_no_share_is_kept_of_what_is_not_positive():
    """A return that falls from -100 to -200 has not been retained twofold, and one of 0 not infinitely well."""
    found = transfer([[-100.0, NAN, NAN], [0.0, 0.0, NAN], [-200.0, 5.0, 10.0]])
    assert found.retention == (None, None, 1.0)
    assert found.forgetting == (200.0, -5.0)
    assert found.backward == pytest.approx((-100 + 5) / 2)
    assert transfer([[10.0, NAN], [-5.0, 1.0]]).retention == (-0.5, 1.0), "lost, and half as much again"
    assert transfer([[0.5, NAN], [0.0, 1.0]], lower_is_better=True).retention == (None, 1.0)


def test_one_task_has_no_transfer():
    assert transfer([[2.0]], untrained=[1.0], alone=[1.0]) == (2.0, 2.0, 0.0, (), (1.0,), 0.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([[1.0, 2.0]], {}, r"square matrix, a row per task learned, got shape \(1, 2\)"),
        ([], {}, "square matrix"),
        ([[1.0, NAN], [NAN, 1.0]], {}, "the score on task 0 after task 1 is nan"),
        ([[1.0, NAN], [1.0, 1.0]], {"untrained": [0.0, 0.0]}, "the score on task 1 after task 0 is nan"),
        ([[1.0, NAN], [1.0, 1.0]], {"alone": [0.0]}, "a baseline must hold 2 finite scores"),
    ],
)
def test_bad_tables_are_named(scores, options, message):
    with pytest.raises(ValueError, match=message):
        transfer(scores, **options)
