import json
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.nn.functional import softplus

from learneddyn.core import DataError, Task, Transitions, generator
from learneddyn.models import AbstractDynamics, ModelFileError, ProbabilisticEnsemble
from learneddyn.models.base import replaced_folder
from learneddyn.spaces import Spaces
from learneddyn.world import World

SMALL = {"num_members": 3, "num_elites": 2, "hidden": (16, 16), "weight_decay": 0.0, "max_epochs": 3}


def box(columns):
    return spaces.Box(-np.inf, np.inf, (columns,), np.float32)


def transitions(obs, action, next_obs, reward=None, terminated=None):
    n = len(obs)
    return Transitions(
        obs,
        action,
        torch.zeros(n) if reward is None else reward,
        next_obs,
        torch.zeros(n, dtype=torch.bool) if terminated is None else terminated,
        torch.arange(n),
        Spaces(box(obs.shape[1]), box(action.shape[1])),
    )


def linear_data(n=600, seed=0, **changes):
    """obs 3 columns (the last one constant), action 1: a noiseless linear system."""
    rng = generator(seed)
    obs, action = torch.randn(n, 3, generator=rng), torch.randn(n, 1, generator=rng)
    obs[:, 2] = 0.7
    change = torch.stack([0.1 * obs[:, 1], -0.2 * obs[:, 0] + 0.3 * action[:, 0], torch.zeros(n)], dim=1)
    return transitions(obs, action, obs + change, **changes)


def fitted(data=None, seed=0, **options):
    model = ProbabilisticEnsemble(**(SMALL | options))
    report = model.fit(data or linear_data(), rng=generator(seed))
    return model, report


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_and_disagreement_are_told_apart(seed):
    """Spec test 0-a: y = sin 3x + 0.1 (1 + |x|) noise on [-1, 1]."""
    rng = generator(seed)
    x = torch.rand(1000, 1, generator=rng) * 2 - 1
    y = torch.sin(3 * x) + 0.1 * (1 + x.abs()) * torch.randn(1000, 1, generator=rng)
    model = ProbabilisticEnsemble(absolute=(0,), hidden=(64, 64), weight_decay=0.0, batch_size=64, patience=40)
    model.fit(transitions(x, torch.zeros(1000, 1), y), rng=rng)
    with torch.no_grad():
        inside = torch.linspace(-0.9, 0.9, 19)[:, None]
        std = model.predict(inside, torch.zeros(19, 1)).std.mean(dim=0)
        means = model.predict(torch.tensor([[-2.0], [0.0], [2.0]]), torch.zeros(3, 1)).mean[..., 0].std(dim=0)
    truth = 0.1 * (1 + inside.abs())
    assert ((std - truth).abs() / truth).mean() < 0.15
    assert means[0] > 5 * means[1]
    assert means[2] > 5 * means[1]


def test_equal_members_on_equal_batches_stay_bit_equal():
    """Spec test 0-b: catches sums that should be means, and members that leak into each other."""
    data = linear_data()
    model = ProbabilisticEnsemble(**SMALL | {"bootstrap": False, "max_epochs": 1})
    model.fit(data, rng=generator(0))
    with torch.no_grad():
        for tensor in [*model.weights, *model.biases]:
            tensor.copy_(tensor[:1].expand_as(tensor))
    model.max_epochs = 4
    model.fit(data, rng=generator(1))
    for tensor in [*model.weights, *model.biases]:
        assert torch.equal(tensor, tensor[:1].expand_as(tensor))


def test_loss_equals_the_published_formula():
    model, _ = fitted(learn_reward=True)
    batch = model._pack(linear_data(8)).expand(3, -1, -1)
    x, target, _ = model._unpack(batch)
    expected = 0.0
    for e in range(3):
        out = x[e]
        for layer in range(3):
            out = out @ model.weights[layer][e] + model.biases[layer][e]
            out = out * torch.sigmoid(out) if layer < 2 else out
        mean, logvar = out[:, :4], out[:, 4:]
        logvar = model.max_logvar - softplus(model.max_logvar - logvar)
        logvar = model.min_logvar + softplus(logvar - model.min_logvar)
        rows = (mean - target[e]) ** 2 * torch.exp(-logvar) + logvar
        expected = expected + rows[:, model.learned].mean()
    expected = expected + 0.01 * (model.max_logvar - model.min_logvar)[model.learned].sum()
    torch.testing.assert_close(model._loss(batch), expected)


