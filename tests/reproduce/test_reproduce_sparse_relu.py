"""The plant of the sparse ReLU experiment: a load moves only at the ends of its play, and costs add up."""

import numpy as np
import torch

from learneddyn.models import SparseReLU
from learneddyn.planners.milp import Solved
from learneddyn.reproduce import sparse_relu


def test_the_load_moves_only_where_the_cart_touches_it():
    obs = torch.tensor([[0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-0.5, -1.0, 0.0], [0.4, 0.0, 0.0]])
    after = sparse_relu.move(obs, torch.zeros(4, 1))
    assert torch.equal(after[[0, 3]], obs[[0, 3]])
    assert torch.allclose(after[1:3, 2], torch.tensor([0.16, -0.16])), "0.2 s at 0.8 m/s, friction included"
    assert ((after[:, 0] - after[:, 2]).abs() <= sparse_relu.GAP + 1e-6).all()


def test_doing_nothing_costs_the_distance_at_every_step():
    def act(obs, state, first):
        return torch.zeros(len(obs), 1), None

    costs, seconds = sparse_relu.closed_loop(act)
    still = sparse_relu.STARTS[:, 2].abs() * sparse_relu.STEPS
    assert torch.allclose(torch.tensor(costs), still, rtol=1e-5)
    assert seconds > 0


def test_a_plan_falls_back_only_where_the_limit_stopped_the_solver(monkeypatch):
    """Three lanes: proven where it began, stopped where it began, and stopped late with a plan of its own."""
    horizon = sparse_relu.HORIZON

    class Planner:
        asked = 0

        def plan(self, obs, warm):
            lane, self.asked = self.asked % 3, self.asked + 1
            actions = warm + 0.1 if lane == 2 else warm
            seconds = 0.6 if lane == 2 else 0.4
            return Solved(actions, np.zeros((horizon, 3)), 1.0, 0.5, lane == 0, 4, seconds)

    monkeypatch.setattr(sparse_relu, "planner", lambda *args: Planner())
    said = sparse_relu.mixed_integer(SparseReLU(), sparse_relu.log(1, 2, 0).spaces, limit=0.5)
    assert np.isclose([said[name] for name in ("stopped", "fallback", "late")], [2 / 3, 1 / 3, 1 / 3]).all()
    assert np.isclose(said["longest"], 1.2)
