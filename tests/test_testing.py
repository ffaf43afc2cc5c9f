"""A contract that nothing can break says nothing: each check meets objects that break it in one way."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from torch import nn

from learneddyn.core import DataError, Outcome, Prediction, Task, generator
from learneddyn.models import AbstractDynamics, FitReport
from learneddyn.spaces import Spaces
from learneddyn.testing import ContractError, check_dynamics, check_policy, check_world, example_transitions
from learneddyn.testing.contract import global_draws
from learneddyn.world import World


def test_a_generator_of_a_cuda_device_is_global_too(monkeypatch):
    states = [torch.zeros(3), torch.zeros(3)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    before = global_draws()
    assert global_draws() == before
    states[1] = torch.ones(3)
    assert global_draws() != before


class Line(AbstractDynamics):
    """Two linear members fitted by least squares on halves of the data, with noise, reward and termination heads."""

    num_members = 2

    def __init__(self, ridge: float = 1e-3) -> None:
        super().__init__()
        self.ridge = ridge

    @property
    def elites(self):
        return torch.tensor([1, 0])

    def _build(self, spaces):
        columns = spaces.obs_dim + spaces.action_dim + 1
        self.weight = nn.Parameter(torch.zeros(2, columns, spaces.obs_dim))

    def fit(self, data, *, rng, progress=False):
        data.check()
        self.check_spaces(data)
        order = torch.randperm(len(data), generator=rng)
        x, y = self._inputs(data.obs, data.action), data.next_obs
        for member, rows in enumerate(order.chunk(2)):
            gram = x[rows].T @ x[rows] + self.ridge * torch.eye(x.shape[1])
            self.weight.data[member] = torch.linalg.solve(gram, x[rows].T @ y[rows])
        return FitReport(1, 0.0, {})

    def predict(self, obs, action, memory=None):
        self._need_fit()
        mean = self._inputs(obs, action) @ self.weight
        std = torch.full_like(mean, 0.1)
        return Prediction(
            mean, std, self.elites, mean[..., 0], std[..., 0], torch.full_like(mean[..., 0], 0.3), memory=None
        )

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        prediction = self.predict(obs, action, memory)
        lane = torch.arange(len(obs))
        mean, reward = prediction.mean[member, lane], prediction.reward_mean[member, lane]
        if not noise:
            return Outcome(mean, reward, torch.zeros(len(obs), dtype=torch.bool), prediction.memory)
        mean = mean + 0.1 * torch.randn(mean.shape, generator=rng)
        reward = reward + 0.1 * torch.randn(reward.shape, generator=rng)
        return Outcome(mean, reward, torch.rand(len(obs), generator=rng) < 0.3, prediction.memory)

    def _inputs(self, obs, action):
        return torch.cat([obs, action, torch.ones(len(obs), 1)], dim=1)

    def _need_fit(self):
        if self.spaces is None:
            raise ValueError("Line has not been fitted")


def test_a_good_model_passes():
    check_dynamics(Line)
    check_dynamics(lambda: Line(ridge=0.1))
    check_dynamics(Echo)
    still = example_transitions()
    still.obs[:, 2] = still.next_obs[:, 2] = 0.0
    check_dynamics(Line, still)
    ready = Line()
    ready.fit(example_transitions(), rng=generator(0))
    check_dynamics(ready)
    check_dynamics(ready, example_transitions(seed=1))


class TensorArgument(Line):
    def __init__(self, ridge=None):
        super().__init__()
        self.ridge = torch.tensor(1e-3) if ridge is None else ridge


class ForgetsArgument(Line):
    def config(self):
        return {"ridge": self.ridge / 2}


class AnswersUnfitted(Line):
    def _need_fit(self):
        if self.spaces is None:
            self._build(example_transitions().spaces)


class TakesNan(Line):
    def fit(self, data, *, rng, progress=False):
        clean = data[data.obs.isfinite().all(1) & data.next_obs.isfinite().all(1) & data.reward.isfinite()]
        return super().fit(clean, rng=rng)


class HalfFitted(Line):
    def fit(self, data, *, rng, progress=False):
        self.check_spaces(data)
        return super().fit(data, rng=rng)


class GlobalRandomness(Line):
    def fit(self, data, *, rng, progress=False):
        return super().fit(data, rng=generator(int(torch.randint(2**31, ()))))


class Scaling(Line):
    def fit(self, data, *, rng, progress=False):
        report = super().fit(data, rng=rng)
        data.obs.div_(2)
        return report


class Fragile(Line):
    def fit(self, data, *, rng, progress=False):
        again = self.spaces is not None
        report = super().fit(data, rng=rng)
        if again:
            self.weight.data.fill_(torch.nan)
        return report


class NoReport(Line):
    def fit(self, data, *, rng, progress=False):
        super().fit(data, rng=rng)


class HiddenState(Line):
    made = 0

    def fit(self, data, *, rng, progress=False):
        HiddenState.made += 1
        return super().fit(data, rng=generator(HiddenState.made))


class AnySpaces(Line):
    def check_spaces(self, data):
        self.spaces = data.spaces
        self._build(data.spaces)
        return data.spaces


class RepeatedElites(Line):
    @property
    def elites(self):
        return torch.tensor([1, 1])


class Changed(Line):
    """Break one field of every prediction."""

    def predict(self, obs, action, memory=None):
        return self.changed(super().predict(obs, action), obs)


class WrongShape(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(reward_mean=prediction.reward_mean[..., None])


class WrongType(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(std=prediction.std.double())


class Infinite(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(std=prediction.std / 0)


class NegativeStd(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(std=-prediction.std)


class NoProbability(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(terminated=prediction.terminated + 1)


class Wobbling(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=prediction.mean + 0.01 * torch.randn(()))


class BatchNormed(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=prediction.mean - obs.mean(dim=0))


class PositionAware(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=prediction.mean + torch.arange(len(obs))[:, None])


class WritesInput(Changed):
    def changed(self, prediction, obs):
        obs[0, 0] = 3.0
        return prediction


class WritesAction(Line):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        outcome = super().sample(obs, action, member, rng, noise=noise)
        action += 1
        return outcome


class Sampled(Line):
    """Break one field of every sample."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return self.drawn(super().sample(obs, action, member, rng, noise=noise), obs, member, rng, noise)


