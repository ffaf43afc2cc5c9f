"""Every public class keeps its contract. A new model, sampler, penalty, task, environment or world enrols by itself."""

import inspect
import warnings

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from model_cases import FITTING, HEADS, MODELS, QUICK, VARIANTS, taken

import learneddyn.planners
from learneddyn import tasks
from learneddyn.core import Task, generator
from learneddyn.envs.worlds import load_world, world_names
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import ICEM, AbstractPlanner
from learneddyn.testing import check_dynamics, check_planner, check_world, example_transitions
from learneddyn.world import PENALTIES, SAMPLERS, Bounded, World
from learneddyn.world.truth import TruthDynamics

PLANNERS = [
    planner
    for planner in (getattr(learneddyn.planners, name) for name in learneddyn.planners.__all__)
    if isinstance(planner, type) and issubclass(planner, AbstractPlanner) and not inspect.isabstract(planner)
]
ENVS = [
    spec.id
    for spec in gym.registry.values()
    if str(spec.entry_point).startswith("learneddyn.envs.learned:")  # flows are their own worlds
]


@pytest.mark.parametrize("model", MODELS)
def test_models(model):
    data = FITTING.get(model)
    check_dynamics(lambda: model(**taken(model, QUICK)), data)
    if taken(model, HEADS):
        check_dynamics(lambda: model(**taken(model, QUICK | HEADS)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_models(variant):
    check_dynamics(VARIANTS[variant])


@pytest.mark.parametrize("planner", PLANNERS)
def test_planners(planner):
    check_planner(planner())


@pytest.fixture(scope="module")
def fitted():
    model = ProbabilisticEnsemble(hidden=[16], weight_decay=1e-5, **taken(ProbabilisticEnsemble, QUICK), **HEADS)
    model.fit(example_transitions(), rng=generator(0))
    return model


@pytest.mark.parametrize("sampler", [*SAMPLERS, Bounded("elite", low=[-0.1] * 3, high=[0.1] * 3, angles=[1])])
def test_samplers(fitted, sampler):
    check_world(World(fitted, Task("Example-v0"), sampler=sampler))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties(fitted, name):
    check_world(World(fitted, Task("Example-v0"), penalty=PENALTIES[name], penalty_weight=0.1))


@pytest.mark.parametrize("real_id", tasks.names())
def test_tasks_in_the_truth(real_id):
    truth = TruthDynamics(real_id, threads=1)
    check_world(World(truth, tasks.get(real_id)))
    truth.close()


def test_truth_is_a_dynamics_model():
    truth = TruthDynamics("Pendulum-v1", threads=1)
    check_dynamics(truth)
    truth.close()


@pytest.mark.parametrize("name", world_names())
def test_shipped_worlds(name):
    loaded = load_world(name)
    check_dynamics(loaded.world.dynamics)
    check_world(loaded.world, None if loaded.start is None else loaded.start[:6])


@pytest.mark.parametrize("env_id", ENVS)
def test_environments(env_id):
    env = gym.make(env_id, world="truth:MountainCarContinuous-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


def test_there_is_something_to_check():
    assert ProbabilisticEnsemble in MODELS
    assert ICEM in PLANNERS
    assert "LearnedDyn-v0" in ENVS
