"""Gymnasium's InvertedPendulum-v5 with heavier parts: the uncertain plant "InvertedPendulum 2" of robust RL.

The ranges that Zouitine, Geist, Rachelson, "Solving robust MDPs as a sequence of static RL problems" (2024) calls
uncertain are in `LOW` and `HIGH`. What the columns mean, reward and starts: `learneddyn.tasks.inverted_pendulum`.
"""

from typing import Any

from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv
from gymnasium.utils import EzPickle

from learneddyn.plants.base import require_positive

LOW, HIGH = (1.0, 1.0), (31.0, 11.0)
"""Least and largest factors of the pole's and the cart's mass."""


class HeavyPendulum(InvertedPendulumEnv):
    """A pole to be kept upright on a cart; masses and inertias are multiples of the usual ones.

    Args:
        pole_mass: factor of the pole's mass and inertia; 1 is 5.02 kg.
        cart_mass: factor of the cart's mass and inertia; 1 is 10.47 kg.
        **kwargs: see ``gymnasium.envs.mujoco.inverted_pendulum_v5.InvertedPendulumEnv``.

    Raises:
        ValueError: a factor that is not positive and finite.
    """

    def __init__(self, pole_mass: float = 1.0, cart_mass: float = 1.0, **kwargs: Any) -> None:
        require_positive(pole_mass=pole_mass, cart_mass=cart_mass)
        self.factors = {"pole": pole_mass, "cart": cart_mass}
        super().__init__(**kwargs)
        EzPickle.__init__(self, pole_mass, cart_mass, **kwargs)

    def _initialize_simulation(self) -> tuple[Any, Any]:
        model, data = super()._initialize_simulation()
        for name, factor in self.factors.items():
            body = model.body(name).id
            model.body_mass[body] *= factor
            model.body_inertia[body] *= factor
        return model, data
