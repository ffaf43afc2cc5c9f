"""Swing a hanging pole up by pushing its cart: the cart-pole of Chua, Calandra, McAllister, Levine, "Deep Reinforcement
Learning in a Handful of Trials using Probabilistic Dynamics Models" (2018).

What the columns mean, reward and starts: `learneddyn.tasks.cartpole_swingup`. Here the pole is straight, while theirs
leans by 1 mm over its length.
"""

from typing import Any

import numpy as np
from gymnasium.utils import EzPickle
from numpy.typing import NDArray

from learneddyn.plants.base import Plant, Verdict, require_positive

RESET_NOISE = 0.1


class CartPoleSwingUp(Plant, EzPickle):
    """A cart on a rail of 5 m and a pole that hangs from it; a motor pushes the cart. 0.04 s a step, never terminates.

    Args:
        pole_length: from hinge to tip, m. The reward measures the tip's distance to its highest place in this unit.
        pole_mass: kg; None is that of a capsule of 1000 kg/m3 (5.02 kg at 0.6 m).
        cart_mass: kg; None is that of a capsule of 1000 kg/m3 (10.47 kg).
        gravity: downwards, m/s2.
        damping: of rail (N s/m) and hinge (N m s).
        **kwargs: of rendering, see ``gymnasium.envs.mujoco.MujocoEnv``.

    Raises:
        ValueError: a parameter that is not positive and finite (damping may be 0).
    """

    def __init__(
        self,
        pole_length: float = 0.6,
        pole_mass: float | None = None,
        cart_mass: float | None = None,
        gravity: float = 9.81,
        damping: float = 1.0,
        **kwargs: Any,
    ) -> None:
        EzPickle.__init__(self, pole_length, pole_mass, cart_mass, gravity, damping, **kwargs)
        masses = {"pole_mass": pole_mass, "cart_mass": cart_mass}
        given = {name: mass for name, mass in masses.items() if mass is not None}
        require_positive(pole_length=pole_length, gravity=gravity, **given)
        if not (np.isfinite(damping) and damping >= 0):
            raise ValueError(f"damping must be at least 0 and finite, got {damping!r}")
        self.pole_length = pole_length
        xml = _XML.format(
            pole_length=pole_length,
            pole=_mass(pole_mass),
            cart=_mass(cart_mass),
            gravity=gravity,
            damping=damping,
        )
        super().__init__(xml, frame_skip=2, **kwargs)

    def start(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Let the pole hang in the middle of the rail, up to noise."""
        qpos, qvel = rng.normal(0, RESET_NOISE, (2, 2))
        return qpos, qvel

    def judge(self, action: NDArray[np.float32], obs: NDArray[np.float64]) -> Verdict:
        """Pay for a tip near its highest place, charge for the effort."""
        tip_x, tip_z = obs[0] - self.pole_length * np.sin(obs[1]), -self.pole_length * np.cos(obs[1])
        height = float(np.exp(-(tip_x**2 + (tip_z - self.pole_length) ** 2) / self.pole_length**2))
        effort = 0.01 * float(np.square(action, dtype=np.float64).sum())
        return Verdict(height - effort, False, {"reward_height": height, "reward_effort": -effort})


def _mass(mass: float | None) -> str:
    return 'density="1000"' if mass is None else f'mass="{mass}"'


_XML = """
<mujoco model="cart-pole swing-up">
  <compiler inertiafromgeom="true"/>
  <option gravity="0 0 -{gravity}" integrator="RK4" timestep="0.02"/>
  <default>
    <joint damping="{damping}"/>
    <geom contype="0" conaffinity="0"/>
  </default>
  <worldbody>
    <light pos="0 -2 3" dir="0 0.6 -1"/>
    <geom name="rail" type="capsule" fromto="-2.6 0 0 2.6 0 0" size="0.02" rgba="0.3 0.3 0.7 1"/>
    <body name="cart">
      <joint name="slider" type="slide" axis="1 0 0" limited="true" range="-2.5 2.5"/>
      <geom name="cart" type="capsule" fromto="-0.1 0 0 0.1 0 0" size="0.1" {cart} rgba="0.7 0.7 0 1"/>
      <body name="pole">
        <joint name="hinge" type="hinge" axis="0 1 0"/>
        <geom name="pole" type="capsule" fromto="0 0 0 0 0 -{pole_length}" size="0.049" {pole} rgba="0 0.7 0.7 1"/>
      </body>
    </body>
  </worldbody>
  <actuator>
    <motor name="push" joint="slider" gear="100" ctrllimited="true" ctrlrange="-3 3"/>
  </actuator>
</mujoco>
"""
