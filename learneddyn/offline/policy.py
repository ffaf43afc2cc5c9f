"""Actors and batched critics behind SB3's ``BasePolicy``: environment units in, actions in [-1, 1] inside."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import torch
from jaxtyping import Float
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import Tensor, nn

from learneddyn.agents.update import HALF_LOG_2PI, TANH_SLACK
from learneddyn.models.nets import BatchedMLP
from learneddyn.spaces import flat_dim

ARCHITECTURE = (256, 256)
LOG_STD = (-5.0, 2.0)
"""Bounds of a tanh-Gaussian's log standard deviation."""
GAUSSIAN_LOG_STD = (-20.0, 2.0)
"""Bounds of a state-independent log standard deviation."""


class Normaliser(nn.Module):
    """Standardise observations with the mean and deviation of the data set; does nothing until `fit`."""

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, obs: Float[Tensor, "n o"], slack: float = 1e-3) -> None:
        """Take mean and deviation of the rows; ``slack`` is added to the deviation."""
        exact = obs.double()
        self.mean.copy_(exact.mean(0))
        self.std.copy_(exact.std(0, correction=0) + slack)

    def forward(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b o"]:
        """Return the standardised rows."""
        return (obs - self.mean) / self.std


class Actor(nn.Module):
    """Base of the actors; ``optimizer`` steps its parameters."""

    optimizer: torch.optim.Optimizer

    def __init__(self, net: BatchedMLP, normaliser: Normaliser) -> None:
        super().__init__()
        self.net, self._normaliser = net, [normaliser]  # a list: the normaliser is the policy's, not a submodule here

    def _out(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b k"]:
        return self.net(self._normaliser[0](obs))[0]

    def mode(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
        """Return the deterministic action, in [-1, 1]."""
        return self._out(obs).tanh()

    def sample(self, obs: Float[Tensor, "b o"], rng: torch.Generator | None = None) -> Float[Tensor, "b a"]:
        """Return a drawn action, in [-1, 1]; without ``rng`` from torch's global generator."""
        return self.mode(obs)


class DeterministicActor(Actor):
    """tanh of a net."""


class GaussianActor(Actor):
    """Gaussian around the tanh of a net, with a log standard deviation that does not depend on the state."""

    def __init__(self, net: BatchedMLP, normaliser: Normaliser) -> None:
        super().__init__(net, normaliser)
        self.log_std = nn.Parameter(torch.zeros(net.biases[-1].shape[-1]))

    def sample(self, obs: Float[Tensor, "b o"], rng: torch.Generator | None = None) -> Float[Tensor, "b a"]:
        """Return a drawn action, clipped to [-1, 1]."""
        mean = self.mode(obs)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return (mean + self._log_std().exp() * noise).clamp(-1, 1)

    def log_prob(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"]) -> Float[Tensor, " b"]:
        """Return the log density of actions before clipping."""
        log_std = self._log_std()
        z = (action - self.mode(obs)) / log_std.exp()
        return -(0.5 * z.square() + log_std + HALF_LOG_2PI).sum(1)

    def _log_std(self) -> Float[Tensor, " a"]:
        return self.log_std.clamp(*GAUSSIAN_LOG_STD)


class SquashedActor(Actor):
    """tanh of a Gaussian whose mean and log standard deviation a net gives (SAC's actor)."""

    def __init__(self, net: BatchedMLP, normaliser: Normaliser, log_std: tuple[float, float] = LOG_STD) -> None:
        super().__init__(net, normaliser)
        self._bounds = log_std

    def mode(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, "b a"]:
        """Return tanh of the mean."""
        return self._out(obs).chunk(2, 1)[0].tanh()

    def sample(self, obs: Float[Tensor, "b o"], rng: torch.Generator | None = None) -> Float[Tensor, "b a"]:
        """Return a drawn action."""
        return self.draw(obs, rng)[0]

    def draw(
        self, obs: Float[Tensor, "b o"], rng: torch.Generator | None, repeats: int = 1
    ) -> tuple[Float[Tensor, "c a"], Float[Tensor, " c"]]:
        """Return ``repeats`` drawn actions per row, rows one after the other, and their log densities."""
        out = self._out(obs).repeat_interleave(repeats, 0)
        noise = torch.randn((len(out), out.shape[1] // 2), generator=rng, device=out.device)
        return self._squash(out, noise)

    def at(self, obs: Float[Tensor, "b o"], noise: Float[Tensor, "b a"]) -> Float[Tensor, "b a"]:
        """Return the action that this standard normal noise gives."""
        return self._squash(self._out(obs), noise)[0]

    def _squash(
        self, out: Float[Tensor, "b k"], noise: Float[Tensor, "b a"]
    ) -> tuple[Float[Tensor, "b a"], Float[Tensor, " b"]]:
        """With u = m + σε: log π = Σ [-ε²/2 - log σ - ½ log 2π - log(1 - tanh² u + c)], c as in Stable-Baselines3."""
        mean, raw = out.chunk(2, 1)
        log_std = raw.clamp(*self._bounds)
        action = (mean + log_std.exp() * noise).tanh()
        slack = (1 - action.square() + TANH_SLACK).log()
        return action, -(0.5 * noise.square() + log_std + HALF_LOG_2PI + slack).sum(1)


ACTORS = {"deterministic": DeterministicActor, "gaussian": GaussianActor, "squashed": SquashedActor}


class Critics(nn.Module):
    """n action values as one batched net."""

    optimizer: torch.optim.Optimizer

    def __init__(self, net: BatchedMLP, normaliser: Normaliser) -> None:
        super().__init__()
        self.net, self._normaliser = net, [normaliser]

    def forward(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "... b a"]) -> Float[Tensor, "n b"]:
        """Return every critic's value; actions ``[n, b, a]`` go each to its own critic."""
        features = self._normaliser[0](obs)
        if action.ndim == 3:
            features = features.expand(len(action), -1, -1)
        return self.net(torch.cat((features, action), -1))[..., 0]


class Value(nn.Module):
    """One state value."""

    optimizer: torch.optim.Optimizer

    def __init__(self, net: BatchedMLP, normaliser: Normaliser) -> None:
        super().__init__()
        self.net, self._normaliser = net, [normaliser]

    def forward(self, obs: Float[Tensor, "b o"]) -> Float[Tensor, " b"]:
        """Return the value of every row."""
        return self.net(self._normaliser[0](obs))[0, :, 0]


class FlatPolicy(BasePolicy):
    """What an offline learner asks of its policy: flat columns, and nets by name, each with its ``optimizer``."""

    normaliser: Normaliser
    learners: list[str]
    """Names of the nets that learn."""

    def columns(self, observation: Any) -> Float[Tensor, "b o"]:
        """Return flat columns of a batch of SB3's observation tensors, in the order of `learneddyn.spaces`."""
        parts = preprocess_obs(observation, self.observation_space, normalize_images=False)
        if isinstance(parts, dict):
            return torch.cat([parts[key].flatten(1).float() for key in sorted(parts)], 1)
        return parts.flatten(1).float()


class OfflinePolicy(FlatPolicy):
    """Actor, critics, their targets and, where asked, a state value; "MlpPolicy" of the offline learners.

    Args:
        observation_space: any space that has flat columns and that SB3 reads (no Tuple, no nested Dict).
        action_space: a bounded Box.
        lr_schedule: start learning rates are ``lr_schedule(1)``; the learner sets them afterwards.
        net_arch: hidden widths, or ``{"pi": ..., "qf": ...}`` for actor and critics.
        actor: "deterministic", "gaussian" (state-independent deviation) or "squashed" (tanh-Gaussian).
        n_critics: critics, 0 for none.
        activation: of the hidden layers of all nets.
        layer_norm: LayerNorm in the critics, after each activation.
        log_std: bounds of the squashed actor's log standard deviation.
        hidden_bias: start value of the hidden biases (None: torch's).
        last_bounds: bounds of the last layers' start weights, actor and critics (None: torch's).
        value: add a state value net.
        actor_target: add a slow copy of the actor.
        optimizer_class: of every net.
        optimizer_kwargs: its arguments besides the learning rate.
        rng: of the start weights, on the CPU.

    Raises:
        ValueError: an unknown actor, or a negative number of critics.
    """

    actor: Actor
    actors: ClassVar[tuple[str, ...]] = tuple(ACTORS)
    """Names of the actors there are."""

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.spaces.Box,
        lr_schedule: Any,
        *,
        net_arch: Sequence[int] | Mapping[str, Sequence[int]] = ARCHITECTURE,
        actor: str = "squashed",
        n_critics: int = 2,
        activation: Callable[[Tensor], Tensor] = torch.relu,
        layer_norm: bool = False,
        log_std: tuple[float, float] = LOG_STD,
        hidden_bias: float | None = None,
        last_bounds: tuple[float, float] | None = None,
        value: bool = False,
        actor_target: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        rng: torch.Generator | None = None,
    ) -> None:
        if actor not in self.actors:
            raise ValueError(f"actor must be one of {sorted(self.actors)}, got {actor!r}")
        if n_critics < 0:
            raise ValueError(f"n_critics must be at least 0, got {n_critics}")
        if optimizer_kwargs is None:
            optimizer_kwargs = {"fused": True} if optimizer_class is torch.optim.Adam else {}
        super().__init__(
            observation_space,
            action_space,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
        )
        self._arguments: dict[str, Any] = {
            "net_arch": net_arch,
            "actor": actor,
            "n_critics": n_critics,
            "activation": activation,
            "layer_norm": layer_norm,
            "log_std": log_std,
            "hidden_bias": hidden_bias,
            "last_bounds": last_bounds,
            "value": value,
            "actor_target": actor_target,
        }
        rng = torch.Generator().manual_seed(torch.initial_seed()) if rng is None else rng
        obs_dim, action_dim = flat_dim(observation_space), flat_dim(action_space)
        pi, qf = (net_arch["pi"], net_arch["qf"]) if isinstance(net_arch, Mapping) else (net_arch, net_arch)
        bounds = last_bounds or (None, None)
        self.normaliser = Normaliser(obs_dim)

        def critic_net(rng: torch.Generator) -> Critics:
            widths = (obs_dim + action_dim, *qf, 1)
            net = BatchedMLP(
                n_critics,
                widths,
                activation=activation,
                normalise=layer_norm,
                hidden_bias=hidden_bias,
                last_bound=bounds[1],
                rng=rng,
            )
            return Critics(net, self.normaliser)

        unused = torch.Generator()
        self.actor, self.learners = self._new_actor(pi, rng), ["actor"]
        if actor_target:
            self.actor_target = _frozen_copy(self._new_actor(pi, unused), self.actor)
        if n_critics:
            self.critic = critic_net(rng)
            self.critic_target = _frozen_copy(critic_net(unused), self.critic)
            self.learners.append("critic")
        if value:
            self.value = Value(BatchedMLP(1, (obs_dim, *qf, 1), activation=activation, rng=rng), self.normaliser)
            self.learners.append("value")
        self._followed = {
            name: (list(getattr(self, f"{name}_target").parameters()), list(getattr(self, name).parameters()))
            for name in self.learners
            if hasattr(self, f"{name}_target")
        }
        for name in self.learners:
            module = getattr(self, name)
            module.optimizer = optimizer_class(module.parameters(), lr=lr_schedule(1), **optimizer_kwargs)  # type: ignore[call-arg]

    def _new_actor(self, hidden: Sequence[int], rng: torch.Generator) -> Actor:
        """Return an actor with fresh weights."""
        kind, normaliser, action_dim = self._arguments["actor"], self.normaliser, flat_dim(self.action_space)
        net = BatchedMLP(
            1,
            (len(normaliser.mean), *hidden, 2 * action_dim if kind == "squashed" else action_dim),
            activation=self._arguments["activation"],
            hidden_bias=self._arguments["hidden_bias"],
            last_bound=(self._arguments["last_bounds"] or (None,))[0],
            rng=rng,
        )
        if kind == "squashed":
            return SquashedActor(net, normaliser, self._arguments["log_std"])
        return ACTORS[kind](net, normaliser)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        spaces = {"observation_space": self.observation_space, "action_space": self.action_space}
        optimizer = {"optimizer_class": self.optimizer_class, "optimizer_kwargs": self.optimizer_kwargs}
        return {**spaces, **optimizer, **self._arguments, "lr_schedule": self._dummy_schedule}

    def forward(self, observation: Any, deterministic: bool = False) -> Float[Tensor, "b a"]:
        """Return actions in [-1, 1]."""
        return self._predict(observation, deterministic)

    def _predict(self, observation: Any, deterministic: bool = False) -> Float[Tensor, "b a"]:
        obs = self.columns(observation)
        return self.actor.mode(obs) if deterministic else self.actor.sample(obs)

    def follow(self, tau: float, *names: str) -> None:
        """Move the target nets (those of ``names``, or all) towards the nets by the share ``tau``."""
        with torch.no_grad():
            for name in names or self._followed:
                torch._foreach_lerp_(*self._followed[name], tau)


def _frozen_copy(fresh: Any, module: nn.Module) -> Any:
    fresh.load_state_dict(module.state_dict())
    return fresh.requires_grad_(False)
