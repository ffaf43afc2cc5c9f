import copy
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

from learneddyn import configs
from learneddyn.core import DataError, Outcome, Prediction, State, Task, generator
from learneddyn.data import collect
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import COMBO, MOBILE, MOPO, RAVL, Diverged, MOReL, OfflineMBPO
from learneddyn.offline.model_based import bellman_inconsistency
from learneddyn.offline.sac import conservative_values
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.testing import check_policy

SMALL = {
    "policy_kwargs": {"net_arch": (16, 16)},
    "batch_size": 40,
    "rollout_batch": 60,
    "rollout_every": 4,
    "horizon": 3,
    "device": "cpu",
    "seed": 0,
}


@pytest.fixture(scope="session")
def model(log):
    ensemble = ProbabilisticEnsemble(
        num_members=5, num_elites=5, hidden=[16], max_epochs=3, learn_reward=True, learn_termination=True
    )
    ensemble.fit(log, rng=generator(0))
    return ensemble


class Still:
    """A plant that stands still."""

    num_members = 1
    elites = torch.zeros(1, dtype=torch.long)

    def __init__(self, spaces) -> None:
        self.spaces = spaces

    def predict(self, obs, action, memory=None):
        return Prediction(obs[None], torch.zeros_like(obs)[None], self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs)


def weights(agent) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in agent.policy.state_dict().values()])


def test_weights_of_zero_are_one_method(log, model):
    """COMBO at β = 0, MOPO at λ = 0, MOBILE at 0 and RAVL with η = 0 and two critics: one method, bit for bit."""
    same = {**SMALL, "real_ratio": 0.3, "entropy_backup": True, "actor_learning_rate": 1e-4, "model": model}
    same |= {"ent_coef_learning_rate": 1e-4, "max_ent_coef": 1.0}
    plain = {"net_arch": (16, 16), "hidden_bias": None, "last_bounds": None}
    agents = [
        kind("MlpPolicy", log, **extra, **(same | {"policy_kwargs": plain})).learn(10)
        for kind, extra in (
            (OfflineMBPO, {}),
            (MOPO, {"penalty_weight": 0.0}),
            (MOReL, {"pessimism": 0.0}),
            (COMBO, {"conservatism": 0.0}),
            (MOBILE, {"inconsistency": 0.0}),
            (RAVL, {"n_critics": 2, "diversity": 0.0}),
        )
    ]
    halfway = OfflineMBPO("MlpPolicy", log, **(same | {"policy_kwargs": plain})).learn(5)
    for other in agents[1:]:
        assert torch.equal(weights(agents[0]), weights(other)), type(other).__name__
    for kind, extra in (
        (MOPO, {"penalty_weight": 1.0}),
        (COMBO, {"conservatism": 1.0}),
        (RAVL, {"n_critics": 2, "diversity": 1.0}),
    ):
        moved = kind("MlpPolicy", log, **extra, **(same | {"policy_kwargs": plain})).learn(5)
        assert not torch.equal(weights(halfway), weights(moved)), kind.__name__


def test_mobile_with_elites_that_agree_is_mbpo(log, model):
    alike = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in (*alike.weights, *alike.biases):
            parameter.copy_(parameter[:1].expand_as(parameter))
    shared = {**SMALL, "model": alike, "entropy_backup": False, "actor_learning_rate": 1e-4}
    mobile = MOBILE("MlpPolicy", log, inconsistency=5.0, **shared)
    mbpo = OfflineMBPO("MlpPolicy", log, **shared)
    disagreeing = MOBILE("MlpPolicy", log, inconsistency=5.0, **(shared | {"model": model}))
    for step in range(4):
        for agent in (mobile, mbpo, disagreeing):  # MOBILE draws more numbers per update: compare update by update
            agent._rng.manual_seed(step)
            agent.learn(1)
    torch.testing.assert_close(weights(mobile), weights(mbpo), rtol=0, atol=1e-6)
    assert (weights(disagreeing) - weights(mbpo)).abs().max() > 1e-5


