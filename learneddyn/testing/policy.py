"""Contracts of a policy: SB3's ``predict``, on one observation and on batches."""

from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.vector.utils import batch_space, iterate

from learneddyn.core import Policy
from learneddyn.spaces import Spaces
from learneddyn.testing.contract import Contracts, random_batch

LANES = 5


def check_policy(policy: Policy, spaces: Spaces) -> None:
    """Check a policy on random observations of its space.

    Args:
        policy: what to check; every SB3 algorithm is one.
        spaces: the observations it reads and the actions it gives.

    Raises:
        ContractError: a contract is broken.
    """
    contracts = Contracts(type(policy).__name__)
    batch: Any = random_batch(spaces.observation, LANES)
    before = deepcopy(batch)
    answer = policy.predict(batch, deterministic=True)
    pair = isinstance(answer, tuple) and len(answer) == 2
    contracts.holds(pair, "predict returns (action, state), as SB3 does", type(answer))
    contracts.holds(_same(before, batch), "predict leaves its observation alone", "a changed observation")
    actions, want = np.asarray(answer[0]), (LANES, *(spaces.action.shape or ()))
    contracts.holds(actions.shape == want, f"a batch of observations gives actions {want}", actions.shape)
    for action in iterate(batch_space(spaces.action, LANES), actions):
        inside = spaces.action.contains(np.asarray(action, spaces.action.dtype))
        contracts.holds(inside, f"actions lie in {spaces.action}", action)
    again, _ = policy.predict(batch, deterministic=True)
    contracts.holds(np.array_equal(actions, again), "deterministic=True gives one answer", "two answers")
    for lane, obs in enumerate(iterate(batch_space(spaces.observation, LANES), batch)):
        alone, _ = policy.predict(obs, deterministic=True)
        same = np.shape(alone) == want[1:] and np.allclose(alone, actions[lane], rtol=1e-4, atol=1e-5)
        contracts.holds(same, "one observation is answered as in a batch", f"{alone} alone, {actions[lane]} in a batch")
    drawn, _ = policy.predict(batch, state=answer[1], episode_start=np.ones(LANES, bool), deterministic=False)
    contracts.holds(np.shape(drawn) == want, f"deterministic=False gives actions {want} too", np.shape(drawn))


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(one[key], two[key]) for key in one)
    if isinstance(one, tuple):
        return all(map(_same, one, two))
    return np.array_equal(one, two)
