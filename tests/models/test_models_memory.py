"""Models with a memory: an episode that a vector environment restarts begins as a fresh one does."""

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AutoresetMode

from learneddyn.core import Task, generator
from learneddyn.envs import LearnedVectorEnv
from learneddyn.models import PLRNN, Koopman
from learneddyn.testing import example_transitions
from learneddyn.world import World

KINDS = {
    "delays": lambda: Koopman(degree=1, delays=3),
    "linear for good": lambda: Koopman(degree=2, relift=False),
    "recurrent": lambda: PLRNN(latent=5, hidden=4, updates=2, window=4),
}


@pytest.fixture(params=KINDS, ids=str)
def model(request):
    built = KINDS[request.param]()
    built.fit(example_transitions(), rng=generator(0))
    return built


def test_no_memory_is_the_memory_of_a_start(model):
    data = example_transitions()[:20]
    fresh, begun = (model.predict(data.obs, data.action, memory) for memory in (None, model.begin(data.obs)))
    torch.testing.assert_close(fresh.mean, begun.mean)
    torch.testing.assert_close(fresh.memory, begun.memory)


def test_a_restarted_lane_goes_on_as_a_fresh_one(model):
    data = example_transitions()
    task = Task("X-v0", reward=lambda obs, action, after: after[:, 0], terminated=lambda obs: obs[:, 0] > 1e9)
    start = data.obs[:1] + 0.3

    def env():
        made = LearnedVectorEnv(
            World(model, task, sampler="mean"), 1, horizon=3, start=start, autoreset_mode=AutoresetMode.SAME_STEP
        )
        assert isinstance(made.single_action_space, gym.spaces.Box)
        return made

    actions = [data.action[row : row + 1].numpy() for row in range(3)]
    once, again = env(), env()
    once.reset(seed=0)
    expected = [once.step(action)[0] for action in actions[:2]]
    again.reset(seed=0)
    for action in actions:  # the last step ends the episode and begins the next
        again.step(action)
    found = [again.step(action)[0] for action in actions[:2]]
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, abs=1e-6)
