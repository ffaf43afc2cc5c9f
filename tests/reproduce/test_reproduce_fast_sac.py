"""The experiment on FastSAC's learning curves, in small: it runs, and a difference that is there is found."""

import json

from matplotlib.figure import Figure

from learneddyn.reproduce import fast_sac


def test_a_seed_is_measured_and_drawn(monkeypatch, tmp_path):
    for name, value in (("POINTS", 2), ("EPISODES", 1), ("FINAL_EPISODES", 1)):
        monkeypatch.setattr(fast_sac, name, value)
    monkeypatch.setattr(fast_sac, "STEPS", {"InvertedPendulum-v5": 40})
    small = {"learning_starts": 20, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}, "device": "cpu"}
    monkeypatch.setattr(fast_sac, "METHODS", {name: (kind, small) for name, (kind, _) in fast_sac.METHODS.items()})
    told = []
    figures = fast_sac.measure(0, tmp_path, lambda what, share: told.append(what))
    assert json.loads(json.dumps(figures)) == figures
    assert told == ["InvertedPendulum-v5, SB3", "InvertedPendulum-v5, FastSAC"]
    slow, fast = (figures["InvertedPendulum-v5"][name] for name in ("SB3", "FastSAC"))
    assert (slow["curve"], slow["final"]) == (fast["curve"], fast["final"])  # the same replay and seed: the same agent
    assert len(slow["curve"]) == 2
    assert slow["seconds"] > 0
    assert isinstance(fast_sac.CLAIM.draw({0: figures, 1: figures}), Figure)


def test_a_difference_that_is_there_is_found():
    def entry(final, curve):
        return {"final": final, "curve": [curve] * fast_sac.POINTS, "seconds": 1.0}

    figures = {
        seed: {
            "Pendulum-v1": {"SB3": entry(seed, 0.0), "FastSAC": entry(seed + (-1) ** seed, 0.0)},
            "InvertedPendulum-v5": {"SB3": entry(seed, seed), "FastSAC": entry(seed, seed - 1.0)},
        }
        for seed in range(10)
    }
    holds = {finding.what: finding.holds for finding in fast_sac.CLAIM.findings(figures) if finding.holds is not None}
    assert holds == {
        "Pendulum-v1: final return, FastSAC less SB3": True,
        "Pendulum-v1: mean return along the curve, FastSAC less SB3": True,
        "InvertedPendulum-v5: final return, FastSAC less SB3": True,
        "InvertedPendulum-v5: mean return along the curve, FastSAC less SB3": False,
    }
