"""The one flow of data, from real steps to MuJoCo's verdict, with every room on the way."""

import gymnasium as gym
import minari
import torch
from stable_baselines3 import PPO

from learneddyn import tasks
from learneddyn.core import generator
from learneddyn.data import collect, load
from learneddyn.envs import LearnedVecEnv, load_world, save_world
from learneddyn.evaluation import evaluate, imagined
from learneddyn.models import ProbabilisticEnsemble


def test_from_a_data_set_to_the_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    collect("InvertedPendulum-v5", "pendulum/random-v0", steps=1000, lanes=1, progress=False)
    data = load("pendulum/random-v0")
    assert minari.load_dataset("pendulum/random-v0").recover_environment().spec.id == "InvertedPendulum-v5"

    model = ProbabilisticEnsemble(5, 5, hidden=(64, 64), scale_targets=True, weight_decay=1e-5, batch_size=64,
                                  patience=15, max_epochs=150)  # fmt: skip
    model.fit(data, rng=generator(0))
    save_world(tmp_path / "world", model, task="InvertedPendulum-v5", data=data, trust_margin=0.2, halt_reward=0.0)

    env = LearnedVecEnv.from_name(str(tmp_path / "world"), 64)
    agent = PPO("MlpPolicy", env, n_steps=64, batch_size=256, n_epochs=5, learning_rate=1e-3, seed=0, device="cpu")
    before = evaluate(agent, "InvertedPendulum-v5", episodes=5).mean
    agent.learn(60_000)
    real = evaluate(agent, "InvertedPendulum-v5", episodes=5)
    assert before < 50
    assert real.mean > 2 * before
    dreamt = imagined(agent, load_world(tmp_path / "world").world, rng=generator(0), start=real.starts)
    assert len(dreamt.returns) == 20


def test_the_default_world_is_faithful_to_mujoco():
    """Its stated fidelity: one step from random-policy states, error below 1 % of the data's spread per column."""
    data = collect("InvertedPendulum-v5", steps=1000, lanes=1, seed=5, progress=False)
    world = load_world("inverted-pendulum").world
    with torch.no_grad():
        prediction = world.dynamics.predict(data.obs, data.action)
    error = prediction.mean[prediction.elites].mean(dim=0) - data.next_obs
    assert (error.square().mean(dim=0).sqrt() < 0.01 * data.next_obs.std(dim=0)).all()
    assert torch.equal(tasks.get("InvertedPendulum-v5").terminated(data.next_obs), data.terminated)


def test_the_default_world_opens_by_name_and_draws():
    env = gym.make("LearnedDyn-v0", render_mode="rgb_array")
    env.reset(seed=0)
    frame = env.render()
    assert frame.shape == (480, 480, 3)
    assert frame.std() > 0
    env.close()
    assert gym.make_vec("LearnedDyn-v0", num_envs=7).num_envs == 7
