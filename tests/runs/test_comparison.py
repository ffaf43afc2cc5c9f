"""Model classes side by side: all of them take part, the known best wins, and what cannot be fitted is shown."""

import inspect
from dataclasses import replace

import pytest
import torch

from learneddyn import models
from learneddyn.core import generator
from learneddyn.data import from_arrays
from learneddyn.models import AbstractContinual, AbstractDynamics
from learneddyn.offline.objectives import split_log
from learneddyn.runs import comparison
from learneddyn.runs.cells import FAILED, Cells
from learneddyn.runs.comparison import EXCLUDED, Log, Rival, compare, count, rivals
from learneddyn.runs.seeds import silent

MATRIX = torch.tensor([[0.9, 0.2], [-0.2, 0.9]])


def spiral(episodes=8, steps=60, seed=0):
    """Log x' = A x + (0, u), a system that linear models know exactly."""
    rng, states, actions = generator(seed), [], []
    for _ in range(episodes):
        path, pushes = [torch.randn(2, generator=rng)], torch.randn(steps, 1, generator=rng)
        for push in pushes:
            path.append(MATRIX @ path[-1] + torch.cat([torch.zeros(1), push]))
        states.append(torch.stack(path).numpy())
        actions.append(pushes.numpy())
    return from_arrays(states, actions, source="spiral")


@pytest.fixture(scope="module")
def log():
    return Log("spiral", *split_log(spiral()))


def broken(*_, **__):
    """Fail as a class may: with an exception of any kind."""
    raise IndexError("index 7 is out of bounds")


@pytest.fixture
def quick(monkeypatch):
    """Leave four classes: two that fit in closed form, one that is excluded, one that breaks."""
    named = ["Koopman", "SINDy", "MixER", "MultiHead"]
    monkeypatch.setattr(models, "__all__", named)
    monkeypatch.setattr(models.MultiHead, "fit_task", broken)
    monkeypatch.setattr(comparison, "SPEED_SECONDS", 0.01)
    monkeypatch.setattr(comparison, "SETTINGS", {"Koopman": {"linear": {"degree": 1}}, "SINDy": {"": {"degree": 2}}})


def test_every_model_class_takes_part_or_says_why_not(log):
    rows = rivals(log)
    classes = {name.partition(",")[0] for name in rows}
    exported = {name: getattr(models, name) for name in models.__all__}
    wanted = {
        name
        for name, kind in exported.items()
        if isinstance(kind, type)
        and issubclass(kind, AbstractDynamics | AbstractContinual)
        and not inspect.isabstract(kind)
    }
    assert classes == wanted
    assert len(rows) > len(classes), "some classes have variants"
    assert "MixER" in rows
    assert "several environments" in rows["MixER"]
    for rival in rows.values():
        if isinstance(rival, Rival):
            rival.kind(**rival.arguments)
    known = Log("spiral", log.train, log.held_out, angles=(1,), known={"MixER": {"environments": 2}})
    rows = rivals(known)
    assert rows["MixER"].arguments["environments"] == 2
    assert rows["NeuralODE"].arguments["updates"] == comparison.BUDGET["updates"]
    assert rows["ProbabilisticEnsemble"].arguments["angles"] == [1]


def test_closed_forms_know_a_linear_system_and_cells_are_kept(log, quick, tmp_path, monkeypatch):
    cells = Cells(tmp_path, silent, count([log]))
    assert cells.total == 3
    found = compare(log, 0, cells)
    assert found["Koopman, linear"]["one"] < 1e-5
    assert found["Koopman, linear"]["far"] < 1e-4
    assert found["SINDy"]["far"] < 1e-3
    assert found["SINDy"]["horizon"] == 50
    assert found["SINDy"]["still"][1] > 0.1
    assert found["SINDy"]["rate"] > 1000
    assert found["MixER"] == {EXCLUDED: comparison.REASONS["MixER"]}
    assert found["MultiHead"] == {FAILED: "IndexError: index 7 is out of bounds"}
    monkeypatch.setattr(comparison, "judge", lambda *_: pytest.fail("this cell was there"))
    assert compare(log, 0, Cells(tmp_path, silent, 3)) == found
    other = Log("spiral", *split_log(spiral(seed=1)))
    with pytest.raises(pytest.fail.Exception, match="this cell was there"):
        compare(other, 0, Cells(tmp_path, silent, 3))


