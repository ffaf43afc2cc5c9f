import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from learneddyn import tasks
from learneddyn.core import Outcome
from learneddyn.evaluation.render import side_by_side
from learneddyn.world import World
from learneddyn.world.truth import TruthDynamics

BAR, GAP, PANEL = 22, 4, 80


class Lean:
    """Pushes to the right until the pole falls."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.ones(len(observation), np.int64), state


class Upright(TruthDynamics):
    """A model that lies: the pole never falls."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs)


def frames(path):
    with Image.open(path) as film:
        pictures = []
        for i in range(film.n_frames):
            film.seek(i)
            pictures.append(np.asarray(film.convert("RGB")).astype(int))
        return np.stack(pictures)


def panels(pictures):
    return pictures[:, BAR:, :PANEL], pictures[:, BAR:, PANEL + GAP :]


def mark(picture):
    """Share of pixels in the red of an ending."""
    red = (picture[..., 0] > 170) & (picture[..., 1] < 110) & (picture[..., 2] < 130)
    return red.mean()


@pytest.fixture(scope="module")
def worlds():
    task = tasks.get("CartPole-v1")
    truth, liar = TruthDynamics(task), Upright(task)
    yield World(truth, task), World(liar, task)
    truth.close()
    liar.close()


def test_a_perfect_model_shows_the_same_on_both_sides(tmp_path, worlds):
    path = side_by_side(Lean(), worlds[0], "CartPole-v1", tmp_path / "a.gif", panel=PANEL, steps=30, every=1)
    pictures = frames(path)
    assert pictures.shape[1:] == (PANEL + BAR, 2 * PANEL + GAP, 3)
    left, right = panels(pictures)
    np.testing.assert_array_equal(left[:-1], right[:-1])
    assert len(np.unique(left.reshape(len(left), -1), axis=0)) > 5, "it moves"
    assert mark(left[-1]) > 0.1 > mark(left[0])
    assert path.stat().st_size < 100_000


def test_a_lying_model_stands_while_the_real_pole_falls(tmp_path, worlds):
    path = side_by_side(Lean(), worlds[1], "CartPole-v1", tmp_path / "b.gif", panel=PANEL, steps=30, every=2)
    left, right = panels(frames(path))
    assert mark(right[-1]) > 0.1 > mark(left[-1])


def test_open_loop_and_listed_actions_stop_where_the_real_side_stops(tmp_path, worlds):
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    fallen = next(t for t in range(1, 100) if env.step(1)[2])
    env.close()
    path = side_by_side(
        Lean(), worlds[1], "CartPole-v1", tmp_path / "c.gif", panel=PANEL, steps=100, every=1, closed_loop=False
    )
    with Image.open(path) as film:
        open_loop = film.n_frames
    listed = np.tile(np.array([[0.0, 1.0]], np.float32), (fallen + 50, 1))
    again = side_by_side(listed, worlds[1], "CartPole-v1", tmp_path / "d.gif", panel=PANEL, steps=100, every=1)
    moving = panels(frames(path))[1], panels(frames(again))[1]
    np.testing.assert_array_equal(moving[0][: fallen - 1], moving[1][: fallen - 1])
    assert open_loop <= fallen + 1


def test_the_same_seed_gives_the_same_file(tmp_path, worlds):
    first, second = (
        side_by_side(Lean(), worlds[0], "CartPole-v1", tmp_path / name, panel=PANEL, steps=10, seed=3).read_bytes()
        for name in ("e.gif", "f.gif")
    )
    assert first == second


def test_bad_input_names_itself_and_keeps_the_old_file(tmp_path, worlds):
    path = tmp_path / "old.gif"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        side_by_side(Lean(), worlds[0], "CartPole-v1", path, steps=0)
    with pytest.raises(ValueError, match=r"shape \(h >= 1, 2\), got \(5, 3\)"):
        side_by_side(np.zeros((5, 3), np.float32), worlds[0], "CartPole-v1", path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.gif"]


def test_an_untrusted_step_ends_the_left_side(tmp_path, worlds):
    doubtful = World(
        worlds[0].dynamics, worlds[0].task, trust=lambda state, action, after: torch.zeros(len(state.obs)) > 0
    )
    path = side_by_side(Lean(), doubtful, "CartPole-v1", tmp_path / "g.gif", panel=PANEL, steps=8, every=1)
    left, right = panels(frames(path))
    assert mark(left[0]) > 0.1
    assert mark(right[0]) == 0
