"""Piecewise-linear recurrent networks: shallow, clipped shallow, and almost linear, with inputs.

Sources: Hess, Monfared, Brenner, Durstewitz, "Generalized Teacher Forcing for Learning Chaotic Dynamics" (2023), for
the shallow network and its clipped form; Brenner, Hemmer, Monfared, Durstewitz, "Almost-Linear RNNs Yield Highly
Interpretable Symbolic Codes in Dynamical Systems Reconstruction" (2024).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from learneddyn.core import Transitions
from learneddyn.models.forcing import AdaptiveForcing, forced_loss
from learneddyn.models.regression import AbstractRegression, Answer
from learneddyn.models.scale import spread
from learneddyn.models.unrolled import unrolled
from learneddyn.models.windows import longest_window, window_starts, windows
from learneddyn.spaces import Spaces

KINDS = ("shallow", "clipped", "almost-linear")


class PLRNN(AbstractRegression):
    """A latent state z of which the first columns are the (standardised) observation; it travels as the State's memory.

    A step first sets these columns to the observation it is given, so that only the hidden units remember; in a free
    run the observation is the model's own, and nothing changes.

    shallow         z' = A z + W1 relu(W2 z + h2 + D u) + h1 + C u, A diagonal
    clipped         relu(W2 z + h2 + D u) - relu(W2 z) in its place: orbits stay bounded where max |A| < 1
    almost-linear   z' = A z + W relu*(z) + h + C u, relu* acting on the last ``relus`` units only: at most 2^relus
                    linear regions, see `learneddyn.evaluation.regions`

    D is ours: without it an input could not change how the state acts. Hidden units beyond the observation begin at a
    trained linear map of it. Training draws windows of ``window`` steps within episodes and forces them towards the
    data (`learneddyn.models.forcing`); the last rows of the data are held out.

    Deviations: weights are kept by the error of free runs over held-out windows (the sources keep them by D_stsp, which
    needs an attractor); the observation is read off the first units, without an observation model of its own; the
    sources' L2 penalty of 1e-5 and the almost linear network's penalty against instability are left out; the factor by
    which adaptive forcing falls is set by the number of updates, so that it settles within any budget.

    Args:
        kind: "shallow", "clipped" or "almost-linear".
        latent: units z; at least the observation's columns, None for exactly these.
        hidden: units of the shallow kinds.
        relus: rectified units of the almost linear kind.
        forcing: "fixed" (generalized teacher forcing with ``alpha``), "adaptive", or "sparse" (every ``interval``
            steps).
        alpha: strength of fixed forcing: 1 is one-step training, 0 backpropagation through time. Adaptive forcing
            starts there.
        interval: steps between two forcings of "sparse".
        window: steps of a training sequence, or the longest episode's where that is shorter.
        batch_size: sequences per update.
        updates: training updates.
        learning_rate: of RAdam, falling exponentially to ``final_learning_rate``.
        final_learning_rate: of the last update.
        input_noise: standard deviation of noise on the observations that training sees, in units of theirs.
        clip: norm that gradients are clipped to.
        learn_reward: add a linear reward read-out of the latent state.
        holdout_ratio: share of the rows, the last ones, that measure the noise and choose the weights.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    num_members = 1

    def __init__(
        self,
        kind: str = "clipped",
        latent: int | None = None,
        hidden: int = 100,
        relus: int = 2,
        forcing: str = "fixed",
        alpha: float = 0.1,
        interval: int = 16,
        window: int = 50,
        batch_size: int = 32,
        updates: int = 4000,
        learning_rate: float = 5e-3,
        final_learning_rate: float = 1e-5,
        input_noise: float = 0.0,
        clip: float = 10.0,
        learn_reward: bool = False,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        for name, ok, value, allowed in (
            ("kind", kind in KINDS, kind, f"one of {KINDS}"),
            ("forcing", forcing in ("fixed", "adaptive", "sparse"), forcing, "'fixed', 'adaptive' or 'sparse'"),
            ("alpha", 0 <= alpha <= 1, alpha, "between 0 and 1"),
            ("relus", relus >= 0, relus, "at least 0"),
            ("window", window >= 1, window, "at least 1"),
            ("updates", updates >= 1, updates, "at least 1"),
            ("interval", interval >= 1, interval, "at least 1"),
            ("holdout_ratio", 0 < holdout_ratio < 1, holdout_ratio, "between 0 and 1"),
        ):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, got {value!r}")
        self.kind, self.latent, self.hidden, self.relus = kind, latent, hidden, relus
        self.forcing, self.alpha, self.interval = forcing, alpha, interval
        self.window, self.batch_size, self.updates = window, batch_size, updates
        self.learning_rate, self.final_learning_rate = learning_rate, final_learning_rate
        self.input_noise, self.clip = input_noise, clip
        self.learn_reward, self.holdout_ratio = learn_reward, holdout_ratio

    def _build_members(self, spaces: Spaces) -> None:
        d, a = spaces.obs_dim, spaces.action_dim
        m = d if self.latent is None else self.latent
        if m < d or (self.kind == "almost-linear" and self.relus > m):
            raise ValueError(f"latent must be at least the {d} observation columns and the {self.relus} relus, got {m}")
        self.diagonal = nn.Parameter(torch.zeros(m))
        self.bias = nn.Parameter(torch.zeros(m))
        self.drive = nn.Parameter(torch.zeros(m, a))
        self.start = nn.Parameter(torch.zeros(m - d, d))
        if self.kind == "almost-linear":
            self.mixing = nn.Parameter(torch.zeros(m, m))
        else:
            self.outer = nn.Parameter(torch.zeros(m, self.hidden))
            self.inner = nn.Parameter(torch.zeros(self.hidden, m))
            self.threshold = nn.Parameter(torch.zeros(self.hidden))
            self.gate = nn.Parameter(torch.zeros(self.hidden, a))
        if self.learn_reward:
            self.reward_readout = nn.Parameter(torch.zeros(m, 1))
            self.reward_bias = nn.Parameter(torch.zeros(1))
        rectified = torch.arange(m) >= m - self.relus
        self.register_buffer("rectified", rectified, persistent=False)
        for name, width in (("obs", d), ("action", a), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    def _initialise(self, rng: torch.Generator) -> None:
        m = len(self.diagonal)
        root = torch.randn(m, m, generator=rng, device=rng.device)
        matrix = root.T @ root / m + torch.eye(m, device=root.device)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.diagonal.copy_((matrix / torch.linalg.matrix_norm(matrix, ord=2)).diagonal())
            if self.kind == "almost-linear":
                self.mixing.copy_(0.01 * torch.randn(m, m, generator=rng, device=rng.device))
                self.mixing.fill_diagonal_(0.0)
            else:
                _uniform(self.outer, self.hidden**-0.5, rng)
                _uniform(self.inner, m**-0.5, rng)
                _uniform(self.gate, m**-0.5, rng)
                if self.kind == "clipped":
                    _uniform(self.threshold, self.hidden**-0.5, rng)
            _uniform(self.start, self.start.shape[1] ** -0.5, rng)

    def begin(self, obs: Float[Tensor, "b d"]) -> Float[Tensor, "b m"] | None:
        """Return the memory of an episode that starts at ``obs``; None where there are no hidden units."""
        return self.embed((obs - self.obs_mean) / self.obs_std) if len(self.start) else None

    def embed(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b m"]:
        """Return the latent state of an episode that starts at a standardised observation."""
        return torch.cat([x, x @ self.start.T], dim=1)

    def advance(self, z: Float[Tensor, "b m"], u: Float[Tensor, "b a"]) -> Float[Tensor, "b m"]:
        """Return the next latent state under a standardised input."""
        linear = torch.addmm(z * self.diagonal + self.bias, u, self.drive.T)
        if self.kind == "almost-linear":
            return torch.addmm(linear, torch.where(self.rectified, z.relu(), z), self.mixing.T)
        inner = z @ self.inner.T
        active = torch.addmm(inner + self.threshold, u, self.gate.T).relu()
        return torch.addmm(linear, active - inner.relu() if self.kind == "clipped" else active, self.outer.T)

    def observe(self, z: Float[Tensor, "b m"]) -> Float[Tensor, "b q"]:
        """Return the standardised observation that a latent state shows, and the reward if there is a head."""
        seen = z[:, : len(self.obs_mean)]
        return torch.cat([seen, z @ self.reward_readout + self.reward_bias], dim=1) if self.learn_reward else seen

    def force(self, z: Float[Tensor, "b m"], x: Float[Tensor, "b d"], alpha: float) -> Float[Tensor, "b m"]:
        """Return the state with its observed units moved towards x by the share alpha."""
        d = x.shape[1]
        return torch.cat([z[:, :d] + alpha * (x - z[:, :d]), z[:, d:]], dim=1)

    def unroll(
        self, x: Float[Tensor, "b t d"], u: Float[Tensor, "b t a"], alphas: Sequence[float]
    ) -> Float[Tensor, "b t m"]:
        """Return the states after every step, before they are forced (`learneddyn.models.unrolled`)."""
        if len(self.start) == 0 and all(alpha == 1 for alpha in alphas[1:]):  # every step begins at the data
            return self.advance(x.flatten(0, 1), u.flatten(0, 1)).view_as(x)
        x, u = x.transpose(0, 1), u.transpose(0, 1)
        drive = u @ self.drive.T + self.bias
        start = self.embed(x[0])
        if self.kind == "almost-linear":
            states = unrolled(start, x, drive, self.diagonal, self.mixing, alphas, rectified=self.rectified)
        else:
            gate, clipped = u @ self.gate.T + self.threshold, self.kind == "clipped"
            parts = (start, x, drive, self.diagonal, self.outer, alphas)
            states = unrolled(*parts, inner=self.inner, gate=gate, clipped=clipped)
        return states.transpose(0, 1)

    def regions(self, z: Float[Tensor, "b m"], u: Float[Tensor, "b a"]) -> Bool[Tensor, "b r"]:
        """Return which rectified units are on: the linear region of every state, one bit per unit."""
        if self.kind == "almost-linear":
            return z[:, self.rectified] > 0
        on = torch.addmm(z @ self.inner.T + self.threshold, u, self.gate.T) > 0
        return torch.cat([on, z @ self.inner.T > 0], dim=1) if self.kind == "clipped" else on

    def _every(self, obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], memory: Tensor | None) -> Answer:
        x = (obs - self.obs_mean) / self.obs_std
        z = self.embed(x) if memory is None else self.force(memory, x, 1.0)
        u = (action - self.action_mean) / self.action_std
        after = self.advance(z, u)
        scale, shift = self.obs_std, self.obs_mean
        if self.learn_reward:
            scale, shift = torch.cat([scale, self.reward_std]), torch.cat([shift, self.reward_mean])
        return Answer((self.observe(after) * scale + shift)[None], after if len(self.start) else None)

    def _held_out(self, rows: int, count: int, rng: torch.Generator) -> Tensor:
        """Return the last rows: neighbours of a held-out row in time would give it away."""
        return torch.arange(rows - count, rows, device=rng.device)

    def _learn(
        self, data: Transitions, rows: Bool[Tensor, " n"], rng: torch.Generator, progress: bool
    ) -> list[dict[str, float]]:
        train, test = data[rows], data[~rows]
        for name, column in (("obs", train.obs), ("action", train.action), ("reward", train.reward[:, None])):
            getattr(self, f"{name}_mean").copy_(column.mean(dim=0))
            getattr(self, f"{name}_std").copy_(spread(column))
        self._initialise(rng)
        window = longest_window(train, self.window)
        starts, judged = (window_starts(part, window) for part in (train, test))
        parts = [self._sequences(part) for part in (train, test)]
        watched = judged[:: max(1, len(judged) // 64)] if len(judged) else starts[:: max(1, len(starts) // 64)]
        held = parts[1] if len(judged) else parts[0]
        optimizer = torch.optim.RAdam(self.parameters(), self.learning_rate)
        fall = (self.final_learning_rate / self.learning_rate) ** (1 / self.updates)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, fall)
        adaptive = AdaptiveForcing(0.02 ** (5 / self.updates), start=self.alpha) if self.forcing == "adaptive" else None
        best, kept, history = torch.inf, {}, []
        bar = tqdm(range(self.updates), desc="PLRNN", disable=not progress)
        for update in bar:
            chosen = torch.randint(len(starts), (self.batch_size,), generator=rng, device=starts.device)
            x, u, target = (windows(part, starts[chosen], window) for part in parts[0])
            if self.input_noise:
                x = x + self.input_noise * torch.randn(x.shape, generator=rng, device=x.device)
            alpha = adaptive.update(self, x, u) if adaptive else 1.0 if self.forcing == "sparse" else self.alpha
            loss = self._loss(x, u, target, alpha)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            optimizer.step()
            schedule.step()
            if (update + 1) % max(1, self.updates // 20) == 0 or update + 1 == self.updates:
                x, u, target = (windows(part, watched, window) for part in held)
                with torch.no_grad():
                    score = float(self._loss(x, u, target, 0.0))
                history.append({"epoch": float(update + 1), "loss": loss.item(), "free_run": score, "alpha": alpha})
                bar.set_postfix(loss=loss.item(), free_run=score)
                if score < best:
                    best, kept = score, {name: p.detach().clone() for name, p in self.named_parameters()}
        if not kept:
            raise FloatingPointError(f"no free run of {window} steps stayed finite: raise alpha or lower the rate")
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(kept[name])
        return history

    def _loss(self, x: Tensor, u: Tensor, target: Tensor, alpha: float) -> Tensor:
        every = self.interval if self.forcing == "sparse" and alpha else 1
        return forced_loss(self, x, u, target, alpha, every=every)

    def _sequences(self, data: Transitions) -> tuple[Tensor, Tensor, Tensor]:
        """Return standardised observations, inputs, and what `observe` should say after each step."""
        x, after = ((part - self.obs_mean) / self.obs_std for part in (data.obs, data.next_obs))
        u = (data.action - self.action_mean) / self.action_std
        if self.learn_reward:
            after = torch.cat([after, (data.reward[:, None] - self.reward_mean) / self.reward_std], dim=1)
        return x, u, after

    # Declared for type checkers; `_build_members` registers them.
    rectified: Tensor
    obs_mean: Tensor
    obs_std: Tensor
    action_mean: Tensor
    action_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor


def _uniform(parameter: Tensor, bound: float, rng: torch.Generator) -> None:
    nn.init.uniform_(parameter, -bound, bound, generator=rng)
