"""The experiments on what a model knows about itself, in small: MOREC's filter, and the penalties."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import rankdata

from learneddyn.core import Transitions, generator
from learneddyn.reproduce import morec, penalties
from learneddyn.world import PENALTIES
from learneddyn.world.truth import TruthDynamics


def verdicts(findings) -> list[bool]:
    return [finding.holds for finding in findings if finding.holds is not None]


def silent(what: str, share: float) -> None:
    pass


def test_the_refrigerator_has_its_fixed_points():
    """Off it warms to the room; at full power to 20 - 1.5 / 0.05 = -10; the controller holds its set point nearly."""
    for act, end in ((torch.zeros_like, 20.0), (torch.ones_like, -10.0)):
        temperature = torch.tensor([[3.0], [9.0]])
        for _ in range(400):
            temperature = morec.after(temperature, act(temperature))
        assert temperature.flatten().tolist() == pytest.approx([end, end], abs=1e-3)
    log = morec.log_of(0)
    assert len(log) == morec.EPISODES * morec.STEPS
    off = log.next_obs - morec.after(log.obs, log.action)
    assert float(off.std()) == pytest.approx(morec.NOISE, rel=0.05)
    assert torch.equal(log.obs[1 : morec.STEPS], log.next_obs[: morec.STEPS - 1])
    assert 1 < float(log.obs.min()) < 2.2
    assert 11 < float(log.obs.max()) < 14


def test_morec_runs_in_small(monkeypatch, tmp_path):
    quick = {"snapshots": 4, "games": 2, "updates": 8, "hidden": (8,), "generator_hidden": (8,), "warm_up": 2}
    for name, value in (("REWARD", quick), ("MODEL", morec.MODEL | {"max_epochs": 2}), ("STARTS", 10), ("HORIZON", 3)):
        monkeypatch.setattr(morec, name, value)
    figures = morec.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert len(figures["error"]) == 24
    assert all(math.isfinite(value) and value > 0 for value in figures["error"].values())
    assert morec.findings({0: figures, 1: figures})
    assert isinstance(morec.draw({0: figures}), Figure)


def test_morec_is_judged_on_every_seed():
    errors = {"random elite": 1.0, "softmax": 0.6, "argmax": 0.2}
    errors |= {"argmax, last only": 0.5, "argmax, clipped": 3.0, "perfect reward": 0.1}
    entry = {"error": {f"{policy}, {name}": value for policy in morec.POLICIES for name, value in errors.items()}}
    entry["curve"] = {"-5.0": (-((morec.OFFSETS + 0.2) ** 2)).tolist()}
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert verdicts(morec.findings(figures)) == [True] * 4
    figures[1]["error"]["off, softmax"] = 1.3
    figures[2]["error"]["full cooling, argmax"] = 0.7
    found = morec.findings(figures)
    assert verdicts(found) == [False, True, False, False]
    told = {finding.what: finding.measured.value for finding in found}
    assert told["full cooling: error of a perfect reward's argmax / random elite"] == pytest.approx(0.1)
    assert told["r^D's peak less the truth, full cooling at -5 °C"] == pytest.approx(-0.2)


def test_a_perfect_reward_chooses_the_nearest_step():
    temperature, power = torch.tensor([[3.0], [9.0], [-4.0]]), torch.tensor([[0.0], [1.0], [0.3]])
    true = morec.after(temperature, power)
    offset = torch.tensor([0.2, -0.1, 0.5])
    assert torch.allclose(morec.nearness(temperature, power, true + offset[:, None]), -offset.abs(), atol=1e-5)


def test_penalties_run_in_small(monkeypatch, tmp_path):
    for name, value in (
        ("ROWS", 300),
        ("ASKED", 100),
        ("STAGES", (1, 2)),
        ("MODEL", penalties.MODEL | {"max_epochs": 2, "hidden": (8,)}),
        ("AGENT", penalties.AGENT | {"rollout_batch": 30, "horizon": 4}),
    ):
        monkeypatch.setattr(penalties, name, value)
    figures = penalties.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures) == {
        f"{place}, {case}" for place in penalties.PLACES for case in (*penalties.PROTOCOLS, "known")
    }
    assert all(set(case) == set(PENALTIES) for case in figures.values())
    assert penalties.findings({0: figures, 1: figures})
    assert isinstance(penalties.draw({0: figures}), Figure)


def test_penalties_are_judged_by_the_weaker_of_two():
    values = dict.fromkeys(PENALTIES, 0.8) | {"max_aleatoric": 0.4}
    case = {name: {"AUROC": value, "Spearman": value, "tail": 3.0} for name, value in values.items()}
    cases = [f"{place}, {protocol}" for place in penalties.PLACES for protocol in (*penalties.PROTOCOLS, "known")]
    entry = {name: copy.deepcopy(case) for name in cases}
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert verdicts(penalties.findings(figures)) == [True] * 8
    figures[1]["Pendulum, transfer"]["ensemble_std"]["Spearman"] = 0.3
    assert verdicts(penalties.findings(figures)) == [True, False, *[True] * 6]


def test_auroc_is_the_rank_statistic_with_ties():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 20, 400).astype(np.float32), rng.random(400) < 0.3
    count = positive.sum()
    wanted = (rankdata(score)[positive].sum() - count * (count + 1) / 2) / (count * (400 - count))
    assert penalties.auroc(torch.tensor(score), torch.tensor(positive)) == pytest.approx(wanted)
    assert penalties.auroc(torch.ones(4), torch.tensor([True, False, True, False])) == 0.5


@pytest.mark.parametrize("name", penalties.PLACES)
def test_rows_are_steps_of_the_real_system(name, monkeypatch):
    """Seen through noisy sensors; the box of logged states lies in the wide one, and both hold what they say."""
    monkeypatch.setattr(penalties, "ROWS", 200)
    place = penalties.PLACES[name]
    truth = TruthDynamics(place.real_id, threads=1)
    logged, wide = (penalties.rows_of(place, box, truth, generator(0)) for box in (place.logged, place.wide))
    for rows in (logged, wide):
        assert isinstance(rows, Transitions)
        off = rows.next_obs - penalties.stepped(truth, rows.obs, rows.action)
        assert float(off.std()) == pytest.approx(penalties.NOISE, rel=0.1)
        assert float(rows.action.abs().max()) <= float(truth.spaces.action.high[0])
    assert bool((wide.obs.std(0) >= logged.obs.std(0) * 0.9).all())
    assert not torch.equal(logged.reward, logged.reward[:1].expand(200))  # else no method would learn from them
    truth.close()
