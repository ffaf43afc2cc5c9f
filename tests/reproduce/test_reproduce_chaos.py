"""Experiments on chaos in small: they run, draw, and judge what they measured."""

import copy

import numpy as np
import pytest

from learneddyn.plants import chaos
from learneddyn.reproduce import al_rnn, neural_ode, teacher_forcing


def silent(message, share):
    pass


def judged(experiment, figures):
    findings = experiment.findings({0: figures, 1: figures})
    assert len({finding.what for finding in findings}) == len(findings)
    experiment.draw({0: figures})
    return [finding.holds for finding in findings if finding.holds is not None]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(chaos, "_TRANSIENT", 30)
    for experiment in (teacher_forcing, al_rnn):
        for name, value in (("LOG", (4, 80)), ("ORBITS", 3), ("LENGTH", 260)):
            monkeypatch.setattr(experiment, name, value)
    for experiment, name, value in (
        (teacher_forcing, "UPDATES", 5),
        (teacher_forcing, "PENDULUM_UPDATES", 5),
        (teacher_forcing, "PLAYED", 4),
        (teacher_forcing, "TESTED", 3),
        (al_rnn, "RUNS", {name: (relus, 5) for name, (relus, _) in al_rnn.RUNS.items()}),
        (neural_ode, "UPDATES", 3),
        (neural_ode, "CAUSAL_UPDATES", 2),
        (neural_ode, "TRAJECTORY", 8),
        (neural_ode, "STEPS", 3),
        (neural_ode, "WINDOW", 2),
    ):
        monkeypatch.setattr(experiment, name, value)


def test_teacher_forcing(tmp_path):
    measured = teacher_forcing.measure(0, tmp_path, silent)
    assert measured["lorenz"]["floor"]["d_stsp"] > 0
    assert "| noise 0.1, alpha 1.0 |" in teacher_forcing.table({0: measured})
    judged(teacher_forcing, measured)
    good = copy.deepcopy(measured)
    good["lorenz"]["forced"] |= {"d_stsp": 1.4, "vpt": 1.3}
    good["lorenz"]["plain"] |= {"d_stsp": 1.5, "vpt": 1.2}
    for kind, error in (("noise 0.0, alpha 1.0", 1.0), ("noise 0.0, alpha 0.1", 1.1), ("noise 0.1, alpha 1.0", 1.3)):
        good["pendulum"][kind] = dict.fromkeys(map(str, teacher_forcing.HORIZONS), error)
    good["pendulum"]["noise 0.1, alpha 0.1"] = dict.fromkeys(map(str, teacher_forcing.HORIZONS), 1.0)
    assert all(judged(teacher_forcing, good))
    for path, value in (
        (("lorenz", "forced", "d_stsp"), 1.6),
        (("lorenz", "forced", "vpt"), 1.1),
        (("lorenz", "plain", "vpt"), 1.4),
        (("pendulum", "noise 0.1, alpha 0.1", "25"), 1.1),
        (("pendulum", "noise 0.0, alpha 1.0", "10"), 1.2),
    ):
        bad = copy.deepcopy(good)
        bad[path[0]][path[1]][path[2]] = value
        assert not all(judged(teacher_forcing, bad)), path


def test_the_pendulum_is_gymnasiums():
    truth = teacher_forcing.TruthDynamics("Pendulum-v1", threads=1)
    obs, torque = teacher_forcing._played(truth, 2, 7)
    truth.close()
    assert obs.shape == (2, 101, 3)
    assert np.abs(torque).max() <= 2
    angle, speed = np.arctan2(obs[0, :-1, 1], obs[0, :-1, 0]), obs[0, :-1, 2]
    after = np.clip(speed + (15 * np.sin(angle) + 3 * torque[0, :, 0]) * 0.05, -8, 8)
    assert np.allclose(obs[0, 1:, 2], after, atol=1e-4)


def test_al_rnn(tmp_path):
    measured = al_rnn.measure(0, tmp_path, silent)
    assert measured["linear"]["regions"] == 1
    good = copy.deepcopy(measured)
    for run in ("3000 updates", "12000 updates"):
        good[run] |= {"d_stsp": 2.4, "regions": 40}
    good["linear"]["d_stsp"] = 12.0
    assert all(judged(al_rnn, good))
    good["12000 updates"]["d_stsp"] = 2.6
    assert not all(judged(al_rnn, good))


def test_neural_ode(tmp_path):
    measured = neural_ode.measure(0, tmp_path, silent)
    good = copy.deepcopy(measured)
    good["plain"]["evaluations"], good["regularised"]["evaluations"] = 100, 70
    assert all(judged(neural_ode, good))
    good["regularised"]["evaluations"] = 90
    assert not all(judged(neural_ode, good))
