"""Behaviour cloning: the supervised baseline that an offline method has to beat."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from learneddyn.offline.base import OfflineAlgorithm, descend
from learneddyn.offline.dataset import Data
from learneddyn.offline.policy import OfflinePolicy


class BC(OfflineAlgorithm):
    """Regress the logged actions: ``L_π = mean |π(s) - a|²`` over rows and action columns. Rewards are not used.

    Source: Pomerleau, "ALVINN: An Autonomous Land Vehicle in a Neural Network", 1989.

    Args:
        policy: see `OfflineAlgorithm`.
        data: see `OfflineAlgorithm`.
        normalize_obs: standardise observations.
        **common: see `OfflineAlgorithm`.
    """

    nets: ClassVar[dict[str, Any]] = {"actor": "deterministic", "n_critics": 0}
    from_rewards: ClassVar[bool] = False

    def __init__(
        self,
        policy: str | type[OfflinePolicy] = "MlpPolicy",
        data: Data | None = None,
        *,
        normalize_obs: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(policy, data, normalize_obs=normalize_obs, **common)

    def _update(self) -> dict[str, Float[Tensor, ""]]:
        batch, actor = self._batch(), self.policy.actor
        loss = (actor.mode(batch.obs) - batch.action).square().mean()
        descend(loss, actor.optimizer)
        return {"actor_loss": loss}