def test_inconsistency_of_one_elite_apart(log, model):
    """Targets of five elites, one of which lies Δ apart: the unbiased deviation is |Δ| sqrt(1/5)."""
    kwargs = {"net_arch": {"pi": (16,), "qf": ()}}
    policy = OfflineMBPO("MlpPolicy", log, model=model, **(SMALL | {"policy_kwargs": kwargs})).policy
    slope = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        weight = policy.critic_target.net.weights[0]
        weight.zero_()
        weight[:, :3, 0] = slope
    mean = torch.randn(1, 7, 3, generator=generator(1)).expand(5, -1, -1).clone()
    zero = torch.zeros(5, 7, 3)
    alike = Prediction(mean, zero + 0.3, torch.arange(5))
    assert bellman_inconsistency(policy, alike, generator(2), 10).abs().max() < 1e-6
    shift = torch.tensor([0.2, 0.1, 0.4])
    mean[3] += shift
    spread = bellman_inconsistency(policy, Prediction(mean, zero + 0.3, torch.arange(5)), generator(2), 10)
    wanted = (slope @ shift).abs() * np.sqrt(1 / 5)
    torch.testing.assert_close(spread, wanted.expand(7), rtol=1e-4, atol=1e-5)
    outside = Prediction(mean, zero, torch.tensor([0, 1, 2, 4]))
    assert bellman_inconsistency(policy, outside, generator(2), 1).abs().max() < 1e-6  # only elites are asked


def test_cut_rollouts_are_not_terminated(endless, model):
    """Every start gives ``horizon`` rows where nothing terminates, and none of them is an end."""
    task = Task("Example-v0", terminated=never)
    agent = OfflineMBPO("MlpPolicy", endless, model=model, task=task, reward_shift=1.0, reward_scale=0.5, **SMALL)
    agent.learn(1)
    rows = agent.imagine()
    assert len(rows) == 60 * 3
    kept = agent.imagined.unpack(agent.imagined.rows()[-180:])
    assert not kept.terminated.any()
    torch.testing.assert_close(kept.reward, (rows.reward + 1) * 0.5)
    assert kept.action.abs().max() <= 1
    starts = rows.obs.view(60, 3, 3)[:, 0]
    assert all(bool((endless.obs == start).all(1).any()) for start in starts)


def test_rollouts_stop_where_the_task_terminates(log, model):
    task = Task("Example-v0", terminated=lambda obs: torch.ones(len(obs), dtype=torch.bool))
    ends = replace(log, terminated=torch.ones_like(log.terminated))
    agent = OfflineMBPO("MlpPolicy", ends, model=model, task=task, **SMALL).learn(1)
    assert len(agent.imagined) == 60
    assert agent.imagined.unpack(agent.imagined.rows()).terminated.all()


def test_pessimism_halts_where_members_disagree(endless, model):
    """Nowhere on the log with c = 1, everywhere on it with a large c, and a tiny c changes nothing at all."""
    task = Task("Example-v0", terminated=never)
    shared = {**SMALL, "model": model, "task": task, "entropy_backup": True}
    halted = {}
    for c in (1.0, 1e9):
        agent = MOReL("MlpPolicy", endless, pessimism=c, halt_offset=-7.0, **shared).learn(1)
        _, step = agent.world.step(
            State(endless.obs, model.elites[:1].expand(len(endless))), endless.action, generator(0)
        )
        halted[c] = float(step.terminated.float().mean())
        assert step.trusted.all()
        price = float(endless.reward.min()) - 7
        torch.testing.assert_close(step.reward[step.terminated], torch.full((int(step.terminated.sum()),), price))
    assert halted == {1.0: 0.0, 1e9: 1.0}
    far = State(endless.obs + 20.0, model.elites[:1].expand(len(endless)))
    cautious = MOReL("MlpPolicy", endless, pessimism=3.0, **shared).learn(1)
    _, step = cautious.world.step(far, endless.action, generator(0))
    assert step.terminated.float().mean() > 0.8
    trusting, plain = (
        kind("MlpPolicy", endless, **extra, **shared).learn(6)
        for kind, extra in (
            (MOReL, {"pessimism": 1e-9}),
            (OfflineMBPO, {}),
        )
    )
    assert torch.equal(weights(trusting), weights(plain))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_a_halt_that_is_a_way_out_is_named(log, model, gamma):
    """An end that pays the least reward, -3.2, beside the mean of -2 for ever: that is -4 at γ = .5."""
    shared = {**SMALL, "model": model, "gamma": gamma, "pessimism": 3.0}
    poor = replace(log, reward=log.reward - 2)
    least = float(poor.reward.min())
    cure = f"halt_offset={least:.4g}" if gamma == 0.5 else "halt_offset=-inf"
    with pytest.warns(UserWarning, match=f"a halted step is worth {least:.4g}, more than to go on .* {cure} makes"):
        MOReL("MlpPolicy", poor, halt_offset=0.0, **shared).learn(1)
    MOReL("MlpPolicy", poor, halt_offset=0.0, reward_shift=2.0, **shared).learn(1)  # warnings are errors here
    if gamma < 1:
        MOReL("MlpPolicy", poor, halt_offset=least, **shared).learn(1)
    filtered = shared | {
        "pessimism": 0.0,
        "dynamics_reward": lambda obs, action, after: torch.full_like(obs[:, 0], 0.7),
    }
    with pytest.warns(UserWarning, match="a halted step is worth -1.9.* least_dynamics_reward=0 ends no rollout"):
        OfflineMBPO("MlpPolicy", poor, least_dynamics_reward=0.5, **filtered).learn(1)
    for rows, least in ((poor, 0.0), (poor, -1.0), (log, 0.5)):
        OfflineMBPO("MlpPolicy", rows, least_dynamics_reward=least, **filtered).learn(1)


