import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from learneddyn.core import Task, Transitions, generator
from learneddyn.evaluation import (
    Gap,
    Headline,
    Imagined,
    Returns,
    Round,
    Verdict,
    cloud_calibration,
    fidelity_of_log,
    judge,
    objective_mismatch,
    one_step_calibration,
    step_accuracy,
    write_report,
)
from learneddyn.evaluation.page import _ticks
from learneddyn.evaluation.stats import Estimate
from learneddyn.world import World

VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.classes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.links.append(value)
            if name == "class":
                self.classes += value.split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def episodes(values):
    values = np.asarray(values, dtype=float)
    n = len(values)
    return Returns(values, np.ones(n, np.int64), np.zeros(n, bool), np.arange(n), torch.zeros(n, 1))


def dreams(values):
    values = np.asarray(values, dtype=float)
    n = len(values)
    return Imagined(values, np.ones(n, np.int64), np.zeros(n, bool), np.zeros(n, bool))


def round_of(promised, paid, number=0, spread=1.0):
    offsets = np.linspace(-spread, spread, 9)
    return Round.from_episodes(number, 1000 * (number + 1), dreams(promised + offsets), episodes(paid + offsets))


@pytest.mark.parametrize(
    ("promised", "paid", "spread", "verdict"),
    [
        (1000, 990, 1, Verdict.AGREES),
        (1000, 800, 1, Verdict.OPTIMISTIC),
        (1000, 75, 1, Verdict.EXPLOITED),
        (700, 1000, 1, Verdict.PESSIMISTIC),
        (1000, 800, 900, Verdict.UNCLEAR),
        (1000, 1000, 2000, Verdict.UNCLEAR),
        (-150, -160, 1, Verdict.AGREES),
        (-150, -900, 1, Verdict.EXPLOITED),
        (0, 0, 0, Verdict.AGREES),
    ],
)
def test_the_verdict_flips_with_the_gap(promised, paid, spread, verdict):
    assert round_of(promised, paid, spread=spread).verdict is verdict


def test_the_scale_of_the_task_decides_what_a_gap_is_worth():
    gap = Gap(Estimate(105, 104, 106), Estimate(100, 99, 101), Estimate(5, 4, 6))
    assert judge(gap) is Verdict.AGREES
    assert judge(gap, scale=10.0) is Verdict.EXPLOITED
    assert judge(gap, scale=10.0, severe=0.6) is Verdict.OPTIMISTIC


def test_one_episode_cannot_convict():
    lone = Round.from_episodes(0, 10, dreams([1000.0]), episodes([10.0]))
    assert lone.verdict is Verdict.UNCLEAR
    assert Round.from_json(json.loads(json.dumps(lone.to_json(), allow_nan=False))) == lone


def test_the_headline_is_the_worst_last_round_and_counts_the_target():
    good, bad = round_of(1000, 990, 1), round_of(1000, 75, 0)
    assert Headline.of({0: [bad, good]}).verdict is Verdict.AGREES, "a fault that the refit cured is history"
    headline = Headline.of({0: [bad, good], 1: [good], 2: [bad]}, target=950.0)
    assert headline.verdict is Verdict.EXPLOITED
    assert headline.counts == {Verdict.AGREES: 2, Verdict.EXPLOITED: 1}
    assert headline.reached == 2
    assert headline.gap.real.value == pytest.approx((990 + 990 + 75) / 3)


def test_fresh_episodes_decide_the_headline(tmp_path):
    """A round that stops because it scored well was lucky more often than not: its own episodes do not count."""
    lucky, honest = round_of(1000, 990, 1), round_of(1000, 75, 1)
    rounds = {0: [round_of(1000, 10, 0), lucky], 1: [round_of(1000, 990, 0)]}
    assert Headline.of(rounds, 950.0).reached == 2
    headline = Headline.of(rounds, 950.0, {0: honest, 1: round_of(1000, 980, 0)})
    assert (headline.verdict, headline.reached) == (Verdict.EXPLOITED, 1)
    assert headline.gap.real.value == pytest.approx((75 + 980) / 2)
    text = write_report(tmp_path, title="A", rounds=rounds, fresh={0: honest}, target=950.0).read_text()
    assert "fresh episodes that decided nothing" in text
    assert "seed 0 · fresh episodes" in text
    assert "seed 1 · fresh episodes" not in text
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["headline"]["target_reached"] == 1
    assert Round.from_json(metrics["fresh"]["0"]) == honest


@pytest.fixture(scope="module")
def measured(linear):
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(300, 2))
    parts = []
    for _ in range(12):
        after = 0.9 * obs + 0.1 * rng.normal(size=obs.shape)
        parts.append((obs, after))
        obs = after
    before, after = (np.stack([part[i] for part in parts], axis=1).reshape(-1, 2) for i in (0, 1))
    rows = len(before)
    data = Transitions.from_numpy(
        before, np.zeros((rows, 1)), before[:, 0], after, np.zeros(rows, bool), np.repeat(np.arange(300), 12)
    )
    task = Task("Line-v0", reward=lambda o, a, n: o[:, 0], terminated=lambda n: n[:, 0] > 9)
    world = World(linear([[[0.9, 0.0], [0.05, 0.85]]] * 2, std=0.1), task)
    return {
        "fidelity": {"held-out": fidelity_of_log(world, data, horizon=10, rng=generator(0))},
        "calibration": {
            "one step": one_step_calibration(world.dynamics, data),
            "clouds": cloud_calibration(world, data, horizons=(1, 4), rng=generator(0)),
        },
        "accuracy": {"held-out": step_accuracy(world, data, rng=generator(0))},
    }


