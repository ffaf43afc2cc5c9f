"""The Koopman experiment in small: it finds the six modes, runs free, and judges what it measured."""

import copy

import pytest
import torch

from learneddyn.reproduce import koopman


def silent(message, share):
    pass


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    small = {"ROWS": 300, "PAIRS": 600, "STEPS": 1200, "TEST_STEPS": 400, "HORIZON": 12, "WINDOWS": 50}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(koopman, name, value)
        yield koopman.measure(0, tmp_path_factory.mktemp("koopman"), silent)


def test_six_modes_are_true_and_four_are_flagged(measured):
    found = koopman.findings({0: measured})
    assert [finding.holds for finding in found[:3]] == [True] * 3
    assert len(measured["closed"]["residuals"]) == 10
    assert found[3].holds is None
    runs = measured["free runs"]["random policy"]
    assert runs[koopman.BEST][0] < runs["linear"][0] / 10
    assert all(len(errors) == 12 for errors in runs.values())
    assert koopman.draw({0: measured}).axes[0].get_yscale() == "log"


def test_verdicts_follow_the_figures(measured):
    bad = copy.deepcopy(measured)
    bad["closed"]["residuals"][5] = 1e-3
    bad["closed"]["eigenvalues"][0] = [0.3, 0.0]
    bad["free runs"]["random policy"][koopman.BEST][koopman.JUDGED - 1] = 0.5
    judged = {finding.what: finding.holds for finding in koopman.findings({0: bad, 1: bad})}
    assert [holds for holds in judged.values() if holds is not None] == [False, False, True, False]


def test_logs_are_what_they_say():
    pairs = koopman.duffing(0)
    energy = [
        0.5 * part[:, 1].square() - 0.5 * part[:, 0].square() + 0.25 * part[:, 0] ** 4
        for part in (pairs.obs, pairs.next_obs)
    ]
    torch.testing.assert_close(*energy, atol=1e-4, rtol=1e-4)
    log = koopman.pendulum(30, 3, 0.9)
    assert (log.obs[1:] == log.next_obs[:-1]).all()
    assert (log.action[1:] - log.action[:-1]).abs().mean() < 0.8
    assert (koopman.pendulum(30, 3, 0.9).obs == log.obs).all()
