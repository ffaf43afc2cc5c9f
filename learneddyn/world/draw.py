"""Pictures of imagined states: an observation is written into the real simulator, which draws it without a screen."""

import os
import sys
from ctypes.util import find_library
from importlib import import_module
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from learneddyn.core import Task

SHADOW_SIZE = 1024
"""Texels along a shadow map's side. MuJoCo's own 4096 takes twice as long per frame where a CPU does the drawing."""

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}


class RenderError(RuntimeError):
    """Nothing can be drawn on this machine. The message names what to install."""


class StateArtist:
    """Draw observations of a task as its real environment would look, headless.

    MuJoCo needs an OpenGL backend: the one named by the environment variable MUJOCO_GL, else EGL, else OSMesa. Parts of
    the state that the observation does not hold are neutral (``task.codec.lost``); a robot whose forward position is
    not observed stays in the middle of the picture.

    Args:
        task: a task with a codec.
        width: of the picture, pixels.
        height: of the picture, pixels.
        camera: name of a camera of the MuJoCo model. None: its camera ``track``, which follows the body, if there is
            one, else the environment's default view.

    Raises:
        ValueError: the task has no codec, the size is not positive, or the model has no such camera.
        RenderError: no OpenGL backend works, or pygame is missing (the classic-control environments draw with it).
    """

    def __init__(self, task: Task, width: int = 480, height: int = 480, *, camera: str | None = None) -> None:
        if task.codec is None:
            raise ValueError(f"the task of {task.real_id} has no codec, so its observations cannot be drawn")
        if width < 1 or height < 1:
            raise ValueError(f"a picture needs at least one pixel each way, got {width} x {height}")
        self.task, self.codec = task, task.codec
        self._canvas: _MujocoCanvas | _ClassicCanvas | None = _canvas(task.real_id, width, height, camera)

    def frame(self, obs: Float[Tensor, " o"] | Float[np.ndarray, " o"]) -> UInt8[np.ndarray, "h w 3"]:
        """Return the picture of one observation, RGB.

        Raises:
            ValueError: wrong number of columns, or NaN or infinite entries.
            RenderError: the artist has been closed.
        """
        if self._canvas is None:
            raise RenderError(f"this StateArtist of {self.task.real_id} has been closed: make a new one")
        row = torch.as_tensor(obs, dtype=torch.float64)
        if not row.isfinite().all():
            raise ValueError(
                f"cannot draw a state of {self.task.real_id} with NaN or infinity in columns "
                f"{(~row.isfinite()).nonzero().flatten().tolist()}"
            )
        qpos, qvel = self.codec.to_simulator(row[None])
        return self._canvas.draw(qpos[0], qvel[0])

    def close(self) -> None:
        """Release the OpenGL context and the environment; a second call does nothing."""
        if self._canvas is not None:
            self._canvas.close()
            self._canvas = None

    def __enter__(self) -> "StateArtist":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _MujocoCanvas:
    def __init__(self, env: Any, width: int, height: int, camera: str | None) -> None:
        import mujoco

        self._mujoco, self._env = mujoco, env
        model = env.model
        self._camera = _camera(mujoco, env, camera)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(height, model.vis.global_.offheight)
        model.vis.quality.shadowsize = SHADOW_SIZE
        self._data, self._options = mujoco.MjData(model), mujoco.MjvOption()
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._pixels, self._area = np.empty((height, width, 3), np.uint8), mujoco.MjrRect(0, 0, width, height)
        self._opengl = _opengl_context(width, height)
        self._opengl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def draw(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        mujoco, model, data = self._mujoco, self._env.model, self._data
        data.qpos[:], data.qvel[:] = qpos, qvel
        mujoco.mj_forward(model, data)
        self._opengl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(model, data, self._options, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._area, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._area, self._context)
        return self._pixels[::-1].copy()

    def close(self) -> None:
        self._opengl.make_current()
        self._context.free()
        self._opengl.free()
        self._env.close()


class _ClassicCanvas:
    def __init__(self, env: Any, width: int, height: int) -> None:
        self._env, self._size = env, (width, height)

    def draw(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        self._env.state = np.stack([qpos, qvel], axis=1).ravel()
        return _fitted(np.asarray(self._env.render()), *self._size)

    def close(self) -> None:
        self._env.close()


def _canvas(real_id: str, width: int, height: int, camera: str | None) -> _MujocoCanvas | _ClassicCanvas:
    from gymnasium.envs.mujoco.mujoco_env import MujocoEnv

    env = gym.make(real_id, render_mode="rgb_array", disable_env_checker=True)
    env.reset(seed=0)
    bare = env.unwrapped
    if isinstance(bare, MujocoEnv):
        return _MujocoCanvas(bare, width, height, camera)
    if camera is not None:
        raise ValueError(f"{real_id} is drawn without cameras, got camera={camera!r}")
    try:
        bare.render()
    except gym.error.DependencyNotInstalled as error:
        raise RenderError(f"drawing {real_id} needs pygame: pip install pygame-ce") from error
    return _ClassicCanvas(bare, width, height)


def _camera(mujoco: Any, env: Any, name: str | None) -> Any:
    model, camera = env.model, mujoco.MjvCamera()
    names = [model.camera(i).name for i in range(model.ncam)]
    if name is not None and name not in names:
        raise ValueError(f"{env.spec.id} has no camera {name!r}, its cameras are {names}")
    chosen = name or "track"
    if chosen in names:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, names.index(chosen)
        return camera
    camera.lookat, camera.distance = np.median(env.data.geom_xpos, axis=0), model.stat.extent
    for key, value in (env.mujoco_renderer.default_cam_config or {}).items():
        setattr(camera, key, value)
    return camera


def _opengl_context(width: int, height: int) -> Any:
    """Return a context of the backend that MUJOCO_GL names, else of the first one whose library is installed.

    Backends cannot be tried one after the other: the first import binds PyOpenGL to its platform for good.
    """
    installed = [name for name, library in _LIBRARIES.items() if find_library(library)]
    backend = os.environ.get("MUJOCO_GL") or (installed[0] if installed else "egl")
    module = f"mujoco.{backend}" if sys.platform == "linux" and backend in _LIBRARIES else "mujoco.gl_context"
    try:
        return import_module(module).GLContext(width, height)
    except Exception as error:  # the bindings raise ImportError, AttributeError, RuntimeError or GLError
        raise RenderError(
            f"no picture: the OpenGL backend {backend!r} does not work here ({type(error).__name__}: {error}). "
            "Without a screen, install EGL (Debian, Ubuntu: apt-get install libegl1) and set MUJOCO_GL=egl, or OSMesa "
            "(apt-get install libosmesa6) and set MUJOCO_GL=osmesa, in the environment of a new process"
        ) from error


def _fitted(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the picture scaled to fit into width x height, centred on white."""
    rows, columns = picture.shape[:2]
    scale = min(width / columns, height / rows)
    size = max(1, round(rows * scale)), max(1, round(columns * scale))
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    scaled = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    canvas = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    canvas[top : top + size[0], left : left + size[1]] = scaled.round().to(torch.uint8).numpy()
    return canvas
