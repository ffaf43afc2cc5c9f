"""Many lanes of a World as one native Gymnasium VectorEnv: all lanes share every model call."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from learneddyn.core import State, Step, generator
from learneddyn.envs.interface import Interface, row
from learneddyn.envs.learned import LearnedEnv, checked_horizon, checked_render_mode, real_render_fps
from learneddyn.envs.start import Start, start_states
from learneddyn.envs.worlds import load_world
from learneddyn.world import World
from learneddyn.world.draw import StateArtist


class LearnedVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` lanes of a World, with the autoreset semantics and infos of Gymnasium's SyncVectorEnv.

    Lanes are independent: what one lane does, and when it ends, changes nothing in another lane's episode, because
    start states and the model's noise come from two random streams. Which start state an episode gets depends on how
    many began before it in the batch. The same seed and actions give the same episodes. (The seed belongs to the batch:
    lane i is not what a single LearnedEnv with seed + i would be.)

    ``reset(options=...)`` takes ``obs`` (a batch of observations to start from) and ``reset_mask`` (bool array, the
    lanes to reset). Infos are empty unless a lane was truncated (``trusted`` tells the horizon from distrust) or, in
    SAME_STEP mode, ended (``final_obs``, ``final_info``).

    Args:
        world: what to step.
        num_envs: lanes, any number from 1.
        horizon: steps until truncation; None takes the task's time limit, or 1000 where it has none.
        start: where episodes begin, see `learneddyn.envs.start`.
        autoreset_mode: NEXT_STEP, SAME_STEP or DISABLED (``"NextStep"``, ``"SameStep"``, ``"Disabled"``).
        output: ``"numpy"``, or ``"torch"`` for tensors on the world's device: observations and rewards float32,
            ``final_obs`` the batch of all lanes before the reset. Needs Box observations.
        render_mode: None, or ``"rgb_array"`` for one frame per lane.
        width: of a frame, pixels.
        height: of a frame, pixels.

    Raises:
        ValueError: no lanes, horizon below 1, unknown mode or output, or start states that do not fit the world.
    """

    def __init__(
        self,
        world: World,
        num_envs: int = 1,
        *,
        horizon: int | None = None,
        start: Start = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        output: str = "numpy",
        render_mode: str | None = None,
        width: int = 480,
        height: int = 480,
    ) -> None:
        self.world, self.num_envs = world, num_envs
        self._device = world.dynamics.elites.device
        self._interface = Interface(world.spaces, num_envs, self._device)
        self.horizon = checked_horizon(horizon, world)
        self._initial = start_states(start, world)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.render_mode = checked_render_mode(render_mode)
        fps = LearnedEnv.metadata["render_fps"] if render_mode is None else real_render_fps(world.task.real_id)
        self.metadata = LearnedEnv.metadata | {"render_fps": fps, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = world.spaces
        self.observation_space = batch_space(world.spaces.observation, num_envs)
        self.action_space = batch_space(world.spaces.action, num_envs)
        if output not in ("numpy", "torch"):
            raise ValueError(f"output must be 'numpy' or 'torch', got {output!r}")
        if output == "torch" and not isinstance(world.spaces.observation, gym.spaces.Box):
            raise ValueError(f"output='torch' needs a Box observation space, got {world.spaces.observation}")
        self.output = output
        self._size = (width, height)
        self._artist: StateArtist | None = None
        self._start_rng: torch.Generator | None = None
        self._noise_rng: torch.Generator | None = None
        self._state: State | None = None
        # Making this object costs more per step than entering it.
        self._no_grad = torch.no_grad()
        # A lane is truncated when the clock reaches its deadline: no counter per lane has to be advanced per step.
        self._clock = 0
        self._deadline = np.zeros(num_envs, np.int64)
        self._next_deadline = 0
        self._ended = np.zeros(num_envs, np.bool_)
        self._any_ended = False

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin episodes in all lanes, or in those of ``options["reset_mask"]``.

        Raises:
            ValueError, TypeError: ``obs`` or ``reset_mask`` do not fit the lanes.
            gymnasium.error.ResetNeeded: a mask was given before the first full reset.
        """
        super().reset(seed=seed)
        if self._start_rng is None or seed is not None:
            seeds = self.np_random.integers(2**62, size=2)
            self._start_rng, self._noise_rng = (generator(int(value), self._device) for value in seeds)
        options = options or {}
        obs = self._interface.start_to_world(options["obs"]) if "obs" in options else None
        if "reset_mask" in options:
            mask = _checked_mask(options["reset_mask"], self.num_envs)
            if self._state is None:
                raise gym.error.ResetNeeded("the first reset must reset all lanes: leave out options['reset_mask']")
            lanes = np.flatnonzero(mask)
            self._restart(self._state, lanes, None if obs is None else obs[torch.from_numpy(lanes).to(self._device)])
            self._note_ended(self._ended & ~mask)
        else:
            if obs is None:
                obs = self._initial(self.num_envs, self._start_rng)
            self._state = self.world.start(obs.clone(), self._start_rng)
            self._clock, self._next_deadline = 0, self.horizon
            self._deadline[:] = self.horizon
            self._note_ended(np.zeros(self.num_envs, np.bool_))
        return self._observations(self._state), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Advance every lane; lanes that ended are restarted as the autoreset mode says.

        Actions of lanes that only restart (NEXT_STEP) must be valid too, but have no effect.

        Raises:
            InvalidAction: wrong shape, NaN, or out of bounds.
            gymnasium.error.ResetNeeded: before the first reset, or (DISABLED) an ended lane was not reset.
        """
        if self._state is None or self._noise_rng is None:
            raise gym.error.ResetNeeded("call reset() before the first step")
        if self._any_ended and self.autoreset_mode is AutoresetMode.DISABLED:
            lanes = np.flatnonzero(self._ended).tolist()
            raise gym.error.ResetNeeded(f"lanes {lanes} have ended: reset them with options={{'reset_mask': mask}}")
        action = self._interface.to_world(actions)
        with self._no_grad:
            state, step = self.world.step(self._state, action, self._noise_rng)
        self._state = state = self._interface.confine(state)
        self._clock += 1
        terminated, trusted = _on_host(step)
        reward: Any = step.reward
        if self.output == "torch":
            reward = reward.clone()
        else:
            reward = (reward if reward.is_cpu else reward.cpu()).numpy().astype(np.float64)
        if (
            self._any_ended
            or self._clock >= self._next_deadline
            or np.count_nonzero(terminated)
            or np.count_nonzero(trusted) < self.num_envs
        ):
            return self._step_with_ends(state, reward, terminated, trusted)
        truncated = np.zeros(self.num_envs, np.bool_)
        return self._observations(state), reward, self._give(terminated), self._give(truncated), {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one frame per lane, uint8 ``[height, width, 3]``, or None without a render mode.

        Raises:
            gymnasium.error.ResetNeeded: there is nothing to draw before the first reset.
        """
        if self.render_mode is None:
            return None
        if self._state is None:
            raise gym.error.ResetNeeded("there is no state to draw: call reset() first")
        if self._artist is None:
            self._artist = StateArtist(self.world.task, *self._size)
        return tuple(self._artist.frame(obs) for obs in self._state.obs)

    def close_extras(self, **kwargs: Any) -> None:
        """Release the renderer."""
        if self._artist is not None:
            self._artist.close()
            self._artist = None

    @torch.no_grad()
    def _step_with_ends(
        self, state: State, reward: Any, terminated: np.ndarray, trusted: np.ndarray
    ) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Finish a step in which some lane ends, or restarts after having ended in the step before (NEXT_STEP)."""
        if self._any_ended:
            self._restart(state, np.flatnonzero(self._ended), None)
            reward[self._give(self._ended)] = 0.0
            terminated, trusted = terminated & ~self._ended, trusted | self._ended
        truncated = (self._clock >= self._deadline) | ~trusted
        ended = terminated | truncated
        infos: dict[str, Any] = {}
        if truncated.any():
            infos = {"trusted": self._give(trusted & truncated), "_trusted": self._give(truncated.copy())}
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            self._note_ended(ended)
        elif ended.any():
            infos = self._final_infos(state, ended, infos)
            self._restart(state, np.flatnonzero(ended), None)
        return self._observations(state), reward, self._give(terminated), self._give(truncated), infos

    def _restart(self, state: State, lanes: np.ndarray, obs: Tensor | None) -> None:
        """Put ``lanes`` at the start of an episode, in place. Fresh memory is ``dynamics.begin(obs)``, else zeros."""
        assert self._start_rng is not None
        if len(lanes) == 0:
            return
        if obs is None:
            obs = self._initial(len(lanes), self._start_rng)
        rows = torch.from_numpy(lanes).to(self._device)
        fresh = self.world.start(obs, self._start_rng)
        state.obs[rows] = fresh.obs
        state.member[rows] = fresh.member
        if state.memory is not None:
            begin = getattr(self.world.dynamics, "begin", None)
            begun = None if begin is None else begin(fresh.obs)
            state.memory[rows] = 0.0 if begun is None else begun
        self._deadline[lanes] = self._clock + self.horizon
        self._next_deadline = int(self._deadline.min())

    def _note_ended(self, ended: np.ndarray) -> None:
        self._ended, self._any_ended = ended, bool(ended.any())

    def _final_infos(self, state: State, ended: np.ndarray, infos: dict[str, Any]) -> dict[str, Any]:
        final_obs = self._observations(state)
        if self.output == "numpy":
            batch, final_obs = final_obs, np.full(self.num_envs, None, dtype=object)
            for lane in np.flatnonzero(ended).tolist():
                final_obs[lane] = row(self.single_observation_space, batch, lane)
        masks = self._give(ended), self._give(ended.copy())
        return {"final_obs": final_obs, "_final_obs": masks[0], "final_info": infos, "_final_info": masks[1]}

    def _observations(self, state: State) -> Any:
        if self.output == "numpy":
            return self._interface.to_agent(state.obs)
        return state.obs.clone().reshape(self.num_envs, *self.single_observation_space.shape)  # type: ignore[misc]

    def _give(self, flags: np.ndarray) -> Any:
        return flags if self.output == "numpy" else torch.from_numpy(flags).to(self._device)


def make_vector_env(
    num_envs: int = 1,
    world: str = "inverted-pendulum",
    *,
    horizon: int | None = None,
    max_episode_steps: int | None = None,
    start: str | None = None,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    output: str = "numpy",
    render_mode: str | None = None,
    width: int = 480,
    height: int = 480,
    device: str = "cpu",
) -> LearnedVectorEnv:
    """Return the environment that ``gym.make_vec("LearnedDyn-v0", num_envs=...)`` makes.

    Args:
        num_envs: lanes.
        world: a shipped world's name, a folder that `learneddyn.envs.worlds.save_world` wrote, or ``"truth:<id>"``.
        horizon: steps until truncation; None takes the one saved with the world.
        max_episode_steps: Gymnasium's name for a limit on top of the horizon.
        start: ``"task"``, ``"saved"`` (the table saved with the world), or None: saved where there is one, else task.
        autoreset_mode: see `LearnedVectorEnv`.
        output: ``"numpy"`` or ``"torch"``.
        render_mode: None or ``"rgb_array"``.
        width: of a frame, pixels.
        height: of a frame, pixels.
        device: where to compute.

    Raises:
        WorldFileError: no such world, or one that cannot be read.
    """
    loaded = load_world(world, device)
    horizon = checked_horizon(loaded.horizon if horizon is None else horizon, loaded.world)
    return LearnedVectorEnv(
        loaded.world,
        num_envs,
        horizon=horizon if max_episode_steps is None else min(horizon, max_episode_steps),
        start=loaded.starts(start),
        autoreset_mode=autoreset_mode,
        output=output,
        render_mode=render_mode,
        width=width,
        height=height,
    )


def _checked_mask(mask: Any, lanes: int) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a NumPy array of bool, got {type(mask).__name__} {mask!r}")
    if mask.shape != (lanes,) or not mask.any():
        raise ValueError(f"options['reset_mask'] must have shape ({lanes},) and mark at least one lane, got {mask}")
    return mask


def _on_host(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Return terminated and trusted as NumPy arrays, with one transfer where they live on another device."""
    if step.trusted.is_cpu:
        return step.terminated.numpy(), step.trusted.numpy()
    terminated, trusted = torch.stack((step.terminated, step.trusted)).cpu().numpy()
    return terminated, trusted
