import math
import time

import gymnasium as gym
import pytest
import torch

from learneddyn import tasks
from learneddyn.agents import MBPO
from learneddyn.agents.diagnostics import (
    Alarm,
    Stopwatch,
    change_scale,
    depth_error,
    imagination_figures,
    model_error,
    return_gap,
)
from learneddyn.core import Outcome, Prediction, Task, Transitions, generator
from learneddyn.models import ProbabilisticEnsemble, RecurrentDynamics
from learneddyn.spaces import Spaces
from learneddyn.world import Divergence, ModelDiverged, World, strict
from learneddyn.world.truth import TruthDynamics

SPACES = Spaces(gym.spaces.Box(-math.inf, math.inf, (2,)), gym.spaces.Box(-1, 1, (1,)))


class Drift:
    """Every member adds the action, off by ``bias`` of its own, and admits a deviation of ``std``."""

    num_members, spaces = 2, SPACES
    elites = torch.tensor([0, 1])

    def __init__(self, bias=(0.0, 0.0), std=1.0) -> None:
        self.bias, self.std = torch.tensor(bias), std

    def predict(self, obs, action, memory=None):
        mean = (obs + action)[None] + self.bias[:, None, None]
        return Prediction(mean, torch.full_like(mean, self.std), self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs + action + self.bias[member][:, None])


TASK = Task("Drift-v0", reward=lambda o, a, n: n[:, 0], terminated=lambda n: n[:, 0] > 1e6)


def walk(episodes=3, steps=30, action=0.5, terminated=False) -> Transitions:
    """Real steps of ``next = obs + action``, from the origin."""
    obs = torch.arange(steps).float()[:, None].expand(-1, 2).repeat(episodes, 1) * action
    ended = torch.zeros(steps, dtype=torch.bool)
    ended[-1] = terminated
    taken = torch.full((episodes * steps, 1), action)
    episode = torch.arange(episodes).repeat_interleave(steps)
    following = obs + taken
    return Transitions(obs, taken, following[:, 0], following, ended.repeat(episodes), episode, SPACES)


def test_model_error_of_a_known_bias():
    data = walk()
    data = Transitions.cat([data, walk(action=-0.5)])  # changes of 0.5 and -0.5: a deviation of 0.5
    torch.testing.assert_close(change_scale(data), torch.tensor([0.5, 0.5]))
    figures = model_error(Drift(bias=(0.25, -0.25), std=0.5), data, data)
    assert figures["model/fresh_mse"] == pytest.approx(0.25)
    assert figures["model/fresh_nll"] == pytest.approx(0.5 * 0.25 + 0.5 * math.log(2 * math.pi))


def test_open_loop_error_grows_as_the_bias_adds_up():
    data = walk()
    figures, errors = depth_error(World(Drift(bias=(0.1, 0.1)), TASK), data, torch.ones(2), depth=10)
    assert errors == pytest.approx([0.1 * step for step in range(1, 11)], rel=1e-4)
    assert figures["model/break_even"] == 10
    far, _ = depth_error(World(Drift(bias=(-1.2, -1.2)), TASK), data, torch.ones(2), depth=10)
    assert far["model/break_even"] == 0
    short, errors = depth_error(World(Drift(), TASK), walk(steps=4), torch.ones(2), depth=10)
    assert (len(errors), short["model/depth_error"]) == (4, 0)


def test_returns_agree_where_the_model_is_right():
    world = World(Drift(), TASK)
    for terminated, windows in ((False, 3 * 21), (True, 3 * 30)):
        data = walk(terminated=terminated)
        policy = lambda obs: torch.full((len(obs), 1), 0.5)  # noqa: E731
        figures = return_gap(world, policy, data, generator(0), depth=10)
        if not terminated:
            assert figures["imagined/return"] == pytest.approx(figures["real/return"], rel=1e-5)
        starts = torch.arange(30).repeat(3)[:windows] if terminated else torch.arange(21)
        real = [sum(0.5 * (s + 1 + j) for j in range(min(10, 30 - s))) for s in starts.tolist()]
        assert figures["real/return"] == pytest.approx(sum(real) / len(real), rel=1e-5)
    assert return_gap(world, policy, walk(steps=5), generator(0), depth=10) == {}


