import os
import subprocess
import sys
from dataclasses import replace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from learneddyn import data
from learneddyn.core import DataError, Transitions
from learneddyn.data.minari import collect_command
from learneddyn.spaces import Spaces, encode

BOX = Spaces(spaces.Box(-np.inf, np.inf, (2,), np.float64), spaces.Box(-1, 1, (1,), np.float32))
NESTED = Spaces(
    spaces.Dict(
        switch=spaces.MultiBinary(2),
        gear=spaces.Discrete(4, start=1),
        pair=spaces.Tuple((spaces.MultiDiscrete([2, 3]), spaces.Box(0, 255, (2, 2), np.uint8))),
        speed=spaces.Box(-np.inf, np.inf, (1,), np.float32),
    ),
    spaces.Dict(pull=spaces.Box(-1, 1, (2,), np.float32), key=spaces.Discrete(3, start=-1)),
)
IMAGE = Spaces(spaces.Box(0, 255, (4, 4, 3), np.uint8), spaces.Discrete(2))


def episodes(of: Spaces, lengths: list[int], terminated: list[bool], seed: int = 0) -> Transitions:
    """Random whole episodes of given lengths."""
    of.observation.seed(seed)
    of.action.seed(seed)
    rng = np.random.default_rng(seed)
    parts = []
    for number, (length, ended) in enumerate(zip(lengths, terminated, strict=True)):
        obs = encode(of.observation, gym.vector.utils.batch_space(of.observation, length + 1).sample())
        action = encode(of.action, gym.vector.utils.batch_space(of.action, length).sample())
        flags = np.arange(length) == (length - 1 if ended else -1)
        reward = rng.standard_normal(length)
        parts.append(
            Transitions.from_numpy(obs[:-1], action, reward, obs[1:], flags, np.full(length, number), spaces=of)
        )
    return Transitions.cat(parts)


def equal(left: Transitions, right: Transitions) -> bool:
    return left.spaces == right.spaces and all(
        torch.equal(column, right.tensors()[name]) for name, column in left.tensors().items()
    )


@pytest.mark.parametrize("of", [BOX, NESTED, IMAGE], ids=["box", "nested", "image"])
def test_save_and_load_are_inverse_bit_for_bit(of, datasets):
    whole = episodes(of, [3, 1, 5, 1], [True, False, False, True])
    data.save(whole, "mine/trip-v0")
    loaded = data.load("mine/trip-v0")
    assert equal(loaded, whole)
    assert loaded.source == "mine/trip-v0"
    assert loaded.obs.dtype == loaded.reward.dtype == torch.float32
    assert loaded.obs.is_contiguous()


def test_minari_sees_terminations_and_truncations_apart(datasets):
    dataset = data.save(episodes(BOX, [3, 2], [True, False]), "mine/ends-v0", seeds=[11, None])
    first, second = dataset[0], dataset[1]
    assert first.terminations.tolist() == [False, False, True]
    assert not first.truncations.any()
    assert second.truncations.tolist() == [False, True]
    assert not second.terminations.any()
    assert first.observations.shape == (4, 2)
    assert [meta.get("seed") for meta in dataset.storage.get_episode_metadata([0, 1])] == [11, None]
    assert "mine/ends-v0" in minari.list_local_datasets()


def test_foreign_data_sets_are_read_by_their_terminations(datasets):
    """Written by Minari itself: a truncation is no termination, the next observation never crosses an episode."""
    buffers = [
        EpisodeBuffer(
            observations=np.full((4, 2), 10.0 * k) + np.arange(4)[:, None],
            actions=np.zeros((3, 1), np.float32),
            rewards=np.ones(3),
            terminations=np.array([False, False, k == 0]),
            truncations=np.array([False, False, k == 1]),
        )
        for k in range(2)
    ]
    with pytest.warns(UserWarning, match="is set to None|env_spec is None"):
        minari.create_dataset_from_buffers(
            "other/made-v0", buffers, observation_space=BOX.observation, action_space=BOX.action
        )
    loaded = data.load("other/made-v0")
    assert loaded.terminated.tolist() == [False, False, True, False, False, False]
    assert loaded.next_obs[:, 0].tolist() == [1.0, 2.0, 3.0, 11.0, 12.0, 13.0]
    assert data.load("other/made-v0", max_episodes=1).episode.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="max_episodes must be at least 1 or None, got 0"):
        data.load("other/made-v0", max_episodes=0)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "CartPole-v1"])
