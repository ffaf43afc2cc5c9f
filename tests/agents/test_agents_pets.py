"""PETS: the loop, its randomness, its files, Stable-Baselines3's surface around it, and what breaks it."""

import csv
import json
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from learneddyn import tasks
from learneddyn.agents.pets import PETS, AgentFileError, published_ensemble
from learneddyn.core import DataError, Task
from learneddyn.models import AbstractDynamics, ProbabilisticEnsemble
from learneddyn.models.base import ModelFileError
from learneddyn.planners import CEM, ICEM, CategoricalCEM
from learneddyn.tasks import registry
from learneddyn.tasks.endless import never
from learneddyn.world import SAMPLERS, ModelDiverged, strict

ID, STEPS = "test/Drift-v0", 8


class Drift(gym.Env):
    """x' = x + 0.5 a, paid -x'^2. Every step terminates if asked to."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, terminal=False):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.terminal = terminal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-2, 2, 1)
        return self.x, {}

    def step(self, action):
        self.x = self.x + 0.5 * action
        return self.x, -(float(self.x[0]) ** 2), self.terminal, False, {}


def square(obs, action, next_obs):
    return -next_obs[:, 0].square()


@pytest.fixture(autouse=True, scope="module")
def _registered():
    gym.register(ID, Drift, max_episode_steps=STEPS)
    tasks.register(Task(ID, square, never), overwrite=True)
    yield
    del gym.registry[ID]
    del registry._registered[ID]


def ensemble(**changes):
    return ProbabilisticEnsemble(**({"num_members": 2, "num_elites": 2, "hidden": [8], "max_epochs": 2} | changes))


def planner():
    return ICEM(horizon=3, candidates=10, elites=4, iterations=1)


def agent(env=ID, model=None, **changes):
    changes = {"particles": 2, "seed": 3, "device": "cpu"} | changes
    return PETS(env, model or ensemble(), planner(), **changes)


@pytest.fixture(scope="module")
def learned(_registered, tmp_path_factory):
    """An agent of three trials, and its folder."""
    pets, folder = agent(), tmp_path_factory.mktemp("pets") / "agent"
    pets.learn(3 * STEPS, checkpoint=folder)
    return pets, folder


def test_the_loop_stores_what_really_happened(learned):
    pets, _ = learned
    data = pets.data
    assert (pets.trials, pets.num_timesteps, len(data)) == (3, 3 * STEPS, 3 * STEPS)
    assert data.episode.tolist() == [k for k in range(3) for _ in range(STEPS)]
    torch.testing.assert_close(data.next_obs, data.obs + 0.5 * data.action, atol=1e-6, rtol=0)  # no reset in between
    assert not data.terminated.any()  # a time limit is no termination
    sums = [float(data.reward[data.episode == k].sum()) for k in range(3)]
    assert pets.returns == pytest.approx(sums)
    assert pets.dynamics.spaces == pets.spaces


def test_the_first_trial_is_random_and_the_model_comes_after_it():
    pets = agent()
    pets.learn(STEPS)
    assert pets.mpc is None
    assert pets.dynamics.spaces is None
    pets.learn(STEPS, reset_num_timesteps=False)
    assert pets.mpc is not None
    assert pets.num_timesteps == 2 * STEPS
    patient = agent(random_trials=3)
    patient.learn(3 * STEPS)
    assert patient.mpc is None


def test_it_learns_to_stay_at_zero():
    pets = PETS(
        ID,
        ensemble(max_epochs=60, hidden=[16], batch_size=8, patience=60, weight_decay=0.0),
        ICEM(horizon=4, candidates=40, iterations=2, elites=5),
        particles=2,
        seed=0,
        device="cpu",
    )
    pets.learn(5 * STEPS)
    last = pets.data.next_obs[pets.data.episode == 4][-3:]
    assert last.abs().max() < 0.15  # from as far as 2, with steps of 0.5


def test_one_seed_one_result_and_another_seed_another(learned):
    pets, _ = learned
    again, other = agent(), agent(seed=4)
    again.learn(3 * STEPS)
    other.learn(STEPS)
    assert torch.equal(again.data.obs, pets.data.obs)
    assert again.returns == pets.returns
    assert other.returns[0] != pets.returns[0]


def test_nothing_global_is_drawn_from_or_seeded():
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    agent().learn(2 * STEPS)
    after = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(11)
    np.random.seed(11)  # noqa: NPY002
    assert after == (torch.rand(1).item(), np.random.rand())  # noqa: NPY002


def test_a_killed_run_goes_on_as_if_nothing_had_happened(learned, tmp_path):
    pets, _ = learned
    agent().learn(2 * STEPS, checkpoint=tmp_path / "run")
    resumed = PETS.load(tmp_path / "run", ID, device="cpu")
    assert (resumed.trials, resumed.num_timesteps) == (2, 2 * STEPS)
    resumed.learn(STEPS, reset_num_timesteps=False)
    assert resumed.returns == pets.returns
    assert torch.equal(resumed.data.next_obs, pets.data.next_obs)
    for name, value in pets.dynamics.state_dict().items():
        assert torch.equal(value, resumed.dynamics.state_dict()[name])


def test_saved_within_a_trial_it_keeps_the_rows_and_begins_the_next(tmp_path):
    pets = agent()
    pets.learn(2 * STEPS, CheckpointCallback(STEPS + 3, str(tmp_path), name_prefix="pets"))
    loaded = PETS.load(tmp_path / f"pets_{STEPS + 3}_steps.zip", ID, device="cpu")
    assert (loaded.trials, loaded.num_timesteps, len(loaded.data)) == (2, STEPS + 3, STEPS + 3)
    loaded.learn(STEPS, reset_num_timesteps=False)
    assert loaded.trials == 3


def test_a_loaded_agent_answers_the_same_without_an_environment(learned):
    pets, folder = learned
    loaded = PETS.load(folder, device="cpu")
    obs = np.array([[0.7], [-1.2]])
    for _ in range(2):
        mine, theirs = pets.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0]
        assert np.array_equal(mine, theirs)
    assert loaded.get_env() is None
    with pytest.raises(ValueError, match="no environment to learn in"):
        loaded.learn(1)
    assert loaded.planner.candidates == 10


def test_an_agent_that_has_seen_nothing_is_saved_and_acts_randomly(tmp_path):
    pets = agent(model=ensemble(hidden=[5]))
    pets.save(tmp_path / "new")
    loaded = PETS.load(tmp_path / "new", ID, device="cpu")
    assert (loaded.trials, loaded.dynamics.hidden) == (0, [5])
    action, state = loaded.predict(np.zeros((3, 1)))
    assert state is None
    assert len({float(a) for a in action[:, 0]}) == 3
    assert loaded.action_space.contains(loaded.predict(np.zeros(1))[0])


def test_stable_baselines_callbacks_evaluation_and_logger(tmp_path):
    pets = agent()
    pets.set_logger(configure(str(tmp_path), ["csv"]))
    evaluation = EvalCallback(
        gym.make(ID), eval_freq=STEPS, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0, warn=False
    )
    pets.learn(3 * STEPS, evaluation)
    pets.logger.close()
    with (tmp_path / "progress.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/ep_rew"]]
    assert [float(row["rollout/ep_rew"]) for row in rows] == pytest.approx(pets.returns, rel=1e-4)
    assert {"eval/mean_reward", "rollout/ep_rew_mean", "time/total_timesteps"} <= set(rows[0])
    for name in ("model/fresh_nll", "model/break_even", "imagined/uncertainty", "imagined/return"):
        assert np.isfinite(float(rows[-1][name]))
    shares = [float(rows[-1][f"time/{part}_share"]) for part in ("real", "plan", "fit", "judge")]
    assert 0.9 < sum(shares) <= 1 + 1e-6
    assert PETS.load(tmp_path / "best_model", ID, device="cpu").trials >= 1
    assert np.isfinite(evaluate_policy(pets, gym.make(ID), n_eval_episodes=1, warn=False)[0])


def test_evaluating_or_diagnosing_changes_nothing_of_what_is_learned(learned):
    pets, _ = learned
    watched = agent(diagnose=False)
    watched.learn(3 * STEPS, EvalCallback(gym.make(ID), eval_freq=3, n_eval_episodes=1, verbose=0, warn=False))
    assert watched.returns == pets.returns
    assert "model/break_even" not in watched.figures


def test_a_callback_can_stop_it():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps < STEPS + 2

    pets = agent()
    pets.learn(5 * STEPS, Stop())
    assert (pets.num_timesteps, pets.trials, len(pets.data)) == (STEPS + 2, 2, STEPS + 2)


@pytest.mark.parametrize("sampler", ["tsinf", "ts1"])
def test_particles_and_sampler_reach_the_world(sampler):
    pets = agent(sampler=sampler, particles=7)
    pets.learn(STEPS + 1)
    assert pets.mpc.particles == 7
    assert pets.mpc.world.sampler is SAMPLERS[sampler]


def test_discrete_actions_are_planned_and_stored():
    pets = PETS(gym.make("CartPole-v1"), ensemble(), CategoricalCEM(2, 4, 2, 1), particles=2, seed=0, device="cpu")
    pets.learn(40)
    assert set(pets.data.action.sum(dim=1).tolist()) == {1.0}
    assert bool(pets.data.terminated.any())


def test_defaults_are_the_sources():
    pets = PETS(gym.make("learneddyn/CartPoleSwingUp-v0"), device="cpu")
    assert isinstance(pets.planner, CEM)
    assert (pets.planner.candidates, pets.planner.elites, pets.planner.iterations) == (400, 40, 5)
    assert (pets.particles, pets.sampler, pets.random_trials) == (20, "tsinf", 1)
    model = pets.dynamics
    assert (model.num_members, model.num_elites, model.max_epochs, model.batch_size) == (5, 5, 5, 32)
    assert model.angles == [1]
    needy = published_ensemble(Task("Anything-v0"))
    assert (needy.learn_reward, needy.learn_termination) == (True, True)


def test_what_learning_asks_for_is_told(capsys):
    pets = agent(verbose=1)  # 10 plans and 1 kept one, of 3 steps and 2 particles
    assert pets.work(100) == {"planned_steps": 100 * 11 * 3 * 2}
    pets.learn(2)
    assert "2 real steps ask for 132 planned_steps at most" in capsys.readouterr().out


def test_an_environment_of_nothing_but_terminations_is_learned_from():
    gym.register("test/Over-v0", Drift, max_episode_steps=STEPS, kwargs={"terminal": True})
    try:
        pets = agent("test/Over-v0", ensemble(learn_termination=True), task=Task("test/Over-v0", square))
        pets.learn(6)
        assert (pets.trials, pets.num_timesteps) == (6, 6)
        assert bool(pets.data.terminated.all())
        assert pets.mpc is not None
    finally:
        del gym.registry["test/Over-v0"]


def test_data_that_cannot_be_learned_from_is_named_and_the_checkpoint_stays(tmp_path):
    class Frozen(Drift):
        def step(self, action):
            return self.x, 0.0, False, False, {}

        def reset(self, *, seed=None, options=None):
            self.x = np.zeros(1)
            return self.x, {}

    env = gym.wrappers.TimeLimit(Frozen(), STEPS)
    pets = agent(env, task=Task("test/Frozen-v0", square, never))
    with pytest.raises(DataError, match="every observation column is constant"):
        pets.learn(3 * STEPS, checkpoint=tmp_path / "run")
    kept = PETS.load(tmp_path / "run", env, task=Task("test/Frozen-v0", square, never), device="cpu")
    assert (kept.trials, len(kept.data)) == (1, STEPS)


class Breaking(ProbabilisticEnsemble):
    """Member 1 answers NaN from the second step of every plan on."""

    def sample(self, obs, action, member, rng, memory=None, *, noise=True):
        outcome = super().sample(obs, action, member, rng, memory, noise=noise)
        gone = (member == 1) & (self.calls % 3 > 0)
        self.calls += 1
        return outcome._replace(next_obs=torch.where(gone[:, None], torch.nan, outcome.next_obs))

    calls = 0


def test_a_model_that_diverges_within_plans_is_named_once_a_trial(tmp_path):
    pets = agent(model=Breaking(num_members=2, num_elites=2, hidden=[8], max_epochs=2), diagnose=False)
    pets.learn(STEPS, checkpoint=tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="trial 2: member 1 of the model left the finite numbers at step 2") as seen:
        pets.learn(STEPS, reset_num_timesteps=False)
    assert len(seen) == 1
    assert pets.trials == 2
    pets.sentinel = strict
    with pytest.raises(ModelDiverged, match="member 1 of the model left the finite numbers at step 2"):
        pets.learn(STEPS, reset_num_timesteps=False, checkpoint=tmp_path / "run")
    assert json.loads((tmp_path / "run" / "pets.json").read_text())["num_timesteps"] == STEPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 0}, "particles must be at least 1, got 0"),
        ({"random_trials": 0}, "random_trials must be at least 1, got 0"),
        ({"env": "Pendulum-v1", "sampler": "ts2"}, None),
        ({"env": "CartPole-v1"}, r"ICEM does not plan actions of Discrete\(2\)"),
        ({"env": DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 2)}, "does not support multiple envs"),
        ({"env": VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))}, "without VecNormalize"),
        ({"env": Drift()}, "no Gymnasium id to look its task up by"),
    ],
)
def test_what_cannot_work_is_refused(change, message):
    if message is None:
        pets = agent(**change)
        with pytest.raises(ValueError, match="unknown sampler 'ts2', allowed are"):
            pets.learn(201)
        return
    with pytest.raises(ValueError, match=message):
        agent(**change)


def test_damaged_folders_are_named(learned, tmp_path):
    _, folder = learned
    with pytest.raises(AgentFileError, match="is not a readable PETS folder"):
        PETS.load(tmp_path / "nothing")
    for name, error in (
        ("pets.json", AgentFileError),
        ("data.safetensors", DataError),
        ("model/model.safetensors", ModelFileError),
    ):
        broken = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, broken)
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(error):
            PETS.load(broken, device="cpu")
    with pytest.raises(AgentFileError, match="was learned in the spaces"):
        PETS.load(folder, "Pendulum-v1", device="cpu")
    with pytest.raises(ValueError, match="pickles nothing"):
        agent().save(tmp_path / "x", exclude=["env"])


def test_a_folder_names_only_classes_of_the_right_kind(learned, tmp_path):
    _, folder = learned
    shutil.copytree(folder, tmp_path / "odd")
    card = json.loads((folder / "pets.json").read_text())
    card["planner"]["class"] = "subprocess.Popen"
    (tmp_path / "odd" / "pets.json").write_text(json.dumps(card))
    with pytest.raises(AgentFileError, match=r"cannot make a subprocess\.Popen: it is no AbstractPlanner"):
        PETS.load(tmp_path / "odd")


def test_any_dynamics_model_will_do():
    assert issubclass(ProbabilisticEnsemble, AbstractDynamics)
    single = agent(model=ensemble(num_members=1, num_elites=1))
    single.learn(2 * STEPS)
    assert single.trials == 2
