"""Continual models: what is generated, what is kept in place, what the penalties are, and files."""

import copy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import learneddyn.models
from learneddyn.core import DataError, Task, Transitions, generator
from learneddyn.data import collect
from learneddyn.envs import save_world
from learneddyn.models import AbstractContinual, HyperCRL, ModelFileError, MultiHead
from learneddyn.models.hypercrl import Hypernetwork, adam_change
from learneddyn.plants.variants import make_variant
from learneddyn.testing import check_dynamics, check_world, example_transitions
from learneddyn.world import World

METHODS = {
    "hypernetwork": lambda **options: HyperCRL(**options),
    "chunked": lambda **options: HyperCRL(chunk=300, hyper_hidden=(10,), **options),
    "fine-tune": lambda **options: MultiHead(**options),
    "one head": lambda **options: MultiHead(shared_layers=3, **options),
    "single": lambda **options: MultiHead(shared_layers=0, **options),
    "EWC": lambda **options: MultiHead(penalty="ewc", **options),
    "SI": lambda **options: MultiHead(penalty="si", **options),
    "coreset": lambda **options: MultiHead(memory=7, **options),
    "multi-task": lambda **options: MultiHead(memory=None, **options),
}
HEADS = {"learn_reward": True, "learn_termination": True}


@pytest.fixture(scope="module")
def systems():
    """Three systems: the example's, one that moves backwards, and one that moves half as far."""
    first = example_transitions()
    return [replace(first, next_obs=first.obs + gain * (first.next_obs - first.obs)) for gain in (1.0, -1.0, 0.5)]


def trained(method, systems, *, tasks=2, updates=5, **options):
    model = METHODS[method](updates=updates, **options)
    for task in range(tasks):
        model.fit_task(task, systems[task], rng=generator(task))
    return model


def answers(model, data):
    with torch.no_grad():
        return model.predict(data.obs, data.action)


@pytest.mark.parametrize("head", ["gaussian", "deterministic"])
@pytest.mark.parametrize("method", METHODS)
def test_every_task_is_a_dynamics_model(method, head, systems):
    model = trained(method, systems, head=head, **(HEADS if head == "gaussian" else {"angles": [1]}))
    assert model.num_tasks == 2
    for task in (0, 1):
        check_dynamics(model.on(task), systems[task])


def test_a_task_opens_as_a_world(systems):
    model = trained("hypernetwork", systems, **HEADS)
    check_world(World(model.on(0), Task("Example-v0")), systems[0].obs[:6])


def test_a_task_opens_as_an_environment(tmp_path):
    """The sequence is MuJoCo's, the handed-out dynamics a world folder like any other."""
    model = METHODS["hypernetwork"](updates=2)
    for task, length in enumerate((1.0, 2.0)):
        real = make_variant("InvertedPendulum-v5", {"pole": {"length": length}})
        model.fit_task(task, collect(real, steps=40, progress=False), rng=generator(task))
    save_world(tmp_path / "world", model.on(0), task="InvertedPendulum-v5")
    env = gym.make("LearnedDyn-v0", world=str(tmp_path / "world"))
    env.reset(seed=0)
    obs, reward, *_ = env.step(env.action_space.sample())
    assert np.isfinite(obs).all()
    assert np.isfinite(reward)
    env.close()


@pytest.mark.parametrize("method", METHODS)
def test_files_and_going_on(method, systems, tmp_path):
    model = trained(method, systems)
    model.save(tmp_path / "model")
    loaded = AbstractContinual.load(tmp_path / "model")
    assert type(loaded) is type(model)
    for each in (model, loaded):
        each.fit_task(1, systems[1], rng=generator(5))
        each.fit_task(2, systems[2], rng=generator(6))
    for task in range(3):
        for one, two in zip(answers(model.on(task), systems[0]), answers(loaded.on(task), systems[0]), strict=True):
            assert one is two or torch.equal(one, two)


