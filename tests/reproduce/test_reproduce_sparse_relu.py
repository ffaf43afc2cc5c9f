"""The plant of the sparse ReLU experiment: a load moves only at the ends of its play, and costs add up."""

import torch

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
