"""What every plant promises, by a walk over all that are registered."""

import subprocess
import sys
import warnings

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

import learneddyn
from learneddyn import tasks

PLANTS = [spec for spec in gym.registry.values() if str(spec.entry_point).startswith(f"{learneddyn.__name__}.plants.")]


def test_there_are_plants():
    assert "learneddyn/CartPoleSwingUp-v0" in [spec.id for spec in PLANTS]


@pytest.mark.parametrize("spec", PLANTS, ids=lambda spec: spec.id)
def test_gymnasium_accepts_it(spec):
    env = gym.make(spec.id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*A Box observation space m(ini|axi)mum value is")
        warnings.filterwarnings("ignore", ".*we recommend using a symmetric and normalized space")
        check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("spec", PLANTS, ids=lambda spec: spec.id)
def test_its_task_has_its_time_limit(spec):
    assert tasks.get(spec.id).max_episode_steps == spec.max_episode_steps


def test_registering_loads_neither_torch_nor_mujoco():
    code = "import sys, learneddyn; assert not {'torch', 'mujoco', 'learneddyn.plants'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
