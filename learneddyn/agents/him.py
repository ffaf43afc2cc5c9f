"""Hybrid Internal Model: a Stable-Baselines3 policy that estimates what its sensors do not show.

    env = PrivilegedHistory(gym.make("Pendulum-v1"), columns=[2])          # what is hidden is there in training
    agent = PPO("MultiInputPolicy", env, policy_kwargs={"features_extractor_class": HIMExtractor})
    agent.learn(100_000, callback=HIMCallback())

Source: Long, Wang, Li, Cao, Gao, Pang, "Hybrid Internal Model: Learning Agile Legged Locomotion with Simulated Robot
Response" (2024). Its loss has two parts: the squared error of an explicit estimate, and an assignment that history and
successor must share, as in Caron, Misra, Mairal, Goyal, Bojanowski, Joulin, "Unsupervised Learning of Visual Features
by Contrasting Cluster Assignments" (2020).

Deviations: columns are standardised by running moments (the source scales them by hand); the estimator is updated
between a rollout's policy update and the next rollout, not within the policy's minibatches, so that the policy's
probability ratios begin at 1; actor and critic see the same features (the source's critic sees what is hidden).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize

from learneddyn.core import generator
from learneddyn.data import HideColumns


class PrivilegedHistory(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Observe the last steps without some columns, and apart from them, for training alone, what is hidden.

    Observations are a Dict: ``history`` [steps, s + a] holds what is shown and the action before it, oldest first;
    ``hidden`` [v] holds the hidden columns now. An episode begins with copies of its first row; actions there are 0.

    Args:
        env: with Boxes of one axis for observations and actions.
        columns: to hide; None hides the velocities.
        steps: of the history.

    Raises:
        ValueError: no such Boxes, steps below 1, or columns that cannot be hidden (see `HideColumns`).
        LookupError: the velocities are not known for this environment.
    """

    def __init__(self, env: gym.Env[Any, Any], columns: Sequence[int] | None = None, steps: int = 6) -> None:
        named = None if columns is None else list(columns)
        gym.utils.RecordConstructorArgs.__init__(self, columns=named, steps=steps)
        super().__init__(env)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not (isinstance(env.action_space, gym.spaces.Box) and len(env.action_space.shape) == 1):
            raise ValueError(f"PrivilegedHistory needs a Box of one axis for actions, got {env.action_space}")
        partial = HideColumns(env, columns)
        self._hidden, self._shown = list(partial.hidden), list(partial.shown)
        width = len(self._shown) + env.action_space.shape[0]
        box = gym.spaces.Box
        self.observation_space = gym.spaces.Dict(
            {
                "history": box(-np.inf, np.inf, (steps, width), np.float32),
                "hidden": box(-np.inf, np.inf, (len(self._hidden),), np.float32),
            }
        )
        self._rows = np.zeros((steps, width), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._rows[:] = self._row(obs, np.zeros(self.action_space.shape, np.float32))  # type: ignore[arg-type]
        return self._observation(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and move the history on."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._rows[:-1] = self._rows[1:]
        self._rows[-1] = self._row(obs, action)
        return self._observation(obs), reward, terminated, truncated, info

    def _row(self, obs: NDArray[Any], action: NDArray[Any]) -> NDArray[np.float32]:
        return np.concatenate([obs[self._shown], action]).astype(np.float32)

    def _observation(self, obs: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        return {"history": self._rows.copy(), "hidden": obs[self._hidden].astype(np.float32)}


class Successions(NamedTuple):
    """What the estimator learns from: histories, and what came one step later."""

    history: Float[Tensor, "n h r"]
    after: Float[Tensor, "n r"]
    """The history's next row."""
    hidden: Float[Tensor, "n v"]
    """What was hidden in that row; or in the history's last one, where the estimate is to be of now."""

    def to(self, device: torch.device) -> "Successions":
        """Return the same rows on another device."""
        return Successions(*(part.to(device) for part in self))

    def rows(self, index: Tensor) -> "Successions":
        """Return the chosen rows."""
        return Successions(*(part[index] for part in self))


class HIMLoss(NamedTuple):
    """The two parts of the estimator's loss, see `HIMExtractor.loss`."""

    hidden: Float[Tensor, ""]
    swap: Float[Tensor, ""]


class HIMExtractor(BaseFeaturesExtractor):
    """Features ``[o, v, z]``: the newest row, an estimate of the hidden columns, and a code of unit norm.

    An encoder maps the history to v and z; a second one maps the row after it to a code of its own. Both codes are
    compared with prototypes: where one is assigned (by `sinkhorn`, so that no prototype takes all), the other's softmax
    must point. No gradient of the policy reaches the encoders: `HIMCallback` trains them, or `HIMTrainer` does. Their
    optimiser's state belongs to the weights: it is saved and loaded with the agent.

    Args:
        observation_space: of `PrivilegedHistory`.
        latent: columns of the code z.
        prototypes: unit vectors that codes are compared with.
        hidden: widths of both encoders' hidden layers.
        temperature: of the softmax over prototypes.

    Raises:
        ValueError: another observation space.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        latent: int = 16,
        prototypes: int = 32,
        hidden: Sequence[int] = (128, 64),
        temperature: float = 3.0,
    ) -> None:
        if not (isinstance(observation_space, gym.spaces.Dict) and {"history", "hidden"} <= set(observation_space)):
            raise ValueError(f"HIMExtractor needs the observations of PrivilegedHistory, got {observation_space}")
        steps, width = observation_space["history"].shape or (0, 0)
        (unseen,) = observation_space["hidden"].shape or (0,)
        super().__init__(observation_space, width + unseen + latent)
        self.temperature, self._unseen = temperature, unseen
        self.encoder = _mlp(steps * width, hidden, unseen + latent)
        self.target = _mlp(width, hidden, latent)
        self.prototypes = nn.Parameter(normalize(torch.randn(prototypes, latent), dim=1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        for name, columns in (("row", width), ("hidden", unseen)):
            self.register_buffer(f"{name}_mean", torch.zeros(columns, dtype=torch.float64))
            self.register_buffer(f"{name}_variance", torch.ones(columns, dtype=torch.float64))
        self.optimizer = torch.optim.Adam(self.parameters())

    def get_extra_state(self) -> Any:
        """Return the optimiser's state, for the file of the weights."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: Any) -> None:
        """Take the optimiser's state from the file of the weights."""
        self.optimizer.load_state_dict(state)

    def forward(self, observations: dict[str, Tensor]) -> Float[Tensor, "b f"]:
        """Return the features of a batch; they carry no gradient."""
        with torch.no_grad():
            hidden, code = self.estimate(observations["history"])
        return torch.cat([observations["history"][:, -1], hidden, code], dim=1)

    def estimate(self, history: Float[Tensor, "b h r"]) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b z"]]:
        """Return the hidden columns in their units, at the step that was learned from `Successions`; and the code."""
        hidden, code = self._encoded(history)
        return hidden * self._std("hidden") + self.hidden_mean.to(hidden), code

    def loss(self, rows: Successions) -> HIMLoss:
        """Return the squared error of the hidden columns, standardised, and the mean of the swapped cross-entropies.

        The mean goes over rows and prototypes, as in the source: with P prototypes and no knowledge it is log(P) / P.
        """
        hidden, code = self._encoded(rows.history)
        after = normalize(self.target(self._standardised("row", rows.after)), dim=1)
        wanted = self._standardised("hidden", rows.hidden)
        scores = code @ self.prototypes.T, after @ self.prototypes.T
        said, heard = (log_softmax(score / self.temperature, dim=1) for score in scores)
        assigned, answered = (sinkhorn(score.detach()) for score in scores)
        return HIMLoss((hidden - wanted).square().mean(), -0.5 * (assigned * heard + answered * said).mean())

    @torch.no_grad()
    def observe(self, rows: Successions) -> None:
        """Take rows into the moments that columns are standardised by.

        The moments of both parts are joined as in Chan, Golub, LeVeque, "Algorithms for computing the sample variance"
        (1983), in float64: means may be many times the spreads.
        """
        count = float(len(rows.after))
        new = count / (self.seen + count)
        for name, part in (("row", rows.after.double()), ("hidden", rows.hidden.double())):
            mean, variance = getattr(self, f"{name}_mean"), getattr(self, f"{name}_variance")
            apart = part.mean(dim=0) - mean
            variance.lerp_(part.var(dim=0, correction=0), new).addcmul_(apart, apart * (new * (1 - new)))
            mean.add_(apart * new)
        self.seen += count

    @torch.no_grad()
    def normalise_prototypes(self) -> None:
        """Bring the prototypes back to the unit sphere."""
        self.prototypes.copy_(normalize(self.prototypes, dim=1))

    def _encoded(self, history: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(self._standardised("row", history).flatten(1))
        return out[:, : self._unseen], normalize(out[:, self._unseen :], dim=1)

    def _standardised(self, name: str, part: Tensor) -> Tensor:
        return (part - getattr(self, f"{name}_mean").to(part)) / self._std(name)

    def _std(self, name: str) -> Float[Tensor, " c"]:
        variance = getattr(self, f"{name}_variance")
        return torch.where(variance > 1e-9, variance, 1.0).sqrt().to(self.prototypes)

    # Declared for type checkers; the constructor registers them.
    seen: Tensor
    row_mean: Tensor
    hidden_mean: Tensor


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "b p"], sharpness: float = 0.05, rounds: int = 3) -> Float[Tensor, "b p"]:
    """Return soft assignments of rows to prototypes: each row adds up to 1, each prototype takes about its share.

    Args:
        scores: inner products of unit vectors.
        sharpness: temperature; the smaller, the harder the assignment.
        rounds: of balancing prototypes and rows in turn.
    """
    share = ((scores - scores.max()) / sharpness).exp()
    for _ in range(rounds):
        share = share / share.sum(dim=0, keepdim=True)
        share = share / share.sum(dim=1, keepdim=True)
    return share


class HIMTrainer:
    """Adam on an estimator; it goes on from where the estimator's last trainer stopped.

    Args:
        extractor: to train.
        learning_rate: may be changed between updates.
        clip: norm that gradients are clipped to.
    """

    def __init__(self, extractor: HIMExtractor, learning_rate: float = 1e-3, clip: float = 10.0) -> None:
        self.extractor, self.learning_rate, self.clip = extractor, learning_rate, clip

    def update(self, rows: Successions) -> HIMLoss:
        """Take one step on a batch; gradients are gone afterwards, so that no other optimiser meets them."""
        self.extractor.normalise_prototypes()
        loss = self.extractor.loss(rows)
        (loss.hidden + loss.swap).backward()
        nn.utils.clip_grad_norm_(self.extractor.parameters(), self.clip)
        optimizer = self.extractor.optimizer
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return HIMLoss(loss.hidden.detach(), loss.swap.detach())

    def epochs(self, rows: Successions, count: int, batch_size: int, rng: torch.Generator) -> HIMLoss:
        """Go over the rows ``count`` times in random batches, and return the last epoch's mean loss."""
        losses: list[HIMLoss] = []
        for _ in range(count):
            order = torch.randperm(len(rows.after), generator=rng).to(rows.after.device)
            losses = [self.update(rows.rows(batch)) for batch in order.split(batch_size)]
        return HIMLoss(*(torch.stack(part).mean() for part in zip(*losses, strict=True)))


class HIMCallback(BaseCallback):
    """Train the policy's `HIMExtractor` on what the agent lives through, at the agent's learning rate.

    An on-policy agent's estimator sees each rollout ``epochs`` times, after the policy's update on it; an off-policy
    agent's sees ``updates`` batches of the replay after every rollout. All extractors of a policy (an actor and critics
    may have their own) hold the same weights. Logged: ``him/hidden_mse`` (standardised) and ``him/swap``. The callback
    has no state of its own: a loaded agent that learns on with a new one is the agent that was never saved.

    Args:
        epochs: over a rollout.
        updates: batches per rollout of an off-policy agent.
        batch_size: rows of a batch.
        ahead: estimate what is hidden one step later, as the source does; False for the newest step itself, which is
            easier where steps are long: the action between the two is not known yet.
        verbose: as in every callback.

    Raises:
        ValueError: a number below 1; at the start of training, where the policy has no `HIMExtractor`.
    """

    def __init__(
        self, epochs: int = 5, updates: int = 1, batch_size: int = 512, ahead: bool = True, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        for name, value in (("epochs", epochs), ("updates", updates), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.epochs, self.updates, self.batch_size, self.ahead = epochs, updates, batch_size, ahead
        self._waiting: Successions | None = None

    def _on_training_start(self) -> None:
        extractors = [module for module in self.model.policy.modules() if isinstance(module, HIMExtractor)]
        if not extractors:
            raise ValueError("HIMCallback needs policy_kwargs={'features_extractor_class': HIMExtractor}")
        self._trainer, self._copies = HIMTrainer(extractors[0]), extractors[1:]
        self._copy()

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._learn_waiting()

    def _on_training_end(self) -> None:
        self._learn_waiting()

    def _on_rollout_end(self) -> None:
        if isinstance(self.model, OnPolicyAlgorithm):
            self._waiting = rollout_successions(self.model, self.ahead).to(self.model.device)
        elif isinstance(self.model, OffPolicyAlgorithm):
            self._learn_from_replay(self.model)

    def _learn_waiting(self) -> None:
        if self._waiting is not None:
            rows, self._waiting = self._waiting, None
            if len(rows.after) == 0:  # no two steps of one episode in this rollout
                return
            rng = generator((self.model.seed or 0) + self.model.num_timesteps)  # the same in a run that was resumed
            self._tuned().extractor.observe(rows)
            self._finish(self._trainer.epochs(rows, self.epochs, self.batch_size, rng))

    def _learn_from_replay(self, agent: OffPolicyAlgorithm) -> None:
        assert agent.replay_buffer is not None
        if agent.num_timesteps < agent.learning_starts:
            return
        for _ in range(self.updates):
            batch: Any = agent.replay_buffer.sample(self.batch_size, env=agent.get_vec_normalize_env())
            now, after = batch.observations, batch.next_observations
            hidden = (after if self.ahead else now)["hidden"]
            rows = Successions(now["history"], after["history"][:, -1], hidden)
            self._tuned().extractor.observe(rows)
            loss = self._trainer.update(rows)
        self._finish(loss)

    def _tuned(self) -> HIMTrainer:
        """Return the trainer at the learning rate that the agent has now."""
        self._trainer.learning_rate = self.model.lr_schedule(self.model._current_progress_remaining)
        return self._trainer

    def _finish(self, loss: HIMLoss) -> None:
        self._copy()
        self.logger.record("him/hidden_mse", float(loss.hidden))
        self.logger.record("him/swap", float(loss.swap))

    def _copy(self) -> None:
        weights = [*self._trainer.extractor.parameters(), *self._trainer.extractor.buffers()]
        for copy in self._copies:
            for old, new in zip([*copy.parameters(), *copy.buffers()], weights, strict=True):
                old.data.copy_(new.data)


def rollout_successions(agent: OnPolicyAlgorithm, ahead: bool = True) -> Successions:
    """Return the pairs of consecutive steps in an agent's full rollout, on the CPU; none reaches across an episode."""
    buffer: Any = agent.rollout_buffer
    joined = torch.from_numpy(buffer.episode_starts[1:] == 0)
    history, hidden = (torch.from_numpy(buffer.observations[name]) for name in ("history", "hidden"))
    hidden = hidden[1:] if ahead else hidden[:-1]
    return Successions(history[:-1][joined], history[1:, ..., -1, :][joined], hidden[joined])


def _mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    widths = [inputs, *hidden]
    layers = [layer for i, j in pairwise(widths) for layer in (nn.Linear(i, j), nn.ELU())]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
