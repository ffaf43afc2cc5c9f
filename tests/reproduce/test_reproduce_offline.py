"""The experiments with offline learners, in small: they run, and judge what they measured."""

import copy
import json
from functools import partial
from statistics import NormalDist

import numpy as np
import pytest
from matplotlib.figure import Figure

from learneddyn.offline import BC, TD3BC
from learneddyn.reproduce import conservatism, edge_of_reach


def judged(findings) -> list[bool]:
    return [finding.holds for finding in findings if finding.holds is not None]


def silent(what: str, share: float) -> None:
    pass


def test_conservatism_runs_in_small(monkeypatch, tmp_path):
    quick = {"device": "cpu", "policy_kwargs": {"net_arch": (8,)}}
    methods = {"BC": BC, "TD3": partial(TD3BC, alpha=9.0), "IQL": BC, "TD3+BC": TD3BC}
    makers = {name: lambda data, seed, kind=kind: kind("MlpPolicy", data, **quick) for name, kind in methods.items()}
    for name, value in (("STEPS", 1600), ("UPDATES", 3), ("EPISODES", 1), ("METHODS", makers)):
        monkeypatch.setattr(conservatism, name, value)
    figures = conservatism.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert len(figures) == 2 * (1 + 4)
    assert all(-2000 < value <= 0 for value in figures.values())
    assert conservatism.findings({0: figures, 1: figures})
    assert isinstance(conservatism.draw({0: figures}), Figure)


def test_conservatism_judges_the_order_of_the_methods():
    entry = {"narrow, log": -180.0, "narrow, BC": -180.0, "narrow, TD3+BC": -175.0, "narrow, IQL": -181.0}
    entry |= {"narrow, TD3": -1400.0, "wide, log": -680.0, "wide, BC": -700.0}
    entry |= {"wide, TD3+BC": -390.0, "wide, IQL": -400.0, "wide, TD3": -170.0}
    figures = {seed: {name: value - seed for name, value in entry.items()} for seed in range(3)}
    assert judged(conservatism.findings(figures)) == [True] * 6
    for seed in figures.values():
        seed["narrow, TD3"], seed["wide, IQL"] = -500.0, -800.0
    assert judged(conservatism.findings(figures)) == [False, True, True, True, True, False]


def test_the_controller_swings_up_and_its_quality_matters():
    good, poor = (conservatism.Swinger(quality, 0, noise=0.0) for quality in (0.8, 0.1))
    returns = [conservatism.evaluate(policy, "Pendulum-v1", episodes=8).mean for policy in (good, poor)]
    assert returns[0] > -300 > -900 > returns[1]


def test_edge_of_reach_runs_in_small(monkeypatch, tmp_path):
    for name, value in (
        ("EPOCHS", 20),
        ("EPISODE", 2),
        ("UPDATES", 1),
        ("ROLLOUTS", 4),
        ("ENSEMBLES", {"small": (2, 1.0)}),
    ):
        monkeypatch.setattr(edge_of_reach, name, value)
    monkeypatch.setattr(edge_of_reach, "BASE", {3: "cut at 3", 5: "cut at 5", 10: "cut at 10"})
    figures = edge_of_reach.measure(0, tmp_path, silent)
    assert json.loads(json.dumps(figures)) == figures
    assert len(figures["small"]["return"]) == 20
    assert edge_of_reach.findings({0: figures, 1: copy.deepcopy(figures)})


def test_the_chain_has_its_closed_form():
    """Value of the start: γ^k times the largest over actions of the least over critics of normal draws."""
    q = np.random.default_rng(3).normal(size=(4, 6, 20))
    assert edge_of_reach.chain(4, 3) == pytest.approx(0.99**5 * q[:, -1].min(axis=0).max())
    assert edge_of_reach.chain(4, 3, patched=True) == 0
    grid = np.linspace(-6, 6, 4001)
    below = np.array([NormalDist().cdf(x) for x in grid]) ** 20  # the largest of 20 normals
    wanted = 0.99**5 * float((grid[1:] * np.diff(below)).sum())
    found = np.mean([edge_of_reach.chain(1, seed) for seed in range(1500)])
    assert found == pytest.approx(wanted, abs=0.05)


def test_edge_of_reach_is_judged_on_every_seed():
    def run(end: float) -> dict:
        return {"return": [0.0] * 39 + [end], "value": list(np.linspace(1, 40, 40)), "edge": [0.0] * 40}

    entry = {"cut at 3": run(-20.0), "cut at 5": run(-19.0), "cut at 10": run(25.8)}
    entry |= {name: run(-17.0) for name in edge_of_reach.ENSEMBLES}
    entry["chain"] = {"1": 1.8, "2": 0.9, "10": -0.5, "50": -1.4, "patched": 0.0}
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert judged(edge_of_reach.findings(figures)) == [True] * 6
    assert isinstance(edge_of_reach.draw(figures), Figure)
    figures[1]["cut at 5"]["return"][-1] = 3.0
    figures[2]["chain"]["patched"] = 0.1
    assert judged(edge_of_reach.findings(figures)) == [True, False, True, True, True, False]
