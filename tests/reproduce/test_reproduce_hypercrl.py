"""The experiments on forgetting in small: their plants are MuJoCo's, they run, and they judge what they measured."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
from matplotlib.figure import Figure

from learneddyn.planners import RandomShooting
from learneddyn.reproduce import hypercrl, hypercrl_control
from learneddyn.world.truth import TruthDynamics


def test_the_cart_poles_differ_in_their_length_only():
    tasks = [hypercrl.cart_pole(length) for length in (0.6, 1.2)]
    assert hypercrl.cart_pole(0.6).real_id == tasks[0].real_id
    models = [gym.make(task.real_id).unwrapped.model for task in tasks]
    assert models[1].geom("pole").size[1] == pytest.approx(2 * models[0].geom("pole").size[1])
    assert [task.reward.keywords for task in tasks] == [{"pole_length": 0.6}, {"pole_length": 1.2}]


def test_transitions_are_steps_of_the_environment():
    task = hypercrl.cart_pole(0.3)
    data = hypercrl.transitions(task, 5, seed=0)
    env = gym.make(task.real_id).unwrapped
    env.reset(seed=0)
    for row in range(5):
        env.set_state(*data.obs[row].double().numpy().reshape(2, 2))
        seen, *_ = env.step(data.action[row].numpy())
        np.testing.assert_allclose(data.next_obs[row], seen, atol=1e-5)


def test_the_error_of_the_truth_is_nothing_and_of_the_mean_change_one():
    task = hypercrl.cart_pole(0.3)
    data = hypercrl.transitions(task, 400, seed=0)

    class MeanChange(TruthDynamics):
        def predict(self, obs, action, memory=None):
            told = super().predict(obs, action, memory)
            return told._replace(mean=(obs + (data.next_obs - data.obs).mean(dim=0))[None])

    for kind, want in ((TruthDynamics, 0.0), (MeanChange, 1.0)):
        model = kind(task, threads=1)
        assert hypercrl.error(model, data) == pytest.approx(want, abs=0.01)
        model.close()


def test_supervised_in_small(monkeypatch, tmp_path):
    for name, value in (("LENGTHS", (0.6, 0.3)), ("TRAIN", 60), ("TEST", 30), ("UPDATES", 2)):
        monkeypatch.setattr(hypercrl, name, value)
    figures = hypercrl.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    assert list(figures) == list(hypercrl.METHODS)
    assert all([len(row) for row in errors] == [1, 2] for errors in figures.values())
    assert figures["single"][0][0] == figures["single"][1][0], "one network per task forgets nothing"
    assert isinstance(hypercrl.draw({0: figures, 1: figures}), Figure)


def test_findings_judge_the_errors():
    kept, lost = [[0.1], [0.1, 0.1]], [[0.1], [5.0, 0.1]]
    seed = {name: lost if name in ("fine-tune", "HyperCRL, no regulariser") else kept for name in hypercrl.METHODS}
    found = hypercrl.findings({0: seed, 1: seed, 2: seed})
    assert [finding.holds for finding in found if finding.holds is not None] == [True, True, True]
    assert found[0].measured.value == pytest.approx(2.55 / 0.1)
    seed["HyperCRL"] = lost
    assert [finding.holds for finding in hypercrl.findings({0: seed, 1: seed})][:3] == [False, False, False]


def test_control_in_small(monkeypatch, tmp_path):
    settings = {"LENGTHS": (0.6, 0.3), "STEPS": 3, "RANDOM": 20, "ROUNDS": 1, "EPISODES": 1, "UPDATES": 2}
    for name, value in settings.items():
        monkeypatch.setattr(hypercrl_control, name, value)
    monkeypatch.setattr(hypercrl_control, "ICEM", lambda **options: RandomShooting(horizon=3, candidates=4))
    figures = hypercrl_control.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    for method in ("HyperCRL", "fine-tune"):
        assert [len(figures[method][when]) for when in ("own", "end")] == [2, 2]
        assert figures[method]["own"][-1] == figures[method]["end"][-1], "nothing was learned since"
    assert isinstance(hypercrl_control.draw({0: figures, 1: figures}), Figure)


def test_findings_judge_the_returns():
    seed = {
        "HyperCRL": {"own": [60, 60, 60], "end": [58, 58, 60]},
        "fine-tune": {"own": [60, 60, 60], "end": [9, 3, 60]},
    }
    found = hypercrl_control.findings({0: seed, 1: seed, 2: seed})
    assert [finding.holds for finding in found if finding.holds is not None] == [True, True]
    assert found[0].measured.value == pytest.approx(58 / 60)
    bad = copy.deepcopy(seed)
    bad["HyperCRL"]["end"] = [20, 3, 60]
    assert hypercrl_control.findings({0: bad, 1: seed})[0].holds is False
    same = dict.fromkeys(seed, seed["HyperCRL"])
    assert hypercrl_control.findings({0: same, 1: same})[2].holds is False


def test_a_lower_triangle_becomes_a_matrix():
    np.testing.assert_array_equal(hypercrl.square([[1.0], [2.0, 3.0]]), [[1.0, np.nan], [2.0, 3.0]])
