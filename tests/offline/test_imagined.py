"""Imagined experience leaves the agent as a Minari data set that says where it comes from."""

from dataclasses import replace

import minari
import pytest
import torch

from learneddyn import data as logs
from learneddyn.core import DataError, Outcome, Prediction, Task
from learneddyn.data import collect
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import BC, MOPO, MOREC, DynamicsReward, MOReL, OfflineMBPO, imagined_log, save_imagined
from learneddyn.offline.imagined import provenance
from learneddyn.offline.model_based import discrepancy
from learneddyn.tasks.endless import never

SMALL = {"policy_kwargs": {"net_arch": (8,)}, "batch_size": 20, "rollout_batch": 30, "horizon": 3, "device": "cpu"}


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))


@pytest.fixture(scope="module")
def model():
    return ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=[16], max_epochs=2)


@pytest.fixture(scope="module")
def agent(model):
    """Two imaginations of Pendulum, rewards shifted and scaled, actions in [-2, 2]."""
    log = collect("Pendulum-v1", steps=600, lanes=3, progress=False)
    shifted = {"reward_shift": 8.0, "reward_scale": 0.1}
    agent = MOPO("MlpPolicy", log, task="Pendulum-v1", model=model, penalty="ensemble_std", penalty_weight=0.5, seed=0,
                 rollout_every=2, **shifted, **SMALL)  # fmt: skip
    kept = []
    imagine = agent.imagine
    agent.imagine = lambda: kept.append(imagine()) or kept[-1]
    agent.learn(3)
    del agent.imagine
    agent.kept = kept
    return agent


def test_the_pool_is_what_the_world_gave(agent):
    rows, given = imagined_log(agent), agent.kept
    assert len(given) == 2
    assert len(rows) == sum(len(part) for part in given)
    for name in ("obs", "next_obs", "terminated"):
        assert torch.equal(getattr(rows, name), torch.cat([getattr(part, name) for part in given])), name
    for name in ("action", "reward"):
        torch.testing.assert_close(
            getattr(rows, name), torch.cat([getattr(part, name) for part in given]), rtol=1e-5, atol=1e-4
        )
    assert rows.episode.unique_consecutive(return_counts=True)[1].tolist() == [3] * 60
    assert bool((rows.action.abs() <= 2).all())


def test_it_is_written_with_its_provenance(agent, model, datasets, tmp_path):
    dataset = save_imagined(agent, "dream/pendulum-v0")
    assert dataset.total_steps == 180
    rows = logs.load("dream/pendulum-v0")
    assert torch.equal(rows.obs, imagined_log(agent).obs)
    card = logs.read_provenance("dream/pendulum-v0")
    model.save(tmp_path / "model")
    assert card["model"]["sha256"] in (tmp_path / "model" / "model.json").read_text()
    assert card["model"]["class"] == "learneddyn.models.ensemble.ProbabilisticEnsemble"
    wanted = {"kind": "imagined", "horizon": 3, "penalty": "ensemble_std", "penalty_weight": 0.5, "policy": "MOPO"}
    assert {name: card[name] for name in wanted} == wanted
    assert (card["sampler"], card["updates"], card["seed"]) == ("elite", 3, 0)
    assert card["filter"] is None
    assert card["halt"] is None
    loaded = minari.load_dataset("dream/pendulum-v0")
    assert loaded.recover_environment(eval_env=True).spec.id == "Pendulum-v1"
    assert not bool(loaded[0].terminations.any())
    assert bool(loaded[0].truncations[-1])  # cut, not ended
    with pytest.raises(logs.DatasetExists):
        save_imagined(agent, "dream/pendulum-v0")
    BC("MlpPolicy", "dream/pendulum-v0", task="Pendulum-v1", seed=0, device="cpu").learn(2)


