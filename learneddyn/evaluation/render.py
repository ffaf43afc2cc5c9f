"""A GIF of imagination beside reality: the same start, the model on the left, the real environment on the right."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from learneddyn.core import Policy, generator
from learneddyn.evaluation.returns import batch_of, seeded, unpenalised
from learneddyn.spaces import Spaces, decode, encode
from learneddyn.world import World
from learneddyn.world.draw import StateArtist

_BAR = 22
_GAP = 4
_COLORS = 64
_HOLD_MS = 1500
_INK, _GROUND, _MARK, _PLAIN = (236, 240, 246), (24, 29, 37), (214, 63, 80), (96, 108, 126)


class Film(NamedTuple):
    """One side of the picture: ``obs[0]`` is the start, ``total[t]`` the return after t steps, ``ending`` says why and
    when it stopped ("" where it did not)."""

    obs: list[Float[Tensor, " o"]]
    total: list[float]
    ending: str


def side_by_side(
    policy: Policy | Float[np.ndarray, "h a"],
    world: World,
    real_id: str,
    path: str | Path,
    *,
    steps: int = 200,
    every: int = 2,
    fps: int = 25,
    seed: int = 0,
    closed_loop: bool = True,
    deterministic: bool = True,
    panel: int = 200,
    device: torch.device | str = "cpu",
    env_kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write a GIF of one imagined and one real episode that begin in the same state, and return its path.

    A side that ends stands still under a mark that says why. Both sides are drawn from their observations by
    `learneddyn.world.draw.StateArtist`, so they look alike.

    Args:
        policy: anything with SB3's ``predict``, or the flat actions to replay on both sides (``[h, a]``).
        world: the world of the left side; its penalty is left out of the return shown.
        real_id: Gymnasium id of the right side.
        path: of the GIF; replaced only once the new one is complete.
        steps: longest episode shown.
        every: steps from one picture to the next.
        fps: pictures a second.
        seed: of the real reset, and of the world.
        closed_loop: the agent acts on what it sees on each side. False: both sides get the real side's actions.
        deterministic: passed to ``predict``.
        panel: side of a panel in pixels.
        device: of the world.
        env_kwargs: passed to ``gymnasium.make``.

    Raises:
        ValueError: steps, every, fps or panel below 1, actions of the wrong width, or a task without a codec.
        learneddyn.world.draw.RenderError: this machine cannot draw.
    """
    for name, number in (("steps", steps), ("every", every), ("fps", fps), ("panel", panel)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    with StateArtist(world.task, panel, panel) as artist, seeded(seed):
        real, actions = _real(policy, real_id, steps, seed, deterministic, env_kwargs or {})
        follow = policy if closed_loop and not isinstance(policy, np.ndarray) else actions
        dream = _imagined(follow, world, real.obs[0].to(device), steps, seed, deterministic)
        frames = list(_frames(artist, dream, real, every, panel))
    return _write_gif(frames, Path(path), fps)


def _real(
    policy: Policy | np.ndarray, real_id: str, steps: int, seed: int, deterministic: bool, env_kwargs: dict[str, Any]
) -> tuple[Film, Float[np.ndarray, "h a"]]:
    env = gym.make(real_id, **env_kwargs)
    try:
        spaces = Spaces(env.observation_space, env.action_space)
        seen, _ = env.reset(seed=seed)
        obs, total, actions, ending = [_flat(spaces, seen)], [0.0], [], ""
        choose = _Actor(policy, spaces, deterministic)
        for t in range(steps):
            flat = choose(obs[-1][None], t)
            if flat is None:
                break
            seen, reward, terminated, truncated, _ = env.step(decode(spaces.action, flat)[0])
            obs.append(_flat(spaces, seen))
            total.append(total[-1] + float(reward))
            actions.append(flat[0])
            if terminated or truncated:
                ending = f"{'terminated' if terminated else 'time limit'} at {t + 1}"
                break
    finally:
        env.close()
    return Film(obs, total, ending), np.stack(actions)


@torch.no_grad()
def _imagined(
    policy: Policy | np.ndarray, world: World, start: Float[Tensor, " o"], steps: int, seed: int, deterministic: bool
) -> Film:
    rng = generator(seed, start.device)
    bare = unpenalised(world)
    state = bare.start(start[None], rng)
    obs, total, ending = [start], [0.0], ""
    choose = _Actor(policy, world.spaces, deterministic)
    for t in range(steps):
        flat = choose(state.obs, t)
        if flat is None:
            break
        state, step = bare.step(state, torch.as_tensor(flat, device=start.device), rng)
        if not bool(step.trusted[0]):
            ending = f"not trusted at {t + 1}"
            break
        obs.append(state.obs[0])
        total.append(total[-1] + float(step.reward[0]))
        if bool(step.terminated[0]):
            ending = f"terminated at {t + 1}"
            break
    return Film(obs, total, ending)


class _Actor:
    """Flat actions for one lane: from a policy, or from a list that may run out (None)."""

    def __init__(self, policy: Policy | np.ndarray, spaces: Spaces, deterministic: bool) -> None:
        if isinstance(policy, np.ndarray):
            rows = len(policy) if policy.ndim == 2 and policy.shape[1] == spaces.action_dim else 0
            if rows == 0:
                raise ValueError(f"actions must have the shape (h >= 1, {spaces.action_dim}), got {policy.shape}")
        self.policy, self.spaces, self.deterministic = policy, spaces, deterministic
        self.memory: tuple[np.ndarray, ...] | None = None

    def __call__(self, obs: Float[Tensor, "1 o"], t: int) -> Float[np.ndarray, "1 a"] | None:
        if isinstance(self.policy, np.ndarray):
            return self.policy[t : t + 1].astype(np.float32) if t < len(self.policy) else None
        seen = decode(self.spaces.observation, obs.cpu().numpy())
        action, self.memory = self.policy.predict(seen, self.memory, np.array([t == 0]), self.deterministic)
        return encode(self.spaces.action, action)


def _flat(spaces: Spaces, seen: Any) -> Float[Tensor, " o"]:
    return torch.as_tensor(encode(spaces.observation, batch_of(spaces.observation, [seen]))[0])


def _frames(
    artist: StateArtist, dream: Film, real: Film, every: int, panel: int
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    last = max(len(dream.obs), len(real.obs)) - 1
    drawn: dict[tuple[str, int], np.ndarray] = {}
    for t in [*range(0, last, every), last]:
        picture = Image.new("RGB", (2 * panel + _GAP, panel + _BAR), _GROUND)
        pen = ImageDraw.Draw(picture)
        for left, name, film in ((0, "imagined", dream), (panel + _GAP, "real", real)):
            at = min(t, len(film.obs) - 1)
            if (name, at) not in drawn:
                drawn = {key: value for key, value in drawn.items() if key[0] != name}
                drawn[name, at] = artist.frame(film.obs[at].cpu())
            picture.paste(Image.fromarray(drawn[name, at]), (left, _BAR))
            pen.text((left + 6, _BAR // 2), name, _INK, _font(13), anchor="lm")
            tail = f"return {film.total[at]:,.0f}" if left else f"step {t}   return {film.total[at]:,.0f}"
            pen.text((left + panel - 6, _BAR // 2), tail, _INK, _font(11), anchor="rm")
            if film.ending and t >= at == len(film.obs) - 1:
                mark = _PLAIN if film.ending.startswith("time") else _MARK
                pen.rectangle((left, _BAR, left + panel - 1, panel + _BAR - 1), outline=mark, width=4)
                pen.rectangle((left, panel + _BAR - 24, left + panel - 1, panel + _BAR - 1), fill=mark)
                pen.text((left + panel / 2, panel + _BAR - 12), film.ending, (255, 255, 255), _font(13), anchor="mm")
        yield np.asarray(picture)


def _write_gif(frames: list[UInt8[np.ndarray, "h w 3"]], path: Path, fps: int) -> Path:
    """Write frames with one shared palette, so that Pillow stores only what changes."""
    sheet = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])
    palette = Image.fromarray(sheet).quantize(_COLORS)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [max(20, round(1000 / fps))] * (len(images) - 1) + [_HOLD_MS]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    images[0].save(
        fresh, format="GIF", save_all=True, append_images=images[1:], duration=milliseconds, loop=0, optimize=True
    )
    os.replace(fresh, path)
    return path


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
