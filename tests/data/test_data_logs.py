import bz2
import gzip
import sys
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError
from learneddyn.data import decimate, from_arrays, from_csv, from_parquet
from learneddyn.spaces import Spaces

OBS = np.arange(12, dtype=float).reshape(6, 2)
ACTION = np.array([0.5, -1.0, 0.25, 2.0, 0.0, 1.0])
REWARD = np.arange(6.0)
EPISODE = np.array([7, 7, 7, 2, 2, 2])


def test_next_obs_is_read_from_the_following_row_of_the_same_episode():
    data = from_arrays(OBS, ACTION, REWARD, episode=EPISODE)
    assert data.obs.tolist() == OBS[[0, 1, 3, 4]].tolist()
    assert data.next_obs.tolist() == OBS[[1, 2, 4, 5]].tolist()
    assert data.action.flatten().tolist() == ACTION[[0, 1, 3, 4]].tolist()
    assert data.reward.tolist() == [0.0, 1.0, 3.0, 4.0]
    assert data.episode.tolist() == [0, 0, 1, 1]
    assert not data.terminated.any()


def test_rows_of_episodes_may_be_mixed():
    mixed = np.array([0, 3, 1, 4, 5, 2])
    data = from_arrays(OBS[mixed], ACTION[mixed], REWARD[mixed], episode=EPISODE[mixed])
    whole = from_arrays(OBS, ACTION, REWARD, episode=EPISODE)
    for name, column in whole.tensors().items():
        assert torch.equal(data.tensors()[name], column), name


def test_given_next_obs_makes_every_row_a_transition():
    after = OBS + 100
    flags = [False, False, True, False, False, True]
    data = from_arrays(OBS, ACTION, REWARD, flags, next_obs=after)
    assert data.next_obs.tolist() == after.tolist()
    assert data.terminated.tolist() == flags
    assert data.episode.tolist() == [0, 0, 0, 1, 1, 1]


def test_truncated_tells_episodes_apart_but_terminates_nothing():
    data = from_arrays(OBS, ACTION, truncated=[0, 0, 1, 0, 0, 0])
    assert data.episode.tolist() == [0, 0, 1, 1]
    assert not data.terminated.any()
    assert (data.reward == 0).all()


def test_a_termination_on_the_last_row_is_never_lost_in_silence():
    flags = [0, 0, 1, 0, 0, 0]
    with pytest.raises(DataError, match=r"1 episodes end with a terminated row.*row 2.*last_row='state'"):
        from_arrays(OBS, ACTION, REWARD, flags, EPISODE)
    assert not from_arrays(OBS, ACTION, REWARD, flags, EPISODE, last_row="drop").terminated.any()
    data = from_arrays(OBS, ACTION, REWARD, flags, EPISODE, last_row="state")
    assert data.terminated.tolist() == [False, True, False, False]


def test_final_observation_rows_may_have_empty_action_reward_and_flag():
    gaps = np.array([2, 5])
    action, reward, flags = ACTION.copy(), REWARD.copy(), np.array([0.0, 1.0, 0, 0, 0, 0])
    action[gaps], reward[gaps], flags[gaps] = np.nan, np.nan, np.nan
    data = from_arrays(OBS, action, reward, flags, EPISODE, last_row="state")
    assert data.terminated.tolist() == [False, True, False, False]


def test_lists_of_episodes_hold_one_observation_more_than_actions():
    obs = [OBS[:3], OBS[3:]]
    data = from_arrays(obs, [ACTION[:2], ACTION[3:5]], [REWARD[:2], REWARD[3:5]], [True, False])
    assert data.terminated.tolist() == [False, True, False, False]
    assert data.next_obs.tolist() == OBS[[1, 2, 4, 5]].tolist()
    assert data.reward.tolist() == [0.0, 1.0, 3.0, 4.0]
    per_step = from_arrays(obs, [ACTION[:2], ACTION[3:5]], terminated=[[False, True], [False, False]])
    assert torch.equal(per_step.terminated, data.terminated)
    with pytest.raises(DataError, match="episode 1 has 3 observations, so its action must have 2 rows"):
        from_arrays(obs, [ACTION[:2], ACTION[3:4]])
    with pytest.raises(DataError, match="reward has 1 episodes, obs has 2"):
        from_arrays(obs, [ACTION[:2], ACTION[3:5]], [REWARD[:2]])


