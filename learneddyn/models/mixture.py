"""MixER: a mixture of expert reconstructors for families of environments.

Source: Nzoyem, Stevens, Sahota, Barton, Deakin, "Towards Foundational Models for Dynamical System Reconstruction:
Hierarchical Meta-Learning via Mixture of Experts" (2025).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import DataError, Transitions
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import spread
from learneddyn.spaces import Spaces

_KMEANS = 20
"""Iterations of the clustering, at most."""
_TOLERANCE = 1e-4
"""Movement of a centre, in units of the context, below which the clustering has converged."""
_ADAPTATION = 0.02
"""First learning rate of a new environment's context."""
_JITTER = 1e-4
"""Noise on the contexts that the gate is fitted to, so that equal ones do not make it singular."""


class MixER(AbstractRegression):
    """One network per family of systems; every environment has a context vector, and a gate sends it to one network.

    The members of the model are the environments it was fitted on, all of them elites: `predict` answers for each, a
    World with the sampler ``tsinf`` plays every lane in an environment of its own, and members disagree where the
    environments differ, whether or not the model is in doubt. `on` hands out the dynamics of one environment,
    `adapted` those of a new one; both have one member.

    Experts see observation, action and context, and begin equal; contexts begin at zero. Contexts and experts learn by
    gradient, each environment through its expert only. The gate does not: every ``gate_every`` updates the contexts
    are clustered (k-means with L1 distances), every cluster gets the expert that fits it best (one to one, median
    loss), and the gate ``softmax(W [context, 1])`` is a least-squares fit to that. Where no clustering converges with
    contexts in every cluster, the gate stays as it is.

    Rows belong to environments by episode: environment i holds the next ``environments[i]`` episodes of the data, in
    their order; an integer deals the episodes evenly. The source reports that with much data of closely related
    systems a single network with contexts is better; `experts=1` is that network.

    Deviations: contexts and experts learn together, where the source alternates between them with proximal terms; the
    loss is of one step, where the source integrates an ODE; the assignment is optimal, where its code is greedy; and
    k-means begins at the last centres, as there, and also far apart from every context in turn, and keeps the tightest
    clustering: from the last centres alone, early mistakes of routing stayed to the end.

    Args:
        environments: number of environments, or of each one's episodes.
        experts: networks.
        context: numbers of a context.
        hidden: widths of an expert's hidden layers.
        updates: of training.
        batch_size: rows of every environment per update.
        learning_rate: of Adam; falls to zero by a cosine.
        gate_every: updates between two fits of the gate.
        learn_reward: add a reward output.
        holdout_ratio: share of the rows that measure the noise, drawn at random.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        environments: int | Sequence[int] = 4,
        experts: int = 3,
        context: int = 4,
        hidden: Sequence[int] = (48, 48),
        updates: int = 2500,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        gate_every: int = 5,
        learn_reward: bool = False,
        holdout_ratio: float = 0.1,
    ) -> None:
        super().__init__()
        counts = [environments] if isinstance(environments, int) else list(environments)
        for name, ok, value, allowed in (
            ("environments", len(counts) > 0 and min(counts) >= 1, environments, "at least 1, or positive counts"),
            ("experts", experts >= 1, experts, "at least 1"),
            ("context", context >= 1, context, "at least 1"),
            ("hidden", len(hidden) > 0 and all(width >= 1 for width in hidden), hidden, "one or more positive widths"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("batch_size", batch_size >= 1, batch_size, "at least 1"),
            ("gate_every", gate_every >= 1, gate_every, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.environments = environments if isinstance(environments, int) else counts
        self.experts, self.context, self.hidden, self.updates = experts, context, list(hidden), updates
        self.batch_size, self.learning_rate, self.gate_every = batch_size, learning_rate, gate_every
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio
        self.num_members = environments if isinstance(environments, int) else len(counts)

    def _build_members(self, spaces: Spaces) -> None:
        o, a, m = spaces.obs_dim, spaces.action_dim, self.experts
        widths = [o + a + self.context, *self.hidden, o + self.learn_reward]
        self.weights = nn.ParameterList(torch.zeros(m, i, j) for i, j in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(m, 1, j) for j in widths[1:])
        self.contexts = nn.Parameter(torch.zeros(self.num_members, self.context))
        self.register_buffer("gate", torch.zeros(self.context + 1, m))
        self.register_buffer("centres", torch.zeros(m, self.context))
        for name, width in (("input", o + a), ("output", widths[-1])):
            self.register_buffer(f"{name}_shift", torch.zeros(width))
            self.register_buffer(f"{name}_scale", torch.ones(width))

    @property
    def routes(self) -> Int[Tensor, " e"]:
        """The expert of every environment."""
        return self.route(self.contexts)

    def route(self, contexts: Float[Tensor, "e c"]) -> Int[Tensor, " e"]:
        """Return the expert that the gate sends each context to."""
        return (contexts @ self.gate[:-1] + self.gate[-1]).argmax(dim=1)

    def environment_of(self, data: Transitions) -> Int[Tensor, " n"]:
        """Return the environment that each row belongs to.

        Raises:
            DataError: the number of episodes does not fit ``environments``.
        """
        changes = data.episode[1:] != data.episode[:-1]
        number = torch.cat([changes.new_zeros(1), changes]).cumsum(dim=0)
        episodes = int(number[-1]) + 1
        if isinstance(self.environments, int):
            if episodes < self.environments:
                raise DataError(f"{self.environments} environments need as many episodes, got {episodes}")
            return number * self.environments // episodes
        ends = torch.tensor(self.environments, device=data.device).cumsum(dim=0)
        if episodes != int(ends[-1]):
            raise DataError(f"environments names {int(ends[-1])} episodes, the data has {episodes}")
        return torch.bucketize(number, ends, right=True)

    def _forward(
        self, experts: slice | Int[Tensor, " g"], obs: Tensor, action: Tensor, contexts: Tensor
    ) -> Float[Tensor, "g b q"]:
        """Return the standardised change (and reward) that group g's expert says of its rows ``[g b ...]``."""
        inputs = (torch.cat([obs, action], dim=-1) - self.input_shift) / self.input_scale
        x = torch.cat([inputs, contexts], dim=-1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = nn.functional.silu(torch.baddbmm(bias[experts], x, weight[experts]))
        return torch.baddbmm(self.biases[-1][experts], x, self.weights[-1][experts])

    def _said(self, obs: Tensor, output: Tensor) -> Tensor:
        """Return next observations and rewards from standardised changes."""
        said, o = output * self.output_scale + self.output_shift, obs.shape[-1]
        return torch.cat([obs + said[..., :o], said[..., o:]], dim=-1)

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        e, b = self.num_members, len(obs)
        contexts = self.contexts[:, None].expand(e, b, -1)
        output = self._forward(self.routes, obs.expand(e, b, -1), action.expand(e, b, -1), contexts)
        return Answer(self._said(obs, output))

    def _own(
        self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], member: Int[Tensor, " b"], memory: Tensor | None
    ) -> Answer:
        """Ask every expert about every row and keep its own: experts are fewer than environments."""
        m, b = self.experts, len(obs)
        contexts = self.contexts[member].expand(m, b, -1)
        output = self._forward(slice(None), obs.expand(m, b, -1), action.expand(m, b, -1), contexts)
        return Answer(self._said(obs, output[self.routes[member], torch.arange(b, device=obs.device)]))

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        train, environment = data[rows], self.environment_of(data)[rows]
        count = torch.bincount(environment, minlength=self.num_members)
        if bool((count == 0).any()):
            raise DataError(f"environment {int(count.argmin())} has no rows to learn from")
        target = self._standardise(train)
        self._initialise(rng)
        table = _Table(train, target, environment, count)
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.updates)
        routes, history = self.routes, []
        bar = tqdm(range(self.updates), desc="MixER", disable=not progress)
        for update in bar:
            obs, action, wanted = table.draw(self.batch_size, rng)
            contexts = self.contexts[:, None].expand(-1, self.batch_size, -1)
            loss = (self._forward(routes, obs, action, contexts) - wanted).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if self.experts > 1 and (update + 1) % self.gate_every == 0:
                self._update_gate(obs, action, wanted, rng)
                routes = self.routes
            if (update + 1) % max(1, self.updates // 20) == 0:
                used = float(len(routes.unique()))
                history.append({"epoch": update + 1.0, "loss": loss.item(), "experts": used})
                bar.set_postfix(loss=loss.item(), experts=used)
        return history

    def _standardise(self, train: Transitions) -> Float[Tensor, "n q"]:
        """Fit the scales and return the standardised targets."""
        inputs, outputs = torch.cat([train.obs, train.action], dim=1), train.next_obs - train.obs
        if self.learn_reward:
            outputs = torch.cat([outputs, train.reward[:, None]], dim=1)
        for name, column in (("input", inputs), ("output", outputs)):
            getattr(self, f"{name}_shift").copy_(column.mean(dim=0))
            getattr(self, f"{name}_scale").copy_(spread(column))
        return (outputs - self.output_shift) / self.output_scale

    @torch.no_grad()
    def _initialise(self, rng: torch.Generator) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight[:1], -bound, bound, generator=rng)
            weight.copy_(weight[:1].expand_as(weight))
            bias.zero_()
        self.contexts.zero_()
        self.gate.zero_()
        self.centres.copy_(1e-3 * (2 * torch.rand(self.centres.shape, generator=rng, device=rng.device) - 1))

    @torch.no_grad()
    def _update_gate(
        self, obs: Float[Tensor, "e b o"], action: Float[Tensor, "e b a"], wanted: Tensor, rng: torch.Generator
    ) -> None:
        clusters = self._clusters()
        if clusters is None:
            return
        m, (e, b) = self.experts, obs.shape[:2]
        contexts = self.contexts[:, None].expand(e, b, -1)
        rows = [part.flatten(0, 1).expand(m, e * b, -1) for part in (obs, action, contexts)]
        error = (self._forward(slice(None), *rows).view(m, e, b, -1) - wanted).square().mean(dim=(2, 3))
        losses = torch.stack([error[:, clusters == k].median(dim=1).values for k in range(m)])
        expert = _assigned(losses)[clusters]
        noise = torch.randn(self.contexts.shape, generator=rng, device=obs.device)
        inputs = torch.cat([self.contexts + _JITTER * noise, torch.ones_like(noise[:, :1])], dim=1)
        wished = nn.functional.one_hot(expert, m).to(inputs)
        self.gate.copy_(torch.linalg.pinv(inputs) @ wished)

    def _clusters(self) -> Int[Tensor, " e"] | None:
        """Return the cluster of every context; None where one is empty or the centres still move."""
        centres = torch.cat([self.centres[None], _far_apart(self.contexts, self.experts)])
        for _ in range(_KMEANS):
            distance = torch.cdist(self.contexts, centres, p=1)
            share = nn.functional.one_hot(distance.argmin(dim=2), self.experts).to(centres)
            size = share.sum(dim=1)[:, :, None]
            moved = torch.where(size > 0, share.mT @ self.contexts / size.clamp_min(1), centres)
            movement = (moved - centres).abs().amax(dim=(1, 2))
            centres = moved
            if bool((movement < _TOLERANCE).all()):
                break
        usable = (movement < _TOLERANCE) & (size > 0).all(dim=(1, 2))
        if not bool(usable.any()):
            return None
        spread = distance.amin(dim=2).sum(dim=1).where(usable, torch.inf)
        best = spread.argmin()
        self.centres.copy_(centres[best])
        return distance[best].argmin(dim=1)

    @torch.no_grad()
    def _measure(self, data: Transitions, rows: Bool[Tensor, " n"]) -> dict[str, float]:
        """Measure every environment's noise on its own rows; one without held-out rows takes the mean of all."""
        environment = self.environment_of(data)[rows]
        error = self._error(self._own(data.obs[rows], data.action[rows], environment, None).mean, data[rows])
        member = nn.functional.one_hot(environment, self.num_members).to(error)
        count = member.sum(dim=0)[:, None]
        own = member.T @ error.square() / count.clamp_min(1)
        self._take_noise(torch.where(count > 0, own, error.square().mean(dim=0)).sqrt(), data[rows])
        return self._metrics(error, self.noise[environment])

    @torch.no_grad()
    def on(self, environment: int) -> "MixER":
        """Return one environment's dynamics as they are now: a copy of one member, which later learning leaves alone.

        Args:
            environment: in the order of the data, from 0; `environment_of` tells the one of a row.

        Raises:
            ValueError: the model has not been fitted, or has no such environment.
        """
        self._require_fitted()
        if not 0 <= environment < self.num_members:
            raise ValueError(
                f"environment must be one of the {self.num_members} it was fitted on, 0 first, got {environment}"
            )
        assert self.spaces is not None
        model = MixER(**(self.config() | {"environments": 1}))
        model._build(self.spaces)
        model.spaces, model.source = self.spaces, self.source
        one = {name: getattr(self, name)[environment : environment + 1] for name in ("contexts", "noise")}
        elites = {"_elites": torch.zeros_like(self._elites[:1])}
        model.load_state_dict(self.state_dict() | one | elites)
        return model.to(self._elites.device)

    def adapted(self, data: Transitions, *, rng: torch.Generator, updates: int = 300) -> "MixER":
        """Return a model of one new environment: the experts stay as they are, only a context is learned.

        It begins at the context of the known environment that says the data best, and stays with that one's expert.

        Args:
            data: of the new environment, any number of episodes.
            rng: draws the rows that measure the noise.
            updates: of Adam on the context, each on all rows but those.

        Raises:
            ValueError: the model has not been fitted, or the data has other spaces.
            DataError: fewer than two rows, or NaN or infinite rows.
        """
        self._require_fitted()
        data = data.check().to(self._elites.device)
        if len(data) < 2:
            raise DataError(f"adapted needs at least 2 transitions, got {len(data)}")
        if self.spaces is None or data.spaces != self.spaces:
            raise ValueError(f"this model was fitted on {self.spaces}, the data has {data.spaces}")
        held = torch.zeros(len(data), dtype=torch.bool, device=data.device)
        held[torch.randperm(len(data), generator=rng, device=rng.device)[: max(1, len(data) // 10)]] = True
        seen = data[~held]
        with torch.no_grad():
            closest = int(self._losses(self.routes, self.contexts, seen).argmin())
        model, expert = self.on(closest), self.routes[closest : closest + 1]
        context = self.contexts[closest : closest + 1].detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([context], _ADAPTATION)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            (context.grad,) = torch.autograd.grad(self._losses(expert, context, seen).sum(), context)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            model.contexts.copy_(context)
            model.source = data.source
            model.gate.zero_()
            model.gate[-1, expert] = 1.0
        model._measure(data, held)
        return model

    def _losses(
        self, experts: Int[Tensor, " g"], contexts: Float[Tensor, "g c"], data: Transitions
    ) -> Float[Tensor, " g"]:
        """Return the loss of every pair of an expert and a context on the data."""
        g, n = len(experts), len(data)
        wanted = data.next_obs - data.obs
        if self.learn_reward:
            wanted = torch.cat([wanted, data.reward[:, None]], dim=1)
        wanted = (wanted - self.output_shift) / self.output_scale
        obs, action, context = (part.expand(g, n, -1) for part in (data.obs, data.action, contexts[:, None]))
        output = self._forward(experts, obs, action, context)
        return (output - wanted).square().mean(dim=(1, 2))

    # Declared for type checkers; `_build_members` registers them.
    gate: Tensor
    centres: Tensor
    input_shift: Tensor
    input_scale: Tensor
    output_shift: Tensor
    output_scale: Tensor


class _Table:
    """The rows of every environment, drawn evenly."""

    def __init__(self, data: Transitions, target: Tensor, environment: Int[Tensor, " n"], count: Tensor) -> None:
        order = environment.argsort(stable=True)
        self._columns = [column[order] for column in (data.obs, data.action, target)]
        self._first, self._count = count.cumsum(dim=0) - count, count

    def draw(self, rows: int, rng: torch.Generator) -> list[Float[Tensor, "e b _"]]:
        """Return observations, actions and targets of ``rows`` random rows of every environment."""
        share = torch.rand(len(self._count), rows, generator=rng, device=rng.device)
        index = self._first[:, None] + (share * self._count[:, None]).long().clamp_max(self._count[:, None] - 1)
        return [column[index] for column in self._columns]


def _far_apart(points: Float[Tensor, "e c"], count: int) -> Float[Tensor, "e m c"]:
    """Return, from every point, ``count`` points that each stand farthest from those before."""
    distance = torch.cdist(points, points, p=1)
    chosen = [torch.arange(len(points), device=points.device)]
    nearest = distance
    while len(chosen) < count:
        chosen.append(nearest.argmax(dim=1))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return points[torch.stack(chosen, dim=1)]


def _assigned(losses: Float[Tensor, "k m"]) -> Int[Tensor, " k"]:
    """Return an expert for every cluster, one to one, of least total loss.

    Raises:
        ImportError: SciPy is not installed (names the extra).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("MixER needs SciPy: pip install 'learneddyn[models]'") from error
    return torch.as_tensor(linear_sum_assignment(losses.cpu().numpy())[1], device=losses.device)
