"""Hidden columns: environments and logs lose the same ones, specs survive, tasks leave to the model what they must."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import learneddyn  # registers the plants  # noqa: F401
from learneddyn import tasks
from learneddyn.core import generator
from learneddyn.data import collect
from learneddyn.data.partial import _VELOCITIES, HideColumns, velocity_columns, without_columns
from learneddyn.envs import LearnedVectorEnv
from learneddyn.models import RecurrentDynamics
from learneddyn.tasks.partial import partially_observed
from learneddyn.world import World

NAMED = "tests/PendulumAngle-v1"


@pytest.fixture(scope="module")
def named():
    gym.register(
        NAMED,
        "gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=30,
        additional_wrappers=(HideColumns.wrapper_spec(columns=[2]),),
    )
    yield NAMED
    del gym.registry[NAMED]


def states(env):
    """Velocities of the simulator, in the order of the observation."""
    base = env.unwrapped
    if hasattr(base, "data"):
        return base.data.qvel
    return np.array({4: base.state[[1, 3]] if len(base.state) == 4 else 0, 2: base.state[1:]}[len(base.state)])


@pytest.mark.parametrize("env_id", _VELOCITIES)
def test_velocity_columns_hold_velocities(env_id):
    env = gym.make(env_id)
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(3):
        obs = env.step(env.action_space.sample())[0]
    shown, true = obs[list(velocity_columns(env_id))], np.asarray(states(env))
    count = min(len(shown), len(true))  # Reacher's target does not move; a humanoid's bodies have velocities too
    assert count >= 1
    assert np.allclose(shown[:count], np.clip(true, -10, 10)[:count], atol=1e-5)
    wrapped = HideColumns(env)
    assert wrapped.observation_space.shape == (len(obs) - len(shown),)
    env.close()


def test_environments_and_logs_lose_the_same_columns():
    whole = collect("Hopper-v5", steps=60, seed=3)
    seen = collect(lambda: HideColumns(gym.make("Hopper-v5"), [0, 7]), steps=60, seed=3)
    cut = without_columns(whole, [7, 0])
    for name, column in cut.tensors().items():
        assert torch.equal(column, seen.tensors()[name]), name
    assert cut.spaces == seen.spaces
    assert cut.source.endswith("without columns [0, 7]")
    assert torch.equal(cut.obs, whole.obs[:, [1, 2, 3, 4, 5, 6, 8, 9, 10]])


def test_specs_are_written_and_read():
    spec = HideColumns(gym.make("Pendulum-v1")).spec
    again = gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json()))
    assert again.observation_space.shape == (2,)


def test_a_named_environment_and_its_task(named):
    task = partially_observed(tasks.get("Pendulum-v1"), [2], named)
    data = collect(named, steps=90, seed=0)
    assert data.spaces.obs_dim == 2
    start = task.initial(5, generator(0))
    assert torch.equal(start, tasks.get("Pendulum-v1").initial(5, generator(0))[:, :2])
    assert task.reward is None
    assert not task.terminated(start).any()
    model = RecurrentDynamics(updates=3, width=8, learn_reward=True)
    model.fit(data, rng=generator(0))
    env = LearnedVectorEnv(World(model, task, sampler="mean"), 3, horizon=10)
    obs, _ = env.reset(seed=0)
    _, reward, *_ = env.step(env.action_space.sample())
    assert obs.shape == (3, 2)
    assert np.isfinite(reward).all()


def test_tasks_renumber_angles_and_leave_terminations_to_the_model():
    task = partially_observed(tasks.get("HalfCheetah-v5"), [0, 8], "X-v0")
    assert tasks.get("HalfCheetah-v5").angles == (1,)
    assert task.angles == (0,)
    assert partially_observed(tasks.get("Hopper-v5"), [5], "X-v0").terminated is None


def test_bad_columns():
    env = gym.make("Pendulum-v1")
    with pytest.raises(ValueError, match="columns 0 to 2, got \\[3\\]"):
        HideColumns(env, [3])
    with pytest.raises(ValueError, match="all 3 observation columns"):
        HideColumns(env, [0, 1, 2])
    with pytest.raises(ValueError, match="Box of one axis"):
        HideColumns(gym.make("FrozenLake-v1"), [0])
    with pytest.raises(LookupError, match="velocities of 'Acrobot-v1' are not known"):
        HideColumns(gym.make("Acrobot-v1"))
    with pytest.raises(ValueError, match="columns must name"):
        without_columns(collect("Pendulum-v1", steps=5), [])


def test_columns_that_an_environment_was_made_to_show_beside_are_not_taken_for_velocities():
    wider = gym.make("Hopper-v5", exclude_current_positions_from_observation=False)
    with pytest.raises(LookupError, match="Hopper-v5 does not show its usual columns here: name columns"):
        HideColumns(wider)
    wider.close()
