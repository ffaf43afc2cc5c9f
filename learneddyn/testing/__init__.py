"""Contracts that every dynamics model, world, planner and policy keeps, ours and yours.

They are to this package what check_estimator is to scikit-learn::

    from learneddyn.testing import check_dynamics

    def test_my_model():
        check_dynamics(lambda: MyModel(hidden=16))

A check returns None, or raises `ContractError` with the contract that was broken and what was seen instead.
"""

from learneddyn.testing.contract import ContractError
from learneddyn.testing.dynamics import check_dynamics, example_transitions
from learneddyn.testing.planner import check_planner
from learneddyn.testing.policy import check_policy
from learneddyn.testing.world import check_world

__all__ = ["ContractError", "check_dynamics", "check_planner", "check_policy", "check_world", "example_transitions"]
