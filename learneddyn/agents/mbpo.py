"""MBPO: short imagined rollouts, branched from real states, train a soft actor-critic.

Source: Janner, Fu, Zhang, Levine, "When to Trust Your Model: Model-Based Policy Optimization" (2019). The loop is
`learneddyn.agents.dyna.Dyna`, which lists where it deviates; the policy optimiser is `FastSAC`. The settings of the
paper's tasks are the presets of ``learneddyn mbpo``. Other policy optimisers are one line each:
"""

from sb3_contrib import TQC, CrossQ
from stable_baselines3 import TD3

from learneddyn.agents.dyna import Dyna
from learneddyn.agents.sac import FastSAC


class MBPO(Dyna, FastSAC):
    """Model-based policy optimisation as published: an ensemble's elites imagine, SAC learns.

    ``MBPO("MlpPolicy", env).learn(125_000)``; arguments are those of `Dyna` and of `FastSAC`.
    """


class DynaTD3(Dyna, TD3):
    """TD3 on imagined rollouts; give ``imagination_noise`` (0.1, say), as its policy is deterministic."""


class DynaTQC(Dyna, TQC):
    """Truncated quantile critics on imagined rollouts."""


class DynaCrossQ(Dyna, CrossQ):
    """CrossQ on imagined rollouts."""
