"""Runs of offline learners: a killed one ends as if nothing had happened; the protocol decides what is reported."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import yaml

from learneddyn import offline as learners
from learneddyn import tasks
from learneddyn.cli import _known_task, _learners, _offline_again, _offline_agent, _weight_notes, main
from learneddyn.core import RewardFn, Task, Transitions
from learneddyn.data import collect, load, read_provenance, save, without_actions
from learneddyn.files import replaced_folder
from learneddyn.models import InverseDynamics, ProbabilisticEnsemble
from learneddyn.offline import BC, IQL, MOPO, MOREC, RAMBO, DynamicsReward
from learneddyn.runs import offline
from learneddyn.runs.marks import read_marks
from learneddyn.runs.offline import Mark, learn_offline, summary

SMALL: dict = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "device": "cpu", "seed": 0, "task": "Pendulum-v1"}
IMAGINED: dict = {"rollout_batch": 20, "rollout_every": 10, "horizon": 2}
TINY_MODEL = {"num_members": 2, "num_elites": 2, "hidden": [8], "max_epochs": 2}
RUN: dict = {"updates": 50, "judge_every": 20, "episodes": 1, "fresh_episodes": 2}
PRESETS = sorted((Path(offline.__file__).parents[1] / "configs" / "offline").glob("*.yaml"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def log() -> Transitions:
    return collect("Pendulum-v1", steps=500, lanes=2, seed=3, progress=False)


@pytest.fixture(scope="module")
def pole() -> Transitions:
    return collect("InvertedPendulum-v5", steps=100, lanes=2, seed=3, progress=False)


def iql(data):
    return IQL("MlpPolicy", data, **SMALL)


def mopo(data):
    model = ProbabilisticEnsemble(**TINY_MODEL)
    return MOPO("MlpPolicy", data, model=model, **SMALL | IMAGINED)


def morec(data):
    model, reward = ProbabilisticEnsemble(**TINY_MODEL), DynamicsReward(snapshots=2, updates=4, hidden=(8,), warm_up=2)
    return MOREC("MlpPolicy", data, model=model, dynamics_reward=reward, least_dynamics_reward=0.0, **SMALL | IMAGINED)


def rambo(data):
    """Turns of the model before and after the kill, and a penalty weighed by the model that they alter."""
    turns = {"adversary": 0.1, "adversary_every": 8, "adversary_steps": 3, "adversary_batch": 8, "cloning_updates": 5}
    weighed = {"penalty": "ensemble_std", "penalty_weight": "quantile:1.0", "model_learning_rate": 0.01}
    return RAMBO("MlpPolicy", data, model=ProbabilisticEnsemble(**TINY_MODEL), **SMALL | IMAGINED | turns | weighed)


def comparable(outcome) -> list:
    """All but the times, which differ from run to run, and the means over a stretch that the kill cut in two."""
    marks = [(mark.updates, mark.returns) for mark in outcome.marks]
    return [outcome.protocol, outcome.updates, outcome.returns, marks]


@pytest.mark.parametrize("make", [iql, mopo, morec, rambo])
def test_a_killed_run_ends_as_if_nothing_had_happened(make, log, tmp_path, monkeypatch):
    again = partial({iql: IQL, mopo: MOPO, morec: MOREC, rambo: RAMBO}[make].load, data=log)
    play = partial(learn_offline, partial(make, log), partial(again, task=SMALL["task"]), "Pendulum-v1", **RUN)
    whole = play(tmp_path / "whole")
    assert [mark.updates for mark in whole.marks] == [20, 40, 50]

    class Killed(replaced_folder):
        """A kill after the curve is written and before the second checkpoint is."""

        def __enter__(self) -> Path:
            if len(read_marks(tmp_path / "torn", Mark)) == 2:
                raise KeyboardInterrupt
            return super().__enter__()

    monkeypatch.setattr(offline, "replaced_folder", Killed)
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "torn")
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert [mark.updates for mark in read_marks(tmp_path / "torn", Mark)] == [20, 40]
    resumed = play(tmp_path / "torn")
    assert comparable(resumed) == comparable(whole)
    assert play(tmp_path / "torn") == resumed
    figures = set(resumed.marks[-1].figures)
    assert {"train/critic_loss"} <= figures
    assert figures == set(whole.marks[-1].figures), "what is logged once must not be lost"
    assert ({"model/holdout_mse"} <= figures) == (make is not iql)
    if make is morec:
        assert {"imagined/dynamics_reward", "imagined/halted"} <= set(resumed.marks[-1].figures)
    if make is not iql:
        assert {"imagined/uncertainty", "train/spread"} <= set(resumed.marks[-1].figures)


def test_the_protocol_decides_which_policy_is_reported(log, tmp_path, monkeypatch):
    def judged(policy, real_id, *, episodes, seed, **_):
        """A policy is worth how near it is to 20 updates."""
        worth = -abs(policy.num_timesteps - 20.0)
        return SimpleNamespace(returns=np.full(episodes, worth), mean=worth)

    monkeypatch.setattr(offline, "evaluate", judged)
    load = partial(IQL.load, data=log, task=SMALL["task"])
    ends = {
        name: learn_offline(partial(iql, log), load, "Pendulum-v1", tmp_path / name, protocol=name, **RUN)
        for name in ("last", "best")
    }
    assert (ends["last"].updates, ends["last"].mean) == (50, -30.0)
    assert (ends["best"].updates, ends["best"].mean) == (20, 0.0)
    assert ends["last"].last_marks == ends["best"].last_marks == pytest.approx(-(0 + 20 + 30) / 3)
    assert IQL.load(tmp_path / "best" / "agent.zip", data=log).num_timesteps == 20
    assert summary({0: ends["last"], 1: ends["best"]}).value == -15.0
    with pytest.raises(ValueError, match="protocol must be one of last, best, got 'mean'"):
        learn_offline(partial(iql, log), load, "Pendulum-v1", tmp_path / "no", **RUN | {"protocol": "mean"})
    with pytest.raises(ValueError, match="judge_every must be at least 1, got 0"):
        learn_offline(partial(iql, log), load, "Pendulum-v1", tmp_path / "no", **RUN | {"judge_every": 0})


@pytest.fixture
def home(tmp_path, monkeypatch, log):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    save(log, "pendulum/random-v0", env_id="Pendulum-v1")
    return tmp_path


def test_the_command_runs_resumes_and_reports(home, capsys):
    config = {
        "agent": "mopo",
        "dataset": ["pendulum/random-v0"],
        "model": {"class_path": "ProbabilisticEnsemble", "init_args": TINY_MODEL},
        "agent_kwargs": {key: value for key, value in SMALL.items() if key in ("policy_kwargs", "batch_size")}
        | IMAGINED
        | {"penalty_weight": 0.25},
        "out": "run",
        "seeds": [1, 2],
        "workers": 1,
        **RUN,
    }
    (home / "small.yaml").write_text(yaml.safe_dump(config))
    main(["offline", "--config", "small.yaml"])
    report = (home / "run" / "report.md").read_text()
    for words in ("95 % bootstrap interval over seeds", "Protocol *last*", "penalty_weight = 0.25 (given)",
                  "`imagined/uncertainty`", "`train/spread`", '"agent": "MOPO"'):  # fmt: skip
        assert words in report
    assert (home / "run" / "curve.png").stat().st_size > 1000
    curve = (home / "run" / "seed-2" / "curve.json").read_text()
    assert [mark["updates"] for mark in json.loads(curve)] == [20, 40, 50]
    with pytest.raises(SystemExit):
        main(["offline", "--config", "small.yaml"])
    assert "pass --resume" in capsys.readouterr().err
    main(["offline", "--config", "small.yaml", "--resume", "true"])
    assert (home / "run" / "seed-2" / "curve.json").read_text() == curve
    for resumed in ("mine/dream-v0", "mine/again-v0"):  # what a run that has ended imagined last
        main(["offline", "--config", "small.yaml", "--resume", "true", "--imagined", resumed])
    rows, others = load("mine/dream-seed-1-v0"), load("mine/dream-seed-2-v0")
    assert torch.equal(rows.obs, load("mine/again-seed-1-v0").obs)
    assert len(rows) == len(others) == 5 * 20 * 2
    assert not torch.equal(rows.obs, others.obs)
    card = read_provenance("mine/dream-seed-1-v0")
    assert (card["kind"], card["policy"], card["updates"], card["penalty_weight"]) == ("imagined", "MOPO", 50, 0.25)
    with pytest.raises(SystemExit):
        main(["offline", "--config", "small.yaml", "--resume", "true", "--imagined", "mine/dream-v0"])
    assert "'mine/dream-seed-1-v0' is already at" in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["bc", "mopo"])
def test_a_log_of_a_plant_without_a_simulator_is_learned_from(home, log, monkeypatch, capsys, agent):
    """It trains, saves, resumes, and says that nobody judged; a forgotten judge is asked for."""
    monkeypatch.setattr(offline, "evaluate", lambda *_, **__: pytest.fail("there is nothing to judge in"))
    save(log, "plant/log-v0")
    config = {"agent": agent, "dataset": "plant/log-v0", "out": "run", "seeds": [1, 2], "workers": 1, **RUN}
    config["agent_kwargs"] = {"batch_size": 16, "policy_kwargs": {"net_arch": [8]}}
    if agent == "mopo":
        config["agent_kwargs"] |= IMAGINED | {"task": {"class": "learneddyn.core.Task", "config": {"real_id": "Mill"}}}
        heads = {"learn_reward": True, "learn_termination": True}
        config["model"] = {"class_path": "ProbabilisticEnsemble", "init_args": TINY_MODEL | heads}
    (home / "plant.yaml").write_text(yaml.safe_dump(config | {"progress": False}))
    with pytest.raises(SystemExit):
        main(["offline", "--config", "plant.yaml"])
    assert "--judge false" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["offline", "--config", "plant.yaml", "--judge", "false", "--protocol", "best"])
    assert "without one it must be 'last'" in capsys.readouterr().err
    assert not (home / "run").exists()
    for resume in ("false", "true"):
        main(["offline", "--config", "plant.yaml", "--judge", "false", "--resume", resume])
    assert "nothing was judged" in capsys.readouterr().out
    report = (home / "run" / "report.md").read_text()
    assert "**Nothing was judged**" in report
    assert "Return in" not in report
    assert "`train/" in report
    assert not (home / "run" / "curve.png").exists()
    loaded = _learners()[agent].load(home / "run" / "seed-2" / "agent.zip")
    assert loaded.num_timesteps == RUN["updates"]


@pytest.mark.parametrize(
    ("kind", "kwargs", "told"),
    [
        (BC, {}, []),
        (learners.RAVL, {}, ["diversity = 1.0 (default)."]),
        (MOPO, {}, ["penalty = max_aleatoric (default), penalty_weight = 1.0 (default)."]),
        (
            MOPO,
            {"penalty": "ensemble_std", "penalty_weight": "quantile:0.5", "clip_target": True},
            [
                "penalty = ensemble_std (given), penalty_weight = quantile:0.5 (given), clip_target = True (given).",
                "penalty_weight is a rule that was worked out on the log: `imagined/penalty_weight` below.",
            ],
        ),
        (learners.MOReL, {"halt_offset": -9}, ["pessimism = 3.0 (default), halt_offset = -9 (given)."]),
        (
            learners.MORECMOBILE,
            {},
            [
                "least_dynamics_reward = quantile:0.01 (default), inconsistency = 0.5 (default).",
                "least_dynamics_reward is a rule that was worked out on the log: `imagined/least_dynamics_reward` "
                "below.",
            ],
        ),
    ],
)
def test_the_report_tells_all_weights_of_pessimism_and_the_rules(kind, kwargs, told):
    notes = _weight_notes(kind, kwargs)
    head = "Weights of pessimism, from the configuration: "
    assert [note.removeprefix(head) for note in notes] == told
    assert _weight_notes(kind, kwargs, "math.sqrt")[-1 if len(told) < 2 else 1] == (
        "The configuration maximised math.sqrt in a sweep (a function of the user's)."
    )


def liking() -> RewardFn:
    """A dynamics reward that is no `DynamicsReward`: an agent's file does not hold it."""
    return lambda obs, action, next_obs: -obs[:, 0]


