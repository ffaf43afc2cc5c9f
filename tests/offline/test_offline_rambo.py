import copy
from itertools import pairwise

import pytest
import torch

from learneddyn.core import State, Task, generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import RAMBO, OfflineMBPO
from learneddyn.tasks.endless import never
from learneddyn.testing import check_policy

SMALL = {
    "policy_kwargs": {"net_arch": (16, 16)},
    "batch_size": 32,
    "rollout_batch": 40,
    "rollout_every": 4,
    "horizon": 3,
    "device": "cpu",
    "seed": 0,
}
TURN = {"cloning_updates": 0, "adversary_batch": 64, "adversary_steps": 20}


@pytest.fixture(scope="module")
def fitted(log):
    ensemble = ProbabilisticEnsemble(
        num_members=3, num_elites=2, hidden=[16], max_epochs=3, learn_reward=True, learn_termination=True
    )
    ensemble.fit(log, rng=generator(0))
    return ensemble


@pytest.fixture
def model(fitted):
    return copy.deepcopy(fitted)


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def test_without_adversary_and_cloning_it_is_mbpo(log, model):
    shared = {**SMALL, "real_ratio": 0.5, "normalize_obs": True, "model": model}
    rambo = RAMBO("MlpPolicy", log, adversary=0.0, cloning_updates=0, **shared).learn(9)
    assert torch.equal(weights(rambo), weights(OfflineMBPO("MlpPolicy", log, **shared).learn(9)))
    played = RAMBO("MlpPolicy", log, adversary=1.0, **TURN, **shared).learn(9)
    assert not torch.equal(weights(rambo), weights(played))


def test_the_adversary_alone_lowers_the_value_of_what_comes_next(endless, model, monkeypatch):
    """A linear critic that likes the first column: the model learns to predict less of it, turn by turn."""
    kwargs = {"policy_kwargs": {"net_arch": {"pi": (16,), "qf": ()}}, "model": model, "model_learning_rate": 3e-3}
    task = Task("Example-v0", terminated=never)
    agent = RAMBO("MlpPolicy", endless, task=task, adversary=1.0, **(SMALL | TURN | kwargs))
    agent.learn(1)
    weight = agent.policy.critic.net.weights[0]
    with torch.no_grad():
        weight.zero_()
        weight[:, 0] = 1.0
    monkeypatch.setattr(agent, "_misfit", lambda: torch.zeros(()))
    found = []
    for _ in range(4):
        with torch.no_grad():
            found.append(float(model.predict(endless.obs, endless.action).mean[model.elites, :, 0].mean()))
        agent._adversarial_turn()
    assert all(later < earlier for earlier, later in pairwise(found))


def test_the_published_weight_barely_moves_a_model_that_fits(log, fitted):
    """Against the same fit without adversary, predictions stay within a twentieth of their deviation."""
    predicted = []
    for weight in (1e-12, 3e-4, 1.0):
        model = copy.deepcopy(fitted)
        agent = RAMBO("MlpPolicy", log, model=model, adversary=weight, **(SMALL | TURN)).learn(1)
        predicted.append(agent.model.predict(log.obs, log.action))
    none, light, heavy = ((p.mean - predicted[0].mean).abs() / predicted[0].std for p in predicted)
    assert none.max() == 0
    assert light.mean() < 0.05
    assert heavy.mean() > 5 * light.mean()


def test_likelihood_of_the_mixture(log, model):
    agent = RAMBO("MlpPolicy", log, model=model, adversary=0.0, cloning_updates=0, **SMALL).learn(1)
    rows = log[:20]
    found = agent.log_likelihood(State(rows.obs, rows.episode), rows.action, rows.next_obs, rows.reward)
    p = model.predict(rows.obs, rows.action)
    mean = torch.cat((p.mean, p.reward_mean[..., None]), 2)[p.elites].transpose(0, 1)
    std = torch.cat((p.std, p.reward_std[..., None]), 2)[p.elites].transpose(0, 1)
    parts = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(20, 2)), parts)
    wanted = mixture.log_prob(torch.cat((rows.next_obs, rows.reward[:, None]), 1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_policy_starts_as_a_clone(log, model):
    shared = {**SMALL, "model": model, "adversary": 0.0}
    cloned, fresh = (RAMBO("MlpPolicy", log, cloning_updates=count, **shared) for count in (150, 0))
    errors = []
    for agent in (cloned, fresh):
        agent.policy.actor.optimizer.param_groups[0]["lr"] = 1e-2
        if agent.cloning_updates:
            agent._clone()
        errors.append((agent.policy.actor.mode(log.obs) - log.action).square().mean())
    assert errors[0] < errors[1]


def test_it_is_saved_and_goes_on(log, model, tmp_path):
    agent = RAMBO("MlpPolicy", log, model=model, adversary=1e-3, **(SMALL | TURN)).learn(3)
    agent.save(tmp_path / "agent")
    loaded = RAMBO.load(tmp_path / "agent", data=log, device="cpu")
    ask = log.obs[:5], log.action[:5]
    torch.testing.assert_close(loaded.model.predict(*ask).mean, agent.model.predict(*ask).mean)
    loaded.learn(2, reset_num_timesteps=False)
    check_policy(loaded, log.spaces)


def test_arguments_outside_their_range(log):
    with pytest.raises(ValueError, match="adversary must be at least 0, got -1"):
        RAMBO("MlpPolicy", log, adversary=-1.0, **SMALL)
