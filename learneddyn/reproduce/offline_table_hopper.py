"""The table of offline methods on Hopper, in two grades: see `learneddyn.reproduce.offline_table`."""

from pathlib import Path

from learneddyn import tasks
from learneddyn.core import Json
from learneddyn.reproduce.offline_table import Part, claim_of, play_parts
from learneddyn.runs.seeds import Notify

PARTS = {
    "Hopper": Part(
        task=tasks.get("Hopper-v5"),
        grades=("medium", "replay"),
        rows=50_000,
        medium=1000.0,
        training=(600_000, 0),
        behaviour={
            "algorithm": "PPO",
            "kwargs": {
                "n_steps": 2048,
                "batch_size": 256,
                "learning_rate": 1e-3,
                "policy_kwargs": {"log_std_init": -0.5},
            },
        },
        model={"num_members": 5, "num_elites": 5, "hidden": [128, 128], "scale_targets": True, "weight_decay": 1e-5}
        | {"learn_reward": True, "max_epochs": 30},
        updates={"BC": 20_000, "IQL": 20_000, "MOPO": 30_000, "RAVL": 20_000, "MOREC": 25_000},
        shared={"policy_kwargs": {"net_arch": [128, 128]}, "normalize_obs": True},
        imagined={"actor_learning_rate": 3e-4, "ent_coef_learning_rate": 3e-4, "real_ratio": 0.5}
        | {"rollout_every": 500, "rollout_batch": 2000, "retain": 20},
        own={
            "MOPO": {"penalty": "ensemble_std", "penalty_weight": "quantile:0.5"},
            "RAVL": {"n_critics": 5},
            "MOREC": {"penalty": "ensemble_std", "penalty_weight": "quantile:0.5", "horizon": 25, "rollout_batch": 200}
            | {"dynamics_reward": {"snapshots": 10, "updates": 5000, "hidden": [128, 128]}},
        },
    ),
}


def measure(seed: int, home: Path, notify: Notify) -> Json:
    """Play all cells of one seed."""
    return play_parts(PARTS, seed, home, notify)


CLAIM = claim_of(
    "offline_table_hopper",
    PARTS,
    measure,
    (),
    "Model-based methods make more of logs of a poor hopper than its clone does; here with a hundredth of the updates.",
    "Published scores take 1 to 3 million updates; these are a hundredth of that, and are no comparison with them. For "
    "the CPU's sake RAVL has 5 critics (10 in its source). Half of a batch is logged and observations standardised. "
    "Tried before the run, for MOPO on the medium data of seed 0: with the sources' 5 % and raw observations it earned "
    "11 after 30,000 updates, with half the batch logged 220 after 9,000, with both 525 after 18,000; a penalty four "
    "times as large made falling the best that a model promised, 9 after 9,000. In what has been played so far no "
    "model-based method surpasses the clone or the behaviour: within this budget the claim fails.",
)