@pytest.mark.parametrize("method", METHODS)
def test_fits_are_reproducible_and_leave_the_global_generator_alone(method, systems):
    before = torch.get_rng_state()
    first, second = (trained(method, systems) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("head", ["gaussian", "deterministic"])
def test_it_learns_each_system_and_the_hypernetwork_remembers(head, systems):
    error = {}
    for method in ("hypernetwork", "fine-tune"):
        model = trained(method, systems, tasks=2, updates=150, head=head, hidden=(32,), batch_size=32)
        predicted = [answers(model.on(task), systems[task]).mean[0] for task in (0, 1)]
        error[method] = [
            float((mean - data.next_obs).square().mean() / (data.next_obs - data.obs).square().mean())
            for mean, data in zip(predicted, systems, strict=False)
        ]
    assert max(error["hypernetwork"]) < 0.25
    assert error["fine-tune"][1] < 0.4
    assert error["fine-tune"][0] > 2 * error["hypernetwork"][0]


def test_the_deterministic_heads_spread_is_the_held_out_error(systems):
    data = systems[0]
    noisy = replace(data, next_obs=data.obs + 0.3 * torch.randn(data.obs.shape, generator=generator(1)))
    model = METHODS["single"](updates=1, learning_rate=1e-9, holdout_ratio=0.5)
    model.fit(noisy, rng=generator(0))
    assert answers(model.on(0), data).std.mean() == pytest.approx(0.3, rel=0.15)
    assert answers(model.on(0), data).std.std(dim=1).max() < 1e-6


# What a hypernetwork generates


@pytest.mark.parametrize(("outputs", "chunk", "chunks"), [(37, None, 1), (37, 10, 4), (40, 10, 4), (37, 50, 1)])
def test_chunks_cover_exactly_the_networks_weights(outputs, chunk, chunks):
    net = Hypernetwork(3, outputs, [5], chunk, code=2)
    theta, embedding = net.initial(generator(0)), torch.randn(4, 3, generator=generator(1))
    assert net.chunks == chunks
    assert theta.shape == (net.size,)
    weights = net(theta, embedding)
    assert weights.shape == (4, outputs)
    for task in range(4):
        torch.testing.assert_close(net(theta, embedding[task : task + 1])[0], weights[task])
    # By hand: the MLP on (embedding, code of the chunk), chunk after chunk.
    width, codes = (chunk or outputs), theta[: chunks * 2].view(chunks, 2) if chunk else theta.new_zeros(1, 0)
    wide = 3 + codes.shape[1]
    one, bias, two, last = theta[codes.numel() :].split([wide * 5, 5, 5 * width, width])
    parts = [
        (torch.cat([embedding[2], code]) @ one.view(wide, 5) + bias).relu() @ two.view(5, width) + last
        for code in codes
    ]
    torch.testing.assert_close(weights[2], torch.cat(parts)[:outputs])


@pytest.mark.parametrize("method", ["hypernetwork", "chunked"])
@pytest.mark.parametrize("head", ["gaussian", "deterministic"])
def test_the_hypernetwork_generates_exactly_the_dynamics_network(method, head, systems):
    model = trained(method, systems, head=head, **HEADS)
    network = model.on(1)
    count = sum(tensor.numel() for tensor in (*network.weights, *network.biases))
    constant = 0 if head == "gaussian" else len(network.max_logvar) * (network.weights[-1].shape[1] + 1)
    assert model._weights(1).shape == (count - constant,)


def test_moving_one_embedding_moves_that_task_only(systems):
    model = trained("hypernetwork", systems)
    before = [answers(model.on(task), systems[0]).mean for task in (0, 1)]
    with torch.no_grad():
        model.state(1).vector += 0.5
    after = [answers(model.on(task), systems[0]).mean for task in (0, 1)]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_what_was_handed_out_does_not_change(systems):
    model = trained("hypernetwork", systems)
    handed, before = model.on(0), answers(model.on(0), systems[0]).mean
    model.fit_task(1, systems[1], rng=generator(3))
    assert torch.equal(answers(handed, systems[0]).mean, before)


# The output regulariser


def test_the_regulariser_is_zero_until_theta_moves(systems):
    model = METHODS["chunked"](updates=3)
    for task in (0, 1):
        model.fit_task(task, systems[task], rng=generator(task))
    model._tasks.append(model._new_task(generator(2)))  # the third task begins
    still, moved = model.theta.detach(), model.theta.detach() + 0.01
    assert float(model.drift(still, 2)) == 0.0
    assert float(model.drift(moved, 2)) > 0
    # By hand: beta times the mean over tasks of the squared distance of all weights.
    embeddings = torch.stack([model.state(task).vector for task in (0, 1)]).detach()
    shift = model.hypernetwork(moved, embeddings) - model.hypernetwork(still, embeddings)
    assert float(model.drift(moved, 2)) == pytest.approx(float(0.05 * shift.square().sum() / 2), rel=1e-4)


def test_the_regulariser_asks_nothing_of_earlier_embeddings(systems):
    model = trained("hypernetwork", systems)
    model.drift(model.theta + 0.1, 1).backward()
    assert model.theta.grad is not None
    assert model.state(0).vector.grad is None


def test_lookahead_by_hand(systems, monkeypatch):
    """A linear hypernetwork: its regulariser at Theta + Delta, and that term's gradient, have a closed form."""
    model = METHODS["hypernetwork"](updates=1, hyper_hidden=(), embedding=2, beta=0.7, clip=1e9)
    model.fit_task(0, systems[0], rng=generator(0))
    seen = []
    inner = model._drift
    monkeypatch.setattr(
        model, "_drift", lambda theta, *kept: seen.append(theta.detach().clone()) or inner(theta, *kept)
    )
    theta = model.theta.detach().clone()
    weights = sum(model.weight_sizes)
    model._tasks.append(model._new_task(generator(1)))
    for name in ("input_mean", "input_std", "target_mean", "target_std", "learned"):
        getattr(model.state(1), name).copy_(getattr(model.state(0), name))
    batch = model._template[0].network._pack(systems[1])[:16]
    model._loss(1, model._weights(1), batch).backward()
    slope = model.theta.grad.clone()
    model.zero_grad()
    model._steps(1, generator(2))(batch)
    # Adam's first step is -lr g / (|g| + eps).
    ahead = -1e-3 * slope / (slope.abs() + 1e-8)
    torch.testing.assert_close(seen[0] - theta, ahead, atol=1e-7, rtol=1e-4)
    matrix, bias = ahead[: 2 * weights].view(2, weights), ahead[2 * weights :]
    moved = model.state(0).vector.detach() @ matrix + bias
    assert float(inner(theta + ahead, *model._kept(1))) == pytest.approx(0.7 * float(moved.square().sum()), rel=1e-3)
    extra = torch.cat([torch.outer(model.state(0).vector.detach(), 1.4 * moved).flatten(), 1.4 * moved])
    torch.testing.assert_close(model.theta.grad, slope + extra, atol=1e-5, rtol=1e-3)


def test_adams_change_is_the_one_that_adam_makes():
    rng = generator(0)
    parameter = nn.Parameter(torch.randn(20, generator=rng))
    optimizer = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(4):
        parameter.grad = torch.randn(20, generator=rng)
        before, told = parameter.detach().clone(), adam_change(optimizer, parameter)
        optimizer.step()
        torch.testing.assert_close(parameter.detach() - before, told, atol=1e-7, rtol=1e-5)
    with pytest.raises(ValueError, match="no gradient"):
        adam_change(optimizer, nn.Parameter(torch.ones(1)))


def test_a_strong_regulariser_holds_earlier_tasks(systems):
    drifts = []
    for beta in (0.0, 1000.0):
        model = trained("hypernetwork", systems, tasks=1, updates=30, beta=beta)
        before = model._weights(0).detach()
        model.fit_task(1, systems[1], rng=generator(1))
        drifts.append(float((model._weights(0).detach() - before).norm()))
    assert drifts[1] < 0.02 * drifts[0]


# Penalties and rehearsal


def test_only_shared_weights_forget(systems):
    for method, model in ((name, trained(name, systems, tasks=1)) for name in METHODS):
        before = model._weights(0).detach().clone()
        model.fit_task(1, systems[1], rng=generator(1))
        same = model._weights(0).detach() == before
        own = model.state(0).vector
        if method == "single":
            assert same.all()
        elif method in ("fine-tune", "EWC", "SI"):
            assert not same.all()
            assert same[-len(own) :].all(), "the earlier task's last layer is its own"


@pytest.mark.parametrize("penalty", ["ewc", "si"])
def test_the_penalty_is_the_quadratic_form(penalty, systems):
    model = MultiHead(penalty=penalty, strength=3.0, updates=5)
    for task in (0, 1):
        model.fit_task(task, systems[task], rng=generator(task))
    theta, expected = model.theta.detach() + 0.1, 0.0
    for task in (0, 1):
        state = model.state(task)
        anchor = model.state(1).anchor if penalty == "si" else state.anchor
        expected += 3.0 * float((theta - anchor) @ torch.diag(state.importance) @ (theta - anchor))
    assert float(model.restraint(theta, 2)) == pytest.approx(expected, rel=1e-4)
    assert float(model.restraint(model.state(0).anchor, 1)) == 0.0


def test_ewc_weighs_by_the_mean_squared_gradient_of_single_rows(systems):
    model = MultiHead(penalty="ewc", updates=3, hidden=(6,))
    model.fit(systems[0], rng=generator(0))
    rows = model._template[0].network._pack(systems[0])[:7]
    squares = []
    for row in rows:
        model.zero_grad()
        model._loss(0, model._weights(0), row[None]).backward()
        squares.append(model.theta.grad.square())
    torch.testing.assert_close(model._fisher(0, rows), torch.stack(squares).mean(dim=0), rtol=1e-4, atol=1e-7)


def test_si_adds_up_to_the_loss_that_was_saved(systems, monkeypatch):
    """On a quadratic, small steps: the path integral of a weight is what that weight took off the loss."""
    curvature, goal = torch.tensor([1.0, 4.0]), torch.tensor([0.3, -0.2])
    model = MultiHead(penalty="si", updates=1, hidden=(1,))
    model.fit(systems[0], rng=generator(0))
    monkeypatch.setattr(model, "theta", nn.Parameter(torch.zeros(2)), raising=False)
    state = model.state(0)
    for name in ("path", "origin", "importance", "anchor"):
        setattr(state, name, torch.zeros(2))
    model.updates, model.learning_rate = 800, 5e-4

    def quadratic(task, weights, batch):
        return 0.5 * (curvature * (weights[:2] - goal).square()).sum()

    monkeypatch.setattr(model, "_loss", quadratic)
    step = model._steps(0, generator(0))
    for _ in range(800):
        step(torch.zeros(1, 1))
    saved = 0.5 * curvature * (goal.square() - (model.theta.detach() - goal).square())
    torch.testing.assert_close(state.path, saved, rtol=0.02, atol=1e-4)
    model._finish(0, torch.zeros(1, 1), generator(0))
    torch.testing.assert_close(state.importance, saved / (model.theta.detach().square() + 1e-3), rtol=0.02, atol=1e-3)


def test_rehearsal_keeps_rows_of_the_task(systems):
    coreset, joint = trained("coreset", systems), trained("multi-task", systems)
    assert [len(coreset.state(task).rows) for task in (0, 1)] == [7, 7]
    train = len(systems[0]) - int(0.2 * len(systems[0]))
    assert [len(joint.state(task).rows) for task in (0, 1)] == [train, train]
    state, columns = coreset.state(0), systems[0].obs.shape[1] + systems[0].action.shape[1]
    kept = state.rows[:, :columns] * state.input_std.float() + state.input_mean.float()
    real = torch.cat([systems[0].obs, systems[0].action], dim=1)
    assert (kept[:, None] - real).abs().amax(dim=2).min(dim=1).values.max() < 1e-5


# What is refused


def test_tasks_come_in_order(systems):
    model = METHODS["fine-tune"](updates=1)
    with pytest.raises(ValueError, match="task must be 0, got 1"):
        model.fit_task(1, systems[0], rng=generator(0))
    with pytest.raises(ValueError, match="one of the 0 that have begun"):
        model.on(0)
    for task in (0, 1):
        model.fit_task(task, systems[task], rng=generator(0))
    with pytest.raises(ValueError, match=r"task must be 1 \(go on with the latest\) or 2 \(begin the next\), got 0"):
        model.fit_task(0, systems[0], rng=generator(0))
    with pytest.raises(ValueError, match="one of the 2 that have begun, 0 first, got 2"):
        model.on(2)
    model.fit(systems[1], rng=generator(0))
    assert model.num_tasks == 2


@pytest.mark.parametrize("method", ["hypernetwork", "coreset", "SI"])
def test_bad_data_leaves_the_model_as_it_was(method, systems):
    model = trained(method, systems, tasks=1)
    before = copy.deepcopy(model.state_dict())
    data = systems[1]
    constant = replace(data, next_obs=data.obs)
    broken = replace(data, obs=torch.full_like(data.obs, np.nan))
    for bad in (constant, broken, data[:1]):
        with pytest.raises(DataError):
            model.fit_task(1, bad, rng=generator(0))
        assert model.num_tasks == 1
    model.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match="training on task 1 diverged"):
        model.fit_task(1, data, rng=generator(0))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_refused_first_fit_leaves_the_model_unfitted(systems, tmp_path):
    model = METHODS["hypernetwork"]()
    with pytest.raises(DataError):
        model.fit(replace(systems[0], next_obs=systems[0].obs), rng=generator(0))
    assert model.spaces is None
    with pytest.raises(ModelFileError, match="has not been fitted"):
        model.save(tmp_path / "model")
    model.updates = 1
    model.fit(systems[0], rng=generator(0))
    assert model.num_tasks == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HyperCRL(beta=-1.0), "beta must be at least 0, got -1.0"),
        (lambda: HyperCRL(head="mean"), "head must be 'gaussian' or 'deterministic', got 'mean'"),
        (lambda: HyperCRL(chunk=0), "chunk must be None or at least 1, got 0"),
        (lambda: MultiHead(penalty="l2"), "penalty must be 'none', 'ewc' or 'si', got 'l2'"),
        (lambda: MultiHead(shared_layers=4), "shared_layers must be None or 0 to 3, got 4"),
        (lambda: MultiHead(memory=-1), "memory must be None or at least 0, got -1"),
        (lambda: MultiHead(updates=0), "updates must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_every_public_continual_model_is_tested_here():
    public = {getattr(learneddyn.models, name) for name in learneddyn.models.__all__}
    concrete = {m for m in public if isinstance(m, type) and issubclass(m, AbstractContinual)} - {AbstractContinual}
    assert concrete == {type(make()) for make in METHODS.values()}


def test_rows_of_the_data_are_left_alone(systems):
    data = Transitions(**{k: v.clone() for k, v in systems[0].tensors().items()}, spaces=systems[0].spaces)
    trained("multi-task", [data, systems[1]])
    assert all(torch.equal(a, b) for a, b in zip(data.tensors().values(), systems[0].tensors().values(), strict=True))
