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
    `GenerativeQL` (ofql.py)        OFQL      average-velocity flow, one step    `OFQL`
      actor, eta                    DQL       diffusion of K denoising steps     `DQL`

The same update inside a learned model, `OfflineMBPO` (model_based.py), is a product of parts, each of which can be off:

    dynamics model   x reward transform  x selector            x critic rule           x data mix
    ``model``: any     ``penalty``,        ``sampler`` or        ``n_critics``,          ``real_ratio``, ``horizon``,
    dynamics           ``penalty_weight``, ``dynamics_reward``   ``diversity``,          ``rollout_batch``,
                       ``pessimism``                             ``conservatism``,       ``rollout_every``,
                                                                 ``inconsistency``       ``retain``

    MBPO, offline      penalty_weight = 0  elite                 twin                    real_ratio .05
    `MOPO`             max_aleatoric, λ    elite                 twin                    .05
    `MOReL`            HALT                elite                 twin                    .05
    `COMBO`            none                elite                 conservatism β          .5
    `MOBILE`           none                elite                 inconsistency           .05
    `RAVL`             none                elite                 n_critics, diversity η  .05
    `MOREC`            max_aleatoric, λ    r^D filter            twin                    .05, horizon 100
    `MORECMOBILE`      none                r^D filter            inconsistency           .05, horizon 100

`RAMBO` (rambo.py) adds the last part, the model's trainer: an adversary of weight λ beside the fit to the log.

With its own weight at 0 (RAVL: with two critics) each is MBPO, bit for bit, and the update of MBPO is SB3's SAC: tests
hold both. A method of your own is another choice of parts: ``OfflineMBPO("MlpPolicy", data, penalty="ensemble_std",
penalty_weight=2.0, n_critics=10, diversity=1.0)``; a new selector is a `learneddyn.world.Sampler`, a new penalty a
`learneddyn.core.Penalty`.

`TrajectoryDiffuser` (trajectory_diffuser.py) has no actor: it proposes a plan of states, refines it in a few denoising
steps, and asks inverse dynamics for the action.

A penalty weight "quantile:c" (weight_rule.py) carries over from one data set to another. Logs whose actions are missing
in part or for the most part go through `semi_supervised` (ss_orl.py) first. `rank` (selection.py) chooses between
policies without the plant, and `save_imagined` writes what an agent has imagined as a Minari data set.
"""

from learneddyn.offline.base import Cosine, Diverged, OfflineAlgorithm
from learneddyn.offline.bc import BC
from learneddyn.offline.dynamics_reward import DynamicsReward
from learneddyn.offline.fqe import PolicyValue, fqe
from learneddyn.offline.imagined import imagined_log, save_imagined
from learneddyn.offline.iql import IQL
from learneddyn.offline.model_based import COMBO, MOBILE, MOPO, RAVL, MOReL, OfflineMBPO
from learneddyn.offline.morec import MOREC, MORECMOBILE
from learneddyn.offline.ofql import DQL, OFQL, GenerativePolicy, GenerativeQL
from learneddyn.offline.policy import OfflinePolicy
from learneddyn.offline.rambo import RAMBO
from learneddyn.offline.sac import CQL, EDAC, SACN, OfflineSAC
from learneddyn.offline.selection import Ranking, model_error, rank, return_in_model
from learneddyn.offline.ss_orl import ProxyLabelled, hide_actions, semi_supervised
from learneddyn.offline.td3 import TD3BC, OfflineTD3, ReBRAC
from learneddyn.offline.trajectory_diffuser import TrajectoryDiffuser, TrajectoryPolicy
from learneddyn.offline.transition_filter import TransitionFilter

__all__ = [
    "BC",
    "COMBO",
    "CQL",
    "DQL",
    "EDAC",
    "IQL",
    "MOBILE",
    "MOPO",
    "MOREC",
    "MORECMOBILE",
    "OFQL",
    "RAMBO",
    "RAVL",
    "SACN",
    "TD3BC",
    "Cosine",
    "Diverged",
    "DynamicsReward",
    "GenerativePolicy",
    "GenerativeQL",
    "MOReL",
    "OfflineAlgorithm",
    "OfflineMBPO",
    "OfflinePolicy",
    "OfflineSAC",
    "OfflineTD3",
    "PolicyValue",
    "ProxyLabelled",
    "Ranking",
    "ReBRAC",
    "TrajectoryDiffuser",
    "TrajectoryPolicy",
    "TransitionFilter",
    "fqe",
    "hide_actions",
    "imagined_log",
    "model_error",
    "rank",
    "return_in_model",
    "save_imagined",
    "semi_supervised",
]
