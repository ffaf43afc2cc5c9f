import minari
import numpy as np
import pytest
import torch

from learneddyn import data
from learneddyn.core import DataError
from learneddyn.data.grades import train
from learneddyn.data.scores import UnknownReference

QUICK = {"learning_rate": 1e-3, "learning_starts": 100, "batch_size": 64, "policy_kwargs": {"net_arch": [32, 32]}}
RUN = {"env_id": "InvertedPendulum-v5", "algorithm": "SAC", "algorithm_kwargs": QUICK, "progress": False}


def returns(transitions):
    total = torch.zeros(int(transitions.episode.max()) + 1)
    return total.index_add_(0, transitions.episode, transitions.reward)


def test_random_grade_is_the_random_collector(datasets):
    graded = data.collect_grade("CartPole-v1", "mine/random-v0", steps=60, grade="random", seed=3, progress=False)
    assert torch.equal(graded.obs, data.collect("CartPole-v1", steps=60, seed=3, progress=False).obs)
    metadata = minari.load_dataset("mine/random-v0").storage.metadata
    assert metadata["description"] == "random grade of CartPole-v1"


def test_medium_stops_at_its_goal_and_tells_what_it_reached(datasets):
    graded = data.collect_grade(
        dataset_id="mine/medium-v0", steps=600, lanes=2, grade="medium", target_return=25.0, train_steps=4000, **RUN
    )
    assert len(graded) == 600
    assert returns(graded).mean() > 12  # a random policy has 6
    dataset = minari.load_dataset("mine/medium-v0")
    text = dataset.storage.metadata["description"]
    assert text.startswith("medium grade of InvertedPendulum-v5: SAC, ")
    steps = int(text.split("SAC, ")[1].split()[0])
    assert 100 < steps < 4000
    assert steps % (4000 // 50) == 0
    assert dataset.recover_environment().spec.id == "InvertedPendulum-v5"


def test_replay_is_what_the_medium_agent_saw(datasets):
    arguments = dict(RUN) | {"target_return": 7.0, "train_steps": 1000}
    replay = data.collect_grade(dataset_id="mine/replay-v0", steps=150, grade="replay", **arguments)
    record = train("InvertedPendulum-v5", algorithm_kwargs=QUICK, train_steps=1000, goal=7.0, progress=False).record
    for name, column in record[-150:].tensors().items():
        assert torch.equal(replay.tensors()[name], column), name
    loaded = data.load("mine/replay-v0")
    assert torch.equal(loaded.next_obs, replay.next_obs)
    # Actions are those of the environment (range 3), not the rescaled ones of a replay buffer (range 1).
    assert replay.action.abs().max() > 2


def test_expert_spends_its_whole_budget_and_discrete_actions_work():
    trained = train(
        "CartPole-v1", "PPO", train_steps=128, algorithm_kwargs={"n_steps": 64, "batch_size": 64}, progress=False
    )
    assert len(trained.record) == 128
    assert trained.record.action.sum(1).eq(1).all()
    assert np.isfinite(trained.mean_return)


def test_a_grade_out_of_reach_writes_nothing(datasets):
    with pytest.raises(data.GradeNotReached, match=r"SAC reached a mean return of .* in 100 steps .* asks for 337\.1"):
        data.collect_grade(dataset_id="mine/far-v0", steps=10, grade="medium", train_steps=100, **RUN)
    assert not list(datasets.rglob("*far*"))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"algorithm": "SARSA"}, ValueError, "algorithm must be one of A2C, ARS, .*TD3.*, got 'SARSA'"),
        ({"fraction": 1.5}, ValueError, "fraction must be above 0 and at most 1, got 1.5"),
        ({"env_id": "Pendulum-v1"}, DataError, "Pendulum-v1 has no expert reference return .*give target_return"),
        ({"env_id": "Acrobot-v1"}, UnknownReference, "no reference returns for 'Acrobot-v1'"),
    ],
)
def test_bad_arguments(wrong, error, message):
    with pytest.raises(error, match=message):
        data.collect_grade(**(RUN | {"steps": 10, "grade": "medium", "train_steps": 100} | wrong))
