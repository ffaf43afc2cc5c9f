import copy
import io
import statistics
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from learneddyn.agents import FastSAC


class Noise(gym.Env):
    """Observations, rewards and terminations that are noise: only the arithmetic of the updates is at stake."""

    def __init__(self, obs_dim: int = 5, action_dim: int = 2) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-2, 2, (action_dim,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        return self._obs(), self.np_random.normal(), self.np_random.random() < 0.1, False, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.normal(size=self.observation_space.shape).astype(np.float32)


def make(kind, *, env=None, seed=0, steps=60, **kwargs):
    """A model with a filled replay, before its first update; one seed gives one replay and one set of weights."""
    kwargs = {"policy_kwargs": {"net_arch": [32, 16]}, "batch_size": 32, "buffer_size": 500, "device": "cpu"} | kwargs
    model = kind("MlpPolicy", env or Noise(), seed=seed, learning_starts=10**6, **kwargs)
    model.set_logger(configure(None, []))
    model.learn(steps)
    return model


def seeded_train(model, steps: int, seed: int = 3, batch: int = 32, kind=None) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what SB3's replay draws from)
    (kind or type(model)).train(model, steps, batch)


def distance(one: dict, other: dict) -> float:
    """The largest difference between two state dicts of the same structure, whatever they nest."""
    flat, other_flat = _leaves(one), _leaves(other)
    assert flat.keys() == other_flat.keys()
    return max((abs(torch.as_tensor(flat[key]) - torch.as_tensor(other_flat[key]))).max().item() for key in flat)


def _leaves(tree, prefix: str = "") -> dict:
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in _leaves(part, f"{prefix}.{name}").items()}
    if isinstance(tree, list | tuple):
        return _leaves(dict(enumerate(tree)), prefix)
    return {prefix: float(tree) if isinstance(tree, bool | int | float) else tree} if tree is not None else {}


