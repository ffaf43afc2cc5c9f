"""The same robot, built otherwise: MuJoCo environments of Gymnasium with other masses, lengths, bodies and gravity.

A sequence of tasks is a list of variants, each registered under an id of its own, so that `gym.make`, the truth and
worlds find it like any other environment::

    register_variant("seq/LongPole-v0", "InvertedPendulum-v5", bodies={"pole": {"length": 2.0}})
    register_variant("seq/BigLegs-v0", "HalfCheetah-v5", bodies={"bthigh": {"size": 1.25}, "fthigh": {"size": 1.25}})
    tasks.register(tasks.variant("seq/LongPole-v0", "InvertedPendulum-v5"))

A `learneddyn.plants.base.Plant` takes its parameters as arguments and needs none of this.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import gymnasium as gym
import mujoco
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.registration import load_env_creator

from learneddyn.plants.base import Plant, require_positive

CHANGES = ("mass", "length", "width", "size", "damping", "friction", "gear")
"""Factors a body may be given: of mass and inertia; of all distances along it; of its geoms' thickness; of both; of the
damping of its joints; of the sliding friction of its geoms; of the gear of the actuators on its joints."""

Bodies = Mapping[str, Mapping[str, float]]
"""Factors by name of body, then by name of change."""


def register_variant(env_id: str, base: str, *, bodies: Bodies | None = None, gravity: float | None = None) -> None:
    """Register a variant of an environment with Gymnasium, with the base's time limit; an id can be given anew.

    Args:
        env_id: of the variant.
        base: id of a MuJoCo environment of Gymnasium.
        bodies: changes by body, see `make_variant`.
        gravity: downwards, m/s2; None keeps the base's.

    Raises:
        ValueError: a change that `make_variant` refuses.
    """
    kwargs: dict[str, Any] = {"base": base, "bodies": {name: dict(change) for name, change in (bodies or {}).items()}}
    kwargs |= {} if gravity is None else {"gravity": gravity}
    make_variant(**kwargs).close()  # type: ignore[no-untyped-call]
    gym.registry.pop(env_id, None)
    entry = f"{make_variant.__module__}:{make_variant.__name__}"
    gym.register(env_id, entry, max_episode_steps=gym.spec(base).max_episode_steps, kwargs=kwargs)


def make_variant(base: str, bodies: Bodies | None = None, gravity: float | None = None, **kwargs: Any) -> MujocoEnv:
    """Make an environment with changed bodies; the entry point of registered variants.

    "length" stretches a body away from its own frame, which stays where it is: places of its geoms, joints, sites and
    child bodies, and its geoms along their axes. "width" is of the radius of capsules, cylinders and spheres and of
    the cross-section of boxes. Masses follow from the new shapes as the model's file says (some keep the total), and
    then "mass" multiplies mass and inertia. A contact takes the larger friction of its two geoms.

    Args:
        base: id of a MuJoCo environment of Gymnasium whose model is a file.
        bodies: factors by body and change (`CHANGES`).
        gravity: downwards, m/s2; None keeps the base's.
        **kwargs: arguments of the base, above its registered ones.

    Raises:
        ValueError: no such environment, not one of MuJoCo, an unknown body or change, a body that has nothing to
            change, or a factor or gravity that is not positive and finite.
    """
    spec = gym.spec(base)
    kind: Any = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    fits = isinstance(kind, type) and issubclass(kind, MujocoEnv) and not issubclass(kind, Plant)
    if not fits:
        raise ValueError(f"base must be a MuJoCo environment of Gymnasium that is read from a file, got {base!r}")
    for body, changes in (bodies or {}).items():
        if unknown := set(changes) - set(CHANGES):
            raise ValueError(f"unknown changes {sorted(unknown)} of body {body!r}, allowed are {CHANGES}")
        require_positive(**{f"{change} of body {body!r}": factor for change, factor in changes.items()})
    if gravity is not None:
        require_positive(gravity=gravity)
    return _variant_of(kind)(base, bodies or {}, gravity, spec.kwargs | kwargs)


@cache
def _variant_of(kind: Any) -> Any:
    """Return the subclass of an environment that changes its model; one for all variants of it."""

    class Variant(kind):  # type: ignore[misc]
        def __init__(self, base: str, bodies: Bodies, gravity: float | None, kwargs: dict[str, Any]) -> None:
            self._made_of = (base, bodies, gravity, kwargs)
            super().__init__(**kwargs)

        def __reduce__(self) -> Any:
            return _again, self._made_of

        def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
            model = _changed(self.fullpath, *self._made_of[1:3])
            screen = model.vis.global_
            screen.offwidth, screen.offheight = max(screen.offwidth, self.width), max(screen.offheight, self.height)
            return model, mujoco.MjData(model)

    Variant.__name__ = Variant.__qualname__ = f"{kind.__name__}Variant"
    return Variant


def _again(base: str, bodies: Bodies, gravity: float | None, kwargs: dict[str, Any]) -> MujocoEnv:
    return make_variant(base, bodies, gravity, **kwargs)


def _changed(path: str, bodies: Bodies, gravity: float | None) -> mujoco.MjModel:
    """Read a model, change its bodies, and compile it."""
    spec = mujoco.MjSpec.from_file(path)
    known = {body.name: body for body in spec.bodies}
    if unknown := set(bodies) - set(known):
        raise ValueError(f"unknown bodies {sorted(unknown)}, the model has {sorted(set(known) - {'world'})}")
    for name, changes in bodies.items():
        size = changes.get("size", 1.0)
        _reshape(known[name], size * changes.get("length", 1.0), size * changes.get("width", 1.0))
    if gravity is not None:
        spec.option.gravity = [0.0, 0.0, -gravity]
    total, spec.compiler.settotalmass = spec.compiler.settotalmass, -1.0  # deprecated at compilation
    model = spec.compile()
    if total > 0:
        mujoco.mj_setTotalmass(model, total)
    for name, changes in bodies.items():
        body = model.body(name).id
        model.body_mass[body] *= changes.get("mass", 1.0)
        model.body_inertia[body] *= changes.get("mass", 1.0)
        for change, (values, own) in _owned(model, body).items():
            if change in changes:
                if not values[own].any():
                    raise ValueError(f"body {name!r} has no {change} to change")
                values[own] *= changes[change]
    mujoco.mj_setConst(model, mujoco.MjData(model))  # what the solver derives from masses
    return model


def _owned(model: mujoco.MjModel, body: int) -> dict[str, tuple[Any, Any]]:
    """Return what a body's joints, geoms and actuators have, as arrays of the model and the places in them."""
    dof, geom = model.body_dofadr[body], model.body_geomadr[body]
    pulls = model.actuator_trntype == mujoco.mjtTrn.mjTRN_JOINT
    return {
        "damping": (model.dof_damping, slice(dof, dof + model.body_dofnum[body])),
        "friction": (model.geom_friction[:, 0], slice(geom, geom + model.body_geomnum[body])),
        "gear": (model.actuator_gear, pulls & (model.jnt_bodyid[model.actuator_trnid[:, 0]] == body)),
    }


def _reshape(body: Any, length: float, width: float) -> None:
    for geom in body.geoms:
        geom.pos *= length
        geom.fromto *= length
        match geom.type:
            case mujoco.mjtGeom.mjGEOM_CAPSULE | mujoco.mjtGeom.mjGEOM_CYLINDER:
                geom.size *= [width, length, 1.0]
            case mujoco.mjtGeom.mjGEOM_SPHERE:
                geom.size *= width
            case _:
                geom.size *= [width, width, length]
    for part in (*body.joints, *body.sites, *body.bodies):
        part.pos *= length
