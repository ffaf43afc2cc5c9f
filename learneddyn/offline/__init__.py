"""Learners from logs, with the surface of Stable-Baselines3: ``IQL("MlpPolicy", "minari/id-v0").learn(100_000)``.

One timestep is one gradient update; no environment is touched except to evaluate. The methods are settings of few
parts.

Updates of actor and critics (`OfflineAlgorithm` holds data, nets, files and logs of all of them):

    part                            method    setting
    `BC`                            BC
    `OfflineTD3`  (td3.py)          TD3       actor_bc = 0, critic_bc = 0        = TD3BC(alpha=inf)
      actor_bc, critic_bc,          TD3+BC    actor_bc = 1 / (alpha columns)     `TD3BC`
      least_critic                  ReBRAC    both, least critic, LayerNorm      `ReBRAC`
    `IQL`         (iql.py)          IQL       expectile, beta
    `OfflineSAC`  (sac.py)          SAC       n_critics = 2, the rest 0          equal to SB3's
      n_critics, diversity,         SAC-N     n_critics                          `SACN`
      conservatism,                 EDAC      n_critics, diversity               `EDAC`
      entropy_backup                CQL       conservatism, no entropy backup    `CQL`
"""

from learneddyn.offline.base import Cosine, Diverged, OfflineAlgorithm
from learneddyn.offline.bc import BC
from learneddyn.offline.iql import IQL
from learneddyn.offline.policy import OfflinePolicy
from learneddyn.offline.sac import CQL, EDAC, SACN, OfflineSAC
from learneddyn.offline.td3 import TD3BC, OfflineTD3, ReBRAC

__all__ = [
    "BC",
    "CQL",
    "EDAC",
    "IQL",
    "SACN",
    "TD3BC",
    "Cosine",
    "Diverged",
    "OfflineAlgorithm",
    "OfflinePolicy",
    "OfflineSAC",
    "OfflineTD3",
    "ReBRAC",
]