def test_collect_save_load_recover(env_id, datasets):
    collected = data.collect(env_id, "mine/real-v0", steps=300, progress=False)
    assert equal(data.load("mine/real-v0"), collected)
    dataset = minari.load_dataset("mine/real-v0")
    assert dataset.total_steps == 300
    env = dataset.recover_environment()
    assert env.spec == dataset.recover_environment(eval_env=True).spec == gym.spec(env_id)
    assert (env.observation_space, env.action_space) == collected.spaces
    seed = next(iter(dataset.storage.get_episode_metadata([0])))["seed"]
    obs, _ = env.reset(seed=seed)
    assert np.array_equal(np.float32(obs), collected.obs[0].numpy())


def test_several_ids_are_joined_and_must_agree(datasets):
    first, second = episodes(BOX, [2, 2], [True, True]), episodes(BOX, [3], [False], seed=1)
    data.save(first, "mine/one-v0")
    data.save(second, "mine/two-v0")
    data.save(episodes(IMAGE, [2], [False]), "mine/image-v0")
    both = data.load(["mine/one-v0", "mine/two-v0"])
    assert both.episode.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert torch.equal(both.obs, torch.cat([first.obs, second.obs]))
    assert both.source == "mine/one-v0 + mine/two-v0"
    with pytest.raises(DataError, match="different spaces"):
        data.load(["mine/one-v0", "mine/image-v0"])


def test_an_existing_id_is_only_replaced_when_asked(datasets):
    old, new = episodes(BOX, [2], [True]), episodes(BOX, [4], [False], seed=1)
    data.save(old, "mine/kept-v0")
    with pytest.raises(data.DatasetExists, match=r"'mine/kept-v0' is already at .*overwrite=True"):
        data.save(new, "mine/kept-v0")
    with pytest.raises(data.DatasetExists, match="overwrite=True"):
        data.collect("Pendulum-v1", "mine/kept-v0", steps=10**9, progress=False)
    assert equal(data.load("mine/kept-v0"), old)
    data.save(new, "mine/kept-v0", overwrite=True)
    assert equal(data.load("mine/kept-v0"), new)
    assert [path.name for path in (datasets / "mine").iterdir() if "kept" in path.name] == ["kept-v0"]


@pytest.mark.parametrize("bad", ["plain", "mine/", "mine/data", "m y/data-v0", "../up-v0", ""])
def test_malformed_ids(bad, datasets):
    for call in (lambda: data.load(bad), lambda: data.save(episodes(BOX, [2], [True]), bad)):
        with pytest.raises(ValueError, match=r"has the form \(namespace/\)name-v0"):
            call()


def test_rows_that_are_not_whole_episodes_are_refused(datasets):
    whole = episodes(BOX, [3, 3], [False, False])
    cases = {
        "2 rows do not lead to the next row": replace(whole, next_obs=whole.next_obs + 1)[torch.tensor([0, 1, 2])],
        "1 rows do not lead .* row 0 of episode 0": whole[torch.tensor([0, 2, 3])],
        "must stand together": whole[torch.tensor([0, 3, 1])],
        "saving needs the spaces": replace(whole, spaces=None),
        "no transitions": whole[:0],
    }
    for message, rows in cases.items():
        with pytest.raises(DataError, match=message):
            data.save(rows, "mine/torn-v0")
    with pytest.raises(ValueError, match="one entry per episode, got 1 for 2 episodes"):
        data.save(whole, "mine/torn-v0", seeds=[1])
    with pytest.raises(gym.error.NameNotFound):
        data.save(whole, "mine/torn-v0", env_id="NoSuchEnv-v0")
    soft = episodes(IMAGE, [2], [False])
    with pytest.raises(DataError, match=r"action of episode 0 holds values that Discrete\(2\) cannot hold exactly"):
        data.save(replace(soft, action=torch.full_like(soft.action, 0.5)), "mine/torn-v0")
    assert not list(datasets.rglob("*torn*"))


def corrupt(datasets, name, change):
    import h5py

    with h5py.File(datasets / name / "data" / "main_data.hdf5", "a") as file:
        change(file)


def test_nan_names_the_data_set(datasets):
    data.save(episodes(BOX, [3, 3], [False, False]), "mine/nan-v0")

    def change(file):
        file["episode_1/observations"][2, 0] = np.nan

    corrupt(datasets, "mine/nan-v0", change)
    with pytest.raises(
        DataError, match=r"'mine/nan-v0': 1 of 6 rows hold NaN or infinity in 'obs', the first is row 5"
    ):
        data.load("mine/nan-v0")


