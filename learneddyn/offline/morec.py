"""MOREC: imagination kept near the real system by a learned dynamics reward, on MOPO and on MOBILE.

    learn the ensemble and r^D on the log (once)                       `learneddyn.offline.dynamics_reward`
    imagine 100 steps from few logged states; at every step            `learneddyn.offline.transition_filter`
        draw ``filter_draws`` next states and rewards from every elite
        choose one per row, softmax of r^D / κ or the largest r^D
        end the rollout, terminated, where r^D of the choice is below r_min
    update as MOPO or MOBILE do

Any other row of the table in `learneddyn.offline.model_based` takes the filter too: ``RAVL("MlpPolicy", data,
dynamics_reward=DynamicsReward(), horizon=100, rollout_batch=2000)``.

Source: Luo, Xu, Cao, Yu, "Reward-Consistent Dynamics Models are Strongly Generalizable for Offline Reinforcement
Learning", 2024; constants of its published code, but for two. r_min, 0.6 there, under which a quarter of a log may lie
here (26 % of Hopper's medium grade in `learneddyn.reproduce.offline_table_hopper`), is a quantile of r^D over the log,
0.01. Candidates, clipped to plus and minus 25 there, are not clipped, since units differ between tasks: the presets for
D4RL's tasks say ``filter_limit: 25.0``.
Every state of a rollout costs candidates times snapshots rows of the discriminator: without a GPU keep
``rollout_batch`` at a few hundred.
"""

from collections.abc import Callable
from typing import Any

from learneddyn.core import RewardFn, Transitions
from learneddyn.offline.base import Cosine
from learneddyn.offline.dataset import Data
from learneddyn.offline.dynamics_reward import DynamicsReward
from learneddyn.offline.model_based import OfflineMBPO
from learneddyn.offline.policy import OfflinePolicy


class MOREC(OfflineMBPO):
    """MOREC-MOPO: MOPO whose imagination is filtered by the dynamics reward.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        dynamics_reward: see `OfflineMBPO`; None learns one with the defaults of `DynamicsReward`.
        penalty_weight: λ of MOPO's penalty, 0.25 to 15 in the published code for D4RL.
        horizon: see `OfflineMBPO`.
        rollout_batch: see `OfflineMBPO`.
        **common: see `OfflineMBPO`. ``filter_temperature=0`` is the published code's other selector.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        dynamics_reward: DynamicsReward | RewardFn | None = None,
        penalty_weight: float | str = 0.5,
        horizon: int = 100,
        rollout_batch: int = 2000,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            dynamics_reward=dynamics_reward,
            penalty_weight=penalty_weight,
            horizon=horizon,
            rollout_batch=rollout_batch,
            **common,
        )

    def _fill(self, rows: Transitions) -> None:
        if self.dynamics_reward is None and self._reward_card is None:
            self.dynamics_reward = DynamicsReward()
        super()._fill(rows)


class MORECMOBILE(MOREC):
    """MOREC-MOBILE: MOBILE whose imagination is filtered by the dynamics reward.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        inconsistency: weight of MOBILE's U, 0.1 to 7.5 in the published code for D4RL.
        penalty_weight: see `OfflineMBPO`.
        actor_learning_rate: see `OfflineAlgorithm`.
        entropy_backup: see `OfflineSAC`.
        **common: see `MOREC`.
    """

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        inconsistency: float = 0.5,
        penalty_weight: float | str = 0.0,
        actor_learning_rate: float | Callable[[float], float] | None = Cosine(1e-4),  # noqa: B008 (immutable)
        entropy_backup: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(
            policy,
            data,
            inconsistency=inconsistency,
            penalty_weight=penalty_weight,
            actor_learning_rate=actor_learning_rate,
            entropy_backup=entropy_backup,
            **common,
        )
