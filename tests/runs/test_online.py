import json
from copy import deepcopy
from pathlib import Path
from pydoc import locate

import gymnasium as gym
import pytest
import torch
import yaml
from stable_baselines3 import SAC

from learneddyn import agents, tasks
from learneddyn.agents import MBPO, Dyna
from learneddyn.cli import main
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.runs import online
from learneddyn.runs.marks import read_marks
from learneddyn.runs.online import Mark, learn_online

PRESETS = sorted((Path(online.__file__).parents[1] / "configs" / "mbpo").glob("*.yaml"))
SMALL: dict = {
    "rollout_batch": 30,
    "refit_every": 40,
    "learning_starts": 60,
    "gradient_steps": 1,
    "batch_size": 20,
    "policy_kwargs": {"net_arch": [8]},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(env) -> Dyna:
    model = ProbabilisticEnsemble(num_members=2, num_elites=1, hidden=[8], max_epochs=2)
    return MBPO("MlpPolicy", env, model=model, seed=0, device="cpu", **deepcopy(SMALL))


def comparable(marks) -> list:
    """Marks without the times, which differ from run to run."""
    return [
        (mark.real_steps, mark.returns, {name: v for name, v in mark.figures.items() if not name.startswith("time/")})
        for mark in marks
    ]


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    given = {"steps": 250, "judge_every": 100, "episodes": 1}
    whole = learn_online(make, "Pendulum-v1", tmp_path / "whole", **given)
    assert [mark.real_steps for mark in whole] == [100, 200, 250]

    def killed(agent, folder):  # after the curve is written, before the second checkpoint
        if agent.num_timesteps == 200:
            raise KeyboardInterrupt
        saved(agent, folder)

    saved = online.save_checkpoint
    monkeypatch.setattr(online, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        learn_online(make, "Pendulum-v1", tmp_path / "torn", **given)
    monkeypatch.setattr(online, "save_checkpoint", saved)
    assert [mark.real_steps for mark in read_marks(tmp_path / "torn", Mark)] == [100, 200]
    resumed = learn_online(make, "Pendulum-v1", tmp_path / "torn", **given)
    assert comparable(resumed) == comparable(whole) == comparable(read_marks(tmp_path / "torn", Mark))
    assert comparable(learn_online(make, "Pendulum-v1", tmp_path / "torn", **given)) == comparable(whole)
    later = learn_online(make, "Pendulum-v1", tmp_path / "torn", **given | {"steps": 290})
    assert [mark.real_steps for mark in later] == [100, 200, 250, 290]


def test_agents_of_sb3_are_judged_too(tmp_path):
    marks = learn_online(
        lambda env: SAC("MlpPolicy", env, learning_starts=500, device="cpu"),
        "Pendulum-v1",
        tmp_path,
        steps=120,
        judge_every=100,
        episodes=1,
    )
    assert [mark.real_steps for mark in marks] == [100, 120]
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "agent.zip", "log-0"}


def test_the_command_runs_and_resumes(tmp_path, capsys):
    config = {
        "env_id": "Pendulum-v1",
        "steps": 90,
        "judge_every": 50,
        "episodes": 1,
        "algorithm": "DynaTD3",
        "algorithm_kwargs": deepcopy(SMALL) | {"imagination_noise": 0.1},
        "model": {
            "class_path": "learneddyn.models.ProbabilisticEnsemble",
            "init_args": {"num_members": 2, "num_elites": 1, "hidden": [8], "max_epochs": 1},
        },
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    main(["mbpo", "--config", str(tmp_path / "small.yaml")])
    assert "30 updates, 2 fits, 60 imagined_steps" in capsys.readouterr().out
    curve = (tmp_path / "run" / "seed-0" / "curve.json").read_text()
    assert [mark["real_steps"] for mark in json.loads(curve)] == [50, 90]
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        main(["mbpo", "--config", str(tmp_path / "small.yaml")])
    assert "pass --resume" in capsys.readouterr().err
    main(["mbpo", "--config", str(tmp_path / "small.yaml"), "--resume", "true"])
    assert (tmp_path / "run" / "seed-0" / "curve.json").read_text() == curve


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_make_an_agent_for_a_known_task(preset):
    given = yaml.safe_load(preset.read_text())
    assert given["env_id"] in tasks.names()
    env = gym.make(given["env_id"], **given.get("env_kwargs", {}))
    model = given.get("model")
    model = model and locate(model["class_path"])(**model["init_args"])
    kind = getattr(agents, given.get("algorithm", "MBPO"))
    agent = kind("MlpPolicy", env, model=model, device="cpu", **given["algorithm_kwargs"])
    assert agent.work(given["steps"])["updates"] >= 10_000
    env.close()
