"""Fitted Q evaluation: what a policy would earn, from a log that other policies wrote.

A critic of the policy under test is regressed on the log, next actions being the policy's own:

    L_i = mean (Q_i(s, a) - clip[r + γ (1 - d) Q̄_i(s', π(s'))])²        over the member's own bootstrap of episodes
    value = mean over members and start states of Q̄_i(s_0, π(s_0))

Source: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", 2019, with the slow target net that later work
uses; the interval follows Hao, Ji, Duan, Lu, Szepesvári, Wang, "Bootstrapping Fitted Q-Evaluation for Off-Policy
Inference", 2021 (episodes are resampled, one member for each resample), and resamples start states as well. Deviation:
targets are clipped to what rewards between the least and the largest logged one can add up to, which keeps a critic of
a policy far from the data from diverging (it does not make it right).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from learneddyn.core import DataError, Json, Policy, Transitions, generator
from learneddyn.evaluation.stats import Estimate, crossed_interval
from learneddyn.models.nets import BatchedMLP
from learneddyn.offline.base import Diverged
from learneddyn.offline.dataset import bounds, check, scaled
from learneddyn.offline.policy import Normaliser
from learneddyn.spaces import Spaces, decode, encode

_CHUNK = 16_384


@dataclass(frozen=True)
class PolicyValue:
    """The discounted return of a policy, as a log tells it.

    ``value`` has an interval over members and start states: what the log leaves open, not the error of the method.
    ``values`` holds every member's value of every start state. ``residual`` is the mean of target minus value on the
    log; the value is still off by about ``residual / (1 - gamma)`` where it is not small: use more updates.
    """

    value: Estimate
    values: Float[np.ndarray, "e m"]
    residual: float
    gamma: float

    def to_json(self) -> Json:
        """Return a plain dictionary."""
        return {"value": self.value.to_json(), "residual": self.residual, "gamma": self.gamma}


def fqe(
    policy: Policy,
    data: Transitions,
    *,
    gamma: float = 0.99,
    start: Float[Tensor, "m o"] | None = None,
    members: int = 5,
    hidden: Sequence[int] = (128, 128),
    updates: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    tau: float = 0.05,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> PolicyValue:
    """Return the discounted return that the log gives a deterministic, memoryless policy.

    The policy is asked once about every next state and every start state, then only the critics run. One seed gives all
    policies the same bootstraps and batches, so that their values can be compared.

    Args:
        policy: anything with SB3's ``predict``; its deterministic action is judged.
        data: the log, on the device that shall do the work.
        gamma: discount, below 1.
        start: flat start observations; None takes the first of every logged episode.
        members: critics, each on its own bootstrap of the episodes.
        hidden: widths of a critic's hidden layers.
        updates: gradient steps; the level of the values needs a few times ``1 / (tau (1 - gamma))``.
        batch_size: rows per member and update.
        learning_rate: of Adam.
        tau: share by which the target nets follow at each update.
        level: nominal coverage of the interval.
        seed: of everything.
        progress: show a bar.

    Raises:
        DataError: data that cannot be learned from (see `learneddyn.offline.dataset.read`), or whose rewards are all 0.
        Diverged: the critics' loss is not finite.
        ValueError: an argument outside its range, a policy with memory, or one whose actions are not finite.
    """
    for name, ok, given, allowed in (
        ("gamma", 0 <= gamma < 1, gamma, "in [0, 1)"),
        ("members", members >= 1, members, "at least 1"),
        ("updates", updates >= 1, updates, "at least 1"),
        ("tau", 0 < tau <= 1, tau, "in (0, 1]"),
    ):
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {given!r}")
    spaces = check(data, rewards=False).spaces
    assert spaces is not None
    size = float(data.reward.abs().mean())
    if size == 0:
        raise DataError("all rewards of the log are 0: every policy is worth 0 there")
    rng = generator(seed, data.device)
    unit = size / (1 - gamma)  # values of order 1, whatever the rewards
    first = data.obs[data.positions() == 0] if start is None else start.to(data.device)
    logged, normaliser = scaled(data), Normaliser(data.obs.shape[1]).to(data.device)
    normaliser.fit(data.obs)
    now = torch.cat((normaliser(data.obs), logged.action), 1)
    after = torch.cat((normaliser(data.next_obs), chosen(policy, data.next_obs, spaces)), 1)
    begin = torch.cat((normaliser(first), chosen(policy, first, spaces)), 1)
    reward, goes_on = data.reward / unit, gamma * (1 - data.terminated.float())
    worst, best = float(reward.min()), float(reward.max())
    low, high = min(worst, worst / (1 - gamma)), max(best, best / (1 - gamma))

    nets = [BatchedMLP(members, (now.shape[1], *hidden, 1), rng=generator(seed)).to(data.device) for _ in range(2)]
    critic, target = nets
    target.requires_grad_(False)
    weights: list[Tensor] = [*critic.parameters()]
    followers: list[Tensor] = [*target.parameters()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate, fused=True)
    rows, lengths = bootstrapped_rows(data, members, rng)
    loss = torch.zeros(())
    for _ in tqdm(range(updates), desc="fqe", unit="update", disable=not progress):
        draw = torch.rand(members, batch_size, generator=rng, device=data.device)
        batch = rows.gather(1, (draw * lengths[:, None]).long())
        with torch.no_grad():
            wanted = (reward[batch] + goes_on[batch] * target(after[batch])[..., 0]).clamp(low, high)
        loss = (critic(now[batch])[..., 0] - wanted).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(followers, weights, tau)
    if not bool(loss.isfinite()):
        raise Diverged(f"fitted Q evaluation diverged within {updates} updates; lower learning_rate")
    with torch.no_grad():
        wanted = (reward + goes_on * _all(target, after)).clamp(low, high)
        residual = float((wanted - _all(target, now)).mean() * unit)
        values = (_all(target, begin) * unit).double().cpu().numpy()
    return PolicyValue(crossed_interval(values, level=level, seed=seed), values, residual, gamma)


def chosen(policy: Policy, obs: Float[Tensor, "n o"], spaces: Spaces) -> Float[Tensor, "n a"]:
    """Return a policy's deterministic actions, scaled from their box to [-1, 1].

    Raises:
        ValueError: an action is not finite, or the policy keeps a memory, which single rows cannot give it.
    """
    parts = []
    for part in obs.split(_CHUNK):
        observation = decode(spaces.observation, part.cpu().numpy())
        actions, memory = policy.predict(observation, None, np.ones(len(part), bool), True)
        if memory is not None:
            raise ValueError(
                f"{type(policy).__name__} remembers earlier steps, which the rows of a log do not bring back: judge it "
                "by return_in_model or in the real environment"
            )
        parts.append(torch.as_tensor(encode(spaces.action, actions), device=obs.device))
    action = torch.cat(parts)
    if not bool(action.isfinite().all()):
        raise ValueError(f"{type(policy).__name__} returned actions that are not finite")
    low, high = bounds(spaces.action, obs.device)
    return ((action - low) / (high - low) * 2 - 1).clamp(-1, 1)


def bootstrapped_rows(
    data: Transitions, members: int, rng: torch.Generator
) -> tuple[Int[Tensor, "e r"], Int[Tensor, " e"]]:
    """Return every member's rows, those of as many episodes as there are, drawn with replacement; and their number.

    The first member has all rows, each once. Entries beyond a member's number are 0 and not to be used.
    """
    counts = torch.unique_consecutive(data.episode, return_counts=True)[1]
    begins = counts.cumsum(0) - counts
    episodes = torch.randint(len(counts), (members, len(counts)), generator=rng, device=data.device)
    episodes[0] = torch.arange(len(counts), device=data.device)
    pools = []
    for drawn in episodes:
        length = counts[drawn]
        # Row r of the pool is row r - (rows of the episodes before) of its episode.
        shift = (begins[drawn] - (length.cumsum(0) - length)).repeat_interleave(length)
        pools.append(torch.arange(len(shift), device=data.device) + shift)
    lengths = torch.tensor([len(pool) for pool in pools], device=data.device)
    return torch.nn.utils.rnn.pad_sequence(pools, batch_first=True), lengths


def _all(net: BatchedMLP, x: Float[Tensor, "n w"]) -> Float[Tensor, "e n"]:
    return torch.cat([net(part)[..., 0] for part in x.split(_CHUNK)], 1)
