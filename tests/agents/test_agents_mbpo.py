import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from learneddyn import tasks
from learneddyn.agents import MBPO, DynaCrossQ, DynaTD3, DynaTQC
from learneddyn.agents.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from learneddyn.agents.dyna import pool_capacity, rollout_length
from learneddyn.core import Task, generator
from learneddyn.models import Koopman, ProbabilisticEnsemble
from learneddyn.tasks import UnknownTask
from learneddyn.world import World

HOPPER = (20, 150, 1, 15)


def small(**heads) -> ProbabilisticEnsemble:
    return ProbabilisticEnsemble(
        num_members=3, num_elites=2, hidden=[16], max_epochs=4, weight_decay=1e-5, batch_size=64, **heads
    )


def agent(kind=MBPO, env="Pendulum-v1", **kwargs):
    heads = kwargs.pop("heads", {})
    given = {
        "model": small(**heads),
        "rollout_batch": 100,
        "refit_every": 50,
        "learning_starts": 100,
        "gradient_steps": 1,
        "batch_size": 100,
        "policy_kwargs": {"net_arch": [16]},
        "seed": 0,
        "device": "cpu",
    }
    return kind("MlpPolicy", gym.make(env) if isinstance(env, str) else env, **given | kwargs)


class Once(gym.Env):
    """Every step ends the episode: the return is the reward of one step."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.at, {}

    def step(self, action):
        return (self.at + 0.1 * action).astype(np.float32), 5.0, True, False, {}


class Noisy(Once):
    """Draws random numbers in its steps, so that its episodes cannot be played again."""

    def step(self, action):
        self.at = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.at, 1.0, False, False, {}


@pytest.mark.parametrize(
    ("epoch", "length"), [(0, 1), (20, 1), (29, 1), (30, 2), (85, 8), (149, 14), (150, 15), (900, 15)]
)
def test_rollout_length_of_the_hopper_schedule(epoch, length):
    assert rollout_length(HOPPER, epoch) == length


def test_capacity_holds_what_retained_epochs_imagine():
    assert pool_capacity(15, 100_000, 250, retain=1) == 15 * 100_000 * 4
    assert pool_capacity(1, 100_000, 1000, retain=5) == 500_000
    assert pool_capacity(2, 50, 5000, retain=1) == 100  # one imagination at least


def test_the_pool_follows_the_schedule():
    model = agent(schedule=(0, 1, 1, 3), rollout_batch=20, refit_every=500, gradient_steps=0)
    model.learn(101)
    assert (model.rollout_length, model.replay_buffer.imagined.capacity) == (1, 1 * 20 * 2)
    model.num_timesteps = 1000
    model.imagine()
    assert (model.rollout_length, model.replay_buffer.imagined.capacity) == (3, 3 * 20 * 2)


def test_without_updates_the_pool_is_a_fresh_elite_rollout():
    """A fresh model, fitted on the same rows with the same seed, imagines the same rows."""

    class Watched(MBPO):
        def refit(self):
            self.before = self.rng.get_state(), torch.get_rng_state()
            return super().refit()

    mine = agent(Watched, gradient_steps=0, schedule=(0, 0, 3, 3))
    mine.learn(101)
    pool = mine.replay_buffer.imagined
    rng = generator(0)
    rng.set_state(mine.before[0])
    other = small()
    other.fit(mine.real_data(), rng=rng)
    starts = mine.replay_buffer.real.sample(100, rng).obs
    torch.set_rng_state(mine.before[1])
    low, high = -2.0, 2.0
    with torch.no_grad():
        fresh = World(other, tasks.get("Pendulum-v1"), sampler="elite").rollout(
            starts, lambda obs: low + (mine.actor(obs, deterministic=False) + 1) / 2 * (high - low), 3, rng
        )
    rows = pool.unpack(pool.rows())
    assert len(pool) == 300
    torch.testing.assert_close(rows.obs, fresh.obs)
    torch.testing.assert_close(rows.next_obs, fresh.next_obs)
    torch.testing.assert_close(rows.action * 2, fresh.action)
    torch.testing.assert_close(rows.reward, fresh.reward)


def test_five_percent_of_a_batch_are_real():
    model = agent(gradient_steps=0)
    model.learn(101)
    buffer = model.replay_buffer
    buffer.imagined._rows[:, 0] = 100.0  # no real cosine is
    shares = [(buffer.sample(256).observations[:, 0] < 2).float().mean() for _ in range(20)]
    assert float(torch.stack(shares).mean()) == pytest.approx(0.05, abs=0.004)


def test_terminal_rows_end_their_rollout_and_are_never_bootstrapped():
    model = agent(env="InvertedPendulum-v5", schedule=(0, 0, 6, 6), rollout_batch=300, learning_starts=300)
    model.learn(301)
    pool = model.replay_buffer.imagined
    rows = pool.unpack(pool.rows())
    fallen = rows.next_obs[:, 1].abs() > 0.2
    assert 0 < int(fallen.sum()) < len(rows.obs)
    assert bool((rows.terminated.bool() == fallen).all())
    assert bool((rows.obs[:, 1].abs() <= 0.2).all()), "a rollout went on after its terminal row"


def test_time_outs_are_no_terminations():
    model = agent()
    model.learn(450)
    data = model.real_data()
    assert not bool(data.terminated.any())
    assert data.episode.unique_consecutive(return_counts=True)[1].tolist() == [200, 200, 50]


def test_lanes_come_out_as_whole_episodes():
    model = agent(env=DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 3), gradient_steps=0)
    model.learn(630)
    data = model.real_data()
    assert data.episode.unique_consecutive(return_counts=True)[1].tolist() == [200, 10] * 3
    same = data.episode[1:] == data.episode[:-1]
    assert bool((data.obs[1:] == data.next_obs[:-1]).all(dim=1)[same].all())
    action = torch.atan2(data.obs[:, 1], data.obs[:, 0])
    assert float((data.reward + action.square() + 0.1 * data.obs[:, 2].square()).abs().max()) < 0.005


@pytest.mark.parametrize("kind", [DynaTD3, DynaTQC, DynaCrossQ])
def test_other_algorithms_are_one_line(kind):
    model = agent(kind, imagination_noise=0.1, gradient_steps=2)
    before = [parameter.clone() for parameter in model.actor.parameters()]
    model.learn(160)
    assert len(model.replay_buffer.imagined) == 200
    assert any(not torch.equal(one, other) for one, other in zip(before, model.actor.parameters(), strict=True))
    batch = model.replay_buffer.imagined
    assert float(batch.unpack(batch.rows()).action.abs().max()) <= 1


def test_learns_what_a_known_optimum_pays():
    """Every step ends with 5: a critic that bootstrapped through a terminal would say far more than 5."""
    task = Task("Once-v0", reward=lambda o, a, n: 5 + 0 * o[:, 0], terminated=lambda n: n[:, 0] == n[:, 0])
    model = agent(env=Once(), task=task, gradient_steps=10, learning_rate=1e-2, tau=0.05, ent_coef=0.0)
    model.learn(200)
    obs, action = torch.zeros(1, 2), torch.zeros(1, 1)
    with torch.no_grad():
        assert float(torch.cat(model.critic(obs, action)).mean()) == pytest.approx(5, abs=0.3)
    assert bool(model.replay_buffer.imagined.unpack(model.replay_buffer.imagined.rows()).terminated.all())


def everything(model) -> dict[str, torch.Tensor]:
    """All that learning depends on."""
    found = {f"policy.{k}": v for k, v in model.policy.state_dict().items()}
    found |= {f"dynamics.{k}": v for k, v in model.dynamics.state_dict().items()}
    for name in ("actor", "critic"):
        for key, moments in getattr(model, name).optimizer.state_dict()["state"].items():
            found |= {f"{name}.{key}.{k}": v for k, v in moments.items()}
    found["alpha"] = model.log_ent_coef
    found["real"], found["imagined"] = (
        part.rows() for part in (model.replay_buffer.real, model.replay_buffer.imagined)
    )
    found["obs"] = torch.zeros(0) if model._last_obs is None else torch.from_numpy(model._last_obs)
    return {name: value.detach().clone() for name, value in found.items()}


class SaveAt(BaseCallback):
    def __init__(self, step, folder):
        super().__init__()
        self.step, self.folder = step, folder

    def _on_rollout_start(self):
        if self.num_timesteps == self.step:
            save_checkpoint(self.model, self.folder)

    def _on_step(self):
        return True


@pytest.mark.parametrize("env", ["Pendulum-v1", "InvertedPendulum-v5"])
@pytest.mark.parametrize("step", [60, 145])  # in the warm-up; between two fits, in the middle of an episode
def test_a_resumed_run_goes_on_bit_equal(env, step, tmp_path):
    whole = agent(env=env, rollout_batch=30, buffer_size=110)  # the real rows wrap
    whole.learn(220, callback=SaveAt(step, tmp_path / "run"))
    torch.rand(3), np.random.rand(3)  # noqa: NPY002 (another process has other global states)
    resumed = load_checkpoint(MBPO, tmp_path / "run", gym.make(env), device="cpu")
    assert resumed.num_timesteps == step
    resumed.learn(220 - step, reset_num_timesteps=False)
    mine, theirs = everything(resumed), everything(whole)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_resume_of_many_lanes(tmp_path):
    lanes = lambda: DummyVecEnv([lambda: gym.make("InvertedPendulum-v5")] * 2)  # noqa: E731
    whole = agent(env=lanes(), gradient_steps=1)
    whole.learn(260, callback=SaveAt(182, tmp_path / "run"))
    resumed = load_checkpoint(MBPO, tmp_path / "run", lanes(), device="cpu")
    resumed.learn(260 - 182, reset_num_timesteps=False)
    mine, theirs = everything(resumed), everything(whole)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_episodes_that_cannot_be_played_again_begin_anew(tmp_path):
    task = Task("Noisy-v0", reward=lambda o, a, n: 1 + 0 * o[:, 0], terminated=lambda n: n[:, 0] > 9)
    noisy = lambda: gym.wrappers.TimeLimit(Noisy(), 50)  # noqa: E731
    model = agent(env=noisy(), task=task)
    model.learn(130)
    save_checkpoint(model, tmp_path / "run")
    with pytest.warns(UserWarning, match="cannot be played again"):
        resumed = load_checkpoint(MBPO, tmp_path / "run", noisy(), device="cpu")
    resumed.learn(60, reset_num_timesteps=False)
    assert resumed.num_timesteps == 190


def test_a_broken_checkpoint_says_so(tmp_path):
    model = agent()
    model.learn(120)
    save_checkpoint(model, tmp_path / "run")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_checkpoint(MBPO, tmp_path / "none", gym.make("Pendulum-v1"))
    rows = tmp_path / "run" / "replay" / "real.safetensors"
    rows.write_bytes(rows.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"real\.safetensors"):
        load_checkpoint(MBPO, tmp_path / "run", gym.make("Pendulum-v1"))
    shutil.rmtree(tmp_path / "run" / "replay")
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        load_checkpoint(MBPO, tmp_path / "run", gym.make("Pendulum-v1"))


def test_sb3s_zip_holds_policy_and_model(tmp_path):
    model = agent(heads={"learn_reward": True})
    model.learn(160)
    model.save(tmp_path / "agent.zip")
    back = MBPO.load(tmp_path / "agent.zip", device="cpu")
    obs = model.env.observation_space.sample()
    np.testing.assert_array_equal(back.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    rows = torch.rand(5, 3), torch.rand(5, 1)
    for one, other in zip(back.dynamics.predict(*rows), model.dynamics.predict(*rows), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    back.set_env(gym.make("Pendulum-v1"))
    before = everything(back)
    back.learn(100, reset_num_timesteps=False)  # an empty replay: neither fits nor updates
    unchanged = {name for name, value in everything(back).items() if torch.equal(value, before[name])}
    assert {name for name in before if name.startswith(("policy", "dynamics"))} <= unchanged
    back.learn(10, reset_num_timesteps=False)
    assert len(back.replay_buffer.imagined) == 100


def test_learning_anew_refits_anew(capsys):
    model = agent(verbose=1)
    model.learn(160)
    assert model._fitted_at == 150
    model.learn(60)
    assert (model.num_timesteps, model._fitted_at) == (60, 50)
    assert "160 real steps ask for 60 updates, 2 fits, 200 imagined_steps at most" in capsys.readouterr().out


def test_an_agent_that_never_learned_is_saved_too(tmp_path):
    agent().save(tmp_path / "agent.zip")
    assert MBPO.load(tmp_path / "agent.zip", env=gym.make("Pendulum-v1"), device="cpu").world is None


def test_sb3s_callbacks_and_logs(tmp_path):
    model = agent()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    env = Monitor(gym.wrappers.TimeLimit(gym.make("Pendulum-v1").unwrapped, 20))
    judge = EvalCallback(env, eval_freq=80, n_eval_episodes=1, best_model_save_path=str(tmp_path), verbose=0)
    keep = CheckpointCallback(100, str(tmp_path), save_replay_buffer=True)
    model.learn(210, callback=[judge, keep], log_interval=1)
    model.logger.close()
    assert {path.name for path in tmp_path.glob("*.zip")} >= {"best_model.zip", "rl_model_200_steps.zip"}
    assert "model/fresh_mse" in (tmp_path / "progress.csv").read_text()


def test_what_is_logged():
    model = agent(schedule=(0, 0, 2, 2))
    model.learn(160)
    wanted = {"model/fresh_nll", "model/fresh_mse", "imagined/uncertainty", "time/fit_share", "time/real_share"}
    assert wanted <= model.figures.keys()
    assert sum(value for name, value in model.figures.items() if name.startswith("time/")) == pytest.approx(1)


def test_diagnostics_change_nothing():
    mine, theirs = (everything(agent(diagnose=diagnose).learn(160)) for diagnose in (True, False))
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_hooks_see_every_refit():
    class Hooked(MBPO):
        seen, fits = 0, 0

        def on_refit(self, report):
            self.fits += 1

        def on_imagined(self, rows):
            self.seen += len(rows)

        def imagination_policy(self, world):
            assert world is self.world
            return lambda obs: torch.full((len(obs), 1), 0.5)

    model = agent(Hooked, gradient_steps=0)
    model.learn(210)
    assert (model.fits, model.seen) == (3, 300)  # after steps 101, 150, 200
    rows = model.replay_buffer.imagined
    assert bool((rows.unpack(rows.rows()).action == 0.25).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env": Once()}, "no Gymnasium id"),
        ({"env": VecNormalize(DummyVecEnv([Once])), "task": Task("Once-v0")}, "VecNormalize"),
        ({"real_ratio": 1.5}, "real_share"),
        ({"refit_every": 0}, "refit_every must be at least 1"),
        ({"schedule": (0, 1, 0, 1)}, "schedule must be"),
        ({"n_steps": 3}, "n_steps must be 1"),
        ({"imagination_noise": -1.0}, "imagination_noise"),
        ({"replay_buffer_class": gym.Env}, "replay_buffer_class"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        agent(**arguments)


def test_unknown_task():
    with pytest.raises(UnknownTask, match="no task is known"):
        agent(env=gym.make("learneddyn:LearnedDyn-v0"))


def test_spaces_must_be_flat_boxes():
    class Images(Once):
        observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)

    class Parts(Once):
        observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32)})

    for env, policy in ((Images(), "CnnPolicy"), (Parts(), "MultiInputPolicy")):
        with pytest.raises(ValueError, match="Box of numbers"):
            MBPO(policy, env, task=Task("Once-v0"))


def test_a_task_of_another_environment_is_refused():
    wrong = Task("Pendulum-v1", reward=lambda o, a, n: 0 * o[:, 0], terminated=tasks.get("Pendulum-v1").terminated)
    with pytest.raises(ValueError, match="the reward of the task Pendulum-v1 differs"):
        agent(task=wrong).learn(101)
    ended = Task("Pendulum-v1", reward=tasks.get("Pendulum-v1").reward, terminated=lambda n: n[:, 0] > 0)
    with pytest.raises(ValueError, match="the termination of the task Pendulum-v1 differs"):
        agent(task=ended).learn(101)


def test_a_model_without_the_heads_that_the_task_needs():
    with pytest.raises(ValueError, match="no reward head"):
        agent(task=Task("Pendulum-v1")).learn(101)
    learned = agent(task=Task("Pendulum-v1"), heads={"learn_reward": True, "learn_termination": True})
    learned.learn(150)
    assert len(learned.replay_buffer.imagined) == 200


@torch.no_grad()
def test_a_model_with_memory_imagines_from_what_led_to_the_real_row():
    mine = agent(model=Koopman(degree=1, delays=3), sampler="mean", gradient_steps=0)
    mine.learn(101)
    data, rows = mine.real_data(), mine.imagine()
    at = (rows.obs[:, None] == data.obs).all(dim=2).long().argmax(dim=1)
    assert torch.equal(data.obs[at], rows.obs)
    wanted = mine.dynamics.predict(rows.obs, rows.action, mine.dynamics.remembered(data)[at]).mean[0]
    torch.testing.assert_close(rows.next_obs, wanted)
    assert (wanted - mine.dynamics.predict(rows.obs, rows.action).mean[0]).abs().max() > 1e-4