def assert_same(model, reference, tolerance: float = 2e-5) -> None:
    assert distance(model.policy.state_dict(), reference.policy.state_dict()) < tolerance
    for name in ("actor.optimizer", "critic.optimizer", "ent_coef_optimizer"):
        if name in model.get_parameters():
            mine, theirs = (m.get_parameters()[name]["state"] for m in (model, reference))
            assert distance(mine, theirs) < tolerance, name
    logged, expected = model.logger.name_to_value, reference.logger.name_to_value
    assert list(logged) == list(expected)
    for name in logged:
        assert logged[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


VARIANTS = {
    "default": {},
    "one layer": {"policy_kwargs": {"net_arch": [24]}},
    "three layers": {"policy_kwargs": {"net_arch": [16, 24, 8]}},
    "linear actor": {"policy_kwargs": {"net_arch": {"pi": [], "qf": [16]}}},
    "linear critics": {"policy_kwargs": {"net_arch": {"pi": [16], "qf": []}}},
    "one critic": {"policy_kwargs": {"net_arch": [16], "n_critics": 1}},
    "three critics": {"policy_kwargs": {"net_arch": [16, 16], "n_critics": 3}},
    "one action": {"env": lambda: Noise(3, 1)},
    "fixed temperature": {"ent_coef": 0.3},
    "start temperature": {"ent_coef": "auto_0.1"},
    "rare targets": {"target_update_interval": 3, "tau": 0.5},
    "three-step returns": {"n_steps": 3},
    "lanes": {"env": lambda: DummyVecEnv([Noise] * 3)},
    "normalised": {"env": lambda: VecNormalize(DummyVecEnv([Noise]))},
    "schedule": {"learning_rate": lambda left: 1e-3 * left},
    "weight decay": {"policy_kwargs": {"net_arch": [16], "optimizer_kwargs": {"weight_decay": 0.1, "eps": 1e-4}}},
    "another optimiser": {"policy_kwargs": {"net_arch": [16], "optimizer_class": torch.optim.AdamW}},
    "amsgrad": {"policy_kwargs": {"net_arch": [16], "optimizer_kwargs": {"amsgrad": True}}},
    "shared extractor": {"policy_kwargs": {"net_arch": [16], "share_features_extractor": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_equal_those_of_sb3(variant: str) -> None:
    given = VARIANTS[variant]
    env = given.get("env", Noise)
    rest = {key: value for key, value in given.items() if key != "env"}
    fast, slow = (make(kind, env=env(), **rest) for kind in (FastSAC, SAC))
    for steps in (1, 1, 8):
        for model in (fast, slow):
            seeded_train(model, steps)
        assert_same(fast, slow)


def test_gradients_equal_autograds() -> None:
    """Also where the deviation is clamped (on either side) and where the tanh saturates."""
    fast, slow = (make(kind, env=Noise(4, 4), ent_coef="auto_0.5") for kind in (FastSAC, SAC))
    for model in (fast, slow):
        with torch.no_grad():
            model.actor.log_std.bias.copy_(torch.tensor([2.0, -20.0, -2.0, -1.0]))  # half the rows of the first two
            model.actor.mu.bias.copy_(torch.tensor([0.0, 0.0, 3.0, -30.0]))
            model.actor.mu.weight[1] = 0  # SB3's (u - m)² / 2σ² has no digits left at σ = e^-20 unless m is 0
    expected = {}
    for part in (slow.actor, slow.critic):  # at the step: afterwards SB3's actor loss adds to the critics' gradients
        part.optimizer.register_step_pre_hook(
            lambda *_, part=part: expected.update({p: p.grad.clone() for p in part.parameters()})
        )
    for model in (fast, slow):
        seeded_train(model, 1)
    for part in ("actor", "critic"):
        named = zip(getattr(fast, part).named_parameters(), getattr(slow, part).parameters(), strict=True)
        for (name, mine), parameter in named:
            keep = [0, 2, 3] if name.startswith("mu") else slice(None)  # at σ = e^-20 autograd adds ±ε/σ to dL/dm
            got, autograd = mine.grad[keep], expected[parameter][keep]
            assert autograd.abs().max() > 0, name
            assert (got - autograd).abs().max() < 1e-4 * autograd.abs().max(), name


def test_files_go_both_ways_and_training_goes_on_as_if_never_saved() -> None:
    for first, second in ((SAC, FastSAC), (FastSAC, SAC), (FastSAC, FastSAC)):
        model = make(first)
        seeded_train(model, 5)
        file = io.BytesIO()
        model.save(file)
        loaded = second.load(io.BytesIO(file.getvalue()), env=Noise())
        loaded.replay_buffer = model.replay_buffer
        for other in (model, loaded):
            other.set_logger(configure(None, []))
            seeded_train(other, 5, seed=4)
        assert_same(loaded, model)
        obs = np.ones((3, 5), np.float32)
        np.testing.assert_allclose(
            loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0], atol=1e-4
        )


def test_a_file_holds_no_more_than_sb3s() -> None:
    sizes = []
    for kind in (FastSAC, SAC):
        model, file = make(kind, policy_kwargs={}), io.BytesIO()
        seeded_train(model, 1)
        model.save(file)
        sizes.append(len(file.getvalue()))
    assert sizes[0] < 1.02 * sizes[1]


def load_all(model, source) -> None:
    model.set_parameters(copy.deepcopy(source.get_parameters()))


def set_temperature(model, source) -> None:
    model.log_ent_coef.data = torch.full((1,), -1.0)  # as SB3's load does


def scale_in_place(model, source) -> None:
    with torch.no_grad():
        model.actor.mu.weight *= 1.5


def move(model, source) -> None:
    model.policy.double()
    model.policy.float()


@pytest.mark.parametrize("change", [load_all, set_temperature, scale_in_place, move])
def test_what_is_changed_from_outside_is_taken_up(change) -> None:
    source, fast, slow = make(SAC, seed=9), make(FastSAC), make(SAC)
    seeded_train(source, 5)
    for model in (fast, slow):
        seeded_train(model, 3)
        change(model, source)
        seeded_train(model, 3)
    assert_same(fast, slow)


def test_sb3s_own_train_works_on_packed_weights() -> None:
    fast, slow = make(FastSAC), make(SAC)
    for kind in (FastSAC, SAC, FastSAC):
        seeded_train(fast, 3, kind=kind)
        seeded_train(slow, 3)
    assert_same(fast, slow)


def test_a_copied_policy_stays_as_it_was() -> None:
    model = make(FastSAC)
    seeded_train(model, 1)
    twin, before = copy.deepcopy(model.policy), copy.deepcopy(model.policy.state_dict())
    seeded_train(model, 3)
    assert distance(twin.state_dict(), before) == 0
    assert distance(model.policy.state_dict(), before) > 0


def test_learn_calls_callbacks_and_logs_sb3s_keys() -> None:
    class Record(BaseCallback):
        keys: tuple[str, ...] = ()

        def _on_step(self) -> bool:
            self.keys = tuple(self.logger.name_to_value)
            return self.n_calls < 30

    logged = []
    for kind in (FastSAC, SAC):
        record = Record()
        kind("MlpPolicy", Noise(), learning_starts=10, seed=0, device="cpu", policy_kwargs={"net_arch": [8]}).learn(
            100, callback=record, log_interval=10**6
        )
        assert record.n_calls == 30
        logged.append(record.keys)
    assert logged[0] == logged[1]
    assert "train/ent_coef_loss" in logged[0]


def test_bf16_computes_close_to_fp32_and_keeps_float32_weights() -> None:
    exact, rough = (make(FastSAC, precision=p, policy_kwargs={"net_arch": [64, 64]}) for p in ("fp32", "bf16"))
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision()
    for model in (exact, rough):
        seeded_train(model, 1)
    assert before == (torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision())
    for (name, p), q in zip(exact.policy.named_parameters(), rough.policy.parameters(), strict=True):
        assert q.dtype == torch.float32
        if "target" not in name:
            assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.995, name
            assert not torch.equal(p.grad, q.grad), name
    for name, value in exact.logger.name_to_value.items():
        assert rough.logger.name_to_value[name] == pytest.approx(value, rel=0.02, abs=0.01), name


def test_bf16_uses_the_weights_of_the_last_step() -> None:
    """Each call of train renews the low-precision weights, also after changes; within a call the updates must."""
    together, apart = (make(FastSAC, precision="bf16") for _ in range(2))
    seeded_train(together, 4)
    seeded_train(apart, 1)
    for _ in range(3):
        apart.train(1, 32)
    assert distance(together.policy.state_dict(), apart.policy.state_dict()) == 0
    for model in (together, apart):
        with torch.no_grad():
            model.critic.q_networks[0][2].weight *= 2
    move(apart, apart)  # is packed anew
    for model in (together, apart):
        seeded_train(model, 1)
    assert distance(together.policy.state_dict(), apart.policy.state_dict()) == 0


def test_bf16_reads_observations_in_full_precision() -> None:
    """1000 + 0.1 x is 1000 for every x in bf16; the first layer must see x."""
    model = make(FastSAC, precision="bf16")
    seeded_train(model, 1)
    net, x = model._update.critic, torch.randn(256, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight = model.critic.q_networks[0][0].weight
        q = torch.cat([network(1000 + 0.1 * x) for network in model.critic.q_networks], 1)
        packed = net.forward(1000 + 0.1 * x)[:, :, 0].T
    assert weight.dtype == torch.float32
    assert (q - packed).abs().max() < 0.05 * q.std()


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"use_sde": True, "policy_kwargs": {"net_arch": [16]}}, "gSDE"),
        ({"policy_kwargs": {"net_arch": [16], "activation_fn": nn.Tanh}}, "layers of type Tanh"),
    ],
)
def test_what_the_fast_path_does_not_cover_trains_as_in_sb3(kwargs: dict, named: str) -> None:
    with pytest.warns(UserWarning, match=f"no fast path for {named}"):
        fast = make(FastSAC, **kwargs)
    slow = make(SAC, **kwargs)
    for model in (fast, slow):
        seeded_train(model, 3)
    assert_same(fast, slow)
    with pytest.raises(ValueError, match=f"precision 'bf16' is not available for {named}"):
        make(FastSAC, precision="bf16", **kwargs)


