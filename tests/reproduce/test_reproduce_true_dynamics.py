"""MuJoCo itself as the model of offline learners: what its certainty leaves of them, and the experiment in small."""

import copy
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from learneddyn.data import collect
from learneddyn.offline import MOBILE, MOPO, RAVL
from learneddyn.offline.model_based import bellman_inconsistency
from learneddyn.offline.sac import diversity_loss
from learneddyn.offline.weight_rule import penalties_of
from learneddyn.reproduce import true_dynamics
from learneddyn.world import PENALTIES
from learneddyn.world.truth import TruthDynamics

TINY = {
    "policy_kwargs": {"net_arch": (8,)},
    "batch_size": 20,
    "rollout_batch": 15,
    "rollout_every": 3,
    "horizon": 3,
    "task": true_dynamics.ENV,
    "device": "cpu",
    "seed": 0,
}


@pytest.fixture(scope="module")
def log():
    return collect(true_dynamics.ENV, steps=300, behaviour=true_dynamics.Balancer(0), lanes=2, seed=0, progress=False)


@pytest.fixture(scope="module")
def truth():
    simulator = TruthDynamics(true_dynamics.ENV, threads=1)
    yield simulator
    simulator.close()


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


@pytest.mark.parametrize("penalty", ["max_aleatoric", "ensemble_std"])
def test_a_penalty_on_the_truth_is_no_penalty(log, truth, penalty):
    """Zero on every logged step, and so MOPO at any λ is MOPO at λ = 0, bit for bit."""
    assert not penalties_of(truth, log, PENALTIES[penalty]).any()
    charged, free = (
        MOPO("MlpPolicy", log, model=truth, penalty=penalty, penalty_weight=weight, **TINY).learn(5)
        for weight in (1000.0, 0.0)
    )
    assert torch.equal(weights(charged), weights(free))
    assert torch.equal(charged.imagined.rows(), free.imagined.rows())


def test_mobile_in_the_truth_is_mopo(log, truth):
    """Elites that are the simulator agree exactly; without their disagreement both are one agent."""
    shared = TINY | {"actor_learning_rate": 1e-3, "entropy_backup": True}
    agent = MOBILE("MlpPolicy", log, model=truth, inconsistency=0.0, **shared).learn(5)
    assert torch.equal(weights(agent), weights(MOPO("MlpPolicy", log, model=truth, **shared).learn(5)))
    prediction = truth.predict(log.obs[:30], log.action[:30])
    twice = prediction._replace(elites=torch.zeros(2, dtype=torch.long))
    assert not bellman_inconsistency(agent.policy, twice, agent._rng, 3).any()
    with pytest.raises(ValueError, match="inconsistency compares elites and needs at least 2, the model has 1"):
        MOBILE("MlpPolicy", log, model=truth, inconsistency=0.5, **TINY).learn(1)


def test_ravl_imagines_in_the_truth_what_the_environment_does(log, truth):
    agent = RAVL("MlpPolicy", log, model=truth, n_critics=4, diversity=0.0, **TINY).learn(4)
    rows = agent.imagine()
    step = truth.open_loop(rows.obs.double(), rows.action[:, None])
    torch.testing.assert_close(step.next_obs[:, 0], rows.next_obs.double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(rows.reward, 1.0 - rows.terminated.float())


def test_diversity_cannot_turn_gradients_of_one_column():
    """A gradient with one entry has no direction but its sign: the loss is flat wherever none of them is 0."""
    slopes = torch.randn(5, 7, 1).requires_grad_()
    (flat,) = torch.autograd.grad(diversity_loss(slopes), slopes)
    assert flat.abs().max() < 1e-4
    wide = torch.randn(5, 7, 2).requires_grad_()
    (steep,) = torch.autograd.grad(diversity_loss(wide), wide)
    assert steep.abs().max() > 1e-2


def test_the_experiment_runs_in_small(monkeypatch, tmp_path):
    runs = (("MOPO", "truth", 1), ("RAVL", "truth", 1), ("MOBILE", "learned", 1))
    for name, value in (
        ("ROWS", 400),
        ("EPISODES", 2),
        ("FEW", 1),
        ("EPOCHS", 2),
        ("UPDATES", 3),
        ("ROLLED", 40),
        ("RUNS", runs),
        ("ENSEMBLE", true_dynamics.ENSEMBLE | {"hidden": (8,), "max_epochs": 1}),
    ):
        monkeypatch.setattr(true_dynamics, name, value)
    figures = true_dynamics.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    assert figures["penalty"] == 0
    for run in runs:
        found = figures[true_dynamics.title(*run)]
        assert all(len(found[curve]) == 2 for curve in ("return", "value", "edge", "spread"))
    assert true_dynamics.findings({0: figures, 1: copy.deepcopy(figures)})
    assert isinstance(true_dynamics.draw({0: figures}), Figure)


def test_ravl_is_judged_against_the_penalty_methods():
    def run(last: float) -> dict:
        return {"last": last, "return": [last] * 6, "value": [20.0] * 6, "edge": [0.1] * 6, "spread": [0.3] * 6}

    entry = {true_dynamics.title(*key): run(900.0 if key[0] == "RAVL" else 5.0) for key in true_dynamics.RUNS}
    entry |= {"behaviour": 130.0, "BC": 150.0, "penalty": 0.0}
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}

    def judged() -> list[bool]:
        return [row.holds for row in true_dynamics.findings(figures) if row.holds is not None]

    assert judged() == [True, True]
    assert isinstance(true_dynamics.draw(figures), Figure)
    figures[1][true_dynamics.title("MOPO", "truth", 1)]["last"] = 1000.0
    figures[2]["penalty"] = 1e-9
    assert judged() == [False, False]


def test_the_balancer_is_of_mean_length_and_clipped():
    force, state = true_dynamics.Balancer(0).predict(np.array([[0.0, 1.0, 0.0, 0.0], [0.0, 0.01, 0.0, -0.1]]), None)
    assert force.shape == (2, 1)
    assert force[0] == 3
    assert state is None
    returns = true_dynamics.evaluate(true_dynamics.Balancer(1), true_dynamics.ENV, episodes=10).returns
    assert 50 < returns.mean() < 400
