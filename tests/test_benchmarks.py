"""The arithmetic and the page of benchmarks/; how fast anything is plays no part here."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("contest", "run"):
        sys.modules.pop(name, None)


def module(name):
    return importlib.import_module(name)


def rows_of(contest):
    return [
        contest.Row("T", "ours", "8 lanes", 8, 10.0, seconds=(1e-3, 2e-3, 4e-3)),
        contest.Row("T", "peer", "8 lanes", 4, 10.0, peer=True, seconds=(1e-3, 2e-3, 3e-3)),
        contest.Row("T", "everyone's peer", "", 1, peer=True, seconds=(1e-3, 1e-3, 1e-3)),
        contest.Row("T", "matrix products, fp32", "512", 1, 160_000.0, seconds=(1.0, 1.0, 1.0)),
    ]


def test_ratios_are_medians_of_the_turns_and_count_rows():
    contest = module("contest")
    ours, peer, other, _ = rows = rows_of(contest)
    assert ours.times_faster_than(peer) == pytest.approx([2.0, 2.0, 1.5])
    assert ours.times_faster_than(other) == pytest.approx([8.0, 4.0, 2.0])
    text = contest.lines([*rows, contest.missing("T", "absent", ImportError("No module named 'absent'"))])
    assert text[0] == "| case |  | µs a call | rows/s | of fp32 ceiling | x peer | x everyone's peer |"
    assert text[2] == "| 8 lanes | ours | 2000.0 [1200.0..3600.0] | 4,000 | 25% | 2.00 | 4.00 |"
    assert text[3] == "| 8 lanes | peer | 2000.0 [1200.0..2800.0] | 2,000 | 12% |  | 2.00 |"
    assert "not installed (No module named 'absent')" in text[-1]
    assert not any("matrix" in line for line in text)


def test_a_contest_times_every_turn_and_puts_products_beside_what_counts_operations():
    contest = module("contest")
    turns = contest.Turns(seconds=1e-4, rounds=3)
    calls = []
    rows = turns.contest("T", [contest.Contestant("one", "", 2, lambda: calls.append(1))])
    assert [(row.table, row.name, row.rows, len(row.seconds)) for row in rows] == [("T", "one", 2, 3)]
    assert len(calls) >= 5  # to size the turns, to warm up, three turns
    names = [row.name for row in turns.contest("T", [contest.Contestant("one", "", 2, sum, 5.0)._replace(call=list)])]
    assert set(names) == {"one", "matrix products, fp32", "matrix products, bf16"}


@pytest.mark.parametrize(
    ("case", "against", "wanted", "found"),
    [
        ("8 lanes", "peer", 2.0, ("2.00 x", True)),
        ("8 lanes", "peer", 2.1, ("2.00 x", False)),
        ("8 lanes", "everyone's peer", 4.5, ("4.00 x", False)),
        ("8 lanes", "us", 2000, ("2000.0 µs", True)),
        ("8 lanes", "us", 1999, ("2000.0 µs", False)),
        ("8 lanes", "ceiling", 0.2, ("25%", True)),
        ("9 lanes", "peer", 1.0, None),
        ("8 lanes", "absent", 1.0, None),
    ],
)
def test_goals(case, against, wanted, found):
    contest, run = module("contest"), module("run")
    rows = [*rows_of(contest), contest.missing("T", "absent", ImportError("no"))]
    assert run.Goal("T", case, "ours", against, wanted).judge(rows) == found
    least = rows[0]._replace(name="products alone fp32")
    judged = run.Goal("T", "8 lanes", "peer", "everyone's peer", 1).judge([*rows, least])
    assert judged == ("2.00 x (products alone fp32: 4.00 x)", True)
    judged = run.Goal("T", "8 lanes", "peer", "us", 2000).judge([*rows, least])
    assert judged == ("2000.0 µs (products alone fp32: 2000.0 µs)", True)
    memory = contest.Row("M", "peak", "all", amount=1.5)
    assert run.Goal("M", "all", "peak", "amount", 2).judge([memory]) == ("1.50 GiB", True)
    assert run.Goal("M", "all", "peak", "amount", 1).judge([memory]) == ("1.50 GiB", False)


def test_goals_name_tables_of_scripts_that_are_run():
    run = module("run")
    scripts = {*run.ONE_THREAD, *run.TWO_THREADS, *run.ON_GPU}
    sources = [(FOLDER / f"{script}.py").read_text() for script in scripts]
    for table in (*(goal.table for goal in run.GOALS), *run.NOTES):
        assert any(f'"{table}"' in source for source in sources), table


def test_a_note_stands_above_its_own_table(monkeypatch):
    run = module("run")
    monkeypatch.setattr(run, "NOTES", {"T": "They differ."})
    rows = [run.Row(table, "ours", "c", amount=1.0) for table in ("T", "U")]
    text = run.page({run.Setting("one thread", 1, "cpu", ()): rows}, [], ["0", "0"], {})
    assert "### T\n\nThey differ.\n\n| case" in text
    assert "### U\n\n| case" in text


def test_a_script_that_fails_is_named_and_the_others_count(tmp_path, monkeypatch):
    run = module("run")
    good = "import contest\ndef measure(turns):\n    return [contest.Row('T', 'ours', 'c', amount=turns.rounds)]\n"
    (tmp_path / "good.py").write_text(f"{good}contest.main(measure, '')\n")
    (tmp_path / "bad.py").write_text("raise RuntimeError('broken')\n")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    setting = run.Setting("one thread", 1, "cpu", ("bad", "good"))
    found = list(run.play(setting, 0.1, 3))
    rows, failed = [row for part, _ in found for row in part], [what for _, bad in found for what in bad]
    assert [(row.name, row.amount) for row in rows] == [("ours", 3)]
    assert failed == ["bad (one thread): RuntimeError: broken"]
    text = run.page({setting: rows}, failed, ["0.1", "0.2"], {})
    assert "- Failed: bad (one thread): RuntimeError: broken" in text
    assert "not measured" in text


def test_a_page_hands_its_figures_on_to_the_next_one_of_the_same_machine(monkeypatch):
    run = module("run")
    monkeypatch.setattr(run, "GOALS", run.GOALS[:1])
    goal, here = run.GOALS[0], run.machine()[0]
    setting = run.Setting("one thread", 1, "cpu", ())
    rows = [
        run.Row(goal.table, name, goal.case, 1, seconds=[time]) for name, time in (("fp32", 1.0), ("mbrl-lib", 2.0))
    ]
    first = run.page({setting: rows}, [], ["0", "0"], {})
    assert run.earlier(first, here) == {goal.text: ["2.00 x"]}
    second = run.page({setting: rows}, [], ["0", "0"], run.earlier(first, here))
    assert run.earlier(second, here) == {goal.text: ["2.00 x", "2.00 x"]}
    assert run.earlier(second, "another machine") == {}
