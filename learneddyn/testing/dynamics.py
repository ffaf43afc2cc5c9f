"""Contracts of a dynamics model: fitting, answers, samples, memory, gradients, files."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from learneddyn.core import DataError, Dynamics, Outcome, Prediction, Transitions, generator
from learneddyn.models.base import AbstractDynamics, FitReport, ModelFileError
from learneddyn.spaces import Spaces
from learneddyn.testing.contract import ContractError, Contracts, close, equal, global_draws, random_rows

DRAWS = 2000
"""Samples per member that are compared with the predicted mean and standard deviation."""

HEADS = ("mean", "std", "reward_mean", "reward_std", "terminated")


def example_transitions(rows: int = 240, seed: int = 0) -> Transitions:
    """Return a small smooth system with noise: 3 observation columns, 2 actions, episodes of at most 12 rows.

    Reward is the first column of the next observation; an episode terminates where that column exceeds 1.2.
    """
    rng = generator(seed)
    starts, actions = 2 * torch.rand(rows, 3, generator=rng) - 1, 2 * torch.rand(rows, 2, generator=rng) - 1
    noise = 0.02 * torch.randn(rows, 3, generator=rng)
    seen, reached, episodes = [], [], []
    obs, episode, length = starts[0], 0, 0
    for row in range(rows):
        (x, y, z), (push, turn) = obs, actions[row]
        next_obs = torch.stack([x + 0.3 * push, 0.9 * y + 0.2 * x.sin(), 0.8 * z + 0.3 * turn * y]) + noise[row]
        seen.append(obs)
        reached.append(next_obs)
        episodes.append(episode)
        obs, length = next_obs, length + 1
        if next_obs[0] > 1.2 or length == 12:
            obs, episode, length = starts[row], episode + 1, 0
    spaces = Spaces(gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), gym.spaces.Box(-1.0, 1.0, (2,), np.float32))
    after = torch.stack(reached)
    reward = after[:, 0].clone()
    return Transitions(
        torch.stack(seen), actions, reward, after, reward > 1.2, torch.tensor(episodes), spaces, "example_transitions"
    )


def check_dynamics(model: Dynamics | Callable[[], Dynamics], data: Transitions | None = None) -> None:
    """Check a dynamics model.

    Args:
        model: a class or function that makes an unfitted `AbstractDynamics` (every contract is checked), or a model
            that is ready to use (only what concerns its answers, and its files if it is an AbstractDynamics).
        data: at least two rows to fit on and to ask about; by default `example_transitions` in units of their own. A
            ready model without ``data`` is asked about random elements of its own spaces.

    Raises:
        ContractError: a contract is broken.
    """
    if isinstance(model, type) or not isinstance(model, Dynamics):
        log = _in_units(example_transitions()) if data is None else data
        obs, action = log.obs[:12].clone(), log.action[:12].clone()
        fitted = _check_fit(model, log)
        _check_answers(fitted, obs, action)
        _check_units(fitted, log)
        _check_gradient(fitted, obs, action)
        _check_files(fitted, obs, action)
        _check_later_fits(fitted, log)
        return
    if model.spaces is None:
        raise ContractError(f"{type(model).__name__} is not fitted: to check its fit, pass the function that makes it")
    device = model.elites.device
    rows = random_rows(model.spaces, 12) if data is None else (data.obs[:12], data.action[:12])
    obs, action = (part.to(device) for part in rows)
    _check_answers(model, obs, action)
    if isinstance(model, AbstractDynamics):
        _check_files(model, obs, action)


def _check_fit(make: Callable[[], Any], data: Transitions) -> AbstractDynamics:
    """Check everything about fitting and return a fitted model."""
    model = make()
    contracts = Contracts(type(model).__name__)
    contracts.holds(isinstance(model, AbstractDynamics), "a model with a fit is an AbstractDynamics", type(model))
    _check_unfitted(model, data, contracts)
    _check_bad_data(make, data, contracts)
    before, columns = global_draws(), tuple(column.clone() for column in data.tensors().values())
    report = model.fit(data, rng=generator(0))
    contracts.holds(before == global_draws(), "fit draws from its rng only", "a global random state moved")
    contracts.holds(equal(columns, tuple(data.tensors().values())), "fit leaves its data alone", "changed columns")
    contracts.holds(isinstance(report, FitReport), "fit returns a FitReport", report)
    contracts.holds(model.spaces == data.spaces, "fit takes the spaces of the data", model.spaces)
    twin = make()
    torch.rand(1)  # moves the global random state, which must not matter
    twin.fit(data, rng=generator(0))
    same = equal(tuple(model.state_dict().values()), tuple(twin.state_dict().values()))
    contracts.holds(same, "one seed and one data set give one fit", "two fits with different parameters")
    return model


def _check_unfitted(model: AbstractDynamics, data: Transitions, contracts: Contracts) -> None:
    contracts.holds(model.spaces is None, "a new model has no spaces: sizes come from the data", model.spaces)
    config = model.config()
    try:
        rebuilt = type(model)(**json.loads(json.dumps(config))).config()
    except TypeError as error:
        raise ContractError(
            f"{contracts.who} breaks the contract: config() holds JSON values. Seen: {error}"
        ) from error
    contracts.holds(rebuilt == config, "config() rebuilds the model through JSON", f"{config} became {rebuilt}")
    rows, member = (data.obs[:3], data.action[:3]), torch.zeros(3, dtype=torch.long)
    contracts.refuses(ValueError, lambda: model.predict(*rows), "predict of an unfitted model is a ValueError")
    sample = partial(model.sample, *rows, member, generator(0))
    contracts.refuses(ValueError, sample, "sample of an unfitted model is a ValueError")
    with tempfile.TemporaryDirectory() as folder:
        save = partial(model.save, Path(folder) / "model")
        contracts.refuses(ModelFileError, save, "an unfitted model cannot be saved (ModelFileError)")


def _check_bad_data(make: Callable[[], Any], data: Transitions, contracts: Contracts) -> None:
    for name, value in (("obs", torch.nan), ("next_obs", torch.inf), ("reward", torch.nan)):
        column = data.tensors()[name].clone()
        column.view(len(data), -1)[1, 0] = value
        broken: Any = {name: column}
        model = make()
        fit = partial(model.fit, replace(data, **broken), rng=generator(0))
        contracts.refuses(DataError, fit, f"fit with {value} in '{name}' is a DataError")
        contracts.holds(model.spaces is None, "a refused first fit leaves the model unfitted", model.spaces)
    fit = partial(make().fit, data[:0], rng=generator(0))
    contracts.refuses(DataError, fit, "fit on no rows is a DataError")


def _check_later_fits(model: AbstractDynamics, data: Transitions) -> None:
    contracts = Contracts(type(model).__name__)
    model.fit(data, rng=generator(1))
    again = model.predict(data.obs[:3], data.action[:3]).mean
    contracts.holds(again.isfinite().all(), "a fitted model can be fitted again", again)
    assert data.spaces is not None
    wider = gym.spaces.Box(-np.inf, np.inf, (data.obs.shape[1] + 1,), np.float32)
    obs, next_obs = (torch.cat([column, column[:, :1]], dim=1) for column in (data.obs, data.next_obs))
    other = replace(data, obs=obs, next_obs=next_obs, spaces=Spaces(wider, data.spaces.action))
    answer = model.predict(data.obs[:3], data.action[:3])
    fit = partial(model.fit, other, rng=generator(0))
    contracts.refuses(ValueError, fit, "a second fit on other spaces is a ValueError")
    kept = equal(answer, model.predict(data.obs[:3], data.action[:3]))
    contracts.holds(kept, "a refused second fit leaves the model as it was", "other predictions")


@torch.no_grad()
def _check_units(model: AbstractDynamics, data: Transitions) -> None:
    """Compare the predictions with the log: answers that are standardised, or changes, miss it by far."""
    contracts, truth = Contracts(type(model).__name__), data.next_obs.double()
    error = (model.predict(data.obs, data.action).mean.double() - truth).square().mean(dim=(0, 1)).sqrt()
    scale = truth.std(dim=0, correction=0)
    size = truth.abs().amax(dim=0)
    far = (error > 2 * scale + 1e-3 * size) & (scale > 1e-6 * size)  # a constant column has no unit
    seen = f"error {error.tolist()} per column, where the log's standard deviation is {scale.tolist()}"
    contracts.holds(~far.any(), "Prediction.mean is the next observation, in the units of the data", seen)


def _in_units(data: Transitions) -> Transitions:
    """Return the log in units in which no column has mean 0 and deviation 1, but for the one that is the reward."""
    scale, shift = data.obs.new_tensor([1.0, 5.0, 0.2]), data.obs.new_tensor([0.0, 20.0, -3.0])
    return replace(data, obs=shift + scale * data.obs, next_obs=shift + scale * data.next_obs)


def _check_answers(model: Dynamics, obs: Tensor, action: Tensor) -> None:
    contracts, members = Contracts(type(model).__name__), set(range(model.num_members))
    draws = global_draws()
    elites = model.elites.tolist()
    distinct = bool(elites) and len(set(elites)) == len(elites) and set(elites) <= members
    contracts.holds(distinct, f"elites are distinct members, 0 to {model.num_members - 1}", elites)
    kept = obs.clone(), action.clone()
    with torch.no_grad():
        prediction = model.predict(obs, action)
        contracts.holds(equal(kept, (obs, action)), "predict leaves its inputs alone", "changed inputs")
        _check_prediction(model, prediction, obs, contracts)
        contracts.holds(equal(prediction, model.predict(obs, action)), "predict is deterministic", "two answers")
        _check_rows(model, prediction, obs, action, contracts)
        if isinstance(model, AbstractDynamics):
            _check_memory(model, obs, action, contracts)
        _check_sample(model, prediction, obs, action, contracts)
        _check_statistics(model, obs[:1], action[:1], contracts)
    contracts.holds(equal(kept, (obs, action)), "sample leaves its inputs alone", "changed inputs")
    moved = "a global random state moved"
    contracts.holds(draws == global_draws(), "predict and sample draw from their rng only", moved)


def _check_prediction(model: Dynamics, prediction: Prediction, obs: Tensor, contracts: Contracts) -> None:
    for name in HEADS:
        value = getattr(prediction, name)
        contracts.holds(value is not None or name not in ("mean", "std"), f"Prediction.{name} is answered", value)
        if value is None:
            continue
        shape = (model.num_members, *obs.shape) if name in ("mean", "std") else (model.num_members, len(obs))
        contracts.column(f"Prediction.{name}", value, shape, obs)
        if name in ("std", "reward_std"):
            contracts.holds((value >= 0).all(), f"Prediction.{name} is not negative", value)
        if name == "std" and isinstance(model, AbstractDynamics):
            contracts.holds((value > 0).all(), "Prediction.std of a learned model is above 0", value)
        if name == "terminated":
            contracts.holds(((value >= 0) & (value <= 1)).all(), "Prediction.terminated is a probability", value)
    contracts.holds(
        equal((prediction.elites,), (model.elites,)), "Prediction.elites are the model's", prediction.elites
    )


def _check_rows(model: Dynamics, prediction: Prediction, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    order = torch.arange(len(obs), device=obs.device).flip(0)
    for contract, rows in (("permuted rows permute predictions", order), ("a row alone is as in a batch", order[:1])):
        part = model.predict(obs[rows], action[rows])
        for name in HEADS:
            whole, piece = getattr(prediction, name), getattr(part, name)
            contracts.holds(whole is None or close(whole[:, rows], piece), contract, f"another Prediction.{name}")


def _check_sample(model: Dynamics, prediction: Prediction, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    lane = torch.arange(len(obs), device=obs.device)
    member = lane.flip(0) % model.num_members
    first, again, other = (model.sample(obs, action, member, generator(seed, obs.device)) for seed in (0, 0, 1))
    _check_outcome(first, prediction, obs, contracts)
    contracts.holds(equal(first, again), "one seed gives one sample", "two samples")
    silent = bool((prediction.std[member, lane] < 1e-5).all())
    varied = silent or not torch.equal(first.next_obs, other.next_obs)
    contracts.holds(varied, "another seed gives another sample", "the same sample, though std is positive")
    plain = model.sample(obs, action, member, generator(0, obs.device), noise=False)
    own = "noise=False gives the answer of the row's own member"
    contracts.holds(close(plain.next_obs, prediction.mean[member, lane]), own, "next_obs is not that member's mean")
    if plain.reward is not None and prediction.reward_mean is not None:
        contracts.holds(
            close(plain.reward, prediction.reward_mean[member, lane]), own, "reward is not that member's mean"
        )
    if plain.terminated is not None and prediction.terminated is not None:
        chance = prediction.terminated[member, lane]
        agrees = (plain.terminated == (chance > 0.5)) | ((chance - 0.5).abs() < 1e-4)
        contracts.holds(agrees.all(), own, "terminated is not whether the probability is above 1/2")
    if first.memory is not None:
        onward = model.sample(first.next_obs, action, member, generator(0, obs.device), first.memory)
        _check_outcome(onward, prediction, obs, contracts)


def _check_memory(model: AbstractDynamics, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    """Check that a memory belongs to its lane, and that it and the observation each count for something."""
    first, begun = model.predict(obs, action), model.begin(obs)
    if first.memory is None:
        contracts.holds(begun is None, "begin is None where predict returns no memory", "a memory")
        return
    memory = first.memory
    contracts.holds(begun is not None, "begin returns the memory of a start where predict returns one", begun)
    assert begun is not None
    for name, value in (("begin", begun), ("Prediction.memory", memory)):
        contracts.column(name, value, (len(obs), begun.shape[1]), obs)
    start = "no memory is the memory of a start"
    contracts.holds(close(model.predict(obs, action, begun).mean, first.mean), start, "another Prediction.mean")
    member = torch.zeros(len(obs), dtype=torch.long, device=obs.device)
    drawn = model.sample(obs, action, member, generator(0, obs.device), noise=False).memory
    kept = drawn is not None and close(drawn, memory)
    contracts.holds(kept, "sample without noise remembers what predict does", drawn)
    own, before = first.mean[0], memory.clone()
    onward = model.predict(own, action, memory)
    contracts.holds(torch.equal(before, memory), "predict leaves the memory it is given alone", "a changed memory")
    order = torch.arange(len(obs), device=obs.device).flip(0)
    for contract, rows in (("permuted rows permute memories", order), ("a memory belongs to its row", order[:1])):
        part = model.predict(own[rows], action[rows], memory[rows])
        same = close(onward.mean[:, rows], part.mean)
        if onward.memory is not None and part.memory is not None:
            same = same and close(onward.memory[rows], part.memory)
        contracts.holds(same, contract, "another answer beside other rows")
    other = model.predict(own, action, memory[order]).mean
    contracts.holds(not torch.equal(other, onward.mean), "what is remembered counts", "one answer for two memories")
    other = model.predict(own[order], action, memory).mean
    contracts.holds(
        not torch.equal(other, onward.mean), "what is seen counts beside a memory", "one answer for two observations"
    )


def _check_outcome(outcome: Outcome, prediction: Prediction, obs: Tensor, contracts: Contracts) -> None:
    contracts.column("Outcome.next_obs", outcome.next_obs, tuple(obs.shape), obs)
    if outcome.reward is not None:
        contracts.column("Outcome.reward", outcome.reward, (len(obs),), obs)
    if outcome.terminated is not None:
        contracts.flags("Outcome.terminated", outcome.terminated, len(obs))
    for name, head in (
        ("reward", prediction.reward_mean),
        ("terminated", prediction.terminated),
        ("memory", prediction.memory),
    ):
        both = (getattr(outcome, name) is None) == (head is None)
        contracts.holds(both, "predict and sample have the same heads", f"only one of them answers '{name}'")


def _check_statistics(model: Dynamics, obs: Tensor, action: Tensor, contracts: Contracts) -> None:
    """Compare many samples of one row with what every member predicts: six standard errors, and 15 % of the spread."""
    prediction, members = model.predict(obs, action), model.num_members
    member = torch.arange(members, device=obs.device).repeat_interleave(DRAWS)
    rng = generator(3, obs.device)
    drawn = model.sample(obs.expand(len(member), -1), action.expand(len(member), -1), member, rng)
    columns = [("next_obs", drawn.next_obs, prediction.mean[:, 0], prediction.std[:, 0])]
    if drawn.reward is not None and prediction.reward_mean is not None and prediction.reward_std is not None:
        columns.append(("reward", drawn.reward, prediction.reward_mean, prediction.reward_std))
    for name, samples, mean, std in columns:
        draws, rounding = samples.view(members, DRAWS, -1), 1e-4 * (1 + mean.abs())
        off = (draws.mean(dim=1) - mean).abs()
        right = (off <= rounding + 6 * std / DRAWS**0.5).all()
        contracts.holds(right, f"samples of '{name}' average to the predicted mean", f"off by {off.max():.3g}")
        spread = draws.std(dim=1)
        right = ((spread - std).abs() <= rounding + 0.15 * std).all()
        contracts.holds(right, f"samples of '{name}' have the predicted std", f"{spread.tolist()}, not {std.tolist()}")
    if drawn.terminated is not None and prediction.terminated is not None:
        share, chance = drawn.terminated.view(members, DRAWS).double().mean(dim=1), prediction.terminated[:, 0]
        right = ((share - chance).abs() <= 6 * (chance * (1 - chance) / DRAWS).sqrt() + 2 / DRAWS).all()
        contracts.holds(right, "samples terminate as often as predicted", f"{share.tolist()}, not {chance.tolist()}")


def _check_gradient(model: AbstractDynamics, obs: Tensor, action: Tensor) -> None:
    contracts, moved = Contracts(type(model).__name__), action.clone().requires_grad_()
    member = torch.zeros(len(obs), dtype=torch.long)
    predicted, drawn = model.predict(obs, moved).mean, model.sample(obs, moved, member, generator(0)).next_obs
    for name, value in (("predict", predicted), ("sample", drawn)):
        gradient = torch.autograd.grad(value.sum(), moved, allow_unused=True)[0] if value.requires_grad else None
        usable = gradient is not None and bool(gradient.isfinite().all() and gradient.any())
        contracts.holds(usable, f"{name} is differentiable in the action", f"gradient {gradient}")


def _check_files(model: AbstractDynamics, obs: Tensor, action: Tensor) -> None:
    contracts = Contracts(type(model).__name__)
    registered = "every tensor is a parameter or a buffer, which move to devices and into files"
    loose = [name for module in model.modules() for name, value in vars(module).items() if isinstance(value, Tensor)]
    contracts.holds(not loose, registered, f"plain attributes {loose}")
    member = torch.arange(len(obs), device=obs.device) % model.num_members
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        target = Path(folder) / "model"
        model.save(target)
        loaded = AbstractDynamics.load(target, obs.device)
        contracts.holds(type(loaded) is type(model), "load returns the class that was saved", type(loaded))
        contracts.holds(loaded.config() == model.config(), "load restores the constructor's arguments", loaded.config())
        contracts.holds(loaded.spaces == model.spaces, "load restores the spaces", loaded.spaces)
        bits = "a loaded model answers bit for bit as the saved one"
        contracts.holds(equal(loaded.predict(obs, action), model.predict(obs, action)), bits, "predict differs")
        drawn = [each.sample(obs, action, member, generator(0, obs.device)) for each in (loaded, model)]
        contracts.holds(equal(*drawn), bits, "sample differs")
        blob = target / "model.safetensors"
        blob.write_bytes(blob.read_bytes()[:-1])
        contracts.refuses(ModelFileError, lambda: type(model).load(target), "a truncated file is a ModelFileError")