class UnseededSample(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(next_obs=outcome.next_obs + 0.01 * torch.randn(obs.shape))


class FixedSeed(Line):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return super().sample(obs, action, member, generator(0), noise=noise)


class MixedMembers(Line):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return super().sample(obs, action, member.sort().values, rng, noise=noise)


class NoisyMean(Line):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return super().sample(obs, action, member, rng)


class ForgetsReward(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(reward=None)


class FloatFlags(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(terminated=outcome.terminated.float())


class Biased(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(next_obs=outcome.next_obs + 0.05 * noise)


class TooCalm(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(std=1.5 * prediction.std)


class Immortal(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(terminated=torch.zeros(len(obs), dtype=torch.bool))


class Detached(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=prediction.mean.detach())


class LosesWeights(Line):
    def state_dict(self, *args, **kwargs):
        return {name: tensor.half().float() for name, tensor in super().state_dict(*args, **kwargs).items()}


class Mute(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=None)


class Standardised(Line):
    """Answer in standard deviations of the data, and forget to multiply by them."""

    def fit(self, data, *, rng, progress=False):
        data.check()
        shift, scale = data.obs.mean(dim=0), data.obs.std(dim=0, correction=0)
        scaled = replace(data, next_obs=(data.next_obs - shift) / scale)
        return super().fit(scaled, rng=rng)


class Changes(Line):
    """Learn the change of the observation, and forget to add it."""

    def fit(self, data, *, rng, progress=False):
        return super().fit(replace(data, next_obs=data.next_obs - data.obs), rng=rng)


class Certain(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(std=0 * prediction.std)


class Wasteful(Changed):
    """Draw from the global generator, though nothing comes of it."""

    def changed(self, prediction, obs):
        torch.rand(1)
        return prediction


class NumpyDraws(Line):
    def fit(self, data, *, rng, progress=False):
        np.random.rand()  # noqa: NPY002
        return super().fit(data, rng=rng)


class Elsewhere(Changed):
    def changed(self, prediction, obs):
        return prediction._replace(mean=prediction.mean.to("meta"))


class DriftingType(Sampled):
    def drawn(self, outcome, obs, member, rng, noise):
        return outcome._replace(next_obs=outcome.next_obs.double())


class LooseTensor(Line):
    def fit(self, data, *, rng, progress=False):
        self.shift = data.obs.mean(dim=0)
        return super().fit(data, rng=rng)


class Echo(Line):
    """A line that leans towards a running mean of what it has seen, which is its memory."""

    def begin(self, obs):
        return obs.clone()

    def predict(self, obs, action, memory=None):
        memory = self.begin(obs) if memory is None else memory
        plain = super().predict(obs, action)
        return plain._replace(mean=plain.mean + 0.1 * (memory - obs), memory=0.5 * (memory + obs))


class ForgetsPast(Echo):
    def predict(self, obs, action, memory=None):
        return super().predict(obs, action)


class Blind(Echo):
    def predict(self, obs, action, memory=None):
        return super().predict(obs if memory is None else memory, action, memory)


class NoStart(Echo):
    def begin(self, obs):
        return None

    def predict(self, obs, action, memory=None):
        return super().predict(obs, action, obs if memory is None else memory)


class OtherStart(Echo):
    def begin(self, obs):
        return torch.zeros_like(obs)

    def predict(self, obs, action, memory=None):
        return super().predict(obs, action, obs if memory is None else memory)


class SampleForgets(Echo):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return super().sample(obs, action, member, rng, memory, noise=noise)._replace(memory=None)


class SampleRemembersElse(Echo):
    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return super().sample(obs, action, member, rng, memory, noise=noise)._replace(memory=obs + 1)


class SharesMemory(Echo):
    def predict(self, obs, action, memory=None):
        prediction = super().predict(obs, action, memory)
        return prediction._replace(memory=prediction.memory + prediction.memory.mean(dim=0))


class WideMemory(Echo):
    def predict(self, obs, action, memory=None):
        prediction = super().predict(obs, action, memory)
        return prediction._replace(memory=prediction.memory.double())


class WritesMemory(Echo):
    def predict(self, obs, action, memory=None):
        prediction = super().predict(obs, action, memory)
        if memory is not None:
            memory.copy_(prediction.memory)
        return prediction


BROKEN = {
    Standardised: "Prediction.mean is the next observation, in the units of the data",
    Changes: "Prediction.mean is the next observation, in the units of the data",
    Certain: "Prediction.std of a learned model is above 0",
    Wasteful: "predict and sample draw from their rng only",
    NumpyDraws: "fit draws from its rng only",
    Elsewhere: "Prediction.mean is on the device",
    DriftingType: "Outcome.next_obs has the dtype",
    LooseTensor: "every tensor is a parameter or a buffer.*'shift'",
    ForgetsPast: "what is remembered counts",
    Blind: "what is seen counts beside a memory",
    NoStart: "begin returns the memory of a start",
    OtherStart: "no memory is the memory of a start",
    SampleForgets: "sample without noise remembers what predict does",
    SampleRemembersElse: "sample without noise remembers what predict does",
    SharesMemory: "a memory belongs to its row",
    WideMemory: "Prediction.memory has the dtype",
    WritesMemory: "predict leaves the memory it is given alone",
    TensorArgument: "config\\(\\) holds JSON values",
    ForgetsArgument: "config\\(\\) rebuilds the model",
    AnswersUnfitted: "predict of an unfitted model is a ValueError",
    TakesNan: "fit with nan in 'obs' is a DataError",
    HalfFitted: "a refused first fit leaves the model unfitted",
    GlobalRandomness: "fit draws from its rng only",
    Scaling: "fit leaves its data alone",
    Fragile: "a fitted model can be fitted again",
    NoReport: "fit returns a FitReport",
    HiddenState: "one seed and one data set give one fit",
    AnySpaces: "a second fit on other spaces is a ValueError",
    RepeatedElites: "elites are distinct members, 0 to 1",
    Mute: "Prediction.mean is answered",
    WrongShape: r"Prediction.reward_mean has shape \(2, 12\)",
    WrongType: "Prediction.std has the dtype",
    Infinite: "Prediction.std is finite",
    NegativeStd: "Prediction.std is not negative",
    NoProbability: "Prediction.terminated is a probability",
    Wobbling: "predict is deterministic",
    BatchNormed: "a row alone is as in a batch",
    PositionAware: "permuted rows permute predictions",
    WritesInput: "predict leaves its inputs alone",
    WritesAction: "one seed gives one sample|sample leaves its inputs alone",
    UnseededSample: "one seed gives one sample",
    FixedSeed: "another seed gives another sample",
    MixedMembers: "noise=False gives the answer of the row's own member",
    NoisyMean: "noise=False gives the answer of the row's own member",
    ForgetsReward: "predict and sample have the same heads",
    FloatFlags: r"Outcome.terminated is bool \[b\]",
    Biased: "noise=False gives the answer|samples of 'next_obs' average to the predicted mean",
    TooCalm: "samples of 'next_obs' have the predicted std",
    Immortal: "samples terminate as often as predicted",
    Detached: "predict is differentiable in the action",
    LosesWeights: "a loaded model answers bit for bit",
}


@pytest.mark.parametrize("model", BROKEN, ids=lambda model: model.__name__)
def test_a_broken_model_is_named_with_its_contract(model):
    with pytest.raises(ContractError, match=f"{model.__name__} breaks the contract: .*({BROKEN[model]})"):
        check_dynamics(model)


def test_every_contract_violation_is_told_apart_from_bad_use():
    assert not issubclass(ContractError, DataError)
    with pytest.raises(ContractError, match="Line is not fitted: to check its fit, pass the function that makes it"):
        check_dynamics(Line())
    with pytest.raises(ContractError, match="a model with a fit is an AbstractDynamics"):
        check_dynamics(lambda: object())


@pytest.fixture
def line():
    model = Line()
    model.fit(example_transitions(), rng=generator(0))
    return model


def test_a_good_world_passes(line):
    check_world(World(line, Task("Example-v0")))
    check_world(World(line, Task("Example-v0")), example_transitions().obs[:4])


def unseeded(state, action, dynamics, rng):
    outcome = dynamics.sample(state.obs, action, state.member, generator(int(torch.randint(2**31, ()))))
    return state._replace(obs=outcome.next_obs), outcome


class Undead(World):
    def rollout(self, obs, policy, horizon, rng):
        data = super().rollout(obs, policy, horizon, rng)
        data.terminated[:] = True
        return data


class Shuffled(World):
    def rollout(self, obs, policy, horizon, rng):
        data = super().rollout(obs, policy, horizon, rng)
        return data[torch.arange(len(data)).flip(0)]


class Gappy(World):
    def rollout(self, obs, policy, horizon, rng):
        data = super().rollout(obs, policy, horizon, rng)
        data.obs[:] += 1
        return data


class AnyHorizon(World):
    def rollout(self, obs, policy, horizon, rng):
        return super().rollout(obs, policy, max(1, horizon), rng)


class NoElite(World):
    def start(self, obs, rng):
        return super().start(obs, rng)._replace(member=torch.full((len(obs),), 7))


class Careless(World):
    def start(self, obs, rng):
        return super().start(obs[:, :3], rng) if len(obs) else None


class OwnReward(World):
    def step(self, state, action, rng):
        after, step = super().step(state, action, rng)
        return after, step._replace(reward=step.reward + 1)


class OwnEnd(World):
    def step(self, state, action, rng):
        after, step = super().step(state, action, rng)
        return after, step._replace(terminated=~step.terminated)


WORLDS = {
    Undead: "no row of an episode follows a terminal one",
    Shuffled: "a rollout's rows are grouped by episode",
    Gappy: "obs is the next_obs of the row before",
    AnyHorizon: "horizon 0 is a ValueError",
    NoElite: "start draws an elite per lane",
    Careless: "start with no lanes is a ValueError",
    OwnReward: "the task's reward function judges",
    OwnEnd: "the task's termination function judges",
}


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.__name__)
def test_a_broken_world_is_named_with_its_contract(line, world):
    task = Task(
        "Example-v0",
        reward=lambda obs, action, next_obs: next_obs[:, 0],
        terminated=lambda next_obs: torch.zeros(len(next_obs), dtype=torch.bool),
    )
    check_world(World(line, task))
    with pytest.raises(ContractError, match=f"World.Line, Example-v0. breaks the contract: {WORLDS[world]}"):
        check_world(world(line, task))


def test_worlds_of_broken_parts_are_named_with_their_contract(line):
    with pytest.raises(ContractError, match="one seed gives one step"):
        check_world(World(line, Task("Example-v0"), sampler=unseeded))
    for task, contract in (
        (Task("Example-v0", reward=lambda o, a, n: n[:, 0] + torch.arange(len(n))), "permuted lanes permute steps"),
        (Task("Example-v0", reward=lambda o, a, n: n[:, 0] - n[:, 0].mean()), "a lane alone is as among others"),
        (Task("Example-v0", reward=lambda o, a, n: n[:, 0].double()), "Step.reward has the dtype of the observations"),
    ):
        with pytest.raises(ContractError, match=contract):
            check_world(World(line, task))


def spaces_of(env_id):
    env = gym.make(env_id)
    return Spaces(env.observation_space, env.action_space)


def test_good_policies_pass():
    check_policy(PPO("MlpPolicy", "Pendulum-v1"), spaces_of("Pendulum-v1"))
    check_policy(DQN("MlpPolicy", "CartPole-v1", buffer_size=10), spaces_of("CartPole-v1"))


class Still:
    """Answer zeros, as SB3 would."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        batched = np.ndim(observation) == 2
        return self.answer(observation, np.zeros((len(observation), 1) if batched else (1,), np.float32)), state

    def answer(self, observation, action):
        return action


class TooStrong(Still):
    def answer(self, observation, action):
        return action + 2.5


class Dice(Still):
    def answer(self, observation, action):
        return np.random.default_rng().uniform(-1, 1, action.shape)


class Flat(Still):
    def answer(self, observation, action):
        return action.ravel()


class Nosy(Still):
    def answer(self, observation, action):
        observation[:] = 0
        return action


class Crowd(Still):
    def answer(self, observation, action):
        return action + np.ndim(observation) / 2


class Bare(Still):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return super().predict(observation)[0]


class Tired(Still):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return super().predict(observation if deterministic else observation[:1])


POLICIES = {
    TooStrong: "actions lie in Box",
    Dice: "deterministic=True gives one answer",
    Flat: r"a batch of observations gives actions \(5, 1\)",
    Nosy: "predict leaves its observation alone",
    Crowd: "one observation is answered as in a batch",
    Bare: "predict returns",
    Tired: r"deterministic=False gives actions \(5, 1\) too",
}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_a_broken_policy_is_named_with_its_contract(policy):
    check_policy(Still(), spaces_of("Pendulum-v1"))
    with pytest.raises(ContractError, match=f"{policy.__name__} breaks the contract: {POLICIES[policy]}"):
        check_policy(policy(), spaces_of("Pendulum-v1"))