def test_the_truth_has_no_error():
    env = gym.make("Pendulum-v1")
    columns: list[list] = [[], [], [], []]
    obs, _ = env.reset(seed=0)
    for _ in range(60):
        action = torch.tensor([obs[1]])
        following, reward, *_ = env.step(action.numpy())
        for column, value in zip(columns, (torch.from_numpy(obs), action, float(reward), following), strict=True):
            column.append(torch.as_tensor(value, dtype=torch.float32))
        obs = following
    obs, action, reward, following = map(torch.stack, columns)
    none = torch.zeros(60)
    data = Transitions(obs, action, reward, following, none.bool(), none.long(), None)
    truth = TruthDynamics("Pendulum-v1", threads=1)
    world = World(truth, tasks.get("Pendulum-v1"))
    figures, _ = depth_error(world, data, change_scale(data))
    assert figures["model/depth_error"] < 1e-3
    assert figures["model/break_even"] == 20
    found = return_gap(world, lambda obs: obs[:, 1:2], data, generator(0))
    assert found["imagined/return"] == pytest.approx(found["real/return"], rel=1e-4)
    truth.close()


def test_disagreement_is_the_uncertainty_of_imagined_rows():
    data = walk(terminated=True)
    figures = imagination_figures(World(Drift(bias=(0.3, -0.1)), TASK), data)
    assert figures["imagined/uncertainty"] == pytest.approx(0.4 * math.sqrt(2), rel=1e-4)
    assert figures["imagined/terminated"] == pytest.approx(1 / 30)
    assert imagination_figures(World(Drift(), TASK), data[:0]) == {}


def test_the_uncertainty_of_a_model_of_one_member_is_the_noise_it_admits():
    alone = Drift(bias=(0.3,), std=2.0)
    alone.num_members, alone.elites = 1, torch.tensor([0])
    figures = imagination_figures(World(alone, TASK), walk())
    assert figures["imagined/uncertainty"] == pytest.approx(2 * math.sqrt(2), rel=1e-5)


def test_a_model_with_memory_tells_no_uncertainty_of_rows_without():
    model = RecurrentDynamics(width=8, window=4, updates=1)
    model.fit(walk(), rng=generator(0))
    assert imagination_figures(World(model, TASK), walk(terminated=True)) == {
        "imagined/terminated": pytest.approx(1 / 30)
    }


def test_an_alarm_rings_once_until_it_is_set_again():
    alarm = Alarm("so what")
    for when in ("first: ", "second: "):
        alarm.begin(when)
        with pytest.warns(RuntimeWarning, match=f"^{when}member 1 of the model left .* at step 4 .*; so what$"):
            alarm(Divergence(4, (1,), 2, 8))
        alarm(Divergence(5, (0,), 2, 8))  # a warning would be an error


def test_an_agent_warns_of_a_broken_model():
    class Breaks(MBPO):
        def on_refit(self, report):
            with torch.no_grad():
                self.dynamics.biases[-1][self.dynamics.elites[0]] = math.inf

    def made(**changes) -> Breaks:
        model = ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=[8], max_epochs=1)
        given = {"model": model, "rollout_batch": 40, "learning_starts": 100, "gradient_steps": 1, "seed": 0} | changes
        return Breaks("MlpPolicy", gym.make("Pendulum-v1"), device="cpu", **given)

    agent = made()
    with pytest.warns(RuntimeWarning, match=r"after 101 real steps: member \d of the model .* step 1 .* of 40 rows"):
        agent.learn(101)
    pool = agent.replay_buffer.imagined
    assert 0 < len(pool) < 40
    assert bool(pool.rows().isfinite().all())
    with pytest.raises(ModelDiverged, match="left the finite numbers at step 1"):
        made(sentinel=strict).learn(101)


def test_a_section_inside_another_pauses_it():
    watch = Stopwatch()
    with watch("outer"):
        with watch("inner"):
            time.sleep(0.05)
        time.sleep(0.01)
    shares = watch.shares()
    assert shares["time/inner_share"] > shares["time/outer_share"] > 0
    assert sum(shares.values()) == pytest.approx(1)
