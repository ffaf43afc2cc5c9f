import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from env_doubles import Linear
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import learneddyn
from learneddyn import tasks
from learneddyn.core import Task, Transitions
from learneddyn.data import collect
from learneddyn.envs import (
    LearnedEnv,
    LearnedVecEnv,
    LearnedVectorEnv,
    WorldFileError,
    load_world,
    save_world,
    world_names,
)
from learneddyn.models.base import ModelFileError
from learneddyn.spaces import Spaces
from learneddyn.world import Bounded

REAL_ID = "MountainCarContinuous-v0"


def model_and_data(real_id: str = REAL_ID) -> tuple[Linear, Transitions]:
    env = gym.make(real_id)
    pair = Spaces(env.observation_space, env.action_space)
    rows = torch.linspace(-0.5, 0.5, 20)[:, None].expand(-1, pair.obs_dim) * 0.1
    zeros = torch.zeros(20)
    data = Transitions(rows, torch.zeros(20, pair.action_dim), zeros, rows, zeros.bool(), zeros.long(), pair, "made/up")
    model = Linear()
    model.fit(data, rng=torch.Generator())
    return model, data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, data = model_and_data()
    save_world(tmp_path / "car", model, task=REAL_ID, sampler="mean", data=data, trust_margin=30.0, horizon=40)
    return tmp_path / "car"


def test_a_saved_world_comes_back(tmp_path: Path):
    model, data = model_and_data()
    save_world(
        tmp_path / "world",
        model,
        task=tasks.get(REAL_ID),
        sampler="tsinf",
        penalty="ensemble_var",
        penalty_weight=2.0,
        data=data,
        trust_margin=0.25,
        horizon=12,
        start=data.obs[:4],
    )
    loaded = load_world(tmp_path / "world")
    world = loaded.world
    assert (loaded.horizon, world.task.real_id, world.penalty_weight) == (12, REAL_ID, 2.0)
    assert (world.sampler.__name__, world.penalty.__name__) == ("tsinf", "ensemble_var")
    assert world.spaces == data.spaces
    torch.testing.assert_close(loaded.start, data.obs[:4])
    state = world.start(torch.tensor([[0.0, 0.0]]), torch.Generator())
    inside, outside = (state._replace(obs=torch.tensor([[x, 0.0]])) for x in (0.0749, 0.0751))
    assert world.trust(state, torch.zeros(1, 1), inside).all()
    assert not world.trust(state, torch.zeros(1, 1), outside).any()


def test_bounds_are_saved_with_a_world(folder: Path):
    """Position is driven out of [-0.02, 0.02] by the action; the world that was saved without bounds lets it go."""
    model, data = model_and_data()
    start = torch.tensor([[0.01, 0.0]])
    bounds = {"low": [-0.02, -math.inf], "high": [0.02, None]}
    ends = {}
    for name, given in (("free", None), ("bounded", bounds)):
        save_world(folder, model, task=REAL_ID, sampler="mean", bounds=given, data=data, trust_margin=1e4, start=start)
        env = gym.make("LearnedDyn-v0", world=str(folder))
        env.reset(seed=0)
        ends[name] = [float(env.step(-np.ones(1, np.float32))[0][0]) for _ in range(2)][-1]
    assert ends["free"] < -0.9
    assert ends["bounded"] == pytest.approx(-0.02)
    card = json.loads((folder / "world.json").read_text())
    assert card["bounds"] == {"low": [-0.02, None], "high": [0.02, None], "unit_pairs": [], "angles": []}
    lanes = gym.make_vec("LearnedDyn-v0", 3, world=str(folder))
    lanes.reset(seed=0)
    for _ in range(3):
        obs, *_ = lanes.step(-np.ones((3, 1), np.float32))
    np.testing.assert_allclose(obs[:, 0], -0.02, rtol=1e-6)
    again = load_world(folder).world
    assert isinstance(again.sampler, Bounded)
    assert again.sampler.sampler.__name__ == "mean"
    edited(folder, bounds={"angles": [7]})
    with pytest.raises(WorldFileError, match=f"{folder.name}: bounds: unit_pairs and angles must name columns"):
        load_world(folder)
    del card["bounds"]
    (folder / "world.json").write_text(json.dumps(card))
    assert not isinstance(load_world(folder).world.sampler, Bounded), "older folders have no such entry"


