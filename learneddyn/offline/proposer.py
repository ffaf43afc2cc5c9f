"""Feasible futures, fast: nets that continue a history of states and returns to go, one state after the other."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from learneddyn.offline.generative import sinusoids


@contextmanager
def start_weights(rng: torch.Generator) -> Iterator[None]:
    """Let torch's modules, whose start weights come from the global generator, take them from ``rng``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=rng)))
        yield


def masked_mean(error: Float[Tensor, "b l"], known: Bool[Tensor, "b l"]) -> Float[Tensor, ""]:
    """Return the mean over known entries; one at least is known."""
    return (error * known).sum() / known.sum()


class Proposer(nn.Module, ABC):
    """Predict the next state and return to go at every position from the positions up to it, as changes.

    Args:
        width: of the two heads' hidden layers.
        features: columns that `read` returns.
        state_dim: columns of a state.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, features: int, width: int, state_dim: int) -> None:
        super().__init__()
        self.state_head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, state_dim))
        self.return_head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1))

    @abstractmethod
    def read(self, states: Float[Tensor, "b l s"], returns: Float[Tensor, "b l"]) -> Float[Tensor, "b l f"]:
        """Return features of every position; none knows of a later one."""

    def forward(
        self, states: Float[Tensor, "b l s"], returns: Float[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b l s"], Float[Tensor, "b l"]]:
        """Return what follows each position: state and return to go."""
        return self.ahead(self.read(states, returns), states, returns)

    def ahead(
        self, features: Float[Tensor, "b l f"], states: Float[Tensor, "b l s"], returns: Float[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b l s"], Float[Tensor, "b l"]]:
        """Return what follows each position, given its features."""
        return states + self.state_head(features), returns + self.return_head(features)[..., 0]

    def loss(
        self, states: Float[Tensor, "b h s"], returns: Float[Tensor, "b h"], known: Bool[Tensor, "b h"]
    ) -> Float[Tensor, ""]:
        """Return the mean squared error of both heads over known positions, each told the true ones before it."""
        state, following = self(states[:, :-1], returns[:, :-1])
        error = (state - states[:, 1:]).square().mean(2) + (following - returns[:, 1:]).square()
        return masked_mean(error, known[:, 1:])

    def roll(
        self, states: Float[Tensor, "b c s"], returns: Float[Tensor, "b c"], count: Int[Tensor, " b"], steps: int
    ) -> Float[Tensor, "b {steps} s"]:
        """Return the states that follow a history, each predicted from the last c entries.

        Args:
            states: histories from the oldest entry on; what stands behind the first ``count`` entries is not read.
            returns: returns to go of the same entries.
            count: entries of each history, 1 to c.
            steps: states to predict.
        """
        rows, last, plan = torch.arange(len(states), device=states.device), states.shape[1] - 1, []
        for _ in range(steps):
            after, following = (part[rows, count - 1] for part in self(states, returns))
            plan.append(after)
            full = (count > last)[:, None]
            states = torch.where(full[..., None], states.roll(-1, 1), states)
            returns = torch.where(full, returns.roll(-1, 1), returns)
            at = count.clamp(max=last)
            states = states.index_put((rows, at), after)
            returns = returns.index_put((rows, at), following)
            count = at + 1
        return torch.stack(plan, 1)


class TransformerProposer(Proposer):
    """A causal transformer on states beside returns to go, both embedded and laid side by side.

    Args:
        state_dim: columns of a state.
        width: of either embedding; the transformer is twice as wide.
        layers: blocks.
        heads: attention heads.
        rng: of the start weights, on the CPU.
    """

    def __init__(
        self, state_dim: int, width: int = 256, layers: int = 4, heads: int = 4, *, rng: torch.Generator
    ) -> None:
        with start_weights(rng):
            super().__init__(2 * width, width, state_dim)
            self.embed_state, self.embed_return = nn.Linear(state_dim, width), nn.Linear(1, width)
            self.blocks = nn.ModuleList(Block(2 * width, heads) for _ in range(layers))
            self.norm = nn.LayerNorm(2 * width)

    def read(self, states: Float[Tensor, "b l s"], returns: Float[Tensor, "b l"]) -> Float[Tensor, "b l f"]:
        """Return the last block's output."""
        x = torch.cat((self.embed_state(states), self.embed_return(returns[..., None])), 2)
        x = x + sinusoids(torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None], x.shape[2])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Block(nn.Module):
    """Causal self-attention and a feed-forward net of the same width, each after a LayerNorm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"the transformer's width {width} must be divisible by its {heads} heads")
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_attention, self.from_attention = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Float[Tensor, "b l f"]) -> Float[Tensor, "b l f"]:
        """Return the block's output; position i reads positions up to i."""
        rows, length, width = x.shape
        parts = self.to_attention(self.before(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.from_attention(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(self.between(x))


class RecurrentProposer(Proposer):
    """A gated recurrent unit on states and returns to go; a cheaper proposer, one step of the unit per state.

    Its rollouts remember all of the history, where the transformer's forget entry by entry.

    Args:
        state_dim: columns of a state.
        width: of the hidden state.
        rng: of the start weights, on the CPU.
    """

    def __init__(self, state_dim: int, width: int = 256, *, rng: torch.Generator) -> None:
        with start_weights(rng):
            super().__init__(width, width, state_dim)
            self.cell = nn.GRU(state_dim + 1, width, batch_first=True)

    def read(self, states: Float[Tensor, "b l s"], returns: Float[Tensor, "b l"]) -> Float[Tensor, "b l f"]:
        """Return the hidden state after each position."""
        return self.cell(torch.cat((states, returns[..., None]), 2))[0]

    def roll(
        self, states: Float[Tensor, "b c s"], returns: Float[Tensor, "b c"], count: Int[Tensor, " b"], steps: int
    ) -> Float[Tensor, "b {steps} s"]:
        """Return the states that follow a history; see `Proposer`."""
        every, plan = torch.arange(len(states), device=states.device), []
        now, left = (part[every, count - 1][:, None] for part in (states, returns))
        features = self.read(states, returns)[every, count - 1][:, None]
        for step in range(steps):
            if step:
                inputs = torch.cat((now, left[..., None]), 2)
                features, _ = self.cell(inputs, features.transpose(0, 1).contiguous())
            now, left = self.ahead(features, now, left)
            plan.append(now)
        return torch.cat(plan, 1)


PROPOSERS = {"transformer": TransformerProposer, "gru": RecurrentProposer}
