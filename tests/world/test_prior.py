"""A simulator as a prior: the environment itself where nothing is changed; batched, differentiable, in model files."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import Outcome, Prediction, Task, Transitions, generator
from learneddyn.models import AbstractDynamics, Hybrid
from learneddyn.plants.variants import make_variant
from learneddyn.spaces import Spaces
from learneddyn.testing import check_dynamics
from learneddyn.world import World
from learneddyn.world.prior import simulated

POLE = "InvertedPendulum-v5"


def pole_rows(rows, seed=0):
    rng = generator(seed)
    obs = 0.3 * torch.randn(rows, 4, generator=rng)
    return obs, 6 * torch.rand(rows, 1, generator=rng) - 3


@pytest.mark.parametrize("real_id", [POLE, "Hopper-v5", "HalfCheetah-v5"])
def test_without_changes_it_is_the_environment(real_id):
    env = gym.make(real_id)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(15):
        action = env.action_space.sample()
        after, _, ended, _, _ = env.step(action)
        rows = torch.as_tensor(obs)[None], torch.as_tensor(action, dtype=torch.float64)[None]
        np.testing.assert_allclose(simulated(*rows, task=real_id)[0].numpy(), after, atol=1e-5, rtol=1e-5)
        obs = env.reset()[0] if ended else after


def test_changes_are_those_of_the_variant():
    bodies = {"pole": {"mass": 2.0, "damping": 3.0}, "cart": {"gear": 0.5}}
    env = make_variant(POLE, bodies, 5.0)
    env.reset(seed=0)
    obs, action = (part.double() for part in pole_rows(1))
    env.set_state(obs[0, :2].numpy(), obs[0, 2:].numpy())
    after = env.step(action[0].numpy())[0]
    said = simulated(obs, action, task=POLE, bodies=bodies, gravity=5.0)[0]
    np.testing.assert_allclose(said.numpy(), after, atol=1e-9)
    assert not torch.allclose(said, simulated(obs, action, task=POLE)[0], atol=1e-3)


def test_rows_do_not_know_each_other():
    obs, action = pole_rows(100)
    together = simulated(obs, action, task=POLE)
    assert together.dtype == torch.float32
    assert torch.equal(together[7:8], simulated(obs[7:8], action[7:8], task=POLE))
    assert simulated(obs[:0], action[:0], task=POLE).shape == (0, 4)
    torch.set_num_threads(2)
    try:
        assert torch.equal(simulated(obs, action, task=POLE), together)
    finally:
        torch.set_num_threads(1)
    obs[3, 1], obs[4, 0], action[5] = torch.nan, 1e12, torch.inf
    broken = simulated(obs, action, task=POLE)
    assert broken.isnan().all(dim=1).nonzero().flatten().tolist() == [3, 4, 5]
    assert torch.equal(broken[6:], together[6:])


class Prior:
    """Dynamics that are the simulator."""

    num_members, elites = 1, torch.zeros(1, dtype=torch.long)

    def __init__(self, real_id):
        env = gym.make(real_id)
        self.spaces = Spaces(env.observation_space, env.action_space)
        self.real_id = real_id

    def predict(self, obs, action, memory=None):
        mean = simulated(obs, action, task=self.real_id)[None]
        return Prediction(mean, torch.zeros_like(mean), self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(simulated(obs, action, task=self.real_id))


def test_a_row_that_mujoco_resets_is_broken_and_ends(tmp_path, monkeypatch):
    """Joint speeds beyond what MuJoCo integrates: it would go on from the start pose as if nothing had happened."""
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its warnings
    obs, action = torch.zeros(5, 11), torch.zeros(5, 3)
    obs[:, 0] = 1.25
    obs[1, 5:], obs[3, 5:] = 1e8, 1e5  # reset at the first substep, and at a later one
    after = simulated(obs, action, task="Hopper-v5")
    assert after.isnan().all(dim=1).tolist() == [False, True, False, True, False]
    assert torch.equal(after[[0, 2, 4]], simulated(obs[[0, 2, 4]], action[:3], task="Hopper-v5"))
    heard = []
    task = Task("X-v0", reward=lambda obs, action, after: after[:, 0], terminated=lambda after: after[:, 0] > 1e9)
    rows = World(Prior("Hopper-v5"), task, sentinel=heard.append).rollout(
        obs, lambda obs: torch.zeros(len(obs), 3), 2, generator(0)
    )
    assert [(each.step, each.rows, each.of) for each in heard] == [(1, 2, 5)]
    assert rows.episode.unique().tolist() == [0, 2, 4]


def test_gradients_are_those_of_the_simulator():
    obs, action = (part.double().requires_grad_() for part in pole_rows(3))
    assert torch.autograd.gradcheck(
        lambda o, u: simulated(o, u, task=POLE), (obs, action), eps=1e-6, atol=1e-4, rtol=1e-3
    )


def test_a_hybrid_on_a_wrong_simulator_learns_what_is_wrong(tmp_path):
    """The gear is a tenth too weak and nothing else: the residual is a tenth of the motor's effect."""
    obs, action = pole_rows(400)
    data = logged(obs, action, simulated(obs, action, task=POLE))
    prior = {"task": POLE, "bodies": {"cart": {"gear": 0.9}}}
    model = Hybrid("learneddyn.world.prior.simulated", prior, dt=0.04, columns=[2, 3], terms=["u0", "u0 cos(x1)"])
    model.fit(data, rng=generator(0))
    wrong = (simulated(obs, action, **prior) - data.next_obs)[:, 2:].square().mean().sqrt()
    assert model.noise[0, 2:].max() < 0.05 * wrong
    model.save(tmp_path / "model")
    again = AbstractDynamics.load(tmp_path / "model")
    assert torch.equal(again.predict(obs, action).mean, model.predict(obs, action).mean)
    check_dynamics(again, data)


def logged(obs, action, after):
    env = gym.make(POLE)
    n = torch.arange(len(obs))
    nothing = torch.zeros(len(obs))
    return Transitions(
        obs, action, nothing, after, nothing.bool(), n, Spaces(env.observation_space, env.action_space), "pole"
    )


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="Humanoid-v5 is no function of positions and velocities alone"):
        simulated(torch.zeros(1, 348), torch.zeros(1, 17), task="Humanoid-v5")
    with pytest.raises(tasks.UnknownTask):
        simulated(*pole_rows(1), task="Nothing-v0")
    with pytest.raises(ValueError, match="unknown bodies"):
        simulated(*pole_rows(1), task=POLE, bodies={"wheel": {"mass": 2.0}})