def test_what_chose_and_what_halted_are_written(endless, datasets):
    """MOREC's dynamics reward and filter, MOReL's discrepancy, each with its threshold and what a halt pays."""
    task = Task("Example-v0", terminated=never)
    heads = ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=[16], max_epochs=2, learn_reward=True)
    judge = DynamicsReward(snapshots=2, updates=5, hidden=(8,), generator_hidden=(8,), warm_up=1, batch_size=16)
    shared = {"task": task, "model": heads, "seed": 0} | SMALL
    morec = MOREC("MlpPolicy", endless, dynamics_reward=judge, filter_limit=9.0, **shared).learn(1)
    save_imagined(morec, "dream/morec-v0")
    card = logs.read_provenance("dream/morec-v0")
    assert card["sampler"] == "learneddyn.offline.transition_filter.TransitionFilter"
    reward = {"class": "learneddyn.offline.dynamics_reward.DynamicsReward", "sha256": judge.digest()}
    assert card["filter"] == {"dynamics_reward": reward, "temperature": 0.1, "draws": 2, "limit": 9.0}
    least = float(judge(endless.obs, endless.action, endless.next_obs).quantile(0.01))
    halt = {"rule": "dynamics reward below", "reward": "kept", "least_dynamics_reward": "quantile:0.01"}
    assert card["halt"] == halt | {"threshold": pytest.approx(least)}
    rows = imagined_log(morec)
    assert bool(rows.terminated.any())
    assert torch.equal(rows.terminated, judge(rows.obs, rows.action, rows.next_obs) < card["halt"]["threshold"])
    morel = MOReL("MlpPolicy", endless, pessimism=2.0, halt_offset=-3.0, **shared).learn(1)
    halt = {"rule": "max_pairwise_diff above", "threshold": pytest.approx(discrepancy(heads, endless) / 2)}
    halt |= {"reward": pytest.approx(float(endless.reward.min()) - 3), "pessimism": 2.0}
    assert provenance(morel)["halt"] == halt
    assert (provenance(morel)["sampler"], provenance(morel)["filter"]) == ("elite", None)


def test_terminations_and_full_rings(log):
    """Rollouts end where the model ends them; the ring keeps the newest rows, its oldest rollout may be torn."""
    task = Task("Example-v0", reward=lambda obs, action, after: after[:, 0], terminated=lambda obs: obs[:, 0] > 0.5)
    ensemble = ProbabilisticEnsemble(num_members=2, num_elites=2, hidden=[16], max_epochs=2)
    ends = replace(log, terminated=log.next_obs[:, 0] > 0.5)
    agent = OfflineMBPO("MlpPolicy", ends, task=task, model=ensemble, seed=0, rollout_every=1, retain=2, **SMALL)
    agent.learn(5)
    rows = imagined_log(agent)
    assert len(rows) == agent.imagined.capacity == 180
    assert torch.equal(rows.terminated, rows.next_obs[:, 0] > 0.5)
    lengths = rows.episode.unique_consecutive(return_counts=True)[1]
    assert int(lengths.max()) == 3
    last = torch.cat((rows.episode[1:] != rows.episode[:-1], torch.ones(1, dtype=torch.bool)))
    assert bool(last[rows.terminated].all())


class Corner:
    """A plant with one state only: every rollout begins where the last one was cut."""

    num_members, elites = 1, torch.zeros(1, dtype=torch.long)

    def __init__(self, spaces) -> None:
        self.spaces = spaces

    def predict(self, obs, action, memory=None):
        return Prediction(torch.zeros_like(obs)[None], torch.zeros_like(obs)[None], self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(torch.zeros_like(obs))


def test_rollouts_that_touch_are_told_apart(log):
    zero = torch.zeros_like(log.obs)
    task = Task("Corner-v0", reward=lambda obs, action, after: action[:, 0], terminated=never)
    still = replace(log, obs=zero, next_obs=zero, terminated=torch.zeros_like(log.terminated))
    agent = OfflineMBPO("MlpPolicy", still, task=task, model=Corner(log.spaces), seed=0, **SMALL).learn(1)
    assert imagined_log(agent).episode.unique_consecutive(return_counts=True)[1].tolist() == [3] * 30


def test_an_agent_that_has_not_imagined(log):
    fresh = OfflineMBPO("MlpPolicy", log, seed=0, **SMALL)
    with pytest.raises(DataError, match="this OfflineMBPO has imagined nothing yet"):
        imagined_log(fresh)
