"""Verdicts of experiments on figures made up here: all hold, each fails by its own number alone, and all is drawn."""

import json
from typing import NamedTuple

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from learneddyn.reproduce import component_law, hybrid_prior, kinematic, medida, mixer, sparse_relu

SEEDS = 3


class Bad(NamedTuple):
    """A number that makes one finding fail."""

    finding: str
    """A part of its text that no other judged finding has."""
    path: tuple
    value: float
    alone: bool = False
    """In one seed only: the mean over seeds is within the bound, the interval's end or the worst seed is not."""


def law_figures():
    errors = {name: [0.1] * component_law.STEPS for name in component_law.COLOURS}
    law = {"speeds": [[-1.0, -2.0], [1.0, 2.0]], "torques": [[1.0, 2.0], [-1.0, -2.0]], "off": [0.03, 0.03]}
    return errors | {"law in the equations": [0.05] * component_law.STEPS, "law": law}


def prior_figures():
    few = {"hybrid": 0.05, "hybrid, sparse": 0.06, "learned": 0.08, "ensemble": 0.09}
    many = {"hybrid": 0.02, "hybrid, sparse": 0.03, "learned": 0.06, "ensemble": 0.07}
    each = {
        f"{name}, {rows} rows": value
        for rows, errors in zip(hybrid_prior.ROWS, (few, many), strict=True)
        for name, value in errors.items()
    }
    return {name: [value] * hybrid_prior.HORIZON for name, value in ({"prior alone": 0.1} | each).items()}


def bicycle_figures():
    stds = {"drawn": 1.0, "full": 1.005, "independent": 0.4}
    moments = {"drawn": 1.0, "first order": 1.2, "exact": 0.995}
    return {
        "spread": {name: [[std] * 4 for _ in range(kinematic.SETTINGS)] for name, std in stds.items()},
        "one step": {name: [value] * len(kinematic.HEADING_STDS) for name, value in moments.items()},
        "holdout_nll": -5.0,
        "coverage": {"full": 0.9, "independent": 0.3, "independent, unrolled": 0.5},
    }


def medida_figures():
    found = dict.fromkeys(medida.TERMS, 0.0) | medida.TRUTH
    ways = {"clean": 0.005, "noisy, plain": 0.5, "noisy, filter": 0.1}
    figures = {way: {"named": 1.0, "error": error, "found": found} for way, error in ways.items()}
    return {name: figures.get(name, {}) | {"1 s": 0.1, "3 s": 0.2} for name in (*ways, "prior alone")}


