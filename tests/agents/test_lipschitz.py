import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from test_agents_sac import Noise, distance, make, seeded_train

from learneddyn.agents import FastSAC
from learneddyn.agents.lipschitz import (
    AdversarialNoise,
    CriticRegulariser,
    GradientPenalty,
    SpectralCap,
    q_values,
    value_slopes,
)
from learneddyn.core import generator


class Bowl(Noise):
    """Rewards fall with the square of every observation column, the columns on different scales."""

    def __init__(self, obs_dim: int = 17) -> None:
        super().__init__(obs_dim, 2)

    def step(self, action):
        obs = self._obs()
        return obs, -float(np.square(obs).sum()), False, False, {}


def rows(obs_dim: int, count: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(seed)
    return torch.randn(count, obs_dim, generator=rng), 2 * torch.rand(count, 2, generator=rng) - 1


def trained(regulariser, updates: int = 120) -> FastSAC:
    model = make(
        FastSAC,
        env=Bowl(),
        steps=400,
        learning_rate=3e-3,
        policy_kwargs={"net_arch": [32, 32]},
        critic_regulariser=regulariser,
    )
    seeded_train(model, updates, batch=64)
    return model


def layers_of(model: FastSAC):
    return [(weight.clone(), bias.clone()) for weight, bias in model._packed().critic.layers]


def slope(model: FastSAC) -> float:
    return value_slopes(model, rows(17)[0]).mean().item()


@pytest.fixture(scope="module")
def plain() -> FastSAC:
    return trained(None)


def test_capped_critics_are_lipschitz_with_the_product_of_the_caps(plain: FastSAC) -> None:
    model = trained(SpectralCap([2.0, 0.9, 1.0]))
    product = 2.0 * 0.9 * 1.0
    (obs, action), (more_obs, more_action) = rows(17, 1000, 1), rows(17, 1000, 2)
    away = torch.cat((obs - more_obs, action - more_action), 1).norm(dim=1)

    def steepest(layers) -> float:
        return ((q_values(layers, obs, action) - q_values(layers, more_obs, more_action)).abs() / away).max().item()

    for net in (model._packed().target, model._packed().critic):
        exact = [torch.linalg.matrix_norm(weight, 2).amax().item() for weight, _ in net.layers]
        assert all(norm <= 1.02 * cap for norm, cap in zip(exact, (2.0, 0.9, 1.0), strict=True)), exact
        assert steepest(net.layers) <= product + 1e-4
    assert exact[1] > 0.85  # the cap binds
    assert steepest(layers_of(plain)) > product


def test_power_iteration_finds_the_spectral_norms() -> None:
    rng = generator(0)
    layers = [(torch.randn(2, *shape, generator=rng), torch.zeros(2, 1, shape[0])) for shape in ((64, 6), (64, 64))]
    cap = SpectralCap(1.0)
    for norm, (weight, _) in zip(cap.norms(layers), layers, strict=True):
        exact = torch.linalg.matrix_norm(weight, 2)
        assert ((norm - exact).abs() < 0.02 * exact).all()
        assert (norm <= exact + 1e-5).all()
    for _ in range(300):
        last = cap.norms(layers)[1]
    assert torch.allclose(last, torch.linalg.matrix_norm(layers[1][0], 2), rtol=1e-4)


def test_an_infinite_cap_changes_nothing() -> None:
    free, plain = (make(FastSAC, critic_regulariser=regulariser) for regulariser in (SpectralCap(math.inf), None))
    for model in (free, plain):
        seeded_train(model, 5)
    assert distance(free.policy.state_dict(), plain.policy.state_dict()) == 0


def test_the_price_has_the_singular_vectors_gradient() -> None:
    weight = torch.randn(2, 8, 8, generator=generator(1)).requires_grad_()
    layers = [(weight, torch.zeros(2, 1, 8))]
    price = SpectralCap(1.0, weight=0.5)
    for _ in range(400):
        loss = price.loss(layers, *rows(4))
    (grad,) = torch.autograd.grad(loss, weight)
    u, s, v = torch.linalg.svd(weight.detach())
    excess = s[:, 0] - 1
    assert torch.allclose(loss, 0.5 * excess.square().sum(), rtol=1e-4)
    expected = excess[:, None, None] * u[:, :, :1] * v[:, :1, :]
    assert torch.allclose(grad, expected, atol=1e-3 * expected.abs().max())
    assert price.loss([(1e-3 * weight, layers[0][1])], *rows(4)) == 0


def linear_critics() -> tuple[list, torch.Tensor]:
    """Two critics without hidden layers, and their weights on the observation in units of its columns' spread."""
    weight = torch.randn(2, 1, 5, generator=generator(2))
    obs, _ = rows(3)
    return [(weight, torch.ones(2, 1, 1))], weight[:, 0, :3] * obs.std(0, correction=0)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_adversary_of_a_linear_critic_finds_the_corner(steps: int) -> None:
    """With Q = w s + ..., the worst noise in a box of radius ε moves Q by ε Σ |w_i|, whatever the start."""
    layers, slopes = linear_critics()
    obs, action = rows(3)
    torch.manual_seed(0)
    loss = AdversarialNoise(2.0, 0.1, steps).loss(layers, obs, action)
    worst = 0.1 * slopes.abs().sum(1)
    assert torch.allclose(loss, 2 * worst.square().sum(), rtol=1e-4)


def test_the_gradient_penalty_of_a_linear_critic_is_its_weight() -> None:
    layers, slopes = linear_critics()
    loss = GradientPenalty(3.0).loss([(w.requires_grad_(), b) for w, b in layers], *rows(3))
    assert torch.allclose(loss, 3 * slopes.square().sum(), rtol=1e-4)


def test_the_adversary_beats_random_signs_threefold(plain: FastSAC) -> None:
    layers, (obs, action) = layers_of(plain), rows(17)
    radius = 0.05 * obs.std(0, correction=0)
    signs = torch.randint(0, 2, (2, *obs.shape), generator=generator(3)) * 2 - 1

    def moved(noise) -> float:
        return (q_values(layers, obs + noise, action) - q_values(layers, obs, action)).abs().mean().item()

    torch.manual_seed(0)
    for steps in (1, 3):
        noise = AdversarialNoise(1.0, 0.05, steps).noise(layers, obs, action)
        assert (noise.abs() <= radius * 1.0001).all()
        assert moved(noise) >= 3 * moved(signs * radius)


@pytest.mark.parametrize("regulariser", [GradientPenalty(0.3), SpectralCap(0.5, weight=2.0)])
def test_the_losss_gradient_is_added_to_the_bellman_errors(regulariser: CriticRegulariser) -> None:
    """Two models of one seed differ in the critics' gradient by that of the loss, taken here through SB3's modules."""
    plain, regularised = (make(FastSAC, critic_regulariser=r) for r in (None, regulariser))
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    batch = plain.replay_buffer.sample(32)
    nets = plain.critic.q_networks
    weights, biases = (
        [torch.stack([getattr(net[index], kind) for net in nets]) for index in (0, 2, 4)] for kind in ("weight", "bias")
    )
    layers = [(weight, bias[:, None]) for weight, bias in zip(weights, biases, strict=True)]
    fresh = CriticRegulariser.from_card(regulariser.card())
    with torch.no_grad():
        fresh.constrain(layers)
    expected = torch.autograd.grad(
        fresh.loss(layers, batch.observations, batch.actions), list(plain.critic.parameters()), allow_unused=True
    )
    for model in (plain, regularised):
        seeded_train(model, 1)
    assert max(grad.abs().max() for grad in expected if grad is not None) > 1e-3
    for mine, other, more in zip(regularised.critic.parameters(), plain.critic.parameters(), expected, strict=True):
        assert torch.allclose(mine.grad - other.grad, torch.zeros(()) if more is None else more, atol=1e-5)


@pytest.mark.parametrize(
    ("weak", "strong"),
    [
        (GradientPenalty(0.01), GradientPenalty(1.0)),
        (AdversarialNoise(0.1, 0.1), AdversarialNoise(10.0, 0.1)),
        (SpectralCap(2.0), SpectralCap(0.7)),
        (SpectralCap(1.0, weight=0.3), SpectralCap(1.0, weight=30.0)),
    ],
)
def test_the_value_varies_less_the_stronger_the_regulariser(plain: FastSAC, weak, strong) -> None:
    slopes = [slope(plain), slope(trained(weak)), slope(trained(strong))]
    assert slopes[0] > slopes[1] > slopes[2]


def test_files_name_the_regulariser_in_json_and_training_goes_on_as_if_never_saved() -> None:
    for regulariser in (SpectralCap([4.0, 1.0, math.inf]), AdversarialNoise(0.1, 0.05, 3)):
        model = make(FastSAC, critic_regulariser=regulariser)
        seeded_train(model, 5)
        file = io.BytesIO()
        model.save(file)
        held = json.loads(zipfile.ZipFile(file).read("data"))
        assert not any(
            "lipschitz" in str(entry.get(":type:", "")) for entry in held.values() if isinstance(entry, dict)
        )
        assert held["_regulariser_card"]["class"].endswith(type(regulariser).__name__)
        loaded = FastSAC.load(io.BytesIO(file.getvalue()), env=Noise())
        assert loaded.critic_regulariser == regulariser
        theirs = SAC.load(io.BytesIO(file.getvalue()))
        assert distance(theirs.policy.state_dict(), model.policy.state_dict()) == 0
        loaded.replay_buffer = model.replay_buffer
        for other in (model, loaded):
            other.set_logger(configure(None, []))
            seeded_train(other, 5, seed=4)
        assert distance(loaded.policy.state_dict(), model.policy.state_dict()) == 0


def test_one_regulariser_may_be_given_to_several_models() -> None:
    shared = SpectralCap(1.0)
    states = []
    for regulariser in (shared, shared, SpectralCap(1.0)):
        model = make(FastSAC, critic_regulariser=regulariser)
        seeded_train(model, 3)
        states.append(model.policy.state_dict())
    assert distance(states[0], states[1]) == distance(states[0], states[2]) == 0


def test_a_card_stands_for_a_regulariser() -> None:
    """As configuration files give it."""
    card = {"class": "learneddyn.agents.SpectralCap", "config": {"cap": 1.0}}
    named, given = (make(FastSAC, critic_regulariser=r) for r in (card, SpectralCap(1.0)))
    for model in (named, given):
        seeded_train(model, 2)
    assert named.critic_regulariser == SpectralCap(1.0)
    assert distance(named.policy.state_dict(), given.policy.state_dict()) == 0


def test_a_regulariser_can_be_changed_between_calls_of_train() -> None:
    model = make(FastSAC)
    seeded_train(model, 1)
    model.critic_regulariser = SpectralCap(0.5)
    seeded_train(model, 1)
    assert all(torch.linalg.matrix_norm(weight, 2).max() < 0.51 for weight, _ in model._packed().critic.layers)


def test_bf16_critics_are_regularised() -> None:
    model = make(FastSAC, precision="bf16", critic_regulariser=SpectralCap(0.5))
    seeded_train(model, 3)
    assert all(torch.linalg.matrix_norm(weight, 2).max() < 0.51 for weight, _ in model._packed().critic.layers)


@pytest.mark.parametrize("steepness", [1, 5, 20])
@pytest.mark.parametrize("shift", [0.01, 0.02, 0.04])
def test_a_models_error_moves_the_value_by_at_most_the_bound(steepness: float, shift: float) -> None:
    """A line of 401 states, 21 moves, a model whose moves are off by ``shift``: |V̂ - V| <= γ Lip(V) shift / (1 - γ)."""
    gamma, x = 0.9, np.linspace(-1, 1, 401)
    moves, reward = np.linspace(-0.2, 0.2, 21), -np.minimum(steepness * np.abs(x), 1)

    def value(offset: float) -> np.ndarray:
        after = np.clip(np.rint((x[:, None] + moves + offset + 1) * 200), 0, 400).astype(int)
        v = np.zeros(401)
        for _ in range(300):
            v = reward + gamma * v[after].max(axis=1)
        return v

    truth = value(0.0)
    lipschitz = np.abs(np.diff(truth) / np.diff(x)).max()
    gap = np.abs(value(shift) - truth).max()
    assert lipschitz == pytest.approx(steepness / (1 - gamma), rel=1e-6)
    assert 0 < gap <= gamma * lipschitz * shift / (1 - gamma)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: SpectralCap(0.0), "cap must be positive, got 0.0"),
        (lambda: SpectralCap([3.0, -1.0]), "cap must be positive, got -1.0"),
        (lambda: SpectralCap(1.0, weight=0.0), "weight must be positive, got 0.0"),
        (lambda: AdversarialNoise(0.0, 0.1), "weight must be positive"),
        (lambda: AdversarialNoise(1.0, math.nan), "radius must be positive, got nan"),
        (lambda: AdversarialNoise(1.0, 0.1, 0), "steps must be at least 1, got 0"),
        (lambda: GradientPenalty(-1.0), "weight must be positive, got -1.0"),
        (lambda: make(FastSAC, critic_regulariser=SpectralCap([1.0, 2.0])), r"one per layer of the critic \(3\)"),
        (
            lambda: CriticRegulariser.from_card({"class": "learneddyn.nowhere.Cap", "config": {}, "state": []}),
            r"cannot import the critic regulariser 'learneddyn\.nowhere\.Cap'",
        ),
        (
            lambda: make(
                FastSAC, critic_regulariser={"class": "learneddyn.agents.SpectralCap", "config": {"beta": 1.0}}
            ),
            r"SpectralCap does not take the arguments \{'beta': 1\.0\}",
        ),
        (
            lambda: CriticRegulariser.from_card({"class": "pathlib.Path", "config": {}, "state": []}),
            r"pathlib\.Path is no CriticRegulariser",
        ),
        (
            lambda: make(FastSAC, use_sde=True, critic_regulariser=SpectralCap(1.0)),
            r"critic_regulariser is not available for gSDE",
        ),
    ],
)
def test_bad_input_is_named(make_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()
