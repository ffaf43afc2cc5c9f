"""``LearnedDyn-v0``: a World as a Gymnasium environment with the real environment's spaces."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from learneddyn.core import State, generator
from learneddyn.envs.interface import Interface, batch_of_one
from learneddyn.envs.start import Start, start_states
from learneddyn.envs.worlds import load_world
from learneddyn.world import Row, RowStep, World, step_row, steps_rows
from learneddyn.world.draw import StateArtist

DEFAULT_HORIZON = 1000
"""Steps of an episode where neither the caller nor the task names a time limit."""


class LearnedEnv(gym.Env[Any, Any]):
    """One lane of a World.

    ``terminated`` is what the task (or the model) says. ``truncated`` says that the horizon is reached or that the
    world does not trust the step, and then ``info["trusted"]`` tells the two apart; the observation is the world's in
    both cases. ``reset(options={"obs": obs})`` starts there. The same seed and actions give the same episode. ``info``
    holds no more than that, for speed: who wants a step's elite, its penalty or its reward before the penalty steps the
    `World` itself, whose state has the ``member`` and whose ``penalty`` may be asked again; a halt that pays
    (``halt_reward``) is a termination like any other.

    Args:
        world: what to step; its spaces are the real environment's.
        horizon: steps until truncation; None takes the task's time limit, or 1000 where it has none.
        start: where episodes begin, see `learneddyn.envs.start`.
        render_mode: None, or ``"rgb_array"`` for uint8 frames ``[height, width, 3]`` of the imagined state.
        width: of a frame, pixels.
        height: of a frame, pixels.

    Raises:
        ValueError: horizon below 1, an unknown render mode, or start states that do not fit the world.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  # Gymnasium declares it an instance variable
        "render_modes": ["rgb_array"],
        "render_fps": 30,
    }

    def __init__(
        self,
        world: World,
        *,
        horizon: int | None = None,
        start: Start = None,
        render_mode: str | None = None,
        width: int = 480,
        height: int = 480,
    ) -> None:
        self.world, self.horizon = world, checked_horizon(horizon, world)
        self.observation_space, self.action_space = world.spaces
        self.render_mode = checked_render_mode(render_mode)
        if render_mode is not None:
            self.metadata = self.metadata | {"render_fps": real_render_fps(world.task.real_id)}
        self._device = world.dynamics.elites.device
        self._interface = Interface(world.spaces, 1, self._device)
        self._initial = start_states(start, world)
        self._size = (width, height)
        self._artist: StateArtist | None = None
        self._rng: torch.Generator | None = None
        self._state: State | Row | None = None
        self._steps, self._ended = 0, True
        # Making this object costs more per step than entering it.
        self._no_grad = torch.no_grad()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, at ``options["obs"]`` if given.

        Raises:
            ValueError: ``options["obs"]`` is not an element of the observation space.
        """
        super().reset(seed=seed)
        if self._rng is None or seed is not None:
            self._rng = generator(int(self.np_random.integers(2**62)), self._device)
        if options and "obs" in options:
            obs = self._interface.start_to_world(batch_of_one(self.observation_space, options["obs"]))
        else:
            obs = self._initial(1, self._rng)
        self._state = self.world.start(obs, self._rng)
        self._steps, self._ended = 0, False
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance by one step of the world.

        Raises:
            InvalidAction: wrong shape, NaN, or out of bounds.
            gymnasium.error.ResetNeeded: no episode is running.
        """
        if self._ended or self._state is None or self._rng is None:
            raise gym.error.ResetNeeded("no episode is running: call env.reset() first, and after an episode ended")
        reward, terminated, trusted = self._advance(self._state, self._interface.one_to_array(action), self._rng)
        self._steps += 1
        truncated = self._steps >= self.horizon or not trusted
        self._ended = terminated or truncated
        info = {"trusted": trusted} if truncated else {}
        return self._observation(), reward, terminated, truncated, info

    def _advance(self, state: State | Row, action: np.ndarray, rng: torch.Generator) -> RowStep:
        """Advance the lane, in NumPy where the world can."""
        if steps_rows(self.world):
            row = state if isinstance(state, Row) else Row(state.obs.numpy()[0], int(state.member.item()))
            row, ended = step_row(self.world, row, action[0], rng)
            self._state = self._interface.confine_row(row)
            return ended
        with self._no_grad:
            before = state.state() if isinstance(state, Row) else state
            after, step = self.world.step(before, torch.from_numpy(action).to(self._device), rng)
        self._state = self._interface.confine(after)
        return RowStep(step.reward.item(), bool(step.terminated.item()), bool(step.trusted.item()))

    def render(self) -> np.ndarray | None:
        """Return a frame of the imagined state, uint8 ``[height, width, 3]``, or None without a render mode.

        Raises:
            gymnasium.error.ResetNeeded: there is no state to draw before the first reset.
        """
        if self.render_mode is None:
            return None
        if self._state is None:
            raise gym.error.ResetNeeded("there is no state to draw: call env.reset() first")
        if self._artist is None:
            self._artist = StateArtist(self.world.task, *self._size)
        return self._artist.frame(self._row())

    def close(self) -> None:
        """Release the renderer; a second call does nothing."""
        if self._artist is not None:
            self._artist.close()
            self._artist = None

    def _observation(self) -> Any:
        return self._interface.one_to_agent(self._row())

    def _row(self) -> np.ndarray:
        assert self._state is not None
        return self._state.obs if isinstance(self._state, Row) else self._state.obs.cpu().numpy()[0]


def make_env(
    world: str = "inverted-pendulum",
    *,
    horizon: int | None = None,
    start: str | None = None,
    render_mode: str | None = None,
    width: int = 480,
    height: int = 480,
    device: str = "cpu",
) -> LearnedEnv:
    """Return the environment that ``gym.make("LearnedDyn-v0", ...)`` makes.

    Args:
        world: a shipped world's name, a folder that `learneddyn.envs.worlds.save_world` wrote, or ``"truth:<id>"``.
        horizon: steps until truncation; None takes the one saved with the world.
        start: ``"task"``, ``"saved"`` (the table saved with the world), or None: saved where there is one, else task.
        render_mode: None or ``"rgb_array"``.
        width: of a frame, pixels.
        height: of a frame, pixels.
        device: where to compute.

    Raises:
        WorldFileError: no such world, or one that cannot be read.
    """
    loaded = load_world(world, device)
    return LearnedEnv(
        loaded.world,
        horizon=loaded.horizon if horizon is None else horizon,
        start=loaded.starts(start),
        render_mode=render_mode,
        width=width,
        height=height,
    )


make_env.metadata = LearnedEnv.metadata  # type: ignore[attr-defined]  # gym.make reads the render modes here


def checked_horizon(horizon: int | None, world: World) -> int:
    """Return the horizon, or the task's time limit, or the default.

    Raises:
        ValueError: horizon below 1.
    """
    if horizon is None:
        return world.task.max_episode_steps or DEFAULT_HORIZON
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    return horizon


def checked_render_mode(render_mode: str | None) -> str | None:
    """Return the render mode.

    Raises:
        ValueError: neither None nor ``"rgb_array"``.
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
    return render_mode


def real_render_fps(real_id: str) -> int:
    """Return the frame rate of the real environment, or 30 where it is not registered or names none."""
    if real_id not in gym.registry:
        return LearnedEnv.metadata["render_fps"]
    env = gym.make(real_id)
    env.close()
    return int(env.metadata.get("render_fps") or LearnedEnv.metadata["render_fps"])
