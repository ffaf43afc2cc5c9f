"""The light presets are the settings that were measured: a preset and its experiment cannot drift apart."""

from pathlib import Path

import gymnasium as gym
import pytest
import yaml

from learneddyn import agents, configs, models
from learneddyn.agents.lipschitz import CriticRegulariser
from learneddyn.reproduce import coplanner, lipschitz, mbpo, sindy_rl

FOLDER = Path(configs.__file__).parent / "mbpo"
MADE = {
    "inverted-pendulum-light": lambda env: mbpo.make("mbpo", "InvertedPendulum-v5", 0, env),
    "pendulum-light": lambda env: mbpo.make("mbpo", "Pendulum-v1", 0, env),
    "pendulum-coplanner-light": lambda env: coplanner.make("COPlanner", 0, env),
    "pendulum-lipschitz-light": lambda env: lipschitz.make(lipschitz.MAIN, 0, env),
    "cartpole-swingup-sindy-light": lambda env: sindy_rl.make("sindy", 0, env),
}
STEPS = {
    "pendulum-coplanner-light": coplanner.STEPS,
    "pendulum-lipschitz-light": lipschitz.STEPS,
    "cartpole-swingup-sindy-light": sindy_rl.STEPS,
}
SETTINGS = (
    "learning_rate",
    "learning_starts",
    "batch_size",
    "gradient_steps",
    "target_entropy",
    "rollout_batch",
    "refit_every",
    "real_ratio",
    "schedule",
    "conservative_rate",
    "optimistic_rate",
    "candidates",
    "plan_horizon",
)


@pytest.mark.parametrize("name", MADE)
def test_a_light_preset_is_what_its_experiment_runs(name):
    preset = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    env = gym.make(preset["env_id"])
    measured = MADE[name](env)
    kind = getattr(agents, preset.get("algorithm", "MBPO"))
    model = getattr(models, preset["model"]["class_path"].removeprefix("learneddyn.models."))
    model = model(**preset["model"]["init_args"])
    mine = kind("MlpPolicy", env, model=model, device="cpu", **preset["algorithm_kwargs"])
    assert isinstance(measured, kind)
    assert mine.dynamics.config() == measured.dynamics.config()
    assert mine.policy_kwargs["net_arch"] == measured.policy_kwargs["net_arch"]
    for setting in SETTINGS:
        assert getattr(mine, setting, None) == getattr(measured, setting, None), setting
    ours, theirs = (agent.critic_regulariser for agent in (mine, measured))
    assert (ours is None) == (theirs is None)
    assert ours is None or CriticRegulariser.from_card(theirs.card()) == ours
    assert preset["steps"] == STEPS.get(name, mbpo.STEPS)
    env.close()


def test_every_light_preset_has_an_experiment():
    assert {path.stem for path in FOLDER.glob("*-light.yaml")} == set(MADE)