def test_a_resumed_agent_has_the_parts_that_its_file_does_not_hold(log, tmp_path):
    task = {"class": "learneddyn.core.Task", "config": {"real_id": "Pendulum-v1"}}
    kwargs = {name: SMALL[name] for name in ("policy_kwargs", "batch_size")} | IMAGINED
    kwargs |= {"task": task, "dynamics_reward": {"class": f"{__name__}.liking"}, "least_dynamics_reward": -9.0}
    model = ProbabilisticEnsemble(**TINY_MODEL | {"learn_reward": True, "learn_termination": True})
    begun = _offline_agent(MOREC, log, "Pendulum-v1", model, kwargs, "cpu", 0).learn(10)
    begun.save(tmp_path / "agent.zip")
    again = _offline_again(MOREC, lambda: log, "Pendulum-v1", kwargs, "cpu", tmp_path / "agent.zip")
    assert again.task == begun.task == Task("Pendulum-v1")
    assert again.dynamics_reward.__qualname__ == begun.dynamics_reward.__qualname__
    assert again.learn(5, reset_num_timesteps=False).num_timesteps == 15


def test_filled_in_actions_are_judged_in_the_report_of_a_resumed_run(home, log, monkeypatch):
    halves = [log[log.episode % 2 == 0], log[log.episode % 2 == 1]]
    more = Transitions.cat([halves[0], halves[0], without_actions(halves[1])])
    save(more, "pendulum/half-v0", env_id="Pendulum-v1", action_free=True)
    quick = "{class_path: InverseDynamics, init_args: {hidden: [8], updates: 2, check_every: 1}}"
    words = ["offline", "--agent", "bc", "--dataset", "pendulum/half-v0", "--out", "run", "--label_actions", quick]
    words += [f"--{name}={value}" for name, value in RUN.items()]
    main(words)
    told = f"filled in the actions of {len(halves[1])} of {len(more)} rows"
    report = (home / "run" / "report.md").read_text()
    assert told in report
    assert "of the variance (R2)" in report
    monkeypatch.setattr(learners, "semi_supervised", lambda *_, **__: pytest.fail("a seed that has ended needs none"))
    main([*words, "--resume", "true"])
    assert (home / "run" / "report.md").read_text() == report