def test_saving_again_replaces_and_a_foreign_folder_is_left_alone(folder: Path, tmp_path: Path):
    model, data = model_and_data()
    save_world(folder, model, task=REAL_ID, horizon=5)
    assert load_world(folder).horizon == 5
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no world or model"):
        save_world(tmp_path / "home", model, task=REAL_ID, data=data)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_last_good_world(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("learneddyn.envs.worlds.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_world(folder, model_and_data()[0], task=REAL_ID, horizon=5)
    assert load_world(folder).horizon == 40


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sampler": "best"}, r"unknown sampler 'best', allowed are \['elite', 'mean', 'ts1', 'tsinf'\]"),
        ({"penalty": "fear"}, r"unknown penalty 'fear', allowed are .*'ensemble_std'"),
        ({"horizon": 0}, "horizon must be None or an integer of at least 1, got 0"),
        ({"trust_margin": -0.5}, "trust_margin must be None or a finite number of at least 0, got -0.5"),
        ({"penalty_weight": 1.0}, "penalty_weight is 1.0 but no penalty is given"),
        ({"bounds": {}}, r"bounds must be null or hold some of \['low', 'high', 'unit_pairs', 'angles'\], got {}"),
        ({"bounds": {"lowest": [0.0]}}, "bounds must be null or hold some of .*, got {'lowest'"),
        ({"bounds": {"low": [1, 1], "high": [0, 1]}}, "bounds: low must not exceed high"),
        ({"bounds": {"low": [0], "high": [1]}}, "bounds: low and high must hold one bound per observation column, 2"),
        ({"bounds": {"angles": [2]}}, "bounds: unit_pairs and angles must name columns from 0 to 1, got 2"),
        ({"task": "Hopper-v5"}, "Hopper-v5 is observed in 11 columns, the model was fitted on 2"),
        ({"start": torch.zeros(3, 5)}, "table 'start' must be finite and have the model's 2 columns"),
        ({"start": torch.full((3, 2), torch.inf)}, "must be finite"),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path, change: dict[str, Any], says: str):
    with pytest.raises(WorldFileError, match=says):
        save_world(tmp_path / "world", model_and_data()[0], **{"task": REAL_ID} | change)
    assert not (tmp_path / "world").exists()


def test_a_task_that_nobody_registered_is_not_saved(tmp_path: Path):
    with pytest.raises(tasks.UnknownTask, match=r"learneddyn\.tasks\.register"):
        save_world(tmp_path / "world", model_and_data()[0], task=Task("My-v0"))


def test_unknown_names_list_what_there_is(tmp_path: Path):
    with pytest.raises(WorldFileError, match=re.escape(f"no world 'nowhere': shipped worlds are {world_names()}")):
        load_world("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorldFileError, match="is not a readable world folder"):
        load_world(tmp_path / "empty")


def edited(folder: Path, **change: Any) -> None:
    card = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps(card | change))


def test_damaged_folders_are_refused(folder: Path):
    whole = (folder / "world.json").read_text()
    for name, error in (("world.json", WorldFileError), ("world.safetensors", WorldFileError)):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(error, match="car"):
            load_world(folder)
        (folder / name).write_bytes(content)
    edited(folder, format=99)
    with pytest.raises(WorldFileError, match=r"has world format 99, this version .* reads format 1"):
        load_world(folder)
    (folder / "world.json").write_text(whole.replace('"horizon"', '"horizont"'))
    with pytest.raises(WorldFileError, match=r"lacks \['horizon'\]"):
        load_world(folder)
    (folder / "world.json").write_text("[]")
    with pytest.raises(WorldFileError, match="format None"):
        load_world(folder)
    (folder / "world.json").write_text(whole)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="truncated"):
        load_world(folder)


def test_a_model_for_other_spaces_is_refused(folder: Path, tmp_path: Path):
    other, _ = model_and_data("HalfCheetah-v5")
    other.save(tmp_path / "other")
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(WorldFileError, match="observed in 2 columns, the model was fitted on 17"):
        load_world(folder)


