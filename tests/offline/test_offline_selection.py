"""Choosing a policy without the plant: what the log, the model and the held-out rows say, side by side."""

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from learneddyn.core import DataError, Outcome, Prediction, State, Task, Transitions, generator
from learneddyn.data import collect
from learneddyn.evaluation import correlation, crossed_interval, evaluate
from learneddyn.evaluation.stats import Estimate
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.offline import objectives
from learneddyn.offline.fqe import fqe
from learneddyn.offline.selection import model_error, rank, return_in_model
from learneddyn.reproduce.conservatism import Swinger
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never
from learneddyn.world import World

SPACES = Spaces(gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-2.0, 2.0, (1,), np.float32))
TASK = Task("Line-v0", reward=lambda obs, action, after: after[:, 0], terminated=never, max_episode_steps=4)


class Drifting:
    """Three members that move by the action plus a drift of their own; the last is no elite."""

    num_members, drift = 3, torch.tensor([0.0, 1.0, 50.0])
    elites = torch.tensor([0, 1])

    def __init__(self) -> None:
        self.spaces = SPACES

    def predict(self, obs, action, memory=None):
        mean = (obs + action) + self.drift[:, None, None]
        return Prediction(mean, torch.zeros_like(mean), self.elites)

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        return Outcome(obs + action + self.drift[member][:, None])


class Constant:
    def __init__(self, action: float) -> None:
        self.action = action

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full((len(observation), 1), self.action, np.float32), state


