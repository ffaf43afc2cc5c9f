"""Imagination from logged rows with a model that has a memory: it starts with what led up to the row."""

import pytest
import torch

from learneddyn.core import Task, generator
from learneddyn.models import Koopman, RecurrentDynamics
from learneddyn.offline import RAMBO, OfflineMBPO
from learneddyn.tasks.endless import never

TASK = Task("X-v0", reward=lambda obs, action, after: after[:, 0], terminated=never)
KINDS = {
    "delays": lambda: Koopman(degree=1, delays=3),
    "gru": lambda: RecurrentDynamics(width=8, window=4, updates=3),
}
SMALL = {
    "policy_kwargs": {"net_arch": (8, 8)}, "batch_size": 16, "rollout_batch": 30, "horizon": 2, "device": "cpu",
    "seed": 0, "task": TASK,
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request, log):
    built = KINDS[request.param]()
    built.fit(log, rng=generator(0))
    return built


def test_an_imagined_first_step_is_that_of_the_remembered_row(model, endless):
    agent = OfflineMBPO("MlpPolicy", endless, model=model, sampler="mean", **SMALL).learn(1)
    rows = agent.imagine()
    rows = rows[rows.positions() == 0]
    at = (rows.obs[:, None] == endless.obs).all(dim=2).long().argmax(dim=1)
    assert torch.equal(endless.obs[at], rows.obs)
    assert (endless.positions()[at] > 0).any(), "some rollouts start within an episode"
    wanted = model.predict(rows.obs, rows.action, model.remembered(endless)[at])
    torch.testing.assert_close(rows.next_obs, wanted.mean[0])
    blank = model.predict(rows.obs, rows.action).mean[0]
    assert (rows.next_obs - blank).abs().max() > 1e-4, "what is remembered plays a part"


def test_rambo_refuses_a_model_with_memory(endless):
    model = KINDS["gru"]()
    model.fit(endless, rng=generator(0))
    with pytest.raises(ValueError, match="RecurrentDynamics must keep no memory here"):
        RAMBO("MlpPolicy", endless, model=model, **SMALL).learn(1)
