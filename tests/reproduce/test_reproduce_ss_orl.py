"""The experiment on action-free trajectories, in small: it runs, and judges what it measured."""

import copy
import json

import pytest
import torch
from matplotlib.figure import Figure

from learneddyn.reproduce import ss_orl


def judged(findings) -> list[bool]:
    return [finding.holds for finding in findings if finding.holds is not None]


def test_it_runs_in_small(monkeypatch, tmp_path):
    small = {"updates": 20, "check_every": 10, "hidden": (8,)}
    monkeypatch.setattr(ss_orl, "INVERSE", small)
    monkeypatch.setattr(ss_orl, "labelling", lambda seed: {f"{where}, {past}": 0.5 for where in ("in", "out")
                                                           for past in (0, 1)})  # fmt: skip
    online = ss_orl.ONLINE | {"learning_starts": 20, "batch_size": 16, "policy_kwargs": {"net_arch": [8]}}
    for name, value in (
        ("STAGES", 2),
        ("STAGE", 40),
        ("STEPS", 600),
        ("UPDATES", 3),
        ("EPISODES", 1),
        ("ONLINE", online),
    ):
        monkeypatch.setattr(ss_orl, name, value)
    figures = ss_orl.measure(0, tmp_path, lambda what, share: None)
    assert json.loads(json.dumps(figures)) == figures
    assert 2 <= figures["log"]["labelled trajectories"] <= 0.1 * figures["log"]["trajectories"] + 1
    assert figures["log"]["returns"] == sorted(figures["log"]["returns"])
    assert all(figures[name] > 0 for name in ss_orl.NAMES)
    assert ss_orl.findings({0: figures, 1: figures})
    assert isinstance(ss_orl.draw({0: figures}), Figure)


def test_the_plant_follows_its_equations():
    rows = ss_orl.hidden_velocity(3, 0, gain=0.3)
    assert len(rows) == 180
    inside = rows.positions() > 0
    before = rows[torch.arange(len(rows))[inside] - 1]
    velocity = before.next_obs - before.obs  # of the step before
    now = rows[inside]
    torch.testing.assert_close(now.next_obs - now.obs, velocity + 0.2 * now.action - 0.05 * now.obs, rtol=0, atol=1e-4)
    assert float(torch.corrcoef(torch.cat((rows.obs, rows.action), 1).T)[0, 1]) < -0.2


def test_it_is_judged_on_every_seed():
    entry = {"hidden velocity": {"in, 0": 0.05, "in, 1": 0.97, "out, 0": 0.03, "out, 1": 0.96}, "r2": 0.9}
    entry["log"] = {"trajectories": 100, "labelled trajectories": 10, "labelled rows": 200, "mean return": 600.0}
    entry |= dict(zip(ss_orl.NAMES, (300.0, 8000.0, 9000.0), strict=True))
    figures = {seed: copy.deepcopy(entry) for seed in range(3)}
    assert ss_orl.pooled_share(list(figures.values())) == pytest.approx((7700 / 8700,) * 3)
    assert judged(ss_orl.findings(figures)) == [True] * 6
    figures[0]["proxy labels"], figures[1]["hidden velocity"]["in, 1"] = 2000.0, 0.5
    assert judged(ss_orl.findings(figures)) == [False, True, True, True, True, False]
    figures[2]["all labels"] = 200.0  # fewer earn more in this seed
    figures[2]["hidden velocity"]["out, 0"] = 0.6
    assert judged(ss_orl.findings(figures)) == [False, True, True, False, False, False]


def test_a_seed_with_nothing_to_gain_hardly_counts():
    """Gains of proxy and of all labels: 300 of 100, 3000 of 4000, 3600 of 4000; the interval is that of the ratio."""
    gains = ((300.0, 100.0), (3000.0, 4000.0), (3600.0, 4000.0))
    seeds = [dict(zip(ss_orl.NAMES, (500.0, 500.0 + proxy, 500.0 + full), strict=True)) for proxy, full in gains]
    share = ss_orl.pooled_share(seeds)
    assert share.value == pytest.approx(6900 / 8100)
    assert 0.75 <= share.low < share.value < share.high <= 3.0
