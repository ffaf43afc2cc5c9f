import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from learneddyn.spaces import Spaces, decode, encode, flat_dim

SPACES = [
    spaces.Box(-1, 1, (3,), np.float64),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(5),
    spaces.Tuple((spaces.Discrete(2), spaces.Box(-5, 5, (2,), np.float32))),
    spaces.Dict({"goal": spaces.Box(-1, 1, (2,), np.float32), "mode": spaces.Discrete(3)}),
]


def stacked(space, items):
    match space:
        case spaces.Dict():
            return {key: stacked(part, [item[key] for item in items]) for key, part in space.spaces.items()}
        case spaces.Tuple():
            return tuple(stacked(part, [item[i] for item in items]) for i, part in enumerate(space.spaces))
    return np.stack(items)


@pytest.mark.parametrize("space", SPACES, ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9))
def test_decode_inverts_encode(space, seed, rows):
    space.seed(seed)
    batch = stacked(space, [space.sample() for _ in range(rows)])
    flat = encode(space, batch)
    assert flat.shape == (rows, flat_dim(space))
    assert flat.dtype == np.float32
    np.testing.assert_equal(encode(space, decode(space, flat)), flat)
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        np.testing.assert_allclose(decode(space, flat), batch, rtol=1e-6, atol=1e-7)
        assert all(item in space for item in decode(space, flat))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_round_trip_through_json(space):
    both = Spaces(space, space)
    assert Spaces.from_json(both.to_json()) == both


def test_a_space_without_columns_is_refused():
    with pytest.raises(TypeError, match="cannot be written as float columns"):
        flat_dim(spaces.Text(5))


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"must have shape .* got \(4, 2\)"):
        encode(spaces.Box(-1, 1, (3,)), np.zeros((4, 2)))


def test_an_index_outside_a_discrete_space_is_named():
    with pytest.raises(ValueError, match="got the entry 7"):
        encode(spaces.Discrete(3), np.array([0, 7]))


def test_equal_dicts_have_the_same_columns():
    """Gymnasium sorts the keys of a plain dict only, and a space read back from JSON is made from one."""
    named = spaces.Dict(mode=spaces.Discrete(3), goal=spaces.Box(-1, 1, (2,), np.float32))
    read = Spaces.from_json(Spaces(named, named).to_json()).observation
    assert read == named
    batch = {"mode": np.array([2, 0]), "goal": np.array([[0.5, 0.25], [1, -1]], np.float32)}
    np.testing.assert_array_equal(encode(read, batch), encode(named, batch))
    np.testing.assert_equal(decode(read, encode(named, batch)), batch)
