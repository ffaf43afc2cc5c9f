"""Partial observation and hidden velocities in small: they run, and judge what they measured."""

import copy

import pytest
import torch

from learneddyn.reproduce import hidden_velocity, partial_observation


def silent(message, share):
    pass


@pytest.fixture(scope="module")
def remembered(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cells = {name: cell | {"updates": 2} for name, cell in partial_observation.CELLS.items()}
        for name, value in (("TRAIN", 5), ("TEST", 3), ("CELLS", cells)):
            patch.setattr(partial_observation, name, value)
        return partial_observation.measure(0, tmp_path_factory.mktemp("partial"), silent)


def test_settled_errors_are_judged_and_conditions_measured(remembered):
    found = partial_observation.findings({0: remembered})
    assert [finding.holds for finding in found][-3:] == [True, True, True], "the conditioning needs no training"
    good = copy.deepcopy(remembered)
    for name in partial_observation.CELLS:
        good[name]["settled"] = good["memoryless"]["settled"] / 21
    assert all(finding.holds is not False for finding in partial_observation.findings({0: good}))
    good["S4D"]["settled"] *= 1.1
    assert partial_observation.findings({0: good})[1].holds is False
    assert len(remembered["GRU"]["by step"]) == partial_observation.STEPS
    assert "| S4D |" in partial_observation.table({0: remembered})
    assert partial_observation.draw({0: remembered}).axes[0].get_yscale() == "log"


def test_nothing_but_the_angle_is_seen():
    data = partial_observation.log(2, 0)
    assert data.obs.shape == (120, 2)
    torch.testing.assert_close(data.obs.norm(dim=1), torch.ones(120))


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TRAIN", 300), ("TEST", 200), ("EPOCHS", 1), ("ONLINE", 128), ("ROLLOUT", 64)):
            patch.setattr(hidden_velocity, name, value)
        patch.setitem(hidden_velocity.PAPER, "batch_size", 16)
        return hidden_velocity.measure(0, tmp_path_factory.mktemp("hidden"), silent)


def test_velocities_are_judged_on_logs_and_beside_the_agent(estimated):
    good = copy.deepcopy(estimated)
    good["pendulums"]["a step later"] |= {"R2": [0.96], "prototypes": 8}
    good["online"] = [0.1, 0.97]
    assert [finding.holds for finding in hidden_velocity.findings({0: good})][:4] == [True, None, True, True]
    good["online"] = [0.97, 0.1]
    assert hidden_velocity.findings({0: good})[2].holds is False, "the last rollout counts"
    assert "HalfCheetah's torso, column 9" in hidden_velocity.table({0: estimated})
    assert len(hidden_velocity.draw({0: estimated}).axes) == 4


def test_variants_are_of_the_same_steps():
    rows = hidden_velocity.real_rows(hidden_velocity.SYSTEMS["pendulums"], 80, 0)
    later, single, now = rows.values()
    assert later.history.shape == (80, 6, 3)
    assert torch.equal(single.history, later.history[:, -1:])
    assert torch.equal(single.hidden, later.hidden)
    assert torch.equal(now.hidden[1:8], later.hidden[:7])


def test_masses_differ_between_episodes():
    env = hidden_velocity.pendulum()
    masses = []
    for seed in range(5):
        env.reset(seed=seed)
        masses.append(env.unwrapped.m)
    assert len(set(masses)) == 5
    assert all(0.4 <= mass <= 2.5 for mass in masses)
