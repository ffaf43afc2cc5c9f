"""The tasks by exact environment id: built-in ones are imported when asked for, others registered by their owners."""

import difflib
from dataclasses import replace
from importlib import import_module
from typing import Any, cast

from learneddyn.core import Task

_BUILT_IN = {
    "Ant-v5": "ant",
    "CartPole-v1": "cartpole",
    "HalfCheetah-v5": "half_cheetah",
    "Hopper-v5": "hopper",
    "Humanoid-v5": "humanoid",
    "HumanoidStandup-v5": "humanoid_standup",
    "InvertedDoublePendulum-v5": "inverted_double_pendulum",
    "InvertedPendulum-v5": "inverted_pendulum",
    "MountainCarContinuous-v0": "mountain_car_continuous",
    "Pendulum-v1": "pendulum",
    "Pusher-v5": "pusher",
    "Reacher-v5": "reacher",
    "Swimmer-v5": "swimmer",
    "Walker2d-v5": "walker2d",
    "learneddyn/CartPoleSwingUp-v0": "cartpole_swingup",
    "learneddyn/HeavyPendulum-v0": "heavy_pendulum",
}
_registered: dict[str, Task] = {}


class UnknownTask(LookupError):
    """No task is known for an environment id. The message names the three ways out."""


def get(real_id: str) -> Task:
    """Return the task of the environment with exactly this id.

    As in Gymnasium, ``module:Id-v0`` imports the module first, which is where your own tasks get registered: worlds and
    commands that name a task so find it in any process. The task may be registered with or without the module's name.

    Raises:
        UnknownTask: neither built in nor registered; another version of a known environment is another environment.
        ModuleNotFoundError: there is no such module.
    """
    module, colon, bare = real_id.partition(":")
    if colon and real_id not in _registered:
        import_module(module)
        real_id = real_id if real_id in _registered else bare
    if real_id in _registered:
        return _registered[real_id]
    if real_id in _BUILT_IN:
        return cast(Task, import_module(f"learneddyn.tasks.{_BUILT_IN[real_id]}").TASK)
    near = difflib.get_close_matches(real_id, names(), n=1, cutoff=0.8)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UnknownTask(
        f"no task is known for environment {real_id!r}{hint}. Three ways out: "
        f"1. give the functions: learneddyn.core.Task({real_id!r}, reward=..., terminated=..., initial=...); "
        f"2. let the model learn them: Task({real_id!r}) with a model fitted with learn_reward=True and "
        "learn_termination=True; "
        "3. register such a task once: learneddyn.tasks.register(task), in a module that the id names if other "
        f"processes shall find it ('module:{real_id}'). "
        f"Known tasks: {', '.join(names())}"
    )


def of_env(env: Any) -> Task:
    """Return the task of a Stable-Baselines3 vector environment's lanes, by their Gymnasium id.

    Raises:
        ValueError: they name none.
        UnknownTask: see `get`.
    """
    spec = env.get_attr("spec", indices=0)[0] if env is not None else None
    if spec is None:
        raise ValueError("the environment has no Gymnasium id to look its task up by: give task=Task(...)")
    return get(spec.id)


def register(task: Task, *, overwrite: bool = False) -> None:
    """Make ``task`` the answer of ``get(task.real_id)``, in this process; ids with a namespace are as good as others.

    Args:
        task: the task; its ``real_id`` is the key.
        overwrite: replace the task that the id already has.

    Raises:
        TypeError: not a Task.
        ValueError: the id is empty, or has a task already and ``overwrite`` is False.
    """
    if not isinstance(task, Task):
        raise TypeError(f"register needs a learneddyn.core.Task, got {type(task).__name__}: {task!r}")
    if not task.real_id.strip():
        raise ValueError(f"a task needs the id of its real environment, got {task.real_id!r}")
    if task.real_id in names() and not overwrite:
        raise ValueError(
            f"environment {task.real_id!r} has a task already; pass overwrite=True to replace it, or choose another id"
        )
    _registered[task.real_id] = task


def variant(real_id: str, base: str) -> Task:
    """Return the task of an environment that differs from ``base`` in its dynamics only, not in what is asked.

    Rewards and terminations that hold a body's measures, such as a tip's height, remain those of the base.

    Raises:
        UnknownTask: no task is known for the base.
    """
    return replace(get(base), real_id=real_id)


def names() -> list[str]:
    """Return the ids of all known tasks, sorted."""
    return sorted({*_BUILT_IN, *_registered})