def test_images_are_left_to_sb3() -> None:
    class Image(Noise):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (3, 36, 36), np.uint8)

        def _obs(self) -> np.ndarray:
            return self.np_random.integers(0, 255, (3, 36, 36), np.uint8)

    with pytest.warns(UserWarning, match="no fast path for the observation space"):
        FastSAC("CnnPolicy", Image(), buffer_size=10, device="cpu")


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ValueError, match=r"one of \['bf16', 'fp32'\], got 'fp16'"):
        FastSAC("MlpPolicy", Noise(), precision="fp16", device="cpu")


def test_update_is_faster_than_sb3s() -> None:
    models = [make(kind, env=Noise(17, 6), policy_kwargs={}, steps=300) for kind in (SAC, FastSAC)]
    ratios = []
    for turn in range(9):
        seconds = []
        for model in models:
            start = time.process_time()
            seeded_train(model, 10, seed=turn, batch=256)
            seconds.append(time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    assert statistics.median(ratios[1:]) >= 1.3, ratios


def test_learns_pendulum_as_sb3_does() -> None:
    """The first updates of a closed loop follow SB3's, and learning goes on to swing the pendulum up."""
    returns = {}
    for kind, steps in ((SAC, 1600), (FastSAC, 4000)):
        kwargs = {
            "learning_rate": 2e-3,
            "learning_starts": 200,
            "batch_size": 64,
            "policy_kwargs": {"net_arch": [64, 64]},
        }
        model = kind("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **kwargs).learn(steps)
        returns[kind] = np.array([episode["r"] for episode in model.ep_info_buffer])
    np.testing.assert_allclose(returns[FastSAC][:8], returns[SAC], atol=100)
    assert np.median(returns[FastSAC][-5:]) > -400, returns
    assert np.median(returns[FastSAC][:5]) < -1000, returns