def test_weight_decay_is_half_the_squared_norm_in_the_loss():
    """Three full-batch epochs equal a plain loop whose loss spells the decay out, per layer, weights only."""
    data, decays = linear_data(20), (0.1, 0.3, 0.5)
    ours = ProbabilisticEnsemble(**SMALL | {"weight_decay": decays, "bootstrap": False, "improvement": -1e9})
    ours.fit(data, rng=generator(3))
    plain = ProbabilisticEnsemble(**SMALL)
    plain._build(data.spaces)
    rng = generator(3)
    plain._initialise(rng)
    rows = data[torch.randperm(20, generator=rng)[4:]]
    plain._standardise(rows)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        norms = sum(0.5 * wd * w.square().sum() for wd, w in zip(decays, plain.weights, strict=True))
        (plain._loss(plain._pack(rows).expand(3, -1, -1)) + norms).backward()
        optimizer.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_log_variance_stays_between_its_bounds():
    model, _ = fitted()
    extreme = torch.cat([torch.zeros(3, 50, 3), torch.linspace(-1e4, 1e4, 50).expand(3, 3, 50).mT], dim=2)
    logvar = model._heads(extreme).logvar
    assert (logvar >= model.min_logvar).all()
    assert (logvar <= model.max_logvar + softplus(model.min_logvar - model.max_logvar) + 1e-6).all()


def test_initial_weights_are_truncated_normals():
    model = ProbabilisticEnsemble(**SMALL | {"hidden": (200, 200)})
    model._build(linear_data().spaces)
    model._initialise(generator(0))
    std = 1 / (2 * math.sqrt(200))
    weight = model.weights[1].detach()
    assert weight.abs().max() <= 2 * std
    # A normal cut at two standard deviations keeps 0.88 of its standard deviation.
    assert weight.std() == pytest.approx(0.8796 * std, rel=0.02)
    assert not any(bias.any() for bias in model.biases)


@pytest.mark.parametrize("options", [{}, {"learn_reward": True, "learn_termination": True, "angles": (0,)}])
def test_sample_asks_the_member_of_each_row(options):
    model, _ = fitted(**options)
    obs, action = torch.randn(50, 3), torch.randn(50, 1)
    member = torch.randint(3, (50,))
    with torch.no_grad():
        outcome = model.sample(obs, action, member, generator(0), noise=False)
        prediction = model.predict(obs, action)
    rows = torch.arange(50)
    torch.testing.assert_close(outcome.next_obs, prediction.mean[member, rows], atol=1e-5, rtol=1e-5)
    if options:
        torch.testing.assert_close(outcome.reward, prediction.reward_mean[member, rows], atol=1e-5, rtol=1e-5)
        assert torch.equal(outcome.terminated, prediction.terminated[member, rows] > 0.5)


