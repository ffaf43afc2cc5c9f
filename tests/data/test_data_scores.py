import gymnasium as gym
import numpy as np
import pytest

from learneddyn.data import scores

CHEAP = ("InvertedPendulum-v5", "CartPole-v1", "Reacher-v5", "MountainCarContinuous-v0")


def test_every_entry_is_an_environment_and_tells_its_source():
    for real_id, entry in scores.REFERENCES.items():
        spec = gym.spec(real_id)
        assert "random" in entry.source
        assert "expert" in entry.source
        assert entry.expert is None or entry.expert > entry.random
        if "reward_threshold" in entry.source:
            assert entry.expert == spec.reward_threshold
        if "can be had" in entry.source:
            assert entry.expert == spec.max_episode_steps


def test_d4rl_references():
    """As in d4rl/infos.py, REF_MIN_SCORE and REF_MAX_SCORE."""
    assert scores.reference("HalfCheetah-v5")[:2] == (-280.178953, 12135.0)
    assert scores.reference("Hopper-v5")[:2] == (-20.272305, 3234.3)
    assert scores.reference("Walker2d-v5")[:2] == (1.629008, 4592.3)


@pytest.mark.parametrize("real_id", CHEAP)
def test_random_references_can_be_measured_again(real_id):
    returns = scores.measure_random(real_id, 30)
    error = returns.std(ddof=1) / 30**0.5
    assert abs(returns.mean() - scores.reference(real_id).random) < 4 * error


def test_score_is_0_for_random_and_100_for_the_expert():
    low, high, _ = scores.reference("Hopper-v5")
    assert scores.normalized_score("Hopper-v5", low) == 0.0
    assert scores.normalized_score("Hopper-v5", high) == 100.0
    middle = scores.normalized_score("Hopper-v5", [low, (low + high) / 2])
    np.testing.assert_allclose(middle, [0.0, 50.0], atol=1e-12)


def test_a_score_goes_with_its_table():
    """Hopper's NeoRL references differ from D4RL's; NeoRL-2's tasks have names of their own."""
    assert scores.normalized_score("Hopper-v5", [5.0, 3294.0], table="neorl").tolist() == [0.0, 100.0]
    assert scores.normalized_score("Hopper-v5", 3294.0) > 101.0
    assert scores.normalized_score("Pipeline", (751.0 - 296.0) / 2, table="neorl2") == 50.0
    for entry in (entry for name in ("neorl", "neorl2") for entry in scores.TABLES[name].values()):
        assert entry.expert > entry.random
        assert "NeoRL" in entry.source
    with pytest.raises(scores.UnknownReference, match="no reference returns for 'Ant-v5' in the table 'neorl'; there"):
        scores.reference("Ant-v5", "neorl")
    with pytest.raises(scores.UnknownReference, match="table must be one of gymnasium, neorl, neorl2, got 'atari'"):
        scores.reference("Ant-v5", "atari")


def test_what_is_not_in_the_table_is_an_error():
    with pytest.raises(
        scores.UnknownReference, match=r"no reference returns for 'Hopper-v2'; there are some for Ant-v5"
    ):
        scores.reference("Hopper-v2")
    with pytest.raises(scores.UnknownReference, match="'Pendulum-v1' has no expert return to normalise by"):
        scores.normalized_score("Pendulum-v1", 0.0)
