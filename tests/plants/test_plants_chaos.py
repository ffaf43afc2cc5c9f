"""Chaotic flows: the orbits are the equations', statistics are theirs, no action column is needed anywhere."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from learneddyn.core import generator
from learneddyn.envs.learned import LearnedEnv
from learneddyn.models import NeuralODE, ProbabilisticEnsemble
from learneddyn.plants import chaos as chaos_flows
from learneddyn.plants.chaos import Flow, FlowDynamics, dysts_flow, lorenz63
from learneddyn.spaces import Spaces
from learneddyn.tasks import chaos
from learneddyn.testing import check_dynamics, check_world
from learneddyn.world import World


@pytest.fixture(scope="module")
def truth():
    return FlowDynamics(dt=0.05)


def test_a_step_is_the_equations_in_units_of_their_own():
    truth, flow = FlowDynamics(dt=1e-4, substeps=1), lorenz63()
    x = truth.start(5, generator(0)).double()
    mean, std = (x.new_tensor(part) for part in (flow.mean, flow.std))
    change = (truth.step(x) - x) * std / 1e-4
    assert torch.allclose(change, flow.slope(x * std + mean), atol=0.5)
    fine = FlowDynamics(dt=0.05, substeps=50).step(x)
    assert torch.allclose(FlowDynamics(dt=0.05).step(x), fine, atol=1e-4)


def test_the_attractor_is_standardised_and_starts_lie_on_it(truth):
    orbits = truth.orbits(truth.start(40, generator(0)).double(), 400)
    assert orbits.shape == (40, 401, 3)
    assert orbits.mean(dim=(0, 1)).abs().max() < 0.1
    assert (orbits.std(dim=(0, 1)) - 1).abs().max() < 0.1
    assert orbits.abs().max() < 4
    starts = truth.start(200, generator(1))
    assert starts.dtype == torch.float32
    assert (starts.std(dim=0) - 1).abs().max() < 0.25, "phases differ"
    assert torch.equal(starts, truth.start(200, generator(1)))


def test_the_fixed_point_is_held_by_its_push_alone():
    truth = FlowDynamics(dt=0.02, forced=[0], push=2.0)
    rest, flow = (72**0.5, 72**0.5, 27.0), lorenz63()
    target = (torch.tensor([rest]).double() - torch.tensor(flow.mean)) / torch.tensor(flow.std)
    assert torch.allclose(truth.step(target, torch.zeros(1, 1).double()), target, atol=1e-9)
    pushed = truth.step(target, torch.full((1, 1), 5.0).double())
    assert torch.equal(pushed, truth.step(target, torch.ones(1, 1).double())), "actions are clipped"
    assert 0.02 < float(pushed[0, 0] - target[0, 0]) < 0.05
    world = World(truth, chaos.held("Lorenz63", target[0].tolist(), effort=0.5))
    _, step = world.step(world.start(target.float(), generator(0)), torch.zeros(1, 1), generator(0))
    assert float(step.reward) == pytest.approx(0.0, abs=1e-9)
    _, step = world.step(world.start(target.float(), generator(0)), torch.ones(1, 1), generator(0))
    assert float(step.reward) == pytest.approx(-(0.5 + float((pushed - target).square().sum())), rel=1e-3)


def test_no_action_column_is_needed_anywhere(truth):
    data = truth.log(12, 20, generator(0))
    assert data.action.shape == (240, 0)
    assert data.labelled().all()
    assert torch.equal(data.obs[1:20], data.next_obs[:19])
    assert data.spaces is not None
    assert Spaces.from_json(data.spaces.to_json()) == data.spaces
    task = chaos.watched("Lorenz63", initial=truth.start)
    check_dynamics(truth, data)
    check_world(World(truth, task))
    model = ProbabilisticEnsemble(num_members=2, num_elites=1, hidden=[8], max_epochs=1)
    for learned in (model, NeuralODE(dt=0.05, hidden=[8], updates=3)):
        learned.fit(data, rng=generator(0))
        world = World(learned, task)
        check_world(world)
        assert world.rollout(data.obs[:3], lambda obs: obs[:, :0], 4, generator(0)).action.shape == (12, 0)
    env = LearnedEnv(World(truth, task), horizon=3)
    first, _ = env.reset(seed=0)
    after, reward, terminated, _, _ = env.step(env.action_space.sample())
    assert np.allclose(after, truth.step(torch.as_tensor(first)[None])[0], atol=1e-6)
    assert (reward, terminated) == (0.0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dt": 0.0}, "dt must be above 0"),
        ({"forced": [3]}, "distinct coordinates 0 to 2"),
        ({"forced": [0, 0]}, "distinct coordinates"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowDynamics(**arguments)


def test_the_way_to_the_attractor_is_cut_as_finely_as_steps():
    stiff = lorenz63()._replace(name="Stiff", slope=lambda s: 500 * (s.new_tensor([1.0, 1.0, 20.0]) - s))
    starts = FlowDynamics(stiff, dt=0.015, substeps=4).start(3, generator(0))
    rest = (torch.tensor(stiff.start) - torch.tensor(stiff.mean)) / torch.tensor(stiff.std)
    assert torch.allclose(starts, rest.expand(3, -1), atol=1e-5)
    with pytest.raises(FloatingPointError, match=r"3 of 3 orbits of Stiff are not finite.*raise substeps, now 1"):
        FlowDynamics(stiff, dt=0.015, substeps=1).start(3, generator(0))


def test_orbits_that_leave_are_drawn_anew(monkeypatch):
    """x' = x^3 - x comes to rest at 0 from below 1 and leaves from above."""
    flow = Flow("Edge", lambda s: s**3 - s, (0.0,), (1.0,), (0.9,), 1.0, 0.0)
    starts = FlowDynamics(flow).start(200, generator(0))
    assert starts.abs().max() < 0.1
    monkeypatch.setattr(chaos_flows, "_ROUNDS", 1)
    with pytest.raises(FloatingPointError, match=r"\d\d of 200 orbits of Edge are not finite"):
        FlowDynamics(flow).start(200, generator(0))


