"""HyperCRL: a hypernetwork generates the dynamics network of every task from the task's embedding.

Source: Huang, Xie, Bharadhwaj, Shkurti, "Continual Model-Based Reinforcement Learning with Hypernetworks" (2021); the
regulariser is the one of von Oswald, Henning, Grewe, Sacramento, "Continual learning with hypernetworks" (2020).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from learneddyn.models.continual import AbstractContinual, Step, TaskState, check_arguments


class Hypernetwork:
    """Map the embeddings of tasks to all weights of their networks, as a function of one flat parameter vector.

    The vector is an argument, so that the regulariser can ask about one that a step would lead to. In full form an MLP
    with ReLU gives all outputs at once. In chunked form it gives ``chunk`` of them, for the embedding beside a learned
    code of the chunk, which tasks share; what the last chunk has too much is cut off.

    Args:
        inputs: width of an embedding.
        outputs: weights of the generated network.
        hidden: widths of the MLP's hidden layers.
        chunk: outputs per chunk; None is the full form.
        code: width of a chunk's code.
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int], chunk: int | None = None, code: int = 20
    ) -> None:
        self.outputs, self.chunk = outputs, chunk
        self.chunks = 1 if chunk is None else math.ceil(outputs / chunk)
        self.code = 0 if chunk is None else code
        self.shapes = list(pairwise([inputs + self.code, *hidden, outputs if chunk is None else chunk]))
        self._sizes = [self.chunks * self.code, *(size for i, j in self.shapes for size in (i * j, j))]

    @property
    def size(self) -> int:
        """Length of the parameter vector."""
        return sum(self._sizes)

    def initial(self, rng: torch.Generator) -> Float[Tensor, " p"]:
        """Draw a parameter vector: codes from N(0, 1), Xavier's uniform weights, biases of zero."""
        parts = [torch.randn(self._sizes[0], generator=rng, device=rng.device)]
        for i, j in self.shapes:
            weight = torch.empty(i, j, device=rng.device)
            nn.init.xavier_uniform_(weight, generator=rng)
            parts += [weight.flatten(), torch.zeros(j, device=rng.device)]
        return torch.cat(parts)

    def __call__(self, theta: Float[Tensor, " p"], embedding: Float[Tensor, "t d"]) -> Float[Tensor, "t w"]:
        """Return the flat weights of every task's network."""
        codes, *layers = theta.split(self._sizes)
        x, tasks = embedding, len(embedding)
        if self.chunk is not None:
            beside = codes.view(1, self.chunks, self.code).expand(tasks, -1, -1)
            x = torch.cat([embedding[:, None].expand(-1, self.chunks, -1), beside], dim=2).flatten(0, 1)
        for layer, (i, j) in enumerate(self.shapes):
            x = torch.addmm(layers[2 * layer + 1], x if layer == 0 else x.relu(), layers[2 * layer].view(i, j))
        return x.view(tasks, -1)[:, : self.outputs]


