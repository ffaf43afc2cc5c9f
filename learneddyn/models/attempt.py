"""What every fit begins with, and how it ends where it fails: the model is left as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

from learneddyn.core import DataError, Transitions
from learneddyn.models.base import AbstractModel


def require_pair(data: Transitions) -> None:
    """Check that there is something to learn from and something to hold out.

    Raises:
        DataError: fewer than two rows, or NaN or infinite ones.
    """
    data.check()
    if len(data) < 2:
        raise DataError(f"fit needs at least 2 transitions (one to learn from, one to hold out), got {len(data)}")


@contextmanager
def attempt(model: AbstractModel, data: Transitions) -> Iterator[None]:
    """Build the model for the data, see `AbstractModel.check_spaces`, and put all of it back where the block fails.

    A missing extra or Ctrl-C must not leave half a model either. Gradients are gone afterwards in any case.

    Raises:
        ValueError: the data has other spaces than the model.
    """
    fresh, source = model.spaces is None, model.source
    model.check_spaces(data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    except BaseException:
        model.load_state_dict(before)
        model.spaces, model.source = None if fresh else model.spaces, source
        raise
    finally:
        model.zero_grad(set_to_none=True)
