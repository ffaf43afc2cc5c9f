"""Finding and registering tasks."""

import subprocess
import sys

import gymnasium as gym
import pytest

from learneddyn import tasks
from learneddyn.core import Task
from learneddyn.tasks import registry


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def test_names_are_the_sixteen_environments_and_exist_in_gymnasium():
    assert len(tasks.names()) == 16
    assert tasks.names() == sorted(tasks.names())
    for name in tasks.names():
        assert tasks.get(name).max_episode_steps == gym.spec(name).max_episode_steps


@pytest.mark.parametrize("unknown", ["Hopper-v4", "Hopper", "hopper-v5", "", "mypkg/Hopper-v5", "HopperHopper-v5"])
def test_only_the_exact_id_is_known(unknown):
    with pytest.raises(tasks.UnknownTask):
        tasks.get(unknown)


def test_the_error_names_the_three_ways_out():
    with pytest.raises(tasks.UnknownTask) as error:
        tasks.get("Hopper-v4")
    text = str(error.value)
    assert text.startswith("no task is known for environment 'Hopper-v4' (did you mean 'Hopper-v5'?). Three ways out: ")
    for way in ("Task('Hopper-v4', reward=", "learn_reward=True", "learn_termination=True", "tasks.register(task)"):
        assert way in text
    assert "Walker2d-v5" in text
    assert isinstance(error.value, LookupError)


def test_a_registered_task_is_found_under_its_namespace():
    task = Task("mypkg/Foo-v0")
    tasks.register(task)
    assert tasks.get("mypkg/Foo-v0") is task
    assert "mypkg/Foo-v0" in tasks.names()
    with pytest.raises(tasks.UnknownTask):
        tasks.get("Foo-v0")


@pytest.mark.parametrize("taken", ["Hopper-v5", "mypkg/Foo-v0"])
def test_a_taken_id_is_replaced_only_when_asked(taken):
    tasks.register(Task("mypkg/Foo-v0"))
    before, mine = tasks.get(taken), Task(taken, max_episode_steps=7)
    with pytest.raises(ValueError, match=f"{taken!r} has a task already; pass overwrite=True"):
        tasks.register(mine)
    assert tasks.get(taken) is before
    tasks.register(mine, overwrite=True)
    assert tasks.get(taken) is mine


def test_an_empty_id_is_refused():
    with pytest.raises(ValueError, match="needs the id of its real environment, got ' '"):
        tasks.register(Task(" "))


def test_angles_are_unbounded_angle_columns():
    assert {name: tasks.get(name).angles for name in tasks.names() if tasks.get(name).angles} == {
        "HalfCheetah-v5": (1,),
        "Swimmer-v5": (0,),
        "learneddyn/CartPoleSwingUp-v0": (1,),
    }


def test_asking_for_tasks_creates_no_simulator():
    code = (
        "import sys, gymnasium; gymnasium.make = None; from learneddyn import tasks\n"
        "for name in tasks.names():\n"
        "    if 'Humanoid' not in name: tasks.get(name)\n"
        "assert 'mujoco' not in sys.modules\n"
        "for name in tasks.names(): tasks.get(name)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["Foo-v0", "my_plant:Foo-v0"])
def test_an_id_with_a_module_finds_the_task_that_the_module_registers(name, tmp_path, monkeypatch):
    lines = ["from learneddyn import tasks", "from learneddyn.core import Task", f"tasks.register(Task({name!r}))"]
    (tmp_path / "my_plant.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_plant", raising=False)
    assert tasks.get("my_plant:Foo-v0") == Task(name)
    with pytest.raises(tasks.UnknownTask):
        tasks.get("my_plant:Bar-v0")
    with pytest.raises(ModuleNotFoundError, match="no_such_plant"):
        tasks.get("no_such_plant:Foo-v0")