def test_inferred_spaces():
    data = from_arrays(OBS, ACTION, episode=EPISODE)
    assert data.spaces == Spaces(gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-1.0, 2.0, (1,)))
    data = from_arrays(OBS, [1, 3, 2, 1, 3, 1], episode=EPISODE, discrete=True)
    assert data.spaces.action == gym.spaces.Discrete(3, start=1)
    assert data.action.argmax(1).tolist() == [0, 2, 0, 2]
    data = from_arrays(OBS, [1, 3, 2, 1, 3, 1], episode=EPISODE, discrete=5)
    assert data.spaces.action == gym.spaces.Discrete(5)
    given = Spaces(gym.spaces.Box(-50, 50, (2,)), gym.spaces.Box(-9, 9, (1,)))
    assert from_arrays(OBS, ACTION, episode=EPISODE, spaces=given).spaces == given
    with pytest.raises(DataError, match="one column of integers"):
        from_arrays(OBS, ACTION, episode=EPISODE, discrete=True)
    with pytest.raises(DataError, match="actions run from 1 to 3, discrete=3 allows 0 to 2"):
        from_arrays(OBS, [1, 3, 2, 1, 3, 1], episode=EPISODE, discrete=3)


def test_bad_rows_are_refused_by_row_and_column():
    obs = OBS.copy()
    obs[4, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 4 rows hold NaN or infinity in 'obs', the first is row 4"):
        from_arrays(obs, ACTION, episode=EPISODE)
    with pytest.raises(DataError, match=r"same number of rows.*'action': 5"):
        from_arrays(OBS, ACTION[:5])
    with pytest.raises(DataError, match=r"'terminated' must be 0 or 1.*got 2.0 in row 3"):
        from_arrays(OBS, ACTION, terminated=[0, 0, 0, 2, 0, 0])


def test_one_row_episodes_are_counted_and_an_empty_log_is_an_error():
    with pytest.warns(UserWarning, match="2 episodes of one row yield no transition"):
        data = from_arrays(OBS, ACTION, episode=[0, 1, 1, 1, 1, 2])
    assert len(data) == 3
    assert data.episode.tolist() == [0, 0, 0]
    with pytest.warns(UserWarning, match="one row"), pytest.raises(DataError, match="6 rows hold no transition"):
        from_arrays(OBS, ACTION, episode=np.arange(6))
    with pytest.raises(DataError, match="0 rows hold no transition"):
        from_arrays(np.zeros((0, 2)), np.zeros((0, 1)))


CSV = """time,x,"speed, m/s",force,cost,end,run
0.0,0,1,0.5,0,false,a
0.1,2,3,-1.0,1,false,a
0.2,4,5,,,true,a
0.0,6,7,2.0,3,false,b
0.1,8,9,0.0,4,false,b
0.2,10,11,,,false,b
"""
NAMED = {"obs": ["x", "speed, m/s"], "action": ["force"], "reward": "cost", "terminated": "end", "episode": "run"}


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".bz2", bz2.open)])
def test_csv_with_words_and_empty_cells(tmp_path, suffix, opener):
    path = tmp_path / f"log.csv{suffix}"
    with opener(path, "wt") as file:
        file.write(CSV)
    data = from_csv(path, **NAMED, last_row="state")
    want = from_arrays(OBS, ACTION, REWARD, [0, 0, 1, 0, 0, 0], EPISODE, last_row="state")
    for name, column in want.tensors().items():
        assert torch.equal(data.tensors()[name], column), name
    assert data.source == str(path)


def test_numeric_csv_and_parquet_give_the_same_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = {"x": OBS[:, 0], "v": OBS[:, 1], "u": ACTION, "r": REWARD, "id": EPISODE}
    lines = [",".join(table), *(",".join(f"{v:g}" for v in row) for row in zip(*table.values(), strict=True))]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    parquet.write_table(pa.table(table), tmp_path / "log.parquet")
    named = {"obs": ["x", "v"], "action": "u", "reward": "r", "episode": "id"}
    want = from_arrays(OBS, ACTION, REWARD, episode=EPISODE)
    for data in (from_csv(tmp_path / "log.csv", **named), from_parquet(tmp_path / "log.parquet", **named)):
        assert data.spaces == want.spaces
        for name, column in want.tensors().items():
            assert torch.equal(data.tensors()[name], column), name


def test_missing_columns_list_the_present_ones(tmp_path):
    (tmp_path / "log.csv").write_text(CSV)
    with pytest.raises(DataError, match=r"no column 'velocity'; it has 'time', 'x', 'speed, m/s', 'force'"):
        from_csv(tmp_path / "log.csv", obs=["x", "velocity"], action=["force"])
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": [1.0, 2.0]}), tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"no column 'u'; it has 'x'"):
        from_parquet(tmp_path / "log.parquet", obs=["x"], action=["u"])


