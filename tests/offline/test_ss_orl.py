"""Semi-supervised offline learning: which trajectories keep their actions, and what fills in the others."""

from dataclasses import replace

import pytest
import torch

from learneddyn import data as logs
from learneddyn.core import DataError, Transitions, generator
from learneddyn.models import InverseDynamics
from learneddyn.models.inverse import r_squared
from learneddyn.offline import TD3BC, hide_actions, semi_supervised
from learneddyn.offline.dataset import episode_returns

QUICK = {"hidden": (32, 32), "learning_rate": 3e-3, "batch_size": 64, "updates": 300, "dropout": 0.0}


def test_actions_stay_in_a_few_poor_trajectories(log):
    hidden = hide_actions(log, rng=generator(0), share=0.2, below=0.5)
    number, returns = episode_returns(log)
    kept = number[hidden.labelled()].unique()
    assert len(kept) == round(0.2 * len(returns))
    assert returns[kept].max() <= returns.sort().values[round(0.5 * len(returns)) - 1]
    assert torch.equal(hidden.action[hidden.labelled()], log.action[hidden.labelled()])
    for name in ("obs", "reward", "next_obs", "terminated", "episode"):
        assert torch.equal(getattr(hidden, name), getattr(log, name))
    other = hide_actions(log, rng=generator(1), share=0.2, below=0.5)
    assert not torch.equal(other.labelled(), hidden.labelled())
    everyone = hide_actions(log, rng=generator(0), share=1.0, below=1.0)
    assert torch.equal(everyone.action, log.action)


def test_missing_actions_are_filled_in_and_the_rest_is_left_alone(log):
    hidden = hide_actions(log, rng=generator(0), share=0.5, below=0.8)
    before = hidden.action.clone()
    filled = semi_supervised(hidden, rng=generator(0), model=InverseDynamics(past=0, **QUICK))
    known = hidden.labelled()
    assert torch.equal(before.nan_to_num(9.0), hidden.action.nan_to_num(9.0))
    assert torch.equal(filled.data.action[known], log.action[known])
    assert torch.equal(filled.std > 0, ~known[:, None].expand(-1, 2))
    # The first action moves the first column by 0.3, the second is multiplied by a state: noise of 0.02 hides it more.
    assert r_squared(filled.data.action[~known, :1], log.action[~known, :1]) > 0.9
    assert filled.report.metrics["holdout_r2"] > 0.3
    TD3BC("MlpPolicy", filled.data, seed=0, device="cpu", policy_kwargs={"net_arch": (8,)}).learn(2)


def test_a_fitted_model_is_taken_as_it_is(log):
    model = InverseDynamics(**QUICK | {"updates": 20})
    model.fit(log, rng=generator(0))
    before = model.digest()
    free = logs.without_actions(log)
    filled = semi_supervised(free, rng=generator(1), model=model)
    assert filled.report is None
    assert model.digest() == before
    assert torch.equal(filled.data.action, model.predict(log).mean)


def test_minari_ids(log, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    logs.save(log, "mine/labelled-v0")
    logs.save(logs.without_actions(log), "mine/states-v0", action_free=True)
    filled = semi_supervised(
        ["mine/labelled-v0", "mine/states-v0"], rng=generator(0), model=InverseDynamics(**QUICK | {"updates": 20})
    )
    assert len(filled.data) == 2 * len(log)
    assert torch.equal(filled.data.action[: len(log)], log.action)
    with pytest.raises(DataError, match=r"'mine/states-v0' holds no action in .*learneddyn.offline.semi_supervised"):
        TD3BC("MlpPolicy", "mine/states-v0", device="cpu")


def test_what_cannot_be_labelled_is_named(log):
    with pytest.raises(DataError, match="every row of data set 'example_transitions' holds an action"):
        semi_supervised(log, rng=generator(0))
    with pytest.raises(DataError, match="got 0 rows with actions in 0 of"):
        semi_supervised(logs.without_actions(log), rng=generator(0))
    with pytest.raises(ValueError, match=r"0 < share <= below <= 1, got share=0.6, below=0.5"):
        hide_actions(log, rng=generator(0), share=0.6)
    few = Transitions.cat([log[log.episode == number] for number in log.episode.unique()[:5]])
    with pytest.raises(ValueError, match=r"share=0.1 labels 0 of 5 trajectories"):
        hide_actions(few, rng=generator(0))
    with pytest.raises(DataError, match="NaN or infinity in 'obs'"):
        semi_supervised(replace(logs.without_actions(log), obs=log.obs / 0), rng=generator(0))
