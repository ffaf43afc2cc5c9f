"""The gradients derived by hand are autograd's."""

import pytest
import torch

from learneddyn.core import generator
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.models.gradients import Gradients
from learneddyn.testing import example_transitions

OPTIONS = [{}, {"learn_reward": True, "learn_termination": True, "angles": (1,), "scale_targets": True}]


def built(seed=0, **options):
    """Random weights and bounds, one column that counts for nothing, and a packed data set."""
    data, rng = example_transitions(), generator(seed)
    model = ProbabilisticEnsemble(**{"num_members": 3, "num_elites": 2, "hidden": (16, 24)} | options)
    model._build(data.spaces)
    model._initialise(rng)
    model._standardise(data)
    model.learned[1] = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return model, model._pack(data)


def by_hand(model, batch, half=False):
    step = Gradients(list(model.weights), list(model.biases), model.max_logvar, model.min_logvar, model.learned, half)
    x, target, ended = model._unpack(batch)
    return step, step(x, target, ended if model.learn_termination else None)


def by_autograd(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model._loss(batch)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "heads"])
def test_gradients_equal_autograd(options):
    model, packed = built(**options)
    batch = packed[torch.randint(len(packed), (3, 32), generator=generator(1))]
    expected_loss, expected = by_autograd(model, batch)
    _, loss = by_hand(model, batch)
    torch.testing.assert_close(loss, expected_loss, atol=1e-6, rtol=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-5)
    assert model.max_logvar.grad.abs().sum() > 0


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "heads"])
def test_steps_equal_autograd(options):
    """Six batches of unequal size through one object, Adam and weight decay included."""
    ours, packed = built(**options)
    theirs, _ = built(**options)
    step, optimizers = None, [ours._optimizer(), theirs._optimizer()]
    for size in (32, 32, 7, 32, 32, 3):
        batch = packed[torch.randint(len(packed), (3, size), generator=generator(size))]
        if step is None:
            step, _ = by_hand(ours, batch)
        else:
            x, target, ended = ours._unpack(batch)
            step(x, target, ended if ours.learn_termination else None)
        by_autograd(theirs, batch)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Where a gradient is zero but for rounding, Adam turns its sign into a step of the learning rate.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_bf16_gradients_point_the_same_way():
    model, packed = built(hidden=(64, 64), **OPTIONS[1])
    batch = packed[torch.randint(len(packed), (3, 64), generator=generator(1))]
    _, expected = by_autograd(model, batch)
    by_hand(model, batch, half=True)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.995


def test_training_in_bf16_costs_less_than_another_seed_does():
    """Hold-out likelihood over three seeds: the bf16 mean lies within the spread of fp32."""
    data = example_transitions(1500)
    scores = {}
    for precision in ("fp32", "bf16"):
        scores[precision] = []
        for seed in range(3):
            model = ProbabilisticEnsemble(
                3, 2, (64, 64), max_epochs=25, batch_size=64, training_precision=precision, scale_targets=True
            )
            scores[precision].append(model.fit(data, rng=generator(seed)).metrics["holdout_nll"])
    full, half = (torch.tensor(scores[name]) for name in ("fp32", "bf16"))
    assert not torch.equal(full, half)
    assert abs(half.mean() - full.mean()) < full.amax() - full.amin()


def test_fit_leaves_no_gradient_behind():
    model = ProbabilisticEnsemble(2, 1, (8,), weight_decay=0.0, max_epochs=1)
    model.fit(example_transitions(), rng=generator(0))
    assert all(parameter.grad is None for parameter in model.parameters())