def gif():
    file = io.BytesIO()
    frames = [Image.new("P", (8, 8), i) for i in range(3)]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def everything(measured):
    return {
        "title": "Line <b>&</b> order",
        "rounds": {0: [round_of(1000, 75, 0), round_of(1000, 990, 1)], 1: [round_of(800, 1000)]},
        **measured,
        "mismatch": objective_mismatch(np.arange(9.0), -np.arange(9.0)),
        "curves": {"imagined return": {"seed 0": ([0, 1, 2], [1.0, float("nan"), 3.0])}},
        "gif": gif(),
        "target": 950.0,
        "config": {"hidden": [200, 200], "note": "</pre><script>alert(1)</script>"},
        "notes": ["x velocity is not observed"],
    }


def test_the_page_is_whole_self_contained_and_escaped(tmp_path, measured):
    text = write_report(tmp_path / "run", **everything(measured)).read_text()
    page = Page(text)
    assert page.open == []
    assert page.links
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert "script" not in page.tags
    assert "<b>&</b>" not in text
    assert page.tags.count("svg") >= 7, "errors (2), reward, PIT (2), coverage, a learning curve"
    assert sum(link.startswith("data:image/gif;base64,") for link in page.links) == 1
    words = " ".join(page.words)
    for expected in ("Promised and paid", "held-out", "x velocity is not observed", "seed 0 · round 1", "gymnasium"):
        assert expected in words
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_every_id_that_a_figure_refers_to_exists_once(tmp_path, measured):
    text = write_report(tmp_path, **everything(measured)).read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two figures must not share an id: one would draw the other's markers"
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_the_banner_changes_with_the_gap(tmp_path):
    exploited = write_report(tmp_path / "a", title="A", rounds={0: [round_of(1000, 75)]}).read_text()
    agrees = write_report(tmp_path / "b", title="B", rounds={0: [round_of(1000, 1000)]}).read_text()
    assert "The agent exploits its model" in exploited
    assert "Imagination and reality agree" in agrees
    assert "card verdict exploited" in exploited
    assert "card verdict agrees" in agrees
    assert "How long imagination follows" not in agrees, "no heading without content"


def test_metrics_round_trip(tmp_path, measured):
    given = everything(measured)
    write_report(tmp_path, **given)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    read = {int(seed): [Round.from_json(r) for r in rounds] for seed, rounds in metrics["seeds"].items()}
    assert read == given["rounds"]
    assert metrics["headline"]["verdict"] == "pessimistic"
    assert metrics["headline"]["seeds"] == {"agrees": 1, "pessimistic": 1}
    assert metrics["fidelity"]["held-out"]["overall"] == measured["fidelity"]["held-out"].overall.tolist()
    assert metrics["calibration"]["clouds"]["horizons"] == [1, 4]
    assert metrics["curves"]["imagined return"]["seed 0"]["y"] == [1.0, None, 3.0]
    assert metrics["mismatch"]["spearman"]["value"] == -1
    assert metrics["config"] == given["config"]
    assert {"torch", "gymnasium", "mujoco", "learneddyn"} <= metrics["versions"].keys()


def test_many_columns_become_a_map(tmp_path, measured):
    wide = measured["fidelity"]["held-out"]
    many = type(wide)(
        **vars(wide)
        | {
            "names": tuple(f"joint {i}" for i in range(30)),
            "scale": np.tile(wide.scale, 15),
            "rmse": np.tile(wide.rmse, (1, 15)),
            "persistence": np.tile(wide.persistence, (1, 15)),
        }
    )
    text = write_report(tmp_path, title="wide", rounds={0: [round_of(1, 1)]}, fidelity={"x": many}).read_text()
    assert "error / persistence" in text
    assert Page(text).open == []


def test_a_failed_report_leaves_the_last_good_one(tmp_path):
    write_report(tmp_path, title="good", rounds={0: [round_of(1000, 1000)]})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="config must be plain JSON"):
        write_report(tmp_path, title="bad", rounds={0: [round_of(1, 1)]}, config={"model": object()})
    with pytest.raises(ValueError, match="config must be plain JSON"):
        write_report(tmp_path, title="bad", rounds={0: [round_of(1, 1)]}, config={"rate": float("nan")})
    with pytest.raises(ValueError, match="picture 'left imagined, right real' begins with b'BMxx"):
        write_report(tmp_path, title="bad", rounds={0: [round_of(1, 1)]}, gif=b"BMxxxxxxxx")
    with pytest.raises(ValueError, match=r"at least one round, got \{0: 1, 1: 0\}"):
        write_report(tmp_path, title="bad", rounds={0: [round_of(1, 1)], 1: []})
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, title="bad", rounds={0: [round_of(1, 1)]}, gif=tmp_path / "none.gif")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(before) == {"metrics.json", "report.html"}


@pytest.mark.parametrize("numbers", [[3.0, 1000.0], [-1500.0, -120.0], [5.0], [0.0, 0.0], [1e-4, 3e-4]])
def test_ticks_are_round_and_enclose_everything(numbers):
    ticks = _ticks(numbers)
    assert ticks[0] <= min(numbers)
    assert ticks[-1] >= max(numbers)
    assert 2 <= len(ticks) <= 7
