"""Every exported agent keeps SB3's surface: learn, predict, save, load, TensorBoard. A new one enrols by itself."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.evaluation import evaluate_policy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import learneddyn.agents
from learneddyn.agents import IWOCS, PETS, Dyna, FastSAC, RobustPolicy
from learneddyn.agents.worst_case import every
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.planners import ICEM
from learneddyn.spaces import Spaces
from learneddyn.testing import check_policy

EXPORTED = [getattr(learneddyn.agents, name) for name in learneddyn.agents.__all__]
LEARNING = [kind for kind in EXPORTED if isinstance(kind, type) and hasattr(kind, "learn")]
MIXINS = [kind for kind in LEARNING if issubclass(kind, Dyna) and not kind.policy_aliases]
LEARNERS = [kind for kind in LEARNING if kind not in MIXINS]
NETS: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "learning_starts": 50, "batch_size": 32, "buffer_size": 400}
STEPS = 20


def pendulum(friction: float = 0.0) -> gym.Env[Any, Any]:
    """Return a pendulum of short episodes; IWOCS asks for one per model, which makes no difference here."""
    return gym.make("Pendulum-v1", max_episode_steps=STEPS)


def ensemble() -> ProbabilisticEnsemble:
    return ProbabilisticEnsemble(2, 1, hidden=[8], max_epochs=2, batch_size=64)


def a_dyna(kind: Any, **given: Any) -> Any:
    model = ensemble()
    return kind(
        "MlpPolicy",
        pendulum(),
        model=model,
        rollout_batch=30,
        refit_every=40,
        gradient_steps=1,
        **deepcopy(NETS),
        **given,
    )


def a_sac(kind: Any, **given: Any) -> Any:
    return kind("MlpPolicy", pendulum(), **deepcopy(NETS), **given)


def a_pets(kind: Any, **given: Any) -> Any:
    return kind(pendulum(), ensemble(), ICEM(4, 10, 4, 1), sampler="mean", particles=1, **given)


def an_iwocs(kind: Any, **given: Any) -> Any:
    steps = {"default_timesteps": 80, "case_timesteps": 80, "fit_steps": 5, "episodes": 1, "radii": (0.5,)}
    seed = given.pop("seed")
    cases = {"nominal": 0.0, "search": every([0.0, 1.0]), "draw": lambda rng: 0.0}
    return kind("MlpPolicy", pendulum, agent_kwargs=deepcopy(NETS) | given, seed=seed, **steps, **cases)


RECIPES: dict[type, Callable[..., Any]] = {Dyna: a_dyna, FastSAC: a_sac, PETS: a_pets, IWOCS: an_iwocs}


def made(kind: type, **given: Any) -> Any:
    recipe = next((recipe for base, recipe in RECIPES.items() if issubclass(kind, base)), None)
    assert recipe is not None, f"{kind.__name__} is exported: RECIPES must say how a small one is made"
    return recipe(kind, **{"seed": 1, "device": "cpu"} | given)


def loaded(kind: Any, path: Any) -> Any:
    return RobustPolicy.load(path) if kind is IWOCS else kind.load(path, device="cpu")


def scalars(folder: Any) -> dict[str, list[float]]:
    """Return what TensorBoard would draw of the run or runs in a folder."""
    found: dict[str, list[float]] = {}
    for events in sorted(folder.rglob("events.out.tfevents*")):
        log = EventAccumulator(str(events))
        log.Reload()
        for tag in log.Tags()["scalars"]:
            found.setdefault(tag, []).extend(event.value for event in log.Scalars(tag))
    return found


@pytest.mark.parametrize("kind", LEARNERS)
def test_agents(kind, tmp_path):
    agent = made(kind, tensorboard_log=str(tmp_path / "board"))
    asked = {"total_timesteps": 160} if kind is IWOCS else {"total_timesteps": 145, "log_interval": 1}
    assert agent.learn(**asked) is agent
    spaces = Spaces(pendulum().observation_space, pendulum().action_space)
    check_policy(agent, spaces)
    assert np.isfinite(evaluate_policy(agent, pendulum(), n_eval_episodes=1, warn=False)[0])

    agent.save(tmp_path / "agent.zip")
    back = loaded(kind, tmp_path / "agent.zip")
    batch = np.stack([spaces.observation.sample() for _ in range(7)])
    mine, theirs = (one.predict(batch, deterministic=True)[0] for one in (agent, back))
    np.testing.assert_array_equal(mine, theirs)

    drawn = scalars(tmp_path / "board")
    assert all(np.isfinite(values).all() for values in drawn.values())
    assert {"rollout/ep_rew_mean", "time/fps"} <= drawn.keys()
    if isinstance(agent, Dyna | PETS):
        wanted = {"model/fresh_nll", "model/fresh_mse", "model/break_even", "imagined/uncertainty", "imagined/return"}
        assert wanted | {"real/return", "time/fit_share", "time/real_share"} <= drawn.keys()
        assert drawn["model/fresh_mse"][-1] == pytest.approx(agent.figures["model/fresh_mse"], rel=1e-5)
        assert [path.name for path in (tmp_path / "board").iterdir()] == [f"{kind.__name__}_1"]
    if not isinstance(agent, PETS):
        assert "train/critic_loss" in drawn


@pytest.mark.parametrize("kind", [kind for kind in LEARNERS if kind is not IWOCS])
def test_one_seed_is_one_agent_and_a_loaded_one_learns_on(kind, tmp_path):
    one, other = (made(kind).learn(60) for _ in range(2))
    batch = np.stack([pendulum().observation_space.sample() for _ in range(7)])
    np.testing.assert_array_equal(*(agent.predict(batch, deterministic=True)[0] for agent in (one, other)))
    one.save(tmp_path / "agent.zip")
    back = kind.load(tmp_path / "agent.zip", env=pendulum(), device="cpu")
    back.learn(20, reset_num_timesteps=False)
    assert back.num_timesteps == 80


def test_all_are_walked_through():
    assert {"MBPO", "COPlanner", "DynaTD3", "DynaTQC", "DynaCrossQ", "FastSAC", "PETS", "IWOCS", "SINDyRL"} <= {
        kind.__name__ for kind in LEARNERS
    }
    assert {kind.__name__ for kind in MIXINS} == {"Dyna", "UPMPC"}
