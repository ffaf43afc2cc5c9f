import os
import subprocess
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from gymnasium import spaces

from learneddyn.core import DataError, Transitions
from learneddyn.spaces import Spaces

BOX = Spaces(spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,)))


def rows(n=4, **changes):
    columns = {
        "obs": np.arange(2 * n).reshape(n, 2) / 10,
        "action": np.zeros((n, 1)),
        "reward": np.ones(n),
        "next_obs": np.arange(2 * n).reshape(n, 2) / 10 + 1,
        "terminated": np.zeros(n, bool),
        "episode": np.arange(n) // 2,
    }
    return Transitions.from_numpy(**({"spaces": BOX} | columns | changes))


@pytest.fixture
def no_shape_checks():
    """A user runs without the shape checks of the test suite, and must still get our own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_columns_must_agree_in_rows(no_shape_checks):
    with pytest.raises(DataError, match=r"same number of rows.*'reward': 3"):
        rows(reward=np.ones(3))


def test_columns_must_fit_the_space():
    with pytest.raises(DataError, match=r"obs has 3 columns, but its space .* has 2"):
        rows(obs=np.zeros((4, 3)), next_obs=np.zeros((4, 3)))


@pytest.mark.parametrize("column", ["obs", "action", "reward", "next_obs"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_check_names_the_first_bad_row(column, bad):
    data = rows()
    getattr(data, column)[2] = bad
    with pytest.raises(DataError, match=f"1 of 4 rows hold NaN or infinity in '{column}', the first is row 2"):
        data.check()


def test_check_refuses_no_rows():
    with pytest.raises(DataError, match="no transitions"):
        rows()[:0].check()


def test_cat_keeps_episodes_apart_and_order():
    joined = Transitions.cat([rows(), rows(2), rows()])
    assert joined.episode.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert torch.equal(joined.obs[4:6], rows(2).obs)


def test_cat_refuses_different_spaces():
    other = Spaces(spaces.Box(-2, 2, (2,)), BOX.action)
    with pytest.raises(DataError, match="different spaces"):
        Transitions.cat([rows(), rows(spaces=other)])


def test_a_mask_selects_rows_in_every_column():
    part = rows()[torch.tensor([False, True, True, False])]
    assert len(part) == 2
    assert part.episode.tolist() == [0, 1]
    assert part.spaces == BOX


def child_cpu_seconds(code):
    """Run code in a fresh interpreter; CPU time, since other work on the machine stretches the clock on the wall."""
    before = os.times()
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, told.strip()


def test_importing_the_package_loads_no_torch_and_is_quick():
    code = "import sys, learneddyn; print('torch' in sys.modules)"
    child_cpu_seconds(code)  # compile and warm the disk cache
    seconds = []
    for _ in range(3):
        bare, _ = child_cpu_seconds("pass")
        spent, has_torch = child_cpu_seconds(code)
        assert has_torch == "False"
        seconds.append(spent - bare)
    assert min(seconds) < 0.5


def test_positions_count_from_each_episodes_first_row():
    n = 6
    rows, none = torch.zeros(n, 1), torch.zeros(n)
    episode = torch.tensor([3, 3, 3, 0, 7, 7])
    data = Transitions(rows, rows, none, rows, none.bool(), episode)
    assert data.positions().tolist() == [0, 1, 2, 0, 0, 1]