def line(rows: int = 400, low: float = -2.0, high: float = 2.0) -> Transitions:
    """Steps of the plant (no drift) under uniform actions, 4 to an episode."""
    rng = generator(0)
    action = low + (high - low) * torch.rand(rows, 1, generator=rng)
    start = torch.randn(rows // 4, 1, generator=rng).repeat_interleave(4, 0)
    after = start + action.view(-1, 4).cumsum(1).reshape(-1, 1)
    obs, number = after - action, torch.arange(rows) // 4
    return Transitions(obs, action, after[:, 0], after, number < 0, number, SPACES)


def test_every_elite_plays_every_start():
    """Return from 0 under a constant action a and drift d over 4 steps: 10 (a + d)."""
    start = torch.tensor([[0.0], [0.5]])
    found = return_in_model(Constant(0.5), World(Drifting(), TASK), start, worst=-1.0)
    of_members = [[10 * (0.5 + drift) + 4 * first for first in (0.0, 0.5)] for drift in (0.0, 1.0)]
    assert found == crossed_interval(np.array(of_members))
    assert found.value == pytest.approx(11.0)
    assert found.low == pytest.approx(5.0)
    assert found.high == pytest.approx(17.0)


class Breaking(Drifting):
    """Its first member gives no number beyond 1.2; the second stays where it is."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        after = torch.where(member[:, None] == 0, obs + action, obs)
        return Outcome(torch.where(after > 1.2, torch.nan, after))


@pytest.mark.parametrize(("worst", "pays"), [(-6.0, -6.0), (0.5, 0.0)])
def test_a_policy_gains_nothing_by_breaking_the_model(worst, pays):
    """Member 0 breaks at the third of four steps: 0.5 and 1 are paid before, and then the worst there is, twice."""
    start = torch.zeros(3, 1)
    found = return_in_model(Constant(0.5), World(Breaking(), TASK), start, worst=worst)
    assert found == crossed_interval(np.array([[1.5 + 2 * pays] * 3, [0.0] * 3]))
    negative = replace(TASK, reward=lambda obs, action, after: after[:, 0] - 5)
    ranked = [
        return_in_model(Constant(action), World(Breaking(), negative), start, worst=-6.0).value for action in (0.2, 2.0)
    ]
    assert ranked[0] == pytest.approx((0.2 + 0.4 + 0.6 + 0.8 - 20 - 20) / 2)
    assert ranked[0] > ranked[1] == pytest.approx((4 * -6 - 20) / 2)


def test_steps_that_are_not_trusted_pay_the_worst():
    near = World(Drifting(), TASK, trust=lambda state, action, after: after.obs[:, 0] < 2, halt_reward=100.0)
    found = return_in_model(Constant(0.5), near, torch.zeros(1, 1), worst=-1.0, horizon=5)
    assert found == crossed_interval(np.array([[0.5 + 1.0 + 1.5 - 2], [1.5 - 4]]))


def test_every_lane_keeps_its_member():
    """Members in one batch play as each alone does, also where the world would deal them anew."""
    start = torch.tensor([[0.0], [0.5], [-1.0]])
    for sampler in ("elite", "tsinf", "mean"):
        found = return_in_model(Constant(0.5), World(Drifting(), TASK, sampler=sampler), start, worst=0.0)
        alone = []
        for member in (0, 1):
            model = Drifting()
            model.elites = torch.tensor([member])
            alone.append(
                [return_in_model(Constant(0.5), World(model, TASK), row[None], worst=0.0).value for row in start]
            )
        assert found == crossed_interval(np.array(alone))


def test_model_error_counts_rows_near_the_policy():
    log = line()
    assert model_error(Drifting(), log) == pytest.approx(0.5 / float((log.next_obs - log.obs).std(correction=0)))

    class Half(Drifting):
        """Right where actions are negative."""

        def predict(self, obs, action, memory=None):
            mean = (obs + action + (action > 0))[None].expand(3, -1, -1)
            return Prediction(mean, torch.zeros_like(mean), self.elites)

    errors = [model_error(Half(), log, Constant(action)) for action in (-1.5, 0.0, 1.5)]
    assert errors[0] < 0.05 < errors[1] < errors[2]
    with pytest.raises(DataError, match="no held-out action lies near those of Constant"):
        model_error(Half(), line(40, high=-1.5), Constant(1.9))


def test_rank_of_constant_actions():
    log, policies = line(), {name: Constant(action) for name, action in (("back", -1.0), ("on", 1.0), ("stay", 0.0))}
    options = {"gamma": 0.5, "hidden": (32,), "members": 2, "updates": 300, "learning_rate": 5e-3}
    world = World(Drifting(), TASK)
    ranking = rank(policies, log, worlds=world, held_out=log, starts=20, **options)
    assert [row.name for row in ranking.candidates] == ["on", "stay", "back"]
    assert ranking.best == "on"
    inside = [row.in_model.value for row in ranking.candidates]
    assert inside == sorted(inside, reverse=True)
    text = str(ranking)
    assert text.count("\n") == 4
    assert text.splitlines()[2].startswith("| on | ")
    assert [row["name"] for row in ranking.to_json()] == ["on", "stay", "back"]
    alone = rank({"on": Constant(1.0)}, log, **options | {"updates": 5})
    assert alone.candidates[0].in_model is None
    far = rank({"on": Constant(1.9)}, log, worlds={"on": world}, held_out=line(40, high=-1.5), starts=3, **options)
    assert far.candidates[0].model_error == np.inf
    assert far.to_json()[0]["model_error"] is None


class Remembering(Constant):
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return super().predict(observation)[0], (observation,)


def test_bad_input_is_named():
    log = line(40)
    memory = "Remembering remembers earlier steps, which the rows of a log do not bring back"
    for judge in (lambda policy: fqe(policy, log), lambda policy: model_error(Drifting(), log, policy)):
        with pytest.raises(ValueError, match=memory):
            judge(Remembering(0.0))
    with pytest.raises(ValueError, match=memory):
        rank({"a": Constant(0.0), "b": Remembering(0.0)}, log, updates=0)  # refused before anything is learned
    with pytest.raises(ValueError, match="at least one policy"):
        rank({}, log)
    with pytest.raises(ValueError, match="pass worlds, too"):
        rank({"a": Constant(0.0)}, log, held_out=log)
    with pytest.raises(ValueError, match=r"no world for \['b'\], given are those of \['a'\]"):
        rank({"a": Constant(0.0), "b": Constant(1.0)}, log, worlds={"a": World(Drifting(), TASK)})
    with pytest.raises(ValueError, match="has no time limit: pass horizon="):
        endless = World(Drifting(), replace(TASK, max_episode_steps=None))
        return_in_model(Constant(0.0), endless, torch.zeros(2, 1), worst=0.0)
    with pytest.raises(DataError, match="NaN"):
        model_error(Drifting(), replace(log, obs=log.obs / 0))


def test_a_sweep_believes_its_judge_where_the_members_agree_as_on_the_log(tmp_path, monkeypatch):
    """Logged steps (the largest disagreement may round), not far ones; a judge of one member wherever it is asked."""
    rows = collect("Pendulum-v1", steps=400, lanes=2, seed=0, progress=False)
    log, held_out, worlds = rows[:200], rows[200:], []

    def played(policy, world, start, **_):
        worlds.append(world)
        return Estimate(1.0, 0.5, 1.5)

    monkeypatch.setattr(objectives, "return_in_model", played)
    for members in (3, 1):
        judge = ProbabilisticEnsemble(num_members=members, num_elites=1, hidden=[8], max_epochs=2)
        judge.fit(rows, rng=generator(0))
        judge.save(tmp_path / str(members))
        asked = objectives.Judgement(Constant(0.0), log, held_out, tmp_path / str(members), "Pendulum-v1", 0)
        assert objectives.by_return_in_model(asked) == 0.5
    several, alone = worlds
    first = torch.zeros(len(rows), dtype=torch.long)
    logged, far = State(rows.obs, first), State(rows.obs * 100, first)
    assert several.trust(logged, rows.action, State(rows.next_obs, first)).float().mean() > 0.99
    assert several.trust(far, rows.action, far).float().mean() < 0.1
    assert alone.trust(far, rows.action, far).all()


def test_pendulum_policies_come_out_in_their_true_order():
    """Controllers of different strength, judged from the log of a mixture of others."""
    mixture = [(1.0, Swinger(quality, seed)) for seed, quality in enumerate((0.0, 0.2, 0.5, 0.8))]
    log = collect("Pendulum-v1", steps=8000, behaviour=mixture, lanes=8, progress=False)
    policies = {str(quality): Swinger(quality, 0, noise=0.0) for quality in (0.0, 0.35, 0.9)}
    real = {name: evaluate(copy.deepcopy(policy), "Pendulum-v1", episodes=6).mean for name, policy in policies.items()}
    ranking = rank(policies, log, gamma=0.97, hidden=(32, 32), members=2, updates=500, batch_size=128, tau=0.1)
    found = {row.name: row.fqe.value for row in ranking.candidates}
    assert correlation([found[name] for name in real], list(real.values())).value == 1.0
    assert max(real, key=real.get) == ranking.best


def test_crossed_intervals_cover():
    """Rows and columns both count: the interval of a mean of row effects + column effects covers its truth."""
    rng, hits = np.random.default_rng(0), 0
    for trial in range(200):
        table = rng.normal(size=(8, 1)) + rng.normal(size=(1, 30)) + 0.1 * rng.normal(size=(8, 30))
        low, high = crossed_interval(table, resamples=300, seed=trial)[1:]
        hits += low <= 0 <= high
    assert 170 <= hits <= 199
    assert crossed_interval([[3.0]]) == (3.0, -np.inf, np.inf)
    one = crossed_interval(np.arange(5.0)[None])
    assert one.low < one.value == 2.0 < one.high
    with pytest.raises(ValueError, match="2 axes"):
        crossed_interval([1.0, 2.0])
