import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import Task
from learneddyn.world.draw import RenderError, StateArtist
from learneddyn.world.truth import TruthDynamics

IDS = ["InvertedPendulum-v5", "Hopper-v5", "HalfCheetah-v5", "Ant-v5", "Pendulum-v1", "CartPole-v1"]


@pytest.fixture(autouse=True)
def headless(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def start(real_id, seed=0):
    return TruthDynamics(real_id, threads=1).reset([seed])[0][0].float()


@pytest.mark.parametrize("real_id", IDS)
def test_frames_follow_the_observation(real_id):
    obs = start(real_id)
    moved = obs.clone()
    moved[:3] += 0.3
    with StateArtist(tasks.get(real_id), width=96, height=64) as artist:
        first, other, again = artist.frame(obs), artist.frame(moved), artist.frame(obs.numpy())
    assert first.shape == (64, 96, 3)
    assert first.dtype == np.uint8
    assert first.std() > 5
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("real_id", ["InvertedPendulum-v5", "InvertedDoublePendulum-v5"])
def test_a_frame_is_the_picture_gymnasium_draws(real_id):
    env = gym.make(real_id, render_mode="rgb_array", width=120, height=120)
    obs, _ = env.reset(seed=3)
    for _ in range(4):
        obs = env.step(np.array([1.0], np.float32))[0]
    want = env.render().astype(int)
    with StateArtist(tasks.get(real_id), width=120, height=120) as artist:
        got = artist.frame(torch.as_tensor(obs, dtype=torch.float32))
    # Gymnasium draws the pose of the last substep's start, so the edges of moving parts may differ by a pixel.
    assert (abs(got - want).max(axis=2) > 30).mean() < 0.02
    env.close()


def test_two_artists_do_not_disturb_each_other():
    obs = start("InvertedPendulum-v5")
    cheetah = start("HalfCheetah-v5")
    with StateArtist(tasks.get("InvertedPendulum-v5"), 64, 64) as one:
        alone = one.frame(obs)
        with StateArtist(tasks.get("HalfCheetah-v5"), 80, 64) as two:
            between = two.frame(cheetah)
            assert np.array_equal(one.frame(obs), alone)
            assert np.array_equal(two.frame(cheetah), between)
        assert np.array_equal(one.frame(obs), alone)


class CountedContext:
    """An OpenGL context that counts how often it is freed."""

    def __init__(self, context):
        self.context, self.frees = context, 0

    def make_current(self):
        self.context.make_current()

    def free(self):
        self.frees += 1
        self.context.free()


def test_the_context_is_released_once():
    artist = StateArtist(tasks.get("InvertedPendulum-v5"), 16, 16)
    artist.frame(start("InvertedPendulum-v5"))
    artist._canvas._opengl = context = CountedContext(artist._canvas._opengl)
    artist.close()
    artist.close()
    assert context.frees == 1
    with pytest.raises(RenderError, match="closed"):
        artist.frame(start("InvertedPendulum-v5"))


def test_a_camera_by_name():
    obs = start("Hopper-v5")
    with (
        StateArtist(tasks.get("Hopper-v5"), 64, 64, camera="track") as named,
        StateArtist(tasks.get("Hopper-v5"), 64, 64) as default,
    ):
        assert np.array_equal(named.frame(obs), default.frame(obs))
    with pytest.raises(ValueError, match=r"no camera 'front', its cameras are \['track'\]"):
        StateArtist(tasks.get("Hopper-v5"), camera="front")
    with pytest.raises(ValueError, match="CartPole-v1 is drawn without cameras"):
        StateArtist(tasks.get("CartPole-v1"), camera="front")


def test_errors_name_the_thing():
    with pytest.raises(ValueError, match="the task of Hopper-v5 has no codec"):
        StateArtist(Task("Hopper-v5"))
    with pytest.raises(ValueError, match="0 x 480"):
        StateArtist(tasks.get("Hopper-v5"), width=0)
    with StateArtist(tasks.get("CartPole-v1"), 32, 32) as artist, pytest.raises(ValueError, match=r"columns \[1, 3\]"):
        artist.frame(torch.tensor([0.0, torch.nan, 0.0, torch.inf]))


def test_missing_pygame_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(RenderError, match="drawing Pendulum-v1 needs pygame: pip install pygame-ce"):
        StateArtist(tasks.get("Pendulum-v1"))


def test_a_missing_backend_names_packages_and_settings():
    script = (
        "from learneddyn import tasks\nfrom learneddyn.world import draw\n"
        "draw.import_module = lambda name: (_ for _ in ()).throw(ImportError('no library'))\n"
        "try:\n    draw.StateArtist(tasks.get('InvertedPendulum-v5'))\n"
        "except draw.RenderError as error:\n    print(error)\n"
    )
    environment = os.environ | {"MUJOCO_GL": "osmesa"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True).stdout
    for part in ("'osmesa' does not work here (ImportError: no library)", "libegl1", "libosmesa6", "MUJOCO_GL=egl"):
        assert part in said
