"""The SINDy experiment in small: it runs, finds the kinematics, and judges what it measured."""

import copy

import pytest
import torch

from learneddyn.reproduce import sindy


def silent(message, share):
    pass


@pytest.fixture
def measured(monkeypatch, tmp_path):
    for name, value in (("STEPS", 1500), ("TEST_STEPS", 600), ("EPISODE", 500), ("HORIZON", 10), ("ROWS", 300)):
        monkeypatch.setattr(sindy, name, value)
    return sindy.measure(0, tmp_path, silent)


def test_a_small_run_finds_the_kinematics_and_the_map(measured):
    assert measured["kinematics"][0] < 1e-3
    assert max(measured["kinematics"]) < 5e-3  # a thousandth needs more rows
    assert measured["recovered"] == 20
    assert measured["equations"][0].startswith("x' = 1 x + 0.01")
    sparse, dense = measured["models"]["degree 2"], measured["models"]["degree 2, dense"]
    assert sparse["terms"] < 30 < dense["terms"]
    assert len(sparse["open loop"]) == 10
    assert next(finding.holds for finding in sindy.findings({0: measured}))
    assert sindy.draw({0: measured}).axes[0].get_yscale() == "log"


def test_verdicts_follow_the_figures(measured):
    bad = copy.deepcopy(measured) | {"kinematics": [0.0, 0.0, 2e-3], "recovered": 18}
    good = copy.deepcopy(measured) | {"kinematics": [0.0, 0.0, 9e-4], "recovered": 19}
    assert [finding.holds for finding in sindy.findings({0: good, 1: good})][:4] == [True] * 4
    assert [finding.holds for finding in sindy.findings({0: good, 1: bad})][:4] == [True, True, False, False]


def test_logs_are_what_they_say():
    data = sindy.log(40, 3, 0.5)
    torch.testing.assert_close(data.obs[:, 1].square() + data.obs[:, 2].square(), torch.ones(40))
    assert (data.obs[1:] == data.next_obs[:-1]).all()
    assert data.obs[0, 1] < -0.99  # it hangs
    assert (sindy.log(40, 3, 0.5).obs == data.obs).all()
