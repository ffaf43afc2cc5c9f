"""Logs of states alone: written, read, told apart, and refused where actions are needed."""

from dataclasses import replace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from learneddyn import data
from learneddyn.core import DataError, Transitions
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions

DICT = gym.spaces.Dict(where=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64), on=gym.spaces.Discrete(2))
PULL = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


@pytest.fixture
def log() -> Transitions:
    return example_transitions(60)


def buffer(rows: int, actions, start: float = 0.0) -> EpisodeBuffer:
    where = start + np.arange(2.0 * (rows + 1)).reshape(-1, 2)
    return EpisodeBuffer(
        observations={"where": where, "on": np.arange(rows + 1) % 2},
        actions=actions,
        rewards=np.ones(rows),
        terminations=np.arange(rows) == rows - 1,
        truncations=np.zeros(rows, bool),
    )


@pytest.fixture
def foreign(datasets):
    """Written by Minari itself: the first and the last episode have no actions."""
    buffers = [buffer(3, None), buffer(2, np.full((2, 1), 0.5, np.float32), 50.0), buffer(4, None, 100.0)]
    with pytest.warns(UserWarning, match="is set to None|env_spec is None"):
        minari.create_dataset_from_buffers("other/mixed-v0", buffers, observation_space=DICT, action_space=PULL)
    return "other/mixed-v0"


def test_a_log_without_actions_comes_back_as_it_was(log, datasets):
    bare = data.without_actions(log)
    assert not bare.labelled().any()
    data.save(bare, "mine/states-v0", action_free=True)
    loaded = data.load_action_free("mine/states-v0")
    for name, column in bare.tensors().items():
        assert torch.equal(column.nan_to_num(9.0), loaded.tensors()[name].nan_to_num(9.0)), name
    assert minari.load_dataset("mine/states-v0").total_steps == len(log)  # Minari itself reads it, too
    with pytest.raises(DataError, match=r"'mine/states-v0' holds no action in 60 of its 60 steps: fill .*_free"):
        data.load("mine/states-v0")


def test_rows_with_and_without_actions_in_one_data_set(log, datasets):
    some = log.episode == log.episode[0]
    mixed = replace(log, action=torch.where(some[:, None], log.action, torch.nan))
    data.save(mixed, "mine/mixed-v0", action_free=True)
    loaded = data.load_action_free("mine/mixed-v0")
    assert torch.equal(loaded.labelled(), some)
    assert torch.equal(loaded.action[some], log.action[some])


def test_whole_logs_load_the_same_way(log, datasets):
    data.save(log, "mine/whole-v0")
    assert torch.equal(data.load_action_free("mine/whole-v0").action, log.action)


def test_episodes_that_minari_wrote_without_actions(foreign):
    with pytest.raises(KeyError, match="actions"):
        list(minari.load_dataset(foreign).iterate_episodes())
    loaded = data.load_action_free(foreign)
    assert loaded.labelled().tolist() == [False] * 3 + [True] * 2 + [False] * 4
    assert loaded.episode.tolist() == [0] * 3 + [1] * 2 + [2] * 4
    assert loaded.obs[5:, -2].tolist() == [100.0, 102.0, 104.0, 106.0]
    assert loaded.next_obs[2].tolist() == [0.0, 1.0, 6.0, 7.0]
    assert loaded.spaces == Spaces(DICT, PULL)
    assert len(data.load_action_free(foreign, max_episodes=1)) == 3
    with pytest.raises(DataError, match="holds no action in 7 of its 9 steps"):
        data.load(foreign)


def test_only_those_who_ask_write_rows_without_actions(log, datasets):
    with pytest.raises(DataError, match="60 of 60 rows hold NaN or infinity in 'action'"):
        data.save(data.without_actions(log), "mine/states-v0")
    torn = log.action.clone()
    torn[3, 0] = torch.nan  # one column of two: a damaged action, not a missing one
    with pytest.raises(DataError, match="1 of 60 rows hold NaN or infinity in 'action', the first is row 3"):
        data.save(replace(log, action=torn), "mine/states-v0", action_free=True)
    keys = replace(log, action=torch.full((60, 2), torch.nan), spaces=Spaces(log.spaces[0], gym.spaces.Discrete(2)))
    with pytest.raises(DataError, match=r"Discrete\(2\) cannot hold exactly"):
        data.save(keys, "mine/states-v0", action_free=True)
    assert not list(datasets.rglob("*states*"))


def test_provenance_is_kept(log, datasets):
    card = {"model": {"class": "a.B", "sha256": "0" * 64}, "horizon": 5, "penalty": None}
    data.save(log, "mine/dream-v0", provenance=card)
    data.save(log, "mine/plain-v0")
    assert data.read_provenance("mine/dream-v0") == card
    assert data.read_provenance("mine/plain-v0") is None
    with pytest.raises(data.DatasetNotFound, match="'mine/none-v0' is not at"):
        data.read_provenance("mine/none-v0")
