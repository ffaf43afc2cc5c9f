"""The sweep command from one end to the other, in small: it picks settings without the simulator and resumes."""

import json
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import yaml

from learneddyn import cli
from learneddyn.cli import main, planned
from learneddyn.data import collect, save
from learneddyn.models import InverseDynamics
from learneddyn.offline import objectives

TINY_MODEL = {"num_members": 2, "num_elites": 2, "hidden": [8], "max_epochs": 2}
CONFIG: dict = {
    "agent": "MOPO",
    "dataset": "pendulum/random-v0",
    "model": {"class_path": "ProbabilisticEnsemble", "init_args": TINY_MODEL},
    "agent_kwargs": {"rollout_batch": 20, "rollout_every": 10, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}},
    "space": {
        "agent_kwargs.penalty_weight": {"low": 0.1, "high": 10.0, "log": True},
        "agent_kwargs.penalty": ["ensemble_std", "max_aleatoric"],
        "agent_kwargs.horizon": {"low": 1, "high": 3},
        "model.num_members": {"low": 1, "high": 3},
    },
    "updates": 20,
    "trials": 2,
    "workers": 1,
    "sampler": "random",
    "out": "sweep",
    "progress": False,
}
FREE: dict = {"agent": "BC", "model": None, "agent_kwargs": {}, "space": {"agent_kwargs.learning_rate": [1e-3, 1e-4]}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    collect("Pendulum-v1", "pendulum/random-v0", steps=1000, lanes=5, seed=3, progress=False)
    yield tmp_path
    torch.set_num_threads(before)


def config(home, **entries) -> str:
    (home / "sweep.yaml").write_text(yaml.safe_dump(CONFIG | entries))
    return "sweep.yaml"


def test_a_sweep_picks_settings_that_the_offline_command_takes(home, monkeypatch, capsys):
    monkeypatch.setattr(objectives, "evaluate", lambda *_, **__: pytest.fail("the simulator was asked"))
    main(["sweep", "--config", config(home)])
    trials = json.loads((home / "sweep" / "trials.json").read_text())
    assert [trial["failed"] for trial in trials] == [""] * 2
    assert all(trial["value"] < 0 for trial in trials)
    best = max(trials, key=lambda trial: trial["value"])
    chosen = yaml.safe_load((home / "sweep" / "best.yaml").read_text())
    assert chosen["agent_kwargs"]["penalty_weight"] == best["settings"]["agent_kwargs.penalty_weight"]
    assert chosen["model"]["init_args"]["num_members"] == best["settings"]["model.num_members"]
    assert "no simulator" in (home / "sweep" / "summary.md").read_text()
    with pytest.raises(SystemExit):
        main(["sweep", "--config", config(home)])
    assert "pass --resume" in capsys.readouterr().err
    main(["sweep", "--config", config(home, trials=3), "--resume", "true"])
    again = json.loads((home / "sweep" / "trials.json").read_text())
    assert again[:2] == trials
    assert len(again) == 3
    main(["offline", "--config", "sweep/best.yaml", "--judge_every", "10", "--episodes", "1", "--fresh_episodes", "2"])
    assert "maximised return_in_model in a sweep (no simulator)" in (home / "runs/offline/report.md").read_text()


@pytest.mark.parametrize("name", ["fqe", "model_error", "real", "math.sqrt"])
def test_objectives_go_by_name(name):
    assert callable(objectives.objective(name))
    with pytest.raises(
        ValueError, match="objective must be one of fqe, return_in_model, model_error, real or the path"
    ):
        objectives.objective(f"{name}_of_nobody")


def test_objectives_judge_a_policy(home):
    data = cli.load("pendulum/random-v0")
    log, held_out = objectives.split_log(data)
    assert len(log) + len(held_out) == len(data)
    assert not set(log.episode.tolist()) & set(held_out.episode.tolist())
    assert len(held_out.episode.unique()) == 1
    with pytest.raises(ValueError, match="a log of 2 episodes cannot be split"):
        objectives.split_log(data[data.episode < 2])
    kwargs = CONFIG["agent_kwargs"]
    model = cli.ProbabilisticEnsemble(**TINY_MODEL)
    agent = cli._offline_agent(cli._learner("mopo"), log, "Pendulum-v1", model, kwargs, "cpu", 0).learn(10)
    judged = objectives.Judgement(agent, log, held_out, home, "Pendulum-v1", 0)
    assert objectives.by_model_error(judged) < 0
    assert -2000 < objectives.by_real(judged) < 0
    cloned = cli._offline_agent(cli._learner("bc"), log, "Pendulum-v1", None, {}, "cpu", 0)
    with pytest.raises(ValueError, match="BC has none"):
        objectives.by_model_error(judged._replace(agent=cloned))


def test_settings_are_put_where_they_belong():
    base = {
        "updates": 5,
        "agent_kwargs": {"a": 1},
        "model": {"class": "m", "config": {"num_members": 7, "num_elites": 5}},
    }
    plan = planned(base, {"updates": 9, "agent_kwargs.b.c": 2, "model.num_members": 3})
    assert plan["updates"] == 9
    assert plan["agent_kwargs"] == {"a": 1, "b": {"c": 2}}
    assert plan["model"]["config"] == {"num_members": 3, "num_elites": 3}
    assert base["agent_kwargs"] == {"a": 1}
    with pytest.raises(ValueError, match="there is no model"):
        planned(base | {"model": None}, {"model.num_members": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"agent_kwargs.fear": [1]}}, "MOPO does not take fear"),
        ({"space": {"horizon": [1]}}, "space holds 'horizon'; names are updates, agent_kwargs.NAME and model.NAME"),
        ({"space": {}}, "must hold at least one setting"),
        ({"objective": "luck"}, "objective must be one of"),
        ({"objective": "model_error", **FREE}, "model_error judges agents with a model, BC has none"),
        ({"objective": "real", "env_id": "Nowhere-v0", **FREE}, "Gymnasium knows no environment 'Nowhere-v0'"),
        ({"objective": "fqe", **FREE, "agent": "TrajectoryDiffuser"}, "fqe judges single rows, TrajectoryDiffuser rem"),
        ({"env_id": "MountainCar-v0", **FREE}, "no task is known for environment 'MountainCar-v0'"),
        ({"space": {"agent_kwargs.horizon": {"low": 0, "high": 3}}}, "can have agent_kwargs.horizon = 0: horizon must"),
        ({"space": {"agent_kwargs.penalty": ["ensemble_std", "luck"]}}, "can have agent_kwargs.penalty = 'luck'"),
        ({"space": {"agent_kwargs.horizon": {"low": 3, "high": 1}}}, "agent_kwargs.horizon: "),
        (
            {"space": {"agent_kwargs.gamma": {"low": 0.9, "high": float("inf")}}},
            "high must be a finite number",
        ),
        ({"space": {"agent_kwargs.tau": {"low": 0.0, "high": 0.1, "log": True}}}, "agent_kwargs.tau: "),
        ({"space": {"model.depth": [1, 2]}}, "no trial can have model.depth = 1"),
        ({"space": {"updates": {"low": 0, "high": 10}}}, "no trial can have updates = 0"),
        ({**FREE, "space": {"model.num_members": [3]}}, "there is no model: give its class with --model"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"seeds": [1, 1]}, "seeds distinct, got 10000 and [1, 1]"),
        ({"workers": 0}, "trials and workers must be at least 1"),
        ({"dataset": "pendulum/short-v0"}, "a log of 2 episodes cannot be split"),
    ],
)
def test_mistakes_cost_no_fit(home, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(cli.ProbabilisticEnsemble, "fit", lambda *_, **__: pytest.fail("a model was fitted first"))
    if "short" in changes.get("dataset", ""):
        collect("Pendulum-v1", "pendulum/short-v0", steps=400, lanes=2, progress=False)
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--config", config(home, **changes)])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err
    assert not (home / "sweep").exists()


def test_trials_share_labels_and_the_environments_arguments(home, monkeypatch):
    """The settings of the inverse dynamics and of the environment reach fit, judge and best.yaml."""
    data = cli.load("pendulum/random-v0")
    bare = replace(data, action=data.action.where((data.episode < 2)[:, None], torch.nan))
    save(bare, "pendulum/bare-v0", env_id="Pendulum-v1", action_free=True)
    fits, judged = [], []
    fit = InverseDynamics.fit
    monkeypatch.setattr(InverseDynamics, "fit", lambda self, *_, **kw: fits.append(self.past) or fit(self, *_, **kw))
    monkeypatch.setattr(objectives, "evaluate", lambda *_, env_kwargs, **__: judged.append(env_kwargs) or Worth(1.0))
    labels = {"class_path": "InverseDynamics", "init_args": {"past": 2, "hidden": [8], "updates": 2}}
    asked = {"dataset": "pendulum/bare-v0", "label_actions": labels, "env_kwargs": {"g": 5.0}, "objective": "real"}
    main(["sweep", "--config", config(home, **FREE | asked)])
    assert fits == [2]
    assert judged == [{"g": 5.0}] * 2
    assert "filled in the actions of 600 of 1000 rows" in (home / "sweep" / "summary.md").read_text()
    short = ["--judge_every", "10", "--episodes", "1", "--fresh_episodes", "1", "--progress", "false"]
    main(["offline", "--config", "sweep/best.yaml", *short])
    given = json.loads((home / "runs" / "offline" / "config.json").read_text())["config"]
    assert given["env_kwargs"] == {"g": 5.0}
    report = (home / "runs" / "offline" / "report.md").read_text()
    assert "maximised real in a sweep (the real environment chose: no result of learning offline)" in report
    assert given["label_actions"]["config"]["past"] == 2
    assert fits == [2, 2]


class Worth(NamedTuple):
    """What an environment says."""

    mean: float


def test_a_finished_trial_keeps_its_agent_and_forgets_what_it_imagined(home, monkeypatch):
    main(["sweep", "--config", config(home, trials=1, objective="model_error")])
    checkpoint = home / "sweep" / "trial-0" / "seed-0" / "checkpoint"
    assert [path.name for path in checkpoint.iterdir()] == ["agent.zip"]
    # Killed after the pool was deleted and before the study was told: nothing is learned again.
    monkeypatch.setattr(cli, "train_offline", lambda *_, **__: pytest.fail("this trial was played"))
    given = json.loads((home / "sweep" / "config.json").read_text())["config"]
    shared = ("agent", "dataset", "env_id", "env_kwargs", "updates", "model", "agent_kwargs", "label_actions")
    base = {name: given[name] for name in shared}
    (trial,) = json.loads((home / "sweep" / "trials.json").read_text())
    again = cli._sweep_trial(
        base, "model_error", [0], 10, "cpu", home / "sweep" / "judge", trial["settings"], home / "sweep" / "trial-0"
    )
    assert again == trial["value"]