def test_a_task_of_your_own_is_found_in_the_module_that_the_id_names(home, monkeypatch):
    (home / "mine.py").write_text(
        "import gymnasium as gym\n"
        "from learneddyn import tasks\n"
        "gym.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=200)\n"
        "tasks.register(tasks.variant('Mine-v0', 'Pendulum-v1'))\n"
    )
    monkeypatch.syspath_prepend(home)
    monkeypatch.setattr(tasks.registry, "_registered", {})
    main(["offline", "--agent", "mopo", "--dataset", "pendulum/random-v0", "--env_id", "mine:Mine-v0", "--out", "run",
          "--updates", "2", "--episodes", "1", "--fresh_episodes", "1", "--model", "ProbabilisticEnsemble",
          *(f"--model.{name}={value}" for name, value in TINY_MODEL.items()), "--agent_kwargs",
          "{rollout_batch: 20, batch_size: 16, policy_kwargs: {net_arch: [8]}}"])  # fmt: skip
    gym.registry.pop("Mine-v0")
    assert "Return in mine:Mine-v0" in (home / "run" / "report.md").read_text()
    assert _known_task(BC, "MountainCar-v0", {}) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--agent", "mopol"], "agent must be one of BC, "),
        ([], "got None"),
        (["--agent", "bc", "--dataset", "[]"], "give at least one Minari id with --dataset"),
        (["--agent", "bc", "--dataset", "[pendulum/random-v0, gone/a-v0]"], "learneddyn collect"),
        (["--agent", "bc", "--agent_kwargs", "{penalty_weight: 1}"], "BC does not take penalty_weight"),
        (["--agent", "morec", "--agent_kwargs", "{dynamics_reward: {config: {}}}"], "needs the path of its class"),
        (["--agent", "iql", "--model", "ProbabilisticEnsemble"], "IQL learns without a model"),
        (["--agent", "bc", "--env_id", "Nowhere-v0"], "Gymnasium knows no environment 'Nowhere-v0', the judge: pass"),
        (["--agent", "mopo", "--env_id", "MountainCar-v0"], "no task is known for environment 'MountainCar-v0'"),
        (["--agent", "mopo", "--env_id", "MountainCar-v0"], "agent_kwargs: {task: {class: learneddyn.core.Task"),
        (["--agent", "iql", "--imagined", "mine/dream-v0"], "IQL imagines nothing: leave --imagined out"),
        (["--agent", "mopo", "--imagined", "dream"], "a Minari id has the form (namespace/)name-v0"),
        (["--agent", "iql", "--updates", "0"], "updates must be at least 1, got 0"),
        (["--agent", "iql", "--label_actions", "true"], "there is nothing to label"),
    ],
)
def test_mistakes_are_named(home, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(["offline", "--dataset", "pendulum/random-v0", *words])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["iql", "mopo"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("log_of", "message"),
    [
        ("one episode", "is one episode of 40 rows"),
        ("equal rewards", "all 400 rewards of data set 'bad/log-v0' equal"),
        ("NaN", "rows hold NaN or infinity in 'obs', the first is row 3"),
        ("no flags", "flags no termination, but "),
    ],
)
def test_a_log_that_cannot_be_learned_from_costs_nothing(
    home, capsys, log, pole, monkeypatch, log_of, message, agent, labelled
):
    monkeypatch.setattr(ProbabilisticEnsemble, "fit", lambda *_, **__: pytest.fail("a model was fitted first"))
    monkeypatch.setattr(InverseDynamics, "fit", lambda *_, **__: pytest.fail("actions were filled in first"))
    rows = {
        "one episode": log[:40],
        "equal rewards": replace(log[:400], reward=torch.full((400,), -1.0)),
        "NaN": log[:400],
        "no flags": replace(pole, terminated=torch.zeros_like(pole.terminated)),
    }[log_of]
    if labelled:
        rows = replace(rows, action=torch.cat((rows.action[:20], torch.full_like(rows.action[20:], torch.nan))))
    saved = save(rows, "bad/log-v0", env_id="InvertedPendulum-v5" if log_of == "no flags" else "Pendulum-v1",
                 action_free=labelled)  # fmt: skip
    if log_of == "NaN":
        with h5py.File(saved.storage.data_path / "main_data.hdf5", "a") as file:
            file["episode_0/observations"][3] = np.nan
    words = ["--dataset", "bad/log-v0", "--label_actions", str(labelled).lower()]
    with pytest.raises(SystemExit) as stopped:
        main(["offline", "--agent", agent, *words])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not (home / "runs").exists()


def test_every_exported_learner_has_a_name():
    assert {"bc", "td3bc", "iql", "mopo", "morel", "combo", "mobile", "ravl", "rambo", "edac"} <= set(_learners())
    assert "offlinealgorithm" not in _learners()


@pytest.mark.filterwarnings("ignore:clip_target")  # Pendulum's rewards are negative, the preset's are not
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_make_the_agent_they_name(preset, log):
    from learneddyn.cli import _check_learner, _learner

    given = yaml.safe_load(preset.read_text())
    kind, kwargs = _learner(given["agent"]), given.get("agent_kwargs", {})
    arguments = (given.get("model") or {}).get("init_args")
    model = None if arguments is None else ProbabilisticEnsemble(**arguments)
    _check_learner(kind, kwargs, model)
    small = kwargs | ({"rollout_batch": 2} if issubclass(kind, learners.OfflineMBPO) else {})
    assert _offline_agent(kind, log, "Pendulum-v1", model, small, "cpu", 0).num_timesteps == 0
    assert given["updates"] >= 1000
