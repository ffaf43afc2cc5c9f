"""The fast path of rollouts answers as the differentiable one does, and never from weights of the past."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from learneddyn.core import generator
from learneddyn.models import AbstractDynamics, ProbabilisticEnsemble
from learneddyn.spaces import Spaces
from learneddyn.testing import example_transitions
from learneddyn.world.sampling import draw_members

HEADS = {"learn_reward": True, "learn_termination": True}


def box(columns):
    return gym.spaces.Box(-np.inf, np.inf, (columns,), np.float32)


def fitted(**options):
    model = ProbabilisticEnsemble(**{"num_members": 4, "num_elites": 3, "hidden": (16, 16), "max_epochs": 2} | options)
    model.fit(example_transitions(), rng=generator(0))
    return model


def rows(n, seed=0):
    rng = generator(seed)
    return torch.randn(n, 3, generator=rng), torch.rand(n, 2, generator=rng) * 2 - 1


def assert_same(one, other, **tolerance):
    for left, right in zip(one, other, strict=True):
        assert (left is None) == (right is None)
        if left is not None:
            torch.testing.assert_close(left.detach(), right.detach(), **tolerance)


@pytest.mark.parametrize(
    "options",
    [{}, HEADS | {"angles": (1,)}, {"scale_targets": True, "absolute": (0,), "learn_termination": True}],
    ids=str,
)
@pytest.mark.parametrize("lanes", [1, 2, 5, 257, 1305, 3500])
@pytest.mark.parametrize("noise", [True, False])
def test_rollouts_equal_the_differentiable_path(options, lanes, noise):
    model = fitted(**options)
    obs, action = rows(lanes)
    members = {
        "balanced": torch.arange(lanes) % 3,
        "apart": 3 * (torch.arange(lanes) % 2),
        "one": torch.full((lanes,), 2),
        "ragged": torch.where(torch.arange(lanes) < lanes - 2, 1, 3),
    }
    for member in members.values():
        slow = model.sample(obs, action, member, generator(1), noise=noise)
        assert slow.next_obs.requires_grad
        with torch.no_grad():
            fast = model.sample(obs, action, member, generator(1), noise=noise)
        assert not fast.next_obs.requires_grad
        assert_same(fast, slow, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("lanes", [1, 150, 1000])
def test_predictions_equal_the_differentiable_path(lanes):
    model = fitted(**HEADS, angles=(1,))
    obs, action = rows(lanes)
    slow = model.predict(obs, action)
    with torch.no_grad():
        assert_same(model.predict(obs, action), slow, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 256, 1000])
def test_rows_dealt_evenly_get_the_answers_of_their_members(lanes):
    model = fitted(**HEADS)
    model.elites.copy_(torch.tensor([3, 0, 2]))  # in any order
    obs, action = rows(lanes)
    for choices in (model.elites, torch.arange(4), torch.tensor([1])):
        member = draw_members(choices, lanes, generator(lanes))
        slow = model.sample(obs, action, member, generator(1))
        with torch.no_grad():
            fast = model.sample_evenly(obs, action, member, choices, generator(1))
        assert_same(fast, slow, rtol=1e-5, atol=1e-5)


def test_dealing_evenly_never_asks_the_device_for_a_number():
    one, other = (fitted()._frozen_now().networks for _ in range(2))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # tensors without numbers, as a graph sees them
        x, member = torch.empty(50, 5), torch.empty(50, dtype=torch.long)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            one.grouped(x, member)
        assert other.dealt(x, member, torch.empty(3, dtype=torch.long)).mean.shape == (50, 3)


def test_no_rows_are_no_answer():
    model = fitted()
    with torch.no_grad():
        outcome = model.sample(torch.zeros(0, 3), torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), generator(0))
        assert model.predict(torch.zeros(0, 3), torch.zeros(0, 2)).mean.shape == (4, 0, 3)
    assert outcome.next_obs.shape == (0, 3)


def test_a_broken_row_breaks_no_other():
    model = fitted()
    obs, action = rows(40)
    obs[7] = torch.nan
    with torch.no_grad():
        finite = model.sample(obs, action, torch.arange(40) % 3, generator(0)).next_obs.isfinite().all(dim=1)
        alone = model.sample(obs[7:8], action[7:8], torch.zeros(1, dtype=torch.long), generator(0)).next_obs
    assert finite.tolist() == [row != 7 for row in range(40)]
    assert alone.isnan().all()


def test_a_row_far_outside_stays_without_warning():
    model = fitted(**HEADS)
    with torch.no_grad():
        outcome = model.sample(
            torch.full((1, 3), 1e8), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), generator(0)
        )
    assert not outcome.next_obs.isnan().any()


def scaled(tensor):
    with torch.no_grad():
        tensor.mul_(1.5)


def one_step(model):
    model._loss(torch.randn(4, 8, 5 + 3 + 1, generator=generator(5))).backward()
    torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()


def swapped(model):
    model.weights[1].data = model.weights[1].data * 1.5


EDITS = {
    "weight in place": lambda model: scaled(model.weights[0]),
    "bias in place": lambda model: model.biases[1].detach().add_(0.3),
    "bound in place": lambda model: scaled(model.max_logvar),
    "standardiser in place": lambda model: scaled(model.input_mean),
    "target scale in place": lambda model: scaled(model.target_std),
    "optimiser step": one_step,
    "storage swapped": swapped,
    "parameter replaced": lambda model: model.weights.__setitem__(0, torch.nn.Parameter(model.weights[0] * 1.5)),
    "weights loaded": lambda model: model.load_state_dict(fitted(learning_rate=0.01).state_dict()),
    "weights assigned": lambda model: model.load_state_dict(fitted(learning_rate=0.01).state_dict(), assign=True),
    "fitted again": lambda model: model.fit(example_transitions(seed=3), rng=generator(3)),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_change_of_the_weights_is_seen(name):
    """By one row, by many and by all members."""
    model = fitted()
    obs, action = rows(30)
    member = torch.arange(30) % 3

    def answers():
        with torch.no_grad():
            return (
                model.sample(obs, action, member, generator(0)).next_obs,
                model.sample(obs[:1], action[:1], member[:1], generator(0)).next_obs,
                model.predict(obs, action).mean[0] + model.predict(obs, action).std[0],
            )

    before = answers()
    EDITS[name](model)
    after = answers()
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert_same(after[:1], [model.sample(obs, action, member, generator(0)).next_obs], atol=2e-6, rtol=2e-5)


def test_copies_and_loaded_models_have_a_snapshot_of_their_own(tmp_path):
    model = fitted()
    obs, action = rows(30)
    member = torch.arange(30) % 3
    with torch.no_grad():
        expected = model.sample(obs, action, member, generator(0)).next_obs
        model.save(tmp_path / "m")
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AbstractDynamics.load(tmp_path / "m")
        scaled(model.weights[0])
        assert not torch.equal(model.sample(obs, action, member, generator(0)).next_obs, expected)
        for other in others:
            assert torch.equal(other.sample(obs, action, member, generator(0)).next_obs, expected)


def test_threads_do_not_share_buffers():
    model = fitted(hidden=(64, 64))
    obs, action = rows(2000)

    def answer(seed):
        member = torch.randint(4, (2000,), generator=generator(seed))
        with torch.no_grad():
            return model.sample(obs, action, member, generator(seed)).next_obs

    alone = [answer(seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, range(20)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_inference_mode_and_no_grad_take_turns():
    model = fitted()
    obs, action = rows(9)
    member = torch.arange(9) % 3
    with torch.inference_mode():
        one = model.sample(obs, action, member, generator(0)).next_obs
    with torch.no_grad():
        other = model.sample(obs, action, member, generator(0)).next_obs
    assert torch.equal(one, other)


def test_bf16_rollouts_differ_by_less_than_the_noise(tmp_path):
    """Predictions stay float32; what a rollout draws is off by a tenth of its own standard deviation at the median."""
    full, half = fitted(hidden=(64, 64)), fitted(hidden=(64, 64), precision="bf16")
    half.load_state_dict(full.state_dict())
    obs, action = rows(600)
    member = torch.arange(600) % 3
    with torch.no_grad():
        exact, rough = (model.sample(obs, action, member, generator(0)).next_obs for model in (full, half))
        assert_same(full.predict(obs, action), half.predict(obs, action), atol=0.0, rtol=0.0)
        std = full.predict(obs, action).std[member, torch.arange(600)]
        off = ((rough - exact).abs() / std).flatten()
        assert 0 < off.median() < 0.05
        assert off.quantile(0.99) < 0.5
        single = [model.sample(obs[:1], action[:1], member[:1], generator(0)).next_obs for model in (full, half)]
        assert torch.equal(*single)
    half.save(tmp_path / "m")
    assert AbstractDynamics.load(tmp_path / "m").precision == "bf16"
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16', got 'fp16'"):
        ProbabilisticEnsemble(precision="fp16")


def test_grouping_beats_asking_all_members_and_gathering_fourfold():
    """CPU time of one thread at the sizes of HalfCheetah with 4096 lanes, medians of turns."""
    spaces = Spaces(box(17), box(6))
    model = ProbabilisticEnsemble(learn_reward=True)
    model._build(spaces)
    model._initialise(generator(0))
    model.spaces = spaces
    obs, action, member = torch.randn(4096, 17), torch.rand(4096, 6), torch.arange(4096) % 5
    lanes = torch.arange(4096)

    def all_members_and_gather():
        x = model._standardised(obs, action)
        heads = model._networks(x.expand(7, -1, -1))
        mean, std = (part[member, lanes] for part in model._in_units(heads))
        return mean + std * torch.randn(mean.shape)

    times = {"grouped": [], "naive": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        for _ in range(6):
            for name, ask in (
                ("grouped", lambda: model.sample(obs, action, member, generator(0))),
                ("naive", all_members_and_gather),
            ):
                started = time.process_time()
                ask()
                times[name].append(time.process_time() - started)
    torch.set_num_threads(threads)
    assert np.median(times["naive"]) > 4 * np.median(times["grouped"])


@pytest.mark.parametrize("lanes", [1, 2, 300])
@pytest.mark.parametrize("noise", [True, False])
def test_one_pass_samples_and_predicts(lanes, noise):
    model = fitted(**HEADS, angles=(1,))
    obs, action = rows(lanes)
    member = torch.arange(lanes) % 3
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            drawn, said = model.sample_and_predict(obs, action, member, generator(1), noise=noise)
            assert_same(drawn, model.sample(obs, action, member, generator(1), noise=noise), atol=2e-6, rtol=2e-5)
            assert_same(said, model.predict(obs, action), atol=2e-6, rtol=2e-5)


def test_a_row_is_sampled_as_a_batch_of_one():
    model = fitted(**HEADS, angles=(1,))
    obs, action = rows(1)
    one, other = generator(1), generator(1)
    for member in (0, 2, 1):
        with torch.no_grad():
            batch = model.sample(obs, action, torch.tensor([member]), one)
        next_obs, reward, terminated = model.sample_row(obs.numpy()[0], action.numpy()[0], member, other)
        assert np.array_equal(next_obs, batch.next_obs[0].numpy())
        assert (reward, terminated) == (batch.reward.item(), batch.terminated.item())
    assert torch.equal(one.get_state(), other.get_state())
    with pytest.raises(ValueError, match="has not been fitted"):
        ProbabilisticEnsemble().sample_row(obs.numpy()[0], action.numpy()[0], 0, one)


@pytest.mark.parametrize("rows", [1, 7, 240])
def test_an_ensemble_of_one_answers_any_number_of_rows(rows):
    data = example_transitions()[:rows]
    model = ProbabilisticEnsemble(1, 1, (8,), max_epochs=1)
    model.fit(example_transitions(), rng=generator(0))
    expected = model.predict(data.obs, data.action).mean.detach()
    with torch.no_grad():
        torch.testing.assert_close(model.predict(data.obs, data.action).mean, expected, atol=1e-6, rtol=1e-5)