def test_gym_make_by_folder_and_its_spec_survives_json(folder: Path):
    env = gym.make("LearnedDyn-v0", world=str(folder))
    assert isinstance(env.unwrapped, LearnedEnv)
    assert env.unwrapped.horizon == 40
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    results = []
    for one in (env, again):
        one.action_space.seed(0)
        results.append((one.reset(seed=0)[0], one.step(one.action_space.sample())[0]))
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("lanes", [1, 7, 4096])
def test_make_vec_is_native_with_any_number_of_lanes(folder: Path, lanes: int):
    env = gym.make_vec("LearnedDyn-v0", num_envs=lanes, world=str(folder))
    assert isinstance(env.unwrapped, LearnedVectorEnv)
    assert env.unwrapped.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, _ = env.reset(seed=0)
    assert obs.shape == (lanes, 2)
    obs, reward, *_ = env.step(env.action_space.sample())
    assert (obs.shape, reward.shape) == ((lanes, 2), (lanes,))


def test_make_vec_passes_its_settings_on(folder: Path):
    env = gym.make_vec(
        "LearnedDyn-v0", 2, world=str(folder), max_episode_steps=3, autoreset_mode="SameStep", output="torch"
    ).unwrapped
    assert (env.horizon, env.autoreset_mode, env.output) == (3, AutoresetMode.SAME_STEP, "torch")
    assert gym.make_vec("LearnedDyn-v0", 2, world=str(folder), horizon=7).unwrapped.horizon == 7
    save_world(folder, model_and_data()[0], task=REAL_ID)
    limit = tasks.get(REAL_ID).max_episode_steps
    assert gym.make_vec("LearnedDyn-v0", 2, world=str(folder)).unwrapped.horizon == limit
    assert gym.make_vec("LearnedDyn-v0", 2, world=str(folder), max_episode_steps=limit + 1).unwrapped.horizon == limit
    assert gym.make("LearnedDyn-v0", world=str(folder)).unwrapped.horizon == limit
    with pytest.raises(ValueError, match="num_envs must be at least 1, got 0"):
        gym.make_vec("LearnedDyn-v0", 0, world=str(folder))


def test_saved_starts_are_the_default_and_the_task_can_be_asked_for(folder: Path):
    model, data = model_and_data()
    with pytest.raises(ValueError, match="saved without a start table"):
        gym.make("LearnedDyn-v0", world=str(folder), start="saved")
    with pytest.raises(ValueError, match="unknown start 'anywhere', allowed are 'task', 'saved'"):
        gym.make("LearnedDyn-v0", world=str(folder), start="anywhere")
    save_world(folder, model, task=REAL_ID, start=data.obs[:1])
    for start in (None, "saved"):
        obs, _ = gym.make("LearnedDyn-v0", world=str(folder), start=start).reset(seed=0)
        np.testing.assert_array_equal(obs, data.obs[0].numpy())
    obs, _ = gym.make("LearnedDyn-v0", world=str(folder), start="task").reset(seed=0)
    assert -0.6 <= obs[0] <= -0.4
    np.testing.assert_array_equal(LearnedVecEnv.from_name(str(folder), 2).reset(), data.obs[[0, 0]].numpy())


def test_both_checkers_pass_without_a_warning(folder: Path):
    """In a task whose real spaces are bounded and normalised; every warning is an error here (see pyproject)."""
    env = gym.make("LearnedDyn-v0", world=str(folder), render_mode="rgb_array").unwrapped
    check_env(env)
    check_env_sb3(env, warn=True, skip_render_check=False)


