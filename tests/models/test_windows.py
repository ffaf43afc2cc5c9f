"""Windows stay within unbroken stretches: across episodes and dropped rows nothing is joined."""

import pytest
import torch

from learneddyn.models.windows import elapsed, linked, longest_window, remaining, window_starts, windows
from learneddyn.testing import example_transitions


@pytest.fixture
def broken():
    """Two episodes of 12 rows; row 4 of the first is lost."""
    data = example_transitions(24)
    assert data.episode.unique_consecutive(return_counts=True)[1].tolist() == [12, 12]
    return data[torch.arange(24) != 4]


def test_stretches_end_where_rows_are_lost_and_episodes_change(broken):
    assert remaining(broken).tolist() == [*range(4, 0, -1), *range(7, 0, -1), *range(12, 0, -1)]
    assert elapsed(broken).tolist() == [*range(4), *range(7), *range(12)]
    assert (~linked(broken)).nonzero().flatten().tolist() == [0, 4, 11]
    assert longest_window(broken, 100) == 12
    assert longest_window(broken, 5) == 5


def test_windows_follow_the_log(broken):
    starts = window_starts(broken, 6)
    assert starts.tolist() == [4, 5, *range(11, 18)]
    parts = [windows(part, starts, 6) for part in (broken.obs, broken.next_obs)]
    assert torch.equal(parts[0][:, 1:], parts[1][:, :-1])


def test_no_rows_have_no_windows(broken):
    assert all(len(found) == 0 for found in (linked(broken[:0]), remaining(broken[:0]), elapsed(broken[:0])))
    assert len(window_starts(broken[:0], 1)) == 0
