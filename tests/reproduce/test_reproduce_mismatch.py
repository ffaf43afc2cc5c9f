"""The experiment on objective mismatch in small: it runs, and judges what it measured."""

import copy
import json

from matplotlib.figure import Figure

from learneddyn.reproduce import mismatch


def test_a_seed_is_measured_judged_and_drawn(monkeypatch, tmp_path):
    for name, value in (
        ("STEPS", 6),
        ("ROWS", 200),
        ("RELEVANT", 20),
        ("WEIGHTED", mismatch.WEIGHTED | {"num_members": 2, "num_elites": 2, "max_epochs": 2}),
        ("EPOCHS", (1, 2)),
        ("ADVERSARIES", ()),
    ):
        monkeypatch.setattr(mismatch, name, value)
    monkeypatch.setattr(mismatch, "ICEM", lambda **_: small())
    figures = mismatch.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    for place in mismatch.PLACES:
        plain, weighted = figures["weighted"][place]["nll"]
        assert plain != weighted
    assert 0 < figures["weighted"]["share"] < 1
    seeds = {0: figures, 1: varied(figures), 2: figures}
    assert [finding.holds for finding in mismatch.findings(seeds) if finding.holds is not None]
    assert isinstance(mismatch.draw(seeds), Figure)


def small():
    from learneddyn.planners import ICEM

    return ICEM(horizon=2, candidates=8, elites=4, iterations=1)


def varied(figures):
    other = copy.deepcopy(figures)
    for part in other["models"].values():
        part["returned"] = [value + 1.0 for value in part["returned"]]
    return other


def judged(better: int) -> bool | None:
    """Return the verdict on ten seeds of which so many have a lower loss near the trajectory."""
    figures = {}
    for seed in range(10):
        near = {"nll": [-9.0, -9.5 if seed < better else -8.5], "mse": [0.1, 0.2]}
        models = {name: {"likelihood": [1.0, seed], "returned": [-5.0, -seed]} for name in mismatch.SETS}
        figures[seed] = {"weighted": {"share": 0.2, "on": near, "near": near, "far": near}, "models": models}
    (verdict,) = [finding.holds for finding in mismatch.findings(figures) if finding.holds is not None]
    return verdict


def test_eight_seeds_of_ten_are_enough_and_seven_are_not():
    assert judged(8) is True
    assert judged(7) is False
