"""Stable-Baselines3's view of a replay on the device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from learneddyn.core import Transitions, generator
from learneddyn.data.replay import MixedReplay, Replay, ReplayFileError
from learneddyn.files import write_file


class DeviceReplayBuffer(ReplayBuffer):
    """A ``replay_buffer_class`` for SB3's off-policy algorithms whose rows live on the device, packed.

    ``real`` holds what the environment gave (actions scaled to [-1, 1], as SB3 stores them), ``imagined`` what a model
    gave; a batch mixes them at a fixed share. Observations are stored in float32. Time-outs are not terminations, as in
    SB3.

    Args:
        buffer_size: transitions of the environment to keep.
        observation_space: a Box that is no image.
        action_space: a bounded Box.
        device: where the rows live.
        n_envs: lanes of the environment.
        optimize_memory_usage: must be False.
        handle_timeout_termination: whether an episode cut by its time limit counts as not terminated.
        imagined_size: imagined transitions to keep; 0: there are none.
        real_share: share of real rows in a batch once there are imagined ones.
        seed: of the sampling; default: the seed that torch was given last.

    Raises:
        ValueError: an observation space that is no flat Box, an action space that is no Box, or a share outside [0, 1].
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        imagined_size: int = 0,
        real_share: float = 0.05,
        seed: int | None = None,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("DeviceReplayBuffer does not support optimize_memory_usage=True")
        if not isinstance(observation_space, spaces.Box) or is_image_space(observation_space):
            raise ValueError(f"DeviceReplayBuffer needs a Box of numbers as observation space, got {observation_space}")
        if not isinstance(action_space, spaces.Box):
            raise ValueError(f"DeviceReplayBuffer needs a Box as action space, got {action_space}")
        super(ReplayBuffer, self).__init__(  # ReplayBuffer's own would allocate its NumPy arrays
            buffer_size, observation_space, action_space, device, n_envs=n_envs
        )
        self.buffer_size = max(buffer_size // n_envs, 1)
        self._bounds = (action_space.low, action_space.high)
        self.optimize_memory_usage, self.handle_timeout_termination = False, handle_timeout_termination
        obs_dim = int(np.prod(self.obs_shape))
        self.real = Replay(self.buffer_size * n_envs, obs_dim, self.action_dim, device=self.device)
        self.imagined: Replay | None = None
        self._source: Replay | MixedReplay = self.real
        if imagined_size:
            self.imagined = Replay(imagined_size, obs_dim, self.action_dim, device=self.device)
            self._source = MixedReplay(self.real, self.imagined, real_share)
        self.rng = generator(torch.initial_seed() if seed is None else seed, self.device)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Append one transition per lane, its action in [-1, 1]."""
        terminated = np.array(done, dtype=np.float32)
        if self.handle_timeout_termination and terminated.any():
            terminated *= [not info.get("TimeLimit.truncated", False) for info in infos]
        columns = (obs, action, next_obs, reward, terminated)
        row = np.concatenate([np.reshape(column, (self.n_envs, -1)) for column in columns], axis=1, dtype=np.float32)
        self.real.add_rows(torch.from_numpy(row).to(self.device))
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full, self.pos = True, 0

    def add_imagined(self, data: Transitions) -> None:
        """Append what a model gave, actions in the environment's units, observations as the environment gives them.

        Raises:
            ValueError: the buffer was made without room for imagined rows.
        """
        if self.imagined is None:
            raise ValueError("this buffer has no room for imagined rows: make it with imagined_size > 0")
        low, high = (torch.as_tensor(bound.reshape(-1), device=data.device) for bound in self._bounds)
        self.imagined.add(replace(data, action=2 * (data.action - low) / (high - low) - 1))

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Return a batch drawn uniformly with replacement; ``env`` normalises observations and rewards."""
        batch = self._source.sample(batch_size, self.rng)
        obs, next_obs, reward = (
            values if env is None else torch.as_tensor(normalise(values.cpu().numpy(), env), device=self.device)
            for values, normalise in (
                (batch.obs.unflatten(1, self.obs_shape), self._normalize_obs),
                (batch.next_obs.unflatten(1, self.obs_shape), self._normalize_obs),
                (batch.reward[:, None], self._normalize_reward),
            )
        )
        return ReplayBufferSamples(obs, batch.action, next_obs, batch.terminated[:, None], reward)

    def save(self, folder: str | Path) -> None:
        """Write the rows and the state of the sampling into a folder; nothing in it has to be unpickled."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.real.save(target / "real.safetensors")
        if self.imagined is not None:
            self.imagined.save(target / "imagined.safetensors")
        place = torch.tensor([self.pos, self.full])
        write_file(target / "sampling.safetensors", save_tensors({"rng": self.rng.get_state(), "place": place}))

    def restore(self, folder: str | Path) -> None:
        """Become what `save` wrote: the same rows, the same batches to come.

        Raises:
            ReplayFileError: a file is missing, truncated, or holds rows of other spaces.
        """
        source = Path(folder)
        parts = {"real": self.real} if self.imagined is None else {"real": self.real, "imagined": self.imagined}
        read = {name: Replay.load(source / f"{name}.safetensors", self.device) for name in parts}
        for name, part in read.items():
            got, want = (part.obs_dim, part.action_dim), (self.real.obs_dim, self.real.action_dim)
            if got != want:
                raise ReplayFileError(f"{source}/{name}.safetensors has (obs, action) columns {got}, wanted {want}")
        try:
            sampling = load_file(source / "sampling.safetensors")
        except (OSError, SafetensorError) as error:
            raise ReplayFileError(f"{source}/sampling.safetensors is not readable: {error}") from error
        for name, part in parts.items():
            part.become(read[name])
        self.rng.set_state(sampling["rng"])
        self.pos, self.full = int(sampling["place"][0]), bool(sampling["place"][1])

    def reset(self) -> None:
        """Forget all rows, real and imagined."""
        super().reset()
        self.real.clear()
        if self.imagined is not None:
            self.imagined.clear()
