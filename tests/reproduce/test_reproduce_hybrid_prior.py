"""The free runs of the hybrid experiment: the right simulator makes no error, and what diverges counts, but no more."""

import torch

from learneddyn.reproduce import hybrid_prior
from learneddyn.world.prior import simulated


def test_the_right_parameters_make_no_error_and_wrong_ones_do(monkeypatch):
    for name, value in (("HELD_OUT", 300), ("WINDOWS", 20), ("HORIZON", 4)):
        monkeypatch.setattr(hybrid_prior, name, value)
    train = hybrid_prior._log(100, 0)

    def right(obs, action):
        return simulated(obs, action, task=hybrid_prior.TASK)

    def wrong(obs, action):
        return simulated(obs, action, **hybrid_prior.WRONG)

    def lost(obs, action):
        return obs * torch.inf

    errors = [hybrid_prior.free_run(step, train, 0) for step in (right, wrong, lost)]
    assert max(errors[0]) < 0.02, "contacts from a cold solver, float32 observations"
    assert min(errors[1]) > 0.05
    assert errors[1] == sorted(errors[1])
    assert errors[2] == [hybrid_prior.MOST] * 4
