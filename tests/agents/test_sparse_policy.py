"""A sparse policy is its formula: known polynomials come back, files hold it, SB3's surface serves it."""

import re

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.agents import SparsePolicy, distil
from learneddyn.core import DataError, generator
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy

LOW, HIGH = np.array([-2.0, -1.0], np.float32), np.array([2.0, 3.0], np.float32)
SPACES = Spaces(gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(LOW, HIGH))


def states(rows=600, seed=0):
    return 2 * torch.rand(rows, 3, generator=generator(seed)) - 1


def polynomial(obs):
    """Return two actions in shares of half their range around its middle."""
    x, angle, z = obs.T
    return torch.stack([0.5 * x - 0.3 * x * z**2, 0.4 * angle.sin() - 0.2 * angle.cos() * z], 1)


def squashed(obs, squash):
    share = polynomial(obs).tanh() if squash == "tanh" else polynomial(obs).clamp(-1, 1)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    return (low + high) / 2 + share * (high - low) / 2


def student(**given):
    return SparsePolicy(
        **{"angles": [1], "thresholds": [1e-2], "ridges": [1e-6], "dropped": 0, "bootstraps": 5} | given
    )


def learned(squash="tanh", **given):
    def teacher(obs):
        return squashed(obs, squash)

    return distil(teacher, states(), SPACES, rng=generator(1), student=student(squash=squash, **given))


def test_a_squashed_polynomial_is_found_exactly():
    policy = learned()
    names = policy._library.names()
    found = [{names[i] for i in column.nonzero().flatten().tolist()} for column in policy.coefficients.T]
    assert found == [{"x0", "x0 x2 x2"}, {"sin(x1)", "x2 cos(x1)"}]
    torch.testing.assert_close(policy.act(states(seed=5)), squashed(states(seed=5), "tanh"), atol=1e-4, rtol=0)


def test_a_clipped_polynomial_is_found_where_it_is_inside_the_bounds():
    def teacher(obs):
        return squashed(obs, "clip")

    small = 0.5 * torch.rand(600, 3, generator=generator(0))
    policy = distil(teacher, small, SPACES, rng=generator(1), student=student(squash="clip"), copies=1, noise=0.01)
    torch.testing.assert_close(policy.act(small), teacher(small), atol=1e-4, rtol=0)
    assert (policy.act(100 * states()) <= policy.high).all()
    assert (policy.act(100 * states()) >= policy.low).all()


@pytest.mark.parametrize("squash", ["clip", "tanh"])
def test_the_formula_is_the_policy(squash):
    policy, obs = learned(squash), states(20, seed=7)
    a, b, c = obs.double().numpy().T
    for index, line in enumerate(policy.formula(["a", "b", "c"], digits=9)):
        left, right = line.split(" = ")
        assert left == f"u{index}"
        text = re.sub(r"(?<=[\w)]) (?=[a-z(])", "*", right)
        names = {"a": a, "b": b, "c": c, "cos": np.cos, "sin": np.sin, "tanh": np.tanh, "clip": np.clip}
        np.testing.assert_allclose(eval(text, names), policy.act(obs)[:, index], atol=1e-5)


def test_files_and_sb3s_surface(tmp_path):
    policy = learned()
    check_policy(policy, SPACES)
    policy.save(tmp_path / "policy")
    again = SparsePolicy.load(tmp_path / "policy")
    assert torch.equal(again.act(states()), policy.act(states()))
    assert again.formula() == policy.formula()
    action, state = policy.predict(states(1)[0].numpy())
    assert action.shape == (2,)
    assert state is None


def test_a_tolerance_buys_a_shorter_formula():
    def teacher(obs):
        return squashed(obs, "clip") + 0.1 * (8 * obs[:, :1]).sin()

    def made(tolerance):
        given = {"thresholds": [0.0, 0.08], "tolerance": tolerance}
        return distil(teacher, states(), SPACES, rng=generator(1), student=student(**given))

    exact, short = made(0.0), made(0.3)
    assert (short.coefficients != 0).sum() < (exact.coefficients != 0).sum()
    assert (short.act(states(seed=3)) - teacher(states(seed=3))).abs().mean() < 0.1


def test_bad_arguments():
    with pytest.raises(ValueError, match="squash must be 'clip' or 'tanh', got 'relu'"):
        SparsePolicy(squash="relu")
    with pytest.raises(ValueError, match=r"thresholds must be numbers of at least 0, one or more, got \[\]"):
        SparsePolicy(thresholds=[])
    with pytest.raises(ValueError, match="aggregate must be"):
        SparsePolicy(aggregate="mode")
    with pytest.raises(ValueError, match="has not been fitted"):
        SparsePolicy().predict(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="has not been fitted"):
        SparsePolicy().formula()
    with pytest.raises(ValueError, match="Box with finite bounds, got Discrete"):
        distil(lambda obs: obs[:, :2], states(), Spaces(SPACES.observation, gym.spaces.Discrete(2)), rng=generator(0))
    with pytest.raises(ValueError, match="copies and noise must be at least 0, got -1"):
        distil(lambda obs: obs, states(), SPACES, rng=generator(0), copies=-1)
    with pytest.raises(DataError, match="at least 2 rows"):
        distil(lambda obs: obs[:, :2], states(1), SPACES, rng=generator(0), copies=0, student=student())
