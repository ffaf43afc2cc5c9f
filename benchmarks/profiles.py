"""Where the time of the hot paths goes, by PyTorch's profiler: shares of the time of one thread.

    python benchmarks/profiles.py [--threads 1] [--seconds 0.2]

Operators are those that do the work, not those that call others; what is left is Python and all that is not PyTorch.
The profiler's own cost makes small operators look a little larger than they are.
"""

import time
from collections.abc import Callable
from typing import Any

import imagine
import penalty
import plan
import sac
from contest import Row, Turns, main
from rollout import TASK, ensemble, world_step
from torch.profiler import ProfilerActivity, profile

from learneddyn.agents.buffer import DeviceReplayBuffer
from learneddyn.agents.sac import FastSAC
from learneddyn.planners import ICEM
from learneddyn.world import PENALTIES, World

TABLE, SHOWN = "Where the time goes", 6


def shares(case: str, call: Callable[[], Any], seconds: float) -> list[Row]:
    """Return the operators that take most of the time of a call."""
    for _ in range(3):
        call()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        begun = time.perf_counter()  # the profiler's clock
        while time.perf_counter() - begun < seconds:
            call()
        whole = time.perf_counter() - begun
    spent = {str(each.key): each.self_cpu_time_total / 1e6 / whole for each in seen.key_averages()}
    most = sorted(spent.items(), key=lambda item: -item[1])[:SHOWN]
    rest = sum(spent.values()) - sum(share for _, share in most)
    told = [*most, ("other operators", rest), ("Python and the rest", 1 - sum(spent.values()))]
    return [Row(TABLE, name.removeprefix("aten::"), case, note=f"{share:.0%}") for name, share in told]


def measure(turns: Turns) -> list[Row]:
    worlds = {precision: World(ensemble(precision=precision), TASK) for precision in ("fp32", "bf16")}
    asked = World(ensemble(), TASK, penalty=PENALTIES["max_aleatoric"], penalty_weight=1.0)
    sizes = sac.Sizes(17, 6, 256, 256)
    icem = ICEM.of_budget(100, horizon=plan.HORIZON, beta=0.25)
    cases = {
        "World step, 256 lanes, fp32": world_step("fp32", worlds["fp32"], 256).call,
        "World step, 4096 lanes, fp32": world_step("fp32", worlds["fp32"], 4096).call,
        "World step, 4096 lanes, bf16": world_step("bf16", worlds["bf16"], 4096).call,
        "World step with MOPO's penalty, 4096 lanes, fp32": world_step("fp32", asked, 4096, penalty.MEMBERS).call,
        "Imagination with the policy in the loop, fp32": imagine.ours(20_000, "fp32", "cpu").call,
        "A step of control by iCEM, fp32": plan.ours("fp32", worlds["fp32"], icem, 5).call,
        "SAC update, fp32": sac.updates(FastSAC, sizes, "cpu", replay_buffer_class=DeviceReplayBuffer),
        "SAC update, bf16": sac.updates(
            FastSAC, sizes, "cpu", precision="bf16", replay_buffer_class=DeviceReplayBuffer
        ),
    }
    return [row for case, call in cases.items() for row in shares(case, call, turns.seconds * turns.rounds)]


if __name__ == "__main__":
    main(measure, __doc__)