def test_checkers_say_of_mujoco_spaces_only_what_they_say_of_the_real_environment(tmp_path: Path):
    model, _ = model_and_data("InvertedPendulum-v5")
    save_world(tmp_path / "pole", model, task="InvertedPendulum-v5", sampler="mean")

    def complaints(env: gym.Env) -> set[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_env(env, skip_render_check=True)
            check_env_sb3(env, warn=True)
        return {str(warning.message) for warning in caught}

    imagined = complaints(gym.make("LearnedDyn-v0", world=str(tmp_path / "pole")).unwrapped)
    assert imagined <= complaints(gym.make("InvertedPendulum-v5").unwrapped)


def test_frames_show_the_imagined_state(folder: Path):
    env = gym.make("LearnedDyn-v0", world=str(folder), render_mode="rgb_array", width=64, height=48)
    env.reset(seed=0, options={"obs": np.array([-1.0, 0.0], np.float32)})
    left = env.render()
    env.reset(options={"obs": np.array([0.3, 0.0], np.float32)})
    assert left.shape == (48, 64, 3)
    assert left.dtype == np.uint8
    assert (left != env.render()).any()
    env.close()
    lanes = gym.make_vec("LearnedDyn-v0", 2, world=str(folder), render_mode="rgb_array", width=64, height=48)
    lanes.reset(seed=0, options={"obs": np.array([[-1.0, 0.0], [0.3, 0.0]], np.float32)})
    frames = lanes.render()
    np.testing.assert_array_equal(frames[0], left)
    assert (frames[0] != frames[1]).any()
    tiled = LearnedVecEnv.from_name(str(folder), 4, render_mode="rgb_array", width=64, height=48)
    tiled.reset()
    assert tiled.render().shape == (96, 128, 3)
    lanes.close()
    tiled.close()


def test_the_truth_stands_behind_the_same_environment():
    """``truth:`` steps MuJoCo from the float32 start observation, so it tracks the real env up to that rounding."""
    env = gym.make("LearnedDyn-v0", world="truth:InvertedPendulum-v5")
    real = gym.make("InvertedPendulum-v5")
    obs, _ = env.reset(seed=0)
    real.reset(seed=0)
    real.unwrapped.set_state(obs[:2], obs[2:])
    real.action_space.seed(0)
    for _ in range(20):
        action = real.action_space.sample()
        one, two = env.step(action), real.step(action)
        np.testing.assert_allclose(one[0], two[0], atol=1e-4)
        assert one[1:3] == (two[1], two[2])
        if two[2]:
            break
    assert env.unwrapped.horizon == 1000


def test_the_truth_is_loaded_for_the_device_asked_for():
    assert load_world("truth:Pendulum-v1", "meta").world.dynamics.elites.device.type == "meta"


def test_lanes_of_the_truth_restart_from_a_fresh_simulator_state(tmp_path: Path):
    start = torch.tensor([[0.1, 0.05, 0.2, 0.1]])
    kwargs = {"horizon": 3, "start": start}
    sync = SyncVectorEnv(
        [lambda: LearnedEnv(load_world("truth:InvertedPendulum-v5").world, **kwargs)] * 2, autoreset_mode="SameStep"
    )
    ours = LearnedVectorEnv(load_world("truth:InvertedPendulum-v5").world, 2, autoreset_mode="SameStep", **kwargs)
    sync.reset(seed=0)
    ours.reset(seed=0)
    for action in np.random.default_rng(0).uniform(-3, 3, (10, 2, 1)).astype(np.float32):
        for one, two in zip(ours.step(action)[:4], sync.step(action)[:4], strict=True):
            np.testing.assert_array_equal(one, two)


def test_minari_recovers_the_environment_a_data_set_was_collected_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    settings = {"world": str(folder), "horizon": 6}
    collect("LearnedDyn-v0", "imagined/car-v0", steps=6, lanes=1, env_kwargs=settings, progress=False)
    dataset = minari.load_dataset("imagined/car-v0")
    env = dataset.recover_environment()
    assert isinstance(env.unwrapped, LearnedEnv)
    assert env.unwrapped.horizon == 6
    seed = int(next(iter(dataset.storage.get_episode_metadata([0])))["seed"])
    np.testing.assert_array_equal(env.reset(seed=seed)[0], dataset[0].observations[0])


def test_the_default_world_opens_without_arguments():
    env = gym.make("learneddyn:LearnedDyn-v0")
    assert env.observation_space == gym.make("InvertedPendulum-v5").observation_space
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert gym.make_vec("LearnedDyn-v0", num_envs=3).reset(seed=0)[0].shape == (3, 4)
    assert learneddyn.__version__