def mixer_figures():
    count = mixer.EACH * len(mixer.FAMILIES)
    routes = [index // mixer.EACH for index in range(count)]
    contexts = [[float(index), float(route), 1.0, 0.0] for index, route in enumerate(routes)]
    shared = {"few shots": 0.1, "contexts": contexts, "loss": [1.0, 0.1]}
    return {
        "MixER": shared | {"mse": 0.49, "errors": [0.49] * count, "index": 0.91, "routes": routes},
        "one network": shared | {"mse": 1.0, "errors": [1.0] * count, "index": 0.0, "routes": [0] * count},
    }


def relu_figures():
    loop = {"costs": [1.0] * len(sparse_relu.STARTS), "seconds": 0.5}
    planned = loop | {"costs": [1.01] * len(sparse_relu.STARTS)}
    planned |= {"stopped": 0.5, "fallback": 0.0, "late": 0.0, "longest": 1.0}
    return {
        "dense": {"rmse": 1.0, "without noise": 0.5, "counts": {"relu": 64, "identity": 0, "zero": 0}},
        "sparse": {"rmse": 1.49, "without noise": 1.0, "counts": {"relu": 31, "identity": 20, "zero": 13}},
        "encoding": 1e-7,
        "excess": [0.0] * 5,
        **dict.fromkeys(("MILP", "MILP, short"), planned),
        **{name: loop | {"candidates": 500} for name in ("CEM", "CEM, small")},
    }


CASES = {
    component_law: (
        law_figures,
        Bad("law of the cart", ("law", "off", 0), 0.08, alone=True),
        Bad("law of the pole", ("law", "off", 1), 0.08, alone=True),
        *(
            Bad(f"law / {name}", (name, -1), 0.05 / 1.5, alone=True)
            for name in ("equations alone", "network alone", "equations and a residual")
        ),
    ),
    hybrid_prior: (
        prior_figures,
        *(
            bad
            for steps, at in (("1 step:", 0), ("20 steps:", -1))
            for bad in (
                Bad(f"200 rows, {steps}", ("learned, 200 rows", at), 0.04),
                Bad(f"200 rows, {steps}", ("prior alone", at), 0.04),
                Bad(f"2000 rows, {steps}", ("hybrid, 2000 rows", at), 0.061),
                Bad(f"{steps} error, hybrid on 200 rows", ("learned, 2000 rows", at), 0.049),
            )
        ),
    ),
    kinematic: (
        bicycle_figures,
        Bad("full covariance, 20 steps", ("spread", "full", 3, 3), 1.018, alone=True),
        Bad("exact Var", ("one step", "exact", 0), 0.982, alone=True),
        Bad("learned inputs", ("coverage", "full"), 0.84),
        Bad("learned inputs", ("coverage", "full"), 0.96),
    ),
    medida: (
        medida_figures,
        Bad("exactly the missing terms", ("clean", "named"), 0.0, alone=True),
        Bad("clean pairs (100): largest", ("clean", "error"), 0.018, alone=True),
        Bad("corrected filter", ("noisy, filter", "error"), 0.35, alone=True),
    ),
    mixer: (
        mixer_figures,
        Bad("Rand index", ("MixER", "index"), 0.89),
        Bad("MSE of MixER / MSE of one network", ("MixER", "mse"), 0.51),
    ),
    sparse_relu: (
        relu_figures,
        Bad("ReLUs that are gone", ("sparse", "counts", "relu"), 34),
        Bad("sparse / dense", ("sparse", "rmse"), 1.51),
        Bad("program against network", ("encoding",), 1.5e-6, alone=True),
        Bad("refined grid", ("excess", 2), -1.5e-3, alone=True),
        Bad("same CPU time", ("MILP", "costs", 0), 1.07),
    ),
}


def spoilt(figures, bad):
    figures = {seed: json.loads(json.dumps(entry)) for seed, entry in figures.items()}  # a copy that shares no lists
    for entry in list(figures.values())[-1 if bad.alone else 0 :]:
        for key in bad.path[:-1]:
            entry = entry[key]
        entry[bad.path[-1]] = bad.value
    return figures


@pytest.mark.parametrize("experiment", CASES, ids=lambda experiment: experiment.CLAIM.name)
def test_every_verdict_is_its_own_numbers(experiment):
    make, *bads = CASES[experiment]
    claim, good = experiment.CLAIM, {seed: make() for seed in range(SEEDS)}

    findings = claim.findings(good)
    judged = {finding.what for finding in findings if finding.holds is not None}
    assert [finding.what for finding in findings if finding.holds is not None and not finding.holds] == []
    assert len({finding.what for finding in findings}) == len(findings)
    assert all(bool(finding.wanted) == (finding.what in judged) for finding in findings), "a bound has a verdict"
    json.dumps([finding.to_json() for finding in findings], allow_nan=False)

    spoilable = set()
    for bad in bads:
        found = claim.findings(spoilt(good, bad))
        failed = [finding.what for finding in found if finding.holds is not None and not finding.holds]
        assert len(failed) == 1, bad
        assert bad.finding in failed[0], bad
        spoilable.update(failed)
    assert spoilable == judged

    figure = claim.draw(good)
    FigureCanvasAgg(figure).draw()
    assert figure.axes
    assert all(axes.has_data() for axes in figure.axes)
