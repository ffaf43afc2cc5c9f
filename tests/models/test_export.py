"""Exported programs answer as the package does, after a round trip through a file."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO, SAC

from learneddyn.core import generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.export import ExportError, compile_ahead, export_policy, export_step, save_onnx
from learneddyn.testing import example_transitions

OPTIONS = {"plain": {}, "heads": {"learn_reward": True, "learn_termination": True, "angles": (1,)}}


def fitted(**options):
    model = ProbabilisticEnsemble(num_members=4, num_elites=3, hidden=(16, 16), max_epochs=1, **options)
    model.fit(example_transitions(), rng=generator(0))
    return model


def rows(model, lanes):
    """Inputs of a step, and what the package draws with the same noise."""
    rng = generator(1)
    obs, action = torch.randn(lanes, 3, generator=rng), torch.rand(lanes, 2, generator=rng)
    member, columns = torch.arange(lanes) % 4, 3 + model.learn_reward
    noise = torch.randn(lanes, columns, generator=generator(2))
    with torch.no_grad():
        drawn = model.sample(obs, action, member, generator(2))
        terminated = model.predict(obs, action).terminated
    expected = [drawn.next_obs]
    if model.learn_reward:
        expected += [drawn.reward, terminated[member, torch.arange(lanes)]]
    return (obs, action, member, noise), expected


def assert_same(answer, expected):
    assert len(answer) == len(expected)
    for one, other in zip(answer, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one).detach(), other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_survives_the_round_trip_with_any_number_of_lanes(name, tmp_path):
    model = fitted(**OPTIONS[name])
    torch.export.save(export_step(model), tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    for lanes in (1, 2, 7, 300):
        inputs, expected = rows(model, lanes)
        assert_same(program(*inputs), expected)


def test_a_program_keeps_the_weights_it_was_made_with(tmp_path):
    model = fitted()
    inputs, expected = rows(model, 5)
    torch.export.save(export_step(model), tmp_path / "step.pt2")
    with torch.no_grad():
        model.weights[0].mul_(1.5)
    assert_same(torch.export.load(tmp_path / "step.pt2").module()(*inputs), expected)


def test_only_a_fitted_ensemble_has_a_step():
    with pytest.raises(ValueError, match="only a fitted ensemble has a step to export"):
        export_step(ProbabilisticEnsemble())


class Bounds(gym.Env):
    """Only the spaces matter; the action bounds are not symmetric."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (4,))

    def __init__(self, discrete):
        low, high = np.array([-3.0, 0.0], np.float32), np.array([1.0, 0.5], np.float32)
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(low, high)


@pytest.mark.parametrize(("kind", "discrete"), [(SAC, False), (PPO, False), (PPO, True), (DQN, True)])
def test_a_policy_acts_as_before_after_the_round_trip(kind, discrete, tmp_path):
    agent = kind("MlpPolicy", Bounds(discrete), device="cpu", seed=0)
    with torch.no_grad():
        for weight in agent.policy.parameters():
            weight.mul_(3.0)
    checks = torch.distributions.Distribution._validate_args
    torch.export.save(export_policy(agent.policy), tmp_path / "policy.pt2")
    assert torch.distributions.Distribution._validate_args == checks
    program = torch.export.load(tmp_path / "policy.pt2").module()
    for lanes in (1, 6):
        obs = torch.rand(lanes, 4, generator=generator(lanes)) * 2 - 1
        expected = torch.as_tensor(agent.predict(obs.numpy(), deterministic=True)[0])
        torch.testing.assert_close(program(obs).detach(), expected, rtol=1e-5, atol=1e-6)


def test_pictures_are_refused():
    class Seeing:
        observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    with pytest.raises(ValueError, match="only policies of flat observations can be exported"):
        export_policy(Seeing())


def test_onnx_gives_the_same_numbers(tmp_path):
    model = fitted(**OPTIONS["heads"])
    try:
        save_onnx(export_step(model), tmp_path / "step.onnx")
    except ExportError as error:
        pytest.skip(f"onnx or onnxscript is not installed: {error}")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(tmp_path / "step.onnx")
    for lanes in (1, 9):
        inputs, expected = rows(model, lanes)
        names = [each.name for each in session.get_inputs()]
        assert names == ["obs", "action", "member", "noise"]
        answer = session.run(None, dict(zip(names, (part.numpy() for part in inputs), strict=True)))
        assert_same(answer, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler (g++) is installed")
def test_a_compiled_step_gives_the_same_numbers(tmp_path):
    model = fitted()
    step = export_step(model)
    with pytest.raises(ValueError, match=r"ends with \.pt2, got 'step\.so'"):
        compile_ahead(step, "step.so")
    compile_ahead(step, tmp_path / "step.pt2")
    program = torch._inductor.aoti_load_package(str(tmp_path / "step.pt2"))
    for lanes in (1, 9):
        inputs, expected = rows(model, lanes)
        assert_same(program(*inputs), expected)
