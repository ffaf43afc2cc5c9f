"""The halt rate: counted over all the steps a trust is asked about, and logged by the agents that halt."""

import torch

from learneddyn.core import State, Task, generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import MOPO, MOReL
from learneddyn.offline.halting import Halting
from learneddyn.tasks.endless import never


def positive(state, action, after):
    return after.obs[:, 0] > 0


def test_refused_steps_are_counted_until_they_are_told():
    halting = Halting(positive, rule="first column at most", threshold=0.0)
    assert halting.share() == 0.0
    for values in ([1.0, -1.0], [1.0, 1.0, -1.0, 2.0]):
        obs = torch.tensor(values)[:, None]
        state = State(obs, torch.zeros(len(obs), dtype=torch.long))
        assert torch.equal(halting(state, obs, state), positive(state, obs, state))
    assert halting.share() == 2 / 6
    assert halting.share() == 0.0


def test_morel_logs_its_halt_rate(endless, listen):
    """Where no row is terminated by the task, the halts are the rows that are."""
    model = ProbabilisticEnsemble(num_members=3, num_elites=3, hidden=[16], max_epochs=2, learn_reward=True)
    model.fit(endless, rng=generator(0))
    shared = {"policy_kwargs": {"net_arch": (8,)}, "batch_size": 20, "rollout_batch": 50, "device": "cpu", "seed": 0}
    shared |= {"model": model, "task": Task("Example-v0", terminated=never), "horizon": 3}
    lines = []
    for kind, own in ((MOReL, {"pessimism": 2.0}), (MOPO, {})):
        agent = kind("MlpPolicy", endless, **own, **shared)
        told = listen(agent)
        agent.learn(1)
        lines.append((agent, told[0]))
    (morel, first), (_, second) = lines
    halted = float(morel.imagined.unpack(morel.imagined.rows()).terminated.float().mean())
    assert 0 < halted < 1
    assert abs(first["imagined/halted"] - halted) < 1e-6
    assert "imagined/halted" not in second