def test_batches_begin_with_logged_rows(log, model):
    agent = COMBO("MlpPolicy", log, model=model, real_ratio=0.25, **SMALL).learn(1)
    batch, logged = agent._batch(), agent._logged_rows()
    assert logged == 10
    known = (batch.obs[:, None] == log.obs).all(2) & (batch.action[:, None] == log.action).all(2)
    assert known.any(1)[:10].all()
    assert not known.any(1)[10:].any()


def test_only_logged_rows_are_pushed_up(log, model):
    agent = COMBO("MlpPolicy", log, model=model, conservatism=1.0, **SMALL).learn(1)
    batch, target = agent._batch(), torch.zeros(40)
    agent._rng.manual_seed(0)
    q, with_term = agent._critic_loss(batch, target)
    agent.conservatism = 0.0
    _, without = agent._critic_loss(batch, target)
    agent._rng.manual_seed(0)
    values = conservative_values(agent.policy, batch.obs, batch.next_obs, agent._rng)
    assert values.shape == (2, 40, 30)  # the whole mixed batch, thirty actions each
    down = values.logsumexp(2).mean(1)
    torch.testing.assert_close(with_term - without, (down - q[:, :20].mean(1)).sum())


def test_conservatism_prefers_the_logged_actions_to_the_policys(log, model):
    """Large β: on the log the policy's own actions are worth less than the logged ones, but not without it."""
    near, share = replace(log, action=log.action * 0.2), {}  # leaves room outside the data
    for weight in (0.0, 50.0):
        agent = COMBO("MlpPolicy", near, model=model, conservatism=weight, learning_rate=1e-2, **SMALL).learn(40)
        with torch.no_grad():
            own = agent.policy.actor.sample(log.obs, generator(0))
            gain = agent.policy.critic(log.obs, own) - agent.policy.critic(log.obs, near.action)
        share[weight] = float((gain < 0).float().mean())
    assert share[50.0] > 0.9
    assert share[0.0] < 0.9


def test_all_elites_and_draws_of_the_inconsistency_are_one_call(log, model, monkeypatch):
    """Of the model and of the target critics, which the target itself asks once more."""
    agent = MOBILE("MlpPolicy", log, model=copy.deepcopy(model), inconsistency_draws=7, **SMALL).learn(1)
    asked, predict = [], agent.model.predict
    monkeypatch.setattr(agent.model, "predict", lambda *rows: asked.append("model") or predict(*rows))
    agent.policy.critic_target.register_forward_hook(lambda *_: asked.append("critics"))
    agent._update()
    assert sorted(asked) == ["critics", "critics", "model"]