def test_samples_have_the_predicted_mean_and_spread():
    model, _ = fitted(learn_reward=True)
    obs, action = torch.tensor([[0.3, -0.5, 0.7]]).expand(20_000, -1), torch.full((20_000, 1), 0.2)
    with torch.no_grad():
        outcome = model.sample(obs, action, torch.ones(20_000, dtype=torch.long), generator(1))
        one = model.predict(obs[:1], action[:1])
    drawn = torch.cat([outcome.next_obs[:, :2], outcome.reward[:, None]], dim=1)
    mean = torch.cat([one.mean[1, 0, :2], one.reward_mean[1]])
    std = torch.cat([one.std[1, 0, :2], one.reward_std[1]])
    assert ((drawn.mean(dim=0) - mean).abs() < 4 * std / 20_000**0.5).all()
    torch.testing.assert_close(drawn.std(dim=0), std, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("scale_targets", [False, True])
def test_a_linear_system_is_learned(scale_targets):
    data = linear_data(2000)
    model = ProbabilisticEnsemble(num_members=3, num_elites=2, hidden=(64, 64), weight_decay=0.0, batch_size=64,
                                  scale_targets=scale_targets, max_epochs=40)  # fmt: skip
    report = model.fit(data, rng=generator(0))
    test = linear_data(200, seed=9)
    with torch.no_grad():
        error = (model.predict(test.obs, test.action).mean[model.elites].mean(dim=0) - test.next_obs)[:, :2]
    assert error.square().mean().sqrt() < 0.05 * (test.next_obs - test.obs)[:, :2].std()
    assert report.epochs == len(report.history) <= 40
    assert report.history[-1]["holdout_mse"] < 0.1 * report.history[0]["holdout_mse"]


def test_constant_columns_are_copied_exactly():
    data = linear_data()
    model, _ = fitted(data)
    with torch.no_grad():
        outcome = model.sample(data.obs, data.action, torch.zeros(len(data), dtype=torch.long), generator(0))
    assert model.learned.tolist() == [True, True, False]
    torch.testing.assert_close(outcome.next_obs[:, 2], data.obs[:, 2], atol=1e-5, rtol=0)


def test_small_units_are_not_taken_for_constants():
    data = linear_data()
    micro = transitions(data.obs * 1e-7, data.action, data.next_obs * 1e-7)
    assert fitted(micro)[0].learned.tolist() == [True, True, False]


def test_a_constant_input_gives_finite_numbers_off_the_data():
    model, _ = fitted()
    prediction = model.predict(torch.tensor([[0.0, 0.0, 1e3]]), torch.zeros(1, 1))
    assert prediction.mean.isfinite().all()


def test_angles_enter_as_cosine_and_sine():
    model, _ = fitted(angles=(1,))
    obs, action = torch.randn(6, 3), torch.randn(6, 1)
    turned = obs + torch.tensor([0.0, 2 * math.pi, 0.0])
    one, other = model.predict(obs, action).mean - obs, model.predict(turned, action).mean - turned
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_termination_head_learns_a_threshold():
    rng = generator(0)
    obs, action = torch.randn(2000, 2, generator=rng), torch.zeros(2000, 1)
    data = transitions(obs, action, obs + 0.1 * torch.randn(2000, 2, generator=rng), terminated=obs[:, 0] > 1)
    wider = {"learn_termination": True, "hidden": (32, 32), "max_epochs": 30, "batch_size": 32}
    model = ProbabilisticEnsemble(**SMALL | wider)
    model.fit(data, rng=rng)
    with torch.no_grad():
        ended = model.sample(obs, action, torch.zeros(2000, dtype=torch.long), rng, noise=False).terminated
    assert (ended == data.terminated).float().mean() > 0.97


def test_one_seed_one_model():
    one, other, third = (fitted(seed=seed)[0].state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["weights.0"], third["weights.0"])


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    fitted()
    assert torch.equal(torch.rand(3), expected)


def test_the_published_constants_are_the_defaults():
    """Janner et al. (2019): 7 networks, 5 elites, 4 x 200, Adam 1e-3, 256 rows, 1 % gain, 5 epochs; Chua et al. (2018):
    bounds of the log-variance from -10 to 0.5."""
    model = ProbabilisticEnsemble()
    model._build(linear_data().spaces)
    given = {name: model.config()[name] for name in ("num_members", "num_elites", "hidden", "learning_rate")}
    assert given == {"num_members": 7, "num_elites": 5, "hidden": [200] * 4, "learning_rate": 1e-3}
    assert (model.batch_size, model.improvement, model.patience, model.max_epochs) == (256, 0.01, 5, None)
    assert (model.bootstrap, model.scale_targets) == (True, False)
    assert set(model.max_logvar.tolist()) == {0.5}
    assert set(model.min_logvar.tolist()) == {-10.0}


def test_a_fifth_of_the_rows_is_held_out_and_at_most_so_many():
    assert (ProbabilisticEnsemble().holdout_ratio, ProbabilisticEnsemble().holdout_max) == (0.2, 5000)
    for options, held in (({}, 120), ({"holdout_max": 50}, 50), ({"holdout_ratio": 0.5}, 300)):
        _, report = fitted(max_epochs=1, **options)
        assert (report.metrics["holdout_rows"], report.metrics["train_rows"]) == (held, 600 - held)


def test_inputs_are_standardised_by_the_training_rows_alone():
    data = linear_data()
    data.obs[:, 0] += 100.0 * (torch.arange(600) % 7)
    model, _ = fitted(data, max_epochs=1)
    rng = generator(0)
    model_again = ProbabilisticEnsemble(**SMALL)
    model_again._build(data.spaces)
    model_again._initialise(rng)
    train = data[torch.randperm(600, generator=rng)[120:]]
    torch.testing.assert_close(model.input_mean, torch.cat([train.obs, train.action], dim=1).double().mean(dim=0))


def test_every_member_keeps_one_bootstrap_of_the_rows_and_shuffles_it():
    model = ProbabilisticEnsemble(**SMALL)
    drawn, shuffled = [], model._shuffled
    model._shuffled = lambda index, rng: drawn.append(shuffled(index, rng)) or drawn[-1]
    model.fit(linear_data(5000), rng=generator(0))
    assert [tuple(index.shape) for index in drawn] == [(3, 4000)] * 3
    for member in range(3):
        # Drawn with replacement, 1 - 1/e of the rows are there.
        assert len(drawn[0][member].unique()) / 4000 == pytest.approx(1 - math.exp(-1), abs=0.02)
        assert torch.equal(drawn[0][member].sort().values, drawn[2][member].sort().values)
        assert not torch.equal(drawn[0][member], drawn[2][member])
    assert not torch.equal(drawn[0][0].sort().values, drawn[0][1].sort().values)


def test_an_epoch_counts_where_any_member_gains_more_than_one_percent():
    """Hold-out errors by script: what is kept, and when training stops, follow from the published rule alone."""
    script = [
        (1.0, 1.0, 1.0),  # before training
        (0.995, 1.0, 2.0),  # half a percent: no gain
        (0.985, 1.0, 2.0),  # 1.5 % below the best of member 0: a gain, the count starts anew
        (0.9, 0.9902, 2.0),  # member 0 gains, member 1 not quite
        (0.9, 0.9898, 2.0),  # now it does
        (0.892, 0.981, 0.991),  # three small gains are none: 1 of at most 2 epochs without one
        (0.892, 0.981, 0.991),  # 2
        (0.892, 0.981, 0.991),  # 3, more than 2: stop
        (0.9, 0.9898, 1.0),  # the kept weights, judged for the elites
    ]
    model = ProbabilisticEnsemble(**SMALL | {"max_epochs": None, "patience": 2})
    weights, scores, holdout = [], iter(script), model._holdout

    def scripted(test):
        weights.append(model.weights[0].detach().clone())
        return holdout(test)._replace(watched=torch.tensor(next(scores)))

    model._holdout = scripted
    report = model.fit(linear_data(), rng=generator(0))
    assert report.epochs == 7
    for member, best_after in ((0, 3), (1, 4), (2, 0)):
        assert torch.equal(model.weights[0][member], weights[best_after][member])
    assert model.elites.tolist() == [0, 1]


def test_the_first_fit_makes_the_parameters_where_the_data_is():
    model = ProbabilisticEnsemble(**SMALL)
    model.check_spaces(linear_data().to("meta"))
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_a_second_fit_goes_on_from_the_weights_at_hand():
    data = linear_data(1000)
    model, first = fitted(data, max_epochs=20)
    again = model.fit(data, rng=generator(1))
    assert again.history[0]["holdout_mse"] < 0.5 * first.history[0]["holdout_mse"]


def test_each_member_keeps_its_best_weights_and_elites_are_the_best_members():
    data = linear_data(300)
    model = ProbabilisticEnsemble(**SMALL | {"learning_rate": 0.05, "max_epochs": None, "patience": 2})
    seen = []
    watch = model._holdout
    model._holdout = lambda test: seen.append(watch(test)) or seen[-1]
    report = model.fit(data, rng=generator(0))
    best = torch.stack([score.watched for score in seen[:-1]]).amin(dim=0)
    kept = seen[-1].watched
    assert report.epochs == len(seen) - 2
    assert (kept <= best * (1 + 2 * model.improvement)).all()
    assert (kept < seen[-2].watched).any()
    assert model.elites.tolist() == kept.argsort()[:2].tolist()


def test_training_stops_after_patience_epochs_without_progress():
    model = ProbabilisticEnsemble(**SMALL | {"improvement": 1e9, "patience": 2, "max_epochs": None})
    report = model.fit(linear_data(), rng=generator(0))
    assert report.epochs == 3


def test_gradients_reach_obs_and_action():
    model, _ = fitted()
    obs, action = torch.randn(4, 3, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    model.sample(obs, action, torch.tensor([0, 1, 2, 0]), generator(0)).next_obs.sum().backward()
    assert obs.grad.abs().sum() > 0
    assert (action.grad.abs() > 0).all()


def test_divergence_is_an_error_and_the_weights_survive():
    model, _ = fitted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r"diverged in epoch 1.*lower learning_rate"):
        model.fit(linear_data(), rng=generator(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_members": 0}, "num_members must be at least 1, got 0"),
        ({"num_elites": 4}, "num_elites must be 1 to num_members = 3, got 4"),
        ({"hidden": (16, 0)}, "hidden must be positive widths"),
        ({"weight_decay": (0.1, 0.2)}, r"weight_decay must be one number, or one per layer \(3\)"),
        ({"holdout_ratio": 1.0}, "holdout_ratio must be between 0 and 1, got 1.0"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ProbabilisticEnsemble(**SMALL | options)


def test_the_published_decay_fits_any_depth():
    assert ProbabilisticEnsemble().weight_decay == [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    assert ProbabilisticEnsemble(hidden=(8, 8)).weight_decay == [2.5e-5, 5e-5, 1e-4]
    assert ProbabilisticEnsemble(hidden=()).weight_decay == [1e-4]


def test_bad_data_is_refused():
    good = linear_data()
    model = ProbabilisticEnsemble(**SMALL)
    with pytest.raises(DataError, match="at least 2 transitions"):
        model.fit(good[:1], rng=generator(0))
    with pytest.raises(DataError, match="every observation column is constant"):
        model.fit(transitions(torch.ones(9, 2), torch.zeros(9, 1), torch.ones(9, 2)), rng=generator(0))
    broken = linear_data()
    broken.next_obs[3, 1] = torch.nan
    with pytest.raises(DataError, match="'next_obs', the first is row 3"):
        model.fit(broken, rng=generator(0))
    fitted_model, _ = fitted(good)
    with pytest.raises(ValueError, match="this model was fitted on"):
        fitted_model.fit(transitions(torch.randn(9, 2), torch.randn(9, 1), torch.randn(9, 2)), rng=generator(0))
    with pytest.raises(ValueError, match="angles must name observation columns 0 to 2"):
        ProbabilisticEnsemble(**SMALL | {"angles": (3,)}).fit(good, rng=generator(0))
    with pytest.raises(ValueError, match="has not been fitted"):
        ProbabilisticEnsemble(**SMALL).predict(good.obs, good.action)


def test_a_data_error_leaves_a_first_fit_possible():
    model = ProbabilisticEnsemble(**SMALL)
    with pytest.raises(DataError):
        model.fit(transitions(torch.ones(9, 3), torch.zeros(9, 1), torch.ones(9, 3)), rng=generator(0))
    model.fit(linear_data(), rng=generator(0))
    fresh, _ = fitted()
    assert torch.equal(model.weights[0], fresh.weights[0])


def test_save_and_load_are_bit_equal(tmp_path):
    model, _ = fitted(learn_reward=True, angles=(0,), absolute=(1,))
    model.save(tmp_path / "m")
    again = AbstractDynamics.load(tmp_path / "m")
    assert type(again) is ProbabilisticEnsemble
    assert again.config() == model.config()
    assert again.spaces == model.spaces
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    obs, action = torch.randn(5, 3), torch.randn(5, 1)
    assert torch.equal(model.predict(obs, action).mean, again.predict(obs, action).mean)


def edit(folder, **changes):
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(card | changes))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "truncated or altered"),
        (lambda f: (f / "model.safetensors").unlink(), "not a readable model folder"),
        (lambda f: (f / "model.json").write_text("{"), "not a readable model folder"),
        (lambda f: (f / "model.json").write_bytes(b"\xff\xfe"), "not a readable model folder"),
        (lambda f: (f / "model.json").write_text("[]"), "must hold a JSON object, got a list"),
        (lambda f: (f / "model.json").write_text('{"format": 1, "class": "A"}'), r"lacks \['config', 'sha256'"),
        (lambda f: edit(f, spaces={"observation": 1, "action": 2}), "names no readable spaces"),
        (lambda f: edit(f, **{"class": "Model"}), "cannot import Model"),
        (lambda f: edit(f, config={"num_members": 0}), "num_members must be at least 1, got 0"),
        (lambda f: edit(f, format=99, version="9.0"), "format 99 .*learneddyn 9.0.*reads format 1"),
        (lambda f: edit(f, **{"class": "learneddyn.core.Task"}), "holds a learneddyn.core.Task, not a"),
        (lambda f: edit(f, **{"class": "learneddyn.nowhere.Model"}), "cannot import learneddyn.nowhere.Model"),
        (lambda f: edit(f, config={"num_members": 2, "num_elites": 1}), "does not fit"),
        (lambda f: edit(f, config={"colour": "red"}), "does not take the arguments"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, harm, message):
    folder = tmp_path / "m"
    fitted()[0].save(folder)
    harm(folder)
    with pytest.raises(ModelFileError, match=message):
        AbstractDynamics.load(folder)


def test_a_kill_in_the_middle_of_a_save_keeps_the_last_model(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    model, _ = fitted()
    model.save(folder)
    other, _ = fitted(seed=1)
    monkeypatch.setattr(replaced_folder, "__exit__", lambda self, *_: None)  # a kill runs nothing of ours
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as fresh:
        (fresh / "model.safetensors").write_bytes(b"ha")
        raise KeyboardInterrupt
    assert torch.equal(AbstractDynamics.load(folder).weights[0], model.weights[0])
    monkeypatch.undo()
    other.save(folder)
    assert torch.equal(AbstractDynamics.load(folder).weights[0], other.weights[0])


def test_an_unfitted_model_is_not_saved(tmp_path):
    with pytest.raises(ModelFileError, match="nothing to save"):
        ProbabilisticEnsemble(**SMALL).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is here")
def test_cuda_gives_the_cpu_numbers():
    model, _ = fitted()
    obs, action = torch.randn(5, 3), torch.randn(5, 1)
    expected = model.predict(obs, action).mean
    moved = model.to("cuda").predict(obs.cuda(), action.cuda()).mean
    torch.testing.assert_close(moved.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is here")
def test_a_step_never_waits_for_a_gpu():
    model, rng = fitted()[0].to("cuda"), generator(0, "cuda")
    task = Task("X-v0", reward=lambda obs, action, after: after[:, 0], terminated=lambda obs: obs[:, 0] > 9)
    world, action = World(model, task), torch.zeros(64, 1, device="cuda")
    state, _ = world.step(world.start(torch.zeros(64, 3, device="cuda"), rng), action, rng)
    torch.cuda.set_sync_debug_mode("error")
    try:
        world.step(state, action, rng)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_world_without_an_answer_is_refused_when_it_is_built():
    model, _ = fitted()
    with pytest.raises(ValueError, match=r"reward of HalfCheetah-v5 does not follow .* learn_reward=True"):
        World(model, Task("HalfCheetah-v5", terminated=lambda obs: obs[:, 0] > 9))
    with pytest.raises(ValueError, match=r"termination of X-v0 does not follow .* learn_termination=True"):
        World(model, Task("X-v0", reward=lambda obs, action, next_obs: next_obs[:, 0]))