class HyperCRL(AbstractContinual):
    """Dynamics of many tasks in a hypernetwork that does not forget, without the data of earlier tasks.

    A task trains its embedding and the hypernetwork's vector Theta; embeddings of earlier tasks stay. From the second
    task on, ``beta * mean_i |h(e_i, Theta*) - h(e_i, Theta + DeltaTheta)|^2`` over earlier tasks i keeps the weights
    generated for them where they were when the task began (Theta*), with DeltaTheta the step that Adam would make for
    the task's loss alone, taken as a constant. The memory needed is that of Theta, of Theta* and of the embeddings,
    normalisers and variances of the tasks.

    Deviations: losses are means over a batch where the source's are sums, and so is the regulariser (its factor
    ``beta * rows`` becomes ``beta``), which changes nothing for Adam but the meaning of ``clip``; the source clips a
    gradient 100 times as large at 5. The dynamics network has SiLU instead of ReLU.

    Args:
        embedding: width of a task's embedding.
        hyper_hidden: widths of the hypernetwork's hidden layers.
        chunk: weights generated at a time; None is the full form, see `Hypernetwork`.
        code: width of a chunk's code.
        beta: strength of the regulariser; 0 forgets.
        lookahead: regularise the vector that the task's own step would lead to; False takes DeltaTheta = 0.
        clip: largest norm of Theta's gradient.
        hidden: see `AbstractContinual` for this and the other arguments.
        head: "gaussian" or "deterministic".
        angles: observation columns in radians.
        learn_reward: add a reward head.
        learn_termination: add a termination head.
        updates: of one call of `fit_task`.
        batch_size: rows per update.
        learning_rate: of Adam, for Theta and the embedding alike (the source: 1e-4).
        holdout_ratio: share of the rows held out.

    Raises:
        ValueError: an argument outside its range (names it, the value, what is allowed).
    """

    def __init__(
        self,
        embedding: int = 10,
        hyper_hidden: Sequence[int] = (16, 16),
        chunk: int | None = None,
        code: int = 20,
        beta: float = 0.05,
        lookahead: bool = True,
        clip: float = 5.0,
        hidden: Sequence[int] = (64, 64),
        head: str = "deterministic",
        angles: Sequence[int] = (),
        learn_reward: bool = False,
        learn_termination: bool = False,
        updates: int = 2000,
        batch_size: int = 100,
        learning_rate: float = 1e-3,
        holdout_ratio: float = 0.2,
    ) -> None:
        super().__init__(
            hidden, head, angles, learn_reward, learn_termination, updates, batch_size, learning_rate, holdout_ratio
        )
        check_arguments(
            ("embedding", embedding >= 1, embedding, "at least 1"),
            ("hyper_hidden", all(width >= 1 for width in hyper_hidden), hyper_hidden, "positive widths"),
            ("chunk", chunk is None or chunk >= 1, chunk, "None or at least 1"),
            ("code", code >= 1, code, "at least 1"),
            ("beta", beta >= 0, beta, "at least 0"),
            ("clip", clip > 0, clip, "positive"),
        )
        self.embedding, self.hyper_hidden, self.chunk, self.code = embedding, list(hyper_hidden), chunk, code
        self.beta, self.lookahead, self.clip = beta, lookahead, clip

    def _build_shared(self) -> None:
        outputs = sum(self.weight_sizes)
        self.hypernetwork = Hypernetwork(self.embedding, outputs, self.hyper_hidden, self.chunk, self.code)
        self.theta = nn.Parameter(torch.zeros(self.hypernetwork.size))
        self.register_buffer("theta_before", torch.zeros(self.hypernetwork.size))

    def _initialise(self, rng: torch.Generator) -> None:
        with torch.no_grad():
            self.theta.copy_(self.hypernetwork.initial(rng))

    def _new_task(self, rng: torch.Generator | None) -> TaskState:
        self.theta_before.copy_(self.theta.detach())
        vector = self.theta.new_zeros(self.embedding)
        drawn = vector if rng is None else torch.randn(self.embedding, generator=rng, device=rng.device)
        return TaskState(drawn, self._template[0].network, self.head == "gaussian")

    def _weights(self, task: int) -> Float[Tensor, " w"]:
        return self.hypernetwork(self.theta, self.state(task).vector[None])[0]

    def drift(self, theta: Float[Tensor, " p"], task: int) -> Float[Tensor, ""]:
        """Return the mean squared distance that ``theta`` moves the weights of tasks before ``task``, times beta."""
        return self._drift(theta, *self._kept(task))

    @torch.no_grad()
    def _kept(self, task: int) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t w"]]:
        """Return the embeddings of the tasks before ``task``, and the weights they had when it began."""
        past = torch.stack([self.state(k).vector for k in range(task)])
        return past, self.hypernetwork(self.theta_before, past)

    def _drift(self, theta: Tensor, past: Float[Tensor, "t d"], kept: Float[Tensor, "t w"]) -> Float[Tensor, ""]:
        return self.beta * (self.hypernetwork(theta, past) - kept).square().sum(dim=1).mean()

    def _steps(self, task: int, rng: torch.Generator) -> Step:
        parameters = [self.theta, *self.state(task).trained()]
        optimizer = torch.optim.Adam(parameters, self.learning_rate, fused=True)
        kept = self._kept(task) if task and self.beta else None

        def step(batch: Float[Tensor, "b r"]) -> Float[Tensor, ""]:
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(task, self._weights(task), batch)
            loss.backward()
            if kept is not None:
                ahead = adam_change(optimizer, self.theta) if self.lookahead else 0.0
                self._drift(self.theta + ahead, *kept).backward()
            nn.utils.clip_grad_norm_(self.theta, self.clip)
            optimizer.step()
            return loss.detach()

        return step

    # Declared for type checkers; `_build_shared` registers it.
    theta_before: Tensor


@torch.no_grad()
def adam_change(optimizer: torch.optim.Adam, parameter: nn.Parameter) -> Tensor:
    """Return by how much ``optimizer.step()`` would change a parameter of its first group, with the gradient at hand.

    Raises:
        ValueError: the parameter has no gradient.
    """
    if parameter.grad is None:
        raise ValueError("the parameter has no gradient: call backward() first")
    group, state = optimizer.param_groups[0], optimizer.state.get(parameter, {})
    one, two = group["betas"]
    step = 1.0 + float(state["step"]) if state else 1.0
    first, second = (state[name] if state else torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq"))
    first = first.lerp(parameter.grad, 1.0 - one) / (1.0 - one**step)
    second = second.mul(two).addcmul_(parameter.grad, parameter.grad, value=1.0 - two) / (1.0 - two**step)
    return first.div_(second.sqrt_().add_(group["eps"])).mul_(-group["lr"])