def test_episodes_without_a_transition_are_counted(datasets):
    data.save(episodes(BOX, [3, 3], [False, False]), "mine/short-v0")

    def empty(number):
        def change(file):
            for name in file[f"episode_{number}"]:
                rows = 1 if name == "observations" else 0
                file[f"episode_{number}/{name}"].resize((rows, *file[f"episode_{number}/{name}"].shape[1:]))

        return change

    def metadata(steps):
        path = datasets / "mine/short-v0/data/metadata.json"
        path.write_text(path.read_text().replace('"total_steps": 6', f'"total_steps": {steps}'))

    corrupt(datasets, "mine/short-v0", empty(0))
    with pytest.warns(UserWarning, match="1 of 2 episodes"), pytest.raises(DataError, match="holds 3 of its 6 steps"):
        data.load("mine/short-v0")
    metadata(3)
    with pytest.warns(UserWarning, match="1 of 2 episodes of 'mine/short-v0' have no transition"):
        loaded = data.load("mine/short-v0")
    assert loaded.episode.tolist() == [0, 0, 0]
    corrupt(datasets, "mine/short-v0", empty(1))
    with (
        pytest.warns(UserWarning, match="2 of 2 episodes"),
        pytest.raises(DataError, match="no transition in any of its 2 episodes"),
    ):
        data.load("mine/short-v0")


def test_damaged_folders_are_named(datasets):
    data.save(episodes(BOX, [3], [False]), "mine/torn-v0")
    main = datasets / "mine/torn-v0/data/main_data.hdf5"
    whole = main.read_bytes()
    main.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"'mine/torn-v0' at .* cannot be read"):
        data.load("mine/torn-v0")
    main.write_bytes(whole)
    corrupt(datasets, "mine/torn-v0", lambda file: file["episode_0/observations"].resize((3, 2)))
    with pytest.raises(DataError, match="3 observations, 3 actions, 3 rewards"):
        data.load("mine/torn-v0")


@pytest.mark.parametrize(
    ("dataset_id", "command"),
    [
        ("mujoco/hopper/medium-v0", "learneddyn collect Hopper-v5 mujoco/hopper/medium-v0 --grade medium"),
        ("D4RL/walker2d/medium-replay-v2", "collect Walker2d-v5 D4RL/walker2d/medium-replay-v2 --grade replay"),
        ("halfcheetah-random-v2", "learneddyn collect HalfCheetah-v5 halfcheetah-random-v2 --grade random"),
        ("mujoco/invertedpendulum/expert-v0", "learneddyn collect InvertedPendulum-v5"),
        ("D4RL/hopper/medium-expert-v0", "collect Hopper-v5 D4RL/hopper/medium-expert-v0 --grade random|medium|expert"),
        ("D4RL/door/human-v2", "learneddyn collect ENV_ID D4RL/door/human-v2 --grade random|medium|expert|replay"),
    ],
)
def test_a_missing_data_set_says_which_command_builds_a_stand_in(dataset_id, command, datasets, monkeypatch):
    def offline(name):
        (datasets / name / "data").mkdir(parents=True)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(minari, "download_dataset", offline)
    assert command in collect_command(dataset_id)
    with pytest.raises(data.DatasetNotFound, match=r"could not be downloaded \(ConnectionError: no route") as caught:
        data.load(dataset_id)
    assert collect_command(dataset_id) in str(caught.value)
    assert not (datasets / dataset_id).exists()


def test_a_remote_data_set_is_downloaded_once(datasets, monkeypatch):
    whole, calls = episodes(BOX, [3], [True]), []

    def download(name):
        calls.append(name)
        data.save(whole, name)

    monkeypatch.setattr(minari, "download_dataset", download)
    assert equal(data.load("far/away-v0"), whole)
    assert equal(data.load("far/away-v0"), whole)
    assert calls == ["far/away-v0"]


KILL = """
import os, sys
from learneddyn import data
from learneddyn.data import minari as room
from pathlib import Path
new = data.collect("Pendulum-v1", steps=50, lanes=2, seed=1, progress=False)
if sys.argv[2] == "writing":
    whole = room._exact
    def dying(*arguments):
        if arguments[2:] == ("action", 1):
            os._exit(9)
        return whole(*arguments)
    room._exact = dying
else:
    rename = Path.rename
    def dying(self, target):
        if self.name.endswith(".new"):
            os._exit(9)
        return rename(self, target)
    Path.rename = dying
data.save(new, sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_save_leaves_the_last_good_state(moment, datasets):
    old = episodes(BOX, [2, 3], [True, False])
    data.save(old, "mine/safe-v0")
    for name in ("mine/safe-v0", "mine/fresh-v0"):
        done = subprocess.run(
            [sys.executable, "-c", KILL, name, moment], env=os.environ, capture_output=True, text=True
        )
        assert done.returncode == 9, done.stderr
    assert equal(data.load("mine/safe-v0"), old)
    with pytest.raises(data.DatasetNotFound):
        data.load("mine/fresh-v0")
    newer = episodes(BOX, [4], [True], seed=2)
    for name in ("mine/safe-v0", "mine/fresh-v0"):
        data.save(newer, name, overwrite=True)
        assert equal(data.load(name), newer)
    assert not [path for path in (datasets / "mine").iterdir() if path.name.startswith(".")]