def test_an_angle_that_crosses_pi_is_judged_the_short_way_round(quick, tmp_path, monkeypatch):
    rng, states, actions = generator(0), [], []
    for _ in range(6):
        pushes = torch.randn(60, 1, generator=rng)
        angle = torch.rand(1, generator=rng) + torch.cat([torch.zeros(1), (0.3 + 0.05 * pushes[:, 0]).cumsum(dim=0)])
        states.append(torch.atan2(angle.sin(), angle.cos())[:, None].numpy())
        actions.append(pushes.numpy())
    train, held_out = split_log(from_arrays(states, actions, source="turns"))
    monkeypatch.setattr(models, "__all__", ["SINDy"])
    found = compare(Log("turns", train, held_out, angles=(0,)), 0, Cells(tmp_path, silent, 1))["SINDy"]
    assert found["one"] < 1e-3
    assert found["far"] < 1e-2
    assert found["still"][1] < 2.5, "no two angles are further apart than half a turn"
    unnamed = compare(Log("turns", train, held_out), 0, Cells(tmp_path, silent, 1))["SINDy"]
    assert unnamed["far"] > 0.5, "another figure, so another cell"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, ImportError, OSError])
def test_who_stops_a_run_or_lacks_a_package_is_no_failed_cell(log, quick, tmp_path, monkeypatch, stop):
    def stopped(*_, **__):
        raise stop

    monkeypatch.setattr(models.MultiHead, "fit_task", stopped)
    with pytest.raises(stop):
        compare(log, 0, Cells(tmp_path, silent, 3))
    assert not list(tmp_path.glob("cells/multihead*"))


def test_settings_that_a_class_does_not_take_end_the_table_before_it_begins(log, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "SETTINGS", {"Koopman": {"": {"degre": 1}}})
    with pytest.raises(TypeError, match="degre"):
        compare(log, 0, Cells(tmp_path, silent, 3))
    assert not list(tmp_path.glob("cells/*"))


def test_rollouts_of_all_seeds_are_of_one_length(log, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "__all__", ["Koopman"])
    assert comparison.horizon_of(log.held_out) == 50
    short = replace(log, horizon=40)
    figures = {
        seed: {"spiral": compare(each, seed, Cells(tmp_path / str(seed), silent, 1))}
        for seed, each in enumerate((log, short))
    }
    assert figures[1]["spiral"]["Koopman, linear"]["horizon"] == 40
    with pytest.raises(ValueError, match=r"'spiral' have \[40, 50\] steps.*Log\(..., horizon=40\)"):
        comparison.table(figures)
    kept = Cells(tmp_path / "0", silent, 1, frozen=True)
    assert compare(replace(log, horizon=50), 0, kept) == figures[0]["spiral"], "the same figures, so the same cell"
    figures[0]["spiral"] = compare(short, 0, Cells(tmp_path / "0", silent, 1))
    assert comparison.still(figures, "spiral")[2] == 40
    monkeypatch.setattr(comparison, "judge", lambda *_: pytest.fail("what 40 steps measure is there"))
    assert compare(short, 0, Cells(tmp_path / "0", silent, 1)) == figures[0]["spiral"]


def test_the_table_shows_what_failed_diverged_or_cannot_take_part(log, quick, tmp_path):
    figures = {seed: {"spiral": compare(log, seed, Cells(tmp_path / str(seed), silent, 3))} for seed in (0, 1)}
    figures[1]["spiral"]["SINDy"] = figures[1]["spiral"]["SINDy"] | {"far": None}
    path = comparison.write(tmp_path, figures)
    text = path.read_text()
    assert "| spiral, k = 50 | *no change* |" in text
    assert "| spiral | MultiHead | **failed** 2x: IndexError: index 7 is out of bounds" in text
    assert "- MixER: tells several environments apart, and this log is of one (see reproduce mixer) (spiral)" in text
    assert "diverged 1x" in text
    assert all(line.count("|") == 10 for line in text.splitlines() if line.startswith("|"))
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert comparison.best(figures, "spiral")[0] == "Koopman, linear"
    assert comparison.told_best(figures)[1].startswith("spiral, 50 steps: Koopman, linear")
    assert comparison.estimate(figures, "spiral", "SINDy", "far") is None


def test_knowledge_that_nobody_asks_for_is_refused():
    comparison.check_known({"Hybrid": {"dt": 0.1}})
    with pytest.raises(ValueError, match=r"known may hold arguments of ComponentLaw, .*, got 'SINDy'"):
        comparison.check_known({"SINDy": {"degree": 1}})
    with pytest.raises(ValueError, match="Hybrid does not take physics; it takes prior"):
        comparison.check_known({"Hybrid": {"physics": "x"}})


def test_a_class_that_failed_on_a_seed_is_never_the_best() -> None:
    cells = {
        0: {"log": {"Good": {"far": 0.5}, "Lucky": {"far": 0.1}}},
        1: {"log": {"Good": {"far": 0.5}, "Lucky": {FAILED: "no"}}},
    }
    found = comparison.best(cells, "log")
    assert found is not None
    assert found[0] == "Good"
