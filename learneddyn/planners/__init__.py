"""Planners: optimisers of action plans that see nothing of a world but a score.

    RandomShooting    uniform draws, the best one
    CEM               PETS: truncated Gaussian, refitted to elites, executes its mean
    ICEM              CEM with coloured noise, kept elites, fewer draws, executes the best plan
    MPPI              averages weighted by exponentials of scores, in both published forms
    GradientPlanner   Adam through a differentiable score
    NewtonPlanner     Newton's method on the plan
    CategoricalCEM    CEM over discrete actions
    LinearMPC         the optimum for a (lifted) linear model and a quadratic cost; takes its matrices, not a score
    MILP              the proven optimum for a piecewise-affine model; takes its weights, not a score

`learneddyn.agents.MPC` makes a policy of a world and a planner: with CEM and the samplers ``ts1`` or ``tsinf`` it is
the controller of PETS, with ``sampler="mean"`` planning on the average model.
"""

from learneddyn.planners.base import AbstractPlanner, Elites, PlanState, Score
from learneddyn.planners.categorical import CategoricalCEM
from learneddyn.planners.cem import CEM
from learneddyn.planners.gradient import GradientPlanner
from learneddyn.planners.icem import ICEM
from learneddyn.planners.linear_mpc import LinearMPC
from learneddyn.planners.milp import MILP
from learneddyn.planners.mppi import MPPI
from learneddyn.planners.newton import NewtonPlanner
from learneddyn.planners.shooting import RandomShooting

__all__ = [
    "CEM",
    "ICEM",
    "MILP",
    "MPPI",
    "AbstractPlanner",
    "CategoricalCEM",
    "Elites",
    "GradientPlanner",
    "LinearMPC",
    "NewtonPlanner",
    "PlanState",
    "RandomShooting",
    "Score",
]
