"""A penalty weight that carries over: medians of the log set the unit."""

from dataclasses import replace

import pytest
import torch

from learneddyn.core import DataError, Task, generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import MOPO
from learneddyn.offline.weight_rule import factor, penalties_of, weight_of
from learneddyn.tasks.endless import never
from learneddyn.world import PENALTIES

TASK = Task("Example-v0", reward=lambda obs, action, after: after[:, 0], terminated=never)
SMALL = {"policy_kwargs": {"net_arch": (8,)}, "batch_size": 20, "rollout_batch": 30, "horizon": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def model(log):
    ensemble = ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=[16], max_epochs=3)
    ensemble.fit(log, rng=generator(0))
    return ensemble


@pytest.mark.parametrize("name", PENALTIES)
def test_a_median_step_costs_c_median_rewards(log, model, name):
    penalty = PENALTIES[name]
    weight = weight_of("quantile:2", model, log, penalty)
    cost = weight * penalties_of(model, log, penalty, chunk=150)
    assert float(cost.median()) == pytest.approx(2 * float(log.reward.abs().median()), rel=1e-5)


def test_units_do_not_matter(log, model):
    """Rewards ten times as large: a weight ten times as large. Uncertainty in other units: their inverse."""
    penalty = PENALTIES["ensemble_std"]
    weight = weight_of("quantile:1", model, log, penalty)
    assert weight_of("quantile:1", model, replace(log, reward=10 * log.reward), penalty) == pytest.approx(10 * weight)
    assert weight_of("quantile:1", model, log, lambda *step: 4 * penalty(*step)) == pytest.approx(weight / 4)
    assert weight_of(0.7, model, log, penalty) == 0.7
    assert weight_of("quantile:0", model, log, penalty) == 0.0


def test_the_agent_tells_the_rule_and_the_number(endless, model, listen, tmp_path):
    ruled = MOPO("MlpPolicy", endless, model=model, task=TASK, penalty="ensemble_std", penalty_weight="quantile:1.0",
                 seed=0, **SMALL)  # fmt: skip
    lines = listen(ruled)
    ruled.learn(3, log_interval=10)
    weight = weight_of("quantile:1.0", model, endless, PENALTIES["ensemble_std"])
    assert ruled.world.penalty_weight == pytest.approx(weight)
    told = lines[-1]
    assert ruled.penalty_rule == f"quantile:1.0 -> {weight:.4g}"
    assert told["imagined/penalty_rule"] == ruled.penalty_rule
    assert told["imagined/penalty_weight"] == pytest.approx(weight)
    plain = MOPO("MlpPolicy", endless, model=model, task=TASK, penalty="ensemble_std", penalty_weight=weight, seed=0,
                 **SMALL).learn(3)  # fmt: skip
    assert plain.penalty_rule == f"{weight:.4g}"
    for one, other in zip(ruled.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    ruled.save(tmp_path / "agent")
    loaded = MOPO.load(tmp_path / "agent", data=endless, task=TASK, device="cpu")
    assert loaded.penalty_weight == "quantile:1.0"
    assert loaded.learn(1, reset_num_timesteps=False).world.penalty_weight == pytest.approx(weight)


@pytest.mark.parametrize("rule", ["quantile", "quantile:", "quantile:-1", "quantile:inf", "2.0", -1.0, "median:1"])
def test_other_rules_are_refused(rule, log, model):
    with pytest.raises(ValueError, match="a number of at least 0 or 'quantile:c'"):
        factor(rule)
    with pytest.raises(ValueError, match="penalty_weight must be a number"):
        MOPO("MlpPolicy", log, model=model, task=TASK, penalty_weight=rule, **SMALL)


def test_medians_of_zero_are_refused(log, model):
    sparse = replace(log, reward=log.reward * (torch.arange(len(log)) % 3 == 0))
    with pytest.raises(DataError, match=r"'quantile:1' needs a positive median of \|reward\| over the log, which is 0"):
        weight_of("quantile:1", model, sparse, PENALTIES["ensemble_std"])
    with pytest.raises(DataError, match="needs a positive median of uncertainty"):
        weight_of("quantile:1", model, log, lambda obs, action, prediction, after: torch.zeros(len(obs)))
