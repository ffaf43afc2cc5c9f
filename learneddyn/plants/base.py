"""A Gymnasium environment of MuJoCo from a model written in the program, whose parameters are arguments."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.spaces import Box
from numpy.typing import NDArray


class Verdict(NamedTuple):
    """What a step earned, whether it ended the episode, and the parts of the reward for ``info``."""

    reward: float
    terminated: bool
    info: dict[str, float]


class Plant(MujocoEnv, ABC):
    """A MuJoCo environment made from XML text instead of a file; it observes joint positions, then velocities.

    A subclass writes the XML, draws starts and judges steps.

    Args:
        xml: the MuJoCo model.
        frame_skip: simulator steps per step of the environment.
        **kwargs: of rendering, see ``gymnasium.envs.mujoco.MujocoEnv``.

    Raises:
        ValueError: MuJoCo cannot read the model.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium declares it an instance variable
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"]
    }

    def __init__(self, xml: str, frame_skip: int, **kwargs: Any) -> None:
        self._xml = xml
        model = mujoco.MjModel.from_xml_string(xml)
        space = Box(-np.inf, np.inf, (model.nq + model.nv,), np.float64)
        # MujocoEnv insists on a file that exists, and reads it only in the method that is replaced below.
        super().__init__(__file__, frame_skip, observation_space=space, **kwargs)
        self.metadata = self.metadata | {"render_fps": round(1 / self.dt)}

    @abstractmethod
    def start(self, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Draw joint positions and velocities of a new episode."""

    @abstractmethod
    def judge(self, action: NDArray[np.float32], obs: NDArray[np.float64]) -> Verdict:
        """Judge the step that led to ``obs``."""

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float64], Any, bool, bool, dict[str, Any]]:
        """Apply the action for one step of the environment; time limits are Gymnasium's wrapper's affair."""
        self.do_simulation(action, self.frame_skip)
        if self.render_mode == "human":
            self.render()  # type: ignore[no-untyped-call]
        obs = self._get_obs()
        verdict = self.judge(action, obs)
        return obs, verdict.reward, verdict.terminated, False, verdict.info

    def reset_model(self) -> NDArray[np.float64]:
        """Begin an episode; Gymnasium's ``reset`` calls this."""
        self.set_state(*self.start(self.np_random))  # type: ignore[no-untyped-call]
        return self._get_obs()

    def _get_obs(self) -> NDArray[np.float64]:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = mujoco.MjModel.from_xml_string(self._xml)
        screen = model.vis.global_
        screen.offwidth, screen.offheight = max(screen.offwidth, self.width), max(screen.offheight, self.height)
        return model, mujoco.MjData(model)


def require_positive(**values: float) -> None:
    """Check parameters of a plant.

    Raises:
        ValueError: one is not a positive, finite number (names it and its value).
    """
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