@pytest.fixture
def dysts(monkeypatch):
    """A package of the same form as dysts, with one flow of each kind that matters."""
    base, flows, package = ModuleType("dysts.base"), ModuleType("dysts.flows"), ModuleType("dysts")
    facts = {
        "nonautonomous": False, "mean": [0.0, 1.0], "std": [2.0, 4.0], "period": 3.0,
        "maximum_lyapunov_estimated": 0.25,
    }  # fmt: skip

    class DynSys:
        ic = np.array([1.0, 0.5])
        metadata = facts
        params = {"rate": 0.1, "weights": np.array([[0.0, 2.0], [1.0, 0.0]])}  # noqa: RUF012

        def __init__(self):
            self.__dict__.update(self.params)

        def rhs(self, X, t):
            return self._rhs(*X.T, t, *self.params.values())

    class Spiral(DynSys):
        @staticmethod
        def _rhs(x, y, t, rate, weights):
            return -rate * x + np.sin(y) + np.heaviside(y, 0) * np.sqrt(4.0), 1.0

    class Vector(DynSys):
        @staticmethod
        def bent(x):
            return np.tanh(x)

        def rhs(self, X, t):
            return np.matmul(self.weights, self.bent(X)) - self.rate * X

    class Inherited(Vector):
        pass

    class Driven(Spiral):
        metadata = facts | {"nonautonomous": True}

    class Hidden(DynSys):
        @staticmethod
        def _rhs(x, y, t, rate, weights):
            return x * t, y

    class Wrapped(Spiral):
        def _postprocessing(self, x, y):
            return np.sin(x), y

    class Rowwise(DynSys):
        @staticmethod
        def _rhs(x, y, t, rate, weights):
            return (x, y) if float(x) > 0 else (y, x)

    class Exotic(DynSys):
        @staticmethod
        def _rhs(x, y, t, rate, weights):
            return np.arcsinh(x), y

    base.DynSys = DynSys
    for kind in (DynSys, Spiral, Vector, Inherited, Driven, Hidden, Wrapped, Rowwise, Exotic):
        setattr(flows, kind.__name__, kind)
    package.base, package.flows = base, flows
    for name, module in (("dysts", package), ("dysts.base", base), ("dysts.flows", flows)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("dysts")
def test_flows_of_dysts_are_stepped_in_batches():
    truth = FlowDynamics("Spiral")
    assert (truth.dt, truth.lyapunov) == (0.03, 0.25)
    slope = truth.flow.slope(torch.tensor([[1.0, 0.5], [2.0, 0.0]]))
    assert torch.allclose(slope, torch.tensor([[np.sin(0.5) - 0.1 + 2.0, 1.0], [-0.2, 1.0]], dtype=torch.float32))


@pytest.mark.usefixtures("dysts")
@pytest.mark.parametrize("name", ["Spiral", "Vector", "Inherited"])
def test_equations_in_numpy_become_torchs(name):
    slope, kind = dysts_flow(name).slope, getattr(sys.modules["dysts.flows"], name)
    states = torch.randn(6, 2, generator=generator(0), dtype=torch.float64)
    expected = np.array([np.array(kind().rhs(state, 0.0), float) for state in states.numpy()])
    assert np.allclose(slope(states), expected, atol=1e-12), "the package's own equations are as they were"
    assert torch.autograd.gradcheck(slope, states.requires_grad_())
    assert slope(states.detach().float()).dtype == torch.float32
    assert slope(torch.zeros(3, 2, device="meta")).device.type == "meta"
    jacobian = torch.func.jacrev(lambda rows: slope(rows).sum(dim=0))(states.detach())
    assert jacobian.shape == (2, 6, 2)


@pytest.mark.usefixtures("dysts")
def test_what_inference_makes_can_be_differentiated_through():
    truth = FlowDynamics("Vector")
    with torch.inference_mode():
        truth.step(torch.zeros(2, 2))
    state = torch.ones(2, 2, requires_grad=True)
    truth.step(state).sum().backward()
    assert state.grad.abs().min() > 0


@pytest.mark.usefixtures("dysts")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Driven", "depends on time"),
        ("Hidden", "depends on time"),
        ("Wrapped", "changes the coordinates of Wrapped"),
        ("Rowwise", "take no batches"),
        ("Exotic", r"np\.arcsinh has no translation"),
        ("Nobody", "no flow"),
        ("DynSys", "no flow"),
    ],
)
def test_other_flows_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        dysts_flow(name)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dysts", None)
    with pytest.raises(ImportError, match=r"learneddyn\[dysts\]"):
        FlowDynamics("Rossler")


@pytest.mark.parametrize(("name", "substeps"), [("Rossler", 2), ("Thomas", 1), ("Lorenz96", 1)])
def test_flows_of_the_real_package_have_their_statistics(name, substeps):
    pytest.importorskip("dysts")
    orbits = (truth := FlowDynamics(name, substeps=substeps)).orbits(truth.start(30, generator(0)).double(), 300)
    assert orbits.mean(dim=(0, 1)).abs().max() < 0.3
    assert (orbits.std(dim=(0, 1)) - 1).abs().max() < 0.3