def test_the_model_is_fitted_once_and_travels_with_the_agent(log, tmp_path):
    quick = {"num_members": 3, "num_elites": 2, "hidden": [8], "max_epochs": 2}
    fresh = ProbabilisticEnsemble(**quick, learn_reward=True, learn_termination=True)
    agent = MOBILE("MlpPolicy", log, model=fresh, **SMALL).learn(2)
    assert fresh.spaces == log.spaces
    fitted = fresh.weights[0].clone()
    agent.learn(2)
    assert torch.equal(fitted, fresh.weights[0])
    agent.save(tmp_path / "agent")
    loaded = MOBILE.load(tmp_path / "agent", data=log, device="cpu")
    ask = log.obs[:5], log.action[:5]
    torch.testing.assert_close(loaded.model.predict(*ask).mean, agent.model.predict(*ask).mean)
    loaded.learn(2, reset_num_timesteps=False)
    check_policy(loaded, log.spaces)


def test_targets_can_be_kept_above_zero(log, model):
    agent = MOBILE("MlpPolicy", log, model=model, clip_target=True, **SMALL).learn(1)
    batch = agent._batch()
    assert agent._target(batch, torch.full((40,), -50.0)).min() == 0
    agent.clip_target = False
    assert (agent._target(batch, torch.full((40,), -50.0)) < 0).any()


def test_clipping_is_named_where_rewards_are_negative(log, model):
    poor = replace(log, reward=log.reward - 2)
    with pytest.warns(
        UserWarning, match=r"clip_target keeps targets at 0 or above, but the log's mean reward is -1\.9"
    ):
        MOBILE("MlpPolicy", poor, model=model, clip_target=True, **SMALL)
    MOBILE("MlpPolicy", poor, model=model, clip_target=True, reward_shift=2.0, **SMALL)
    MOBILE("MlpPolicy", poor, model=model, **SMALL)


def test_models_that_do_not_go_with_the_data_or_the_rule(log, model):
    box = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)
    other = replace(log, spaces=Spaces(log.spaces.observation, box))
    with pytest.raises(ValueError, match=r"the model was fitted on .* the data has"):
        MOPO("MlpPolicy", other, model=model, **SMALL).learn(1)
    single = copy.deepcopy(model)
    single._elites = single._elites[:1]
    with pytest.raises(ValueError, match="inconsistency compares elites and needs at least 2, the model has 1"):
        MOBILE("MlpPolicy", log, model=single, **SMALL).learn(1)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.biases[0].fill_(torch.nan)
    with pytest.raises(Diverged, match="none of 60 imagined first steps is finite"):
        MOPO("MlpPolicy", log, model=broken, **SMALL).learn(1)


@pytest.mark.parametrize(
    ("learner", "argument", "name"),
    [
        (MOPO, {"penalty": "ll_var"}, "ll_var"),
        (OfflineMBPO, {"penalty": "loo_kl", "penalty_weight": 0.0}, "loo_kl"),
        (MOReL, {"pessimism": 2.0}, "max_pairwise_diff"),
    ],
)
def test_what_compares_members_is_refused_for_a_model_of_one_before_it_is_fitted(log, learner, argument, name):
    with pytest.raises(ValueError, match=f"{name} compares the members of a model and needs at least 2, got 1"):
        learner("MlpPolicy", log, model=ProbabilisticEnsemble(1, 1), **(SMALL | argument))


def test_inconsistency_and_weight_rules_are_refused_before_the_model_is_fitted(log):
    with pytest.raises(ValueError, match="inconsistency compares elites and needs at least 2, the model has 1"):
        MOBILE("MlpPolicy", log, model=ProbabilisticEnsemble(5, 1), **SMALL)
    sparse = replace(log, reward=log.reward * (torch.arange(len(log)) % 3 == 0))
    with pytest.raises(DataError, match=r"needs a positive median of \|reward\|"):
        MOPO("MlpPolicy", sparse, penalty_weight="quantile:1", **SMALL)


def test_what_was_measured_on_one_log_is_not_taken_for_another(log, model, tmp_path):
    """The weight by a rule and MOReL's discrepancy; on the same log they are those of when learning began."""
    agent = OfflineMBPO("MlpPolicy", log, model=model, penalty_weight="quantile:1", pessimism=1.0, **SMALL).learn(1)
    agent.save(tmp_path / "agent")
    other = replace(log, obs=log.obs + 3, reward=5 * log.reward)
    fresh = OfflineMBPO("MlpPolicy", other, model=model, penalty_weight="quantile:1", pessimism=1.0, **SMALL).learn(1)
    for data, wanted in ((log, agent), (other, fresh)):
        loaded = OfflineMBPO.load(tmp_path / "agent", data=data, device="cpu")
        with torch.no_grad():
            for weight in loaded.model.weights if data is log else ():
                weight.mul_(2)  # as RAMBO would
        loaded.learn(1, reset_num_timesteps=False)
        assert loaded.world.penalty_weight == pytest.approx(wanted.world.penalty_weight)
        assert loaded.world.trust.threshold == pytest.approx(wanted.world.trust.threshold)


