"""Does an ensemble lose anything by training its layers in bfloat16? Validation likelihood on HalfCheetah-v5.

    python benchmarks/half_training.py [--steps 10000] [--seeds 3] [--out benchmarks/half_training.md]

Both precisions train to the end of early stopping from the same seeds on the same log of random actions. The
likelihood (negative, nats per column) is that of the elites on another log, computed in float32.
Not a contest, and not run by `run.py`: it takes minutes, and its result is one number per seed.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from learneddyn import data, tasks
from learneddyn.core import Transitions, generator
from learneddyn.models import ProbabilisticEnsemble

ENV = "HalfCheetah-v5"


@torch.no_grad()
def nll(model: ProbabilisticEnsemble, rows: Transitions) -> float:
    said = model.predict(rows.obs, rows.action)
    assert said.reward_mean is not None
    assert said.reward_std is not None
    terms = torch.cat(
        [_nll(rows.next_obs, said.mean, said.std), _nll(rows.reward, said.reward_mean, said.reward_std)[..., None]], 2
    )
    return float(terms[said.elites].mean())


def _nll(target: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return 0.5 * ((target - mean) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, test = (
        data.collect(ENV, None, steps=steps, lanes=4, seed=seed, progress=False)
        for steps, seed in ((args.steps, 0), (4_000, 1))
    )
    scores: dict[str, list[float]] = {"fp32": [], "bf16": []}
    lines = [
        "# Training in bfloat16: validation likelihood",
        "",
        f"Written by `python benchmarks/half_training.py`: {ENV}, {args.steps} random steps, until early stopping;",
        "negative log-likelihood of the elites on another log, nats per column.",
        "",
        "| layers | seed | NLL | epochs | CPU s |",
        "|---|---|---|---|---|",
    ]
    for seed in range(args.seeds):
        for name, found in scores.items():
            model = ProbabilisticEnsemble(learn_reward=True, angles=tasks.get(ENV).angles, training_precision=name)
            started = time.process_time()
            report = model.fit(train, rng=generator(seed))
            found.append(nll(model, test))
            spent = time.process_time() - started
            lines.append(f"| {name} | {seed} | {found[-1]:.3f} | {report.epochs} | {spent:.0f} |")
            print(lines[-1], flush=True)
    full, half = (statistics.mean(found) for found in scores.values())
    spread = statistics.stdev(scores["fp32"])
    lines += ["", f"Mean in fp32 {full:.3f}, in bf16 {half:.3f}: a difference of {half - full:+.3f}; the seeds of fp32"]
    lines += [f"have a standard deviation of {spread:.3f}."]
    print(*lines[-2:])
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