def test_csv_cells_that_are_no_numbers(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("x,u\n1,2\n3,fast\n5,6\n")
    with pytest.raises(DataError, match="column 'u' holds 'fast' in row 1, which is no number"):
        from_csv(path, obs=["x"], action=["u"])
    path.write_text("x,u\n1,2\n,3\n5,6\n")
    with pytest.raises(DataError, match=r"NaN or infinity in 'obs', the first is row 1 \(column 'x'\)"):
        from_csv(path, obs=["x"], action=["u"])
    path.write_text("x,u\n1,2\n3\n")
    with pytest.raises(DataError, match="is not a table"):
        from_csv(path, obs=["x"], action=["u"])
    path.write_text("x,u\n")
    with pytest.raises(DataError, match="0 rows hold no transition"):
        from_csv(path, obs=["x"], action=["u"])


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install learneddyn\[parquet\]"):
        from_parquet(tmp_path / "log.parquet", obs=["x"], action=["u"])


def fast_log(tmp_path, rows=9, at=lambda row: 0.01 * row):
    """Write x = row and u = 10 row; return how to read it."""
    lines = [f"{at(row)!r},{row},{10 * row}" for row in range(rows)]
    (tmp_path / "fast.csv").write_text("\n".join(["t,x,u", *lines]))
    return partial(from_csv, tmp_path / "fast.csv", obs=["x"], action=["u"], time="t")


def test_uneven_time_steps_are_refused_or_split(tmp_path):
    assert len(fast_log(tmp_path)()) == 8
    assert len(fast_log(tmp_path, at=lambda row: 0.01 * row + 0.0004 * (row == 4))()) == 8, "jitter below 5 %"
    late = fast_log(tmp_path, at=lambda row: 0.01 * row + 0.02 * (row >= 4))
    with pytest.raises(DataError, match=r"1 of 8 time steps differ .* the median, 0\.01, .* row 3 to 4 \(0\.03\)"):
        late()
    split = late(gaps="split")
    assert split.obs[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert split.episode.tolist() == [0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(DataError, match="8 of 8 time steps"):
        fast_log(tmp_path, at=lambda row: float("nan"))()
    with pytest.raises(DataError, match=r"the median, -0\.01"):
        fast_log(tmp_path, at=lambda row: -0.01 * row)()


def test_episodes_do_not_go_on_in_the_next_file(tmp_path):
    read = fast_log(tmp_path)
    path = tmp_path / "fast.csv"
    both = from_csv([path, path], **read.keywords)
    assert both.episode.tolist() == [0] * 8 + [1] * 8
    assert torch.equal(both.obs[:8], both.obs[8:])
    assert both.source == f"{path}, {path}"
    (tmp_path / "log.csv").write_text(CSV)
    named = from_csv([tmp_path / "log.csv"] * 2, **NAMED, last_row="state")
    assert named.episode.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    with pytest.raises(DataError, match=r"at least one file, got \[\]"):
        from_csv([], obs=["x"])


def test_a_log_of_a_system_that_nobody_acts_on(tmp_path):
    data = from_csv(fast_log(tmp_path).args[0], obs=["x", "u"])
    assert data.action.shape == (8, 0)
    assert data.spaces.action_dim == 0
    assert len(data.check()) == 8
    assert bool(data.labelled().all())


def test_decimated_steps_last_longer_and_keep_terminations(tmp_path):
    data = fast_log(tmp_path)()
    slow = decimate(data, 3)
    assert slow.obs[:, 0].tolist() == [0, 3]
    assert slow.next_obs[:, 0].tolist() == [3, 6]
    assert slow.action[:, 0].tolist() == [10, 40]
    ended = replace(data, terminated=torch.arange(8) == 7, reward=torch.ones(8))
    slow = decimate(ended, 3)
    assert slow.obs[:, 0].tolist() == [2, 5]
    assert slow.next_obs[:, 0].tolist() == [5, 8]
    assert slow.terminated.tolist() == [False, True]
    assert slow.reward.tolist() == [3, 3]
    torn = data[torch.tensor([0, 1, 2, 4, 5, 6, 7])]
    assert decimate(torn, 2).obs[:, 0].tolist() == [0, 4, 6]
    assert torch.equal(decimate(data, 1).action, data.action)
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        decimate(data, 0)
    with pytest.raises(DataError, match="no unbroken stretch of the log holds 9 rows"):
        decimate(data, 9)
    with pytest.raises(ValueError, match=r"mean of their actions, and Discrete\(3"):
        decimate(from_arrays(OBS, [1, 3, 2, 1, 3, 1], episode=EPISODE, discrete=True), 2)
    data = from_arrays(OBS, [1, 3, 2, 1, 3, 1], episode=EPISODE, discrete=True)
    assert decimate(data, 1) is data, "a step of one row needs no mean"