def test_a_model_without_the_heads_that_the_task_needs_is_refused_before_it_is_fitted(endless):
    """With data and, as a sweep asks, without; a model with the heads or a task with the functions passes."""
    told = Task("Example-v0", reward=lambda obs, action, after: action[:, 0], terminated=never)
    for what, task in (("reward", replace(told, reward=None)), ("termination", replace(told, terminated=None))):
        lacking, having = ProbabilisticEnsemble(), ProbabilisticEnsemble(**{f"learn_{what}": True})
        for data in (endless, None):
            given = {**SMALL, "task": task, "_init_setup_model": data is not None}
            with pytest.raises(ValueError, match=f"no {what} head: fit it with learn_{what}=True"):
                MOPO("MlpPolicy", data, model=lacking, **given)
            MOPO("MlpPolicy", data, model=having, **given)
            MOPO("MlpPolicy", data, model=lacking, **(given | {"task": told}))


@pytest.mark.parametrize("real_id", ["Hopper-v5", "InvertedDoublePendulum-v5"])
def test_the_design_choices_preset_goes_with_tasks_of_which_the_model_must_learn_parts(real_id):
    """Their observations do not show the reward, and those of the second not the termination either."""
    preset = yaml.safe_load((Path(configs.__file__).parent / "sweep" / "mopo-design-choices.yaml").read_text())
    data = collect(real_id, steps=40, lanes=2, seed=0, progress=False)
    arguments = preset["model"]["init_args"] | {"hidden": [8], "max_epochs": 1}
    agent = MOPO("MlpPolicy", data, model=ProbabilisticEnsemble(**arguments), task=real_id, **SMALL).learn(1)
    assert len(agent.imagined) > 0


def test_the_truth_imagines_too(endless, tmp_path):
    """A model that is no AbstractDynamics is not saved, and is asked for when learning goes on."""
    still = Still(endless.spaces)
    task = Task("Example-v0", reward=lambda obs, action, after: action[:, 0], terminated=never)
    agent = MOBILE("MlpPolicy", endless, model=still, task=task, inconsistency=0.0, **SMALL).learn(2)
    pool = agent.imagined.unpack(agent.imagined.rows())
    assert torch.equal(pool.obs, pool.next_obs)
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="saved without its model"):
        MOBILE.load(tmp_path / "agent", data=endless, task=task, device="cpu").learn(1)
    MOBILE.load(tmp_path / "agent", data=endless, task=task, model=still, device="cpu").learn(1)


def test_whether_rollouts_end_must_be_known(log):
    bare = replace(log, terminated=torch.zeros_like(log.terminated))
    with pytest.raises(DataError, match="whether imagined rollouts end is unknown"):
        MOPO("MlpPolicy", bare, **SMALL)
    MOPO("MlpPolicy", bare, task=Task("Example-v0", terminated=never), **SMALL)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"penalty": "variance"}, "penalty must be one of .* got 'variance'"),
        ({"penalty_weight": -1.0}, "penalty_weight must be a number of at least 0 or .*, got -1"),
        ({"halt_offset": 5.0}, "halt_offset must be at most 0, got 5"),
        ({"horizon": 0}, "horizon must be at least 1, got 0"),
        ({"real_ratio": 1.5}, r"real_ratio must be in \[0, 1\], got 1.5"),
        ({"conservatism": 1.0, "real_ratio": 0.01}, "real_ratio must leave .* row .* in every batch of 40, got 0.01"),
        ({"sampler": "best"}, "unknown sampler 'best'"),
    ],
)
def test_arguments_outside_their_range(log, model, argument, message):
    with pytest.raises(ValueError, match=message):
        OfflineMBPO("MlpPolicy", log, model=model, **(SMALL | argument)).learn(1)
