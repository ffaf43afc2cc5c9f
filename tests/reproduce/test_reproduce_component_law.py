"""The equations of the component law's experiment are MuJoCo's, once they are told the joints' resistance."""

import torch

from learneddyn.reproduce import component_law


def test_with_the_true_resistance_the_equations_are_the_real_environment():
    data = component_law.log(10, 0)
    damping = torch.tensor(component_law.measures().damping)
    said = component_law.cart_pole(data.obs.double(), data.action.double(), lambda speed: -damping * speed)
    assert (said - data.next_obs).abs().max() < 1e-4
    alone = component_law.frictionless(data.obs.double(), data.action.double())
    assert (alone - data.next_obs).abs().max() > 1e-2


def test_a_log_is_runs_of_equal_length():
    data = component_law.log(7, 1)
    assert data.episode.bincount().tolist() == [component_law.STEPS] * 7
    assert torch.equal(data.obs[1], data.next_obs[0])
    assert data.obs[:, :2].abs().max() < 1.5
