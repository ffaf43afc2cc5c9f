"""How unsure an ensemble is about a step: the six penalties that Lu et al., "Revisiting Design Choices in Offline
Model-Based Reinforcement Learning" (2022), compare.

Every function has the signature of `learneddyn.core.Penalty`, asks all members (not only the elites) and returns one
number per row, in the units of the environment. The six differ by orders of magnitude in scale and tail, so a weight
chosen for one does not carry over to another. With homoscedastic noise `max_aleatoric` cannot tell known states from
unknown ones; the others can. Three compare members and are refused for a model of one, which agrees with itself.

    name                what it is                                       reward head   noise   needs
    max_aleatoric       largest predicted noise of a member              in            yes
    max_pairwise_diff   largest distance between two members' means      out           no      2 members
    ll_var              variance of the members' log-likelihoods         out           yes     2, drawn obs, std > 0
    loo_kl              divergence of one member from the others         out           yes     2, drawn member, std > 0
    ensemble_var        variance of the mixture of all members           out           yes
    ensemble_std        standard deviation of that mixture               out           yes
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.core import Penalty, Prediction, State

KL_MAX = 1e6
"""`loo_kl` overflows where the others agree closely and one does not; this keeps it finite."""


def max_aleatoric(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return ``max_i |std_i|``, the largest norm of a member's predicted noise, a reward head's included.

    Source: Yu et al., "MOPO: Model-based Offline Policy Optimization", 2020.
    """
    norm = torch.linalg.vector_norm(prediction.std, dim=2)
    if prediction.reward_std is not None:
        norm = torch.hypot(norm, prediction.reward_std)
    return norm.amax(dim=0)


def max_pairwise_diff(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return ``max_ij |mean_i - mean_j|``, the largest distance between two members' mean next observations.

    Raises:
        ValueError: the model has only one member.

    Source: Kidambi et al., "MOReL: Model-Based Offline Reinforcement Learning", 2020.
    """
    require_members(max_pairwise_diff, len(prediction.mean))
    mean = prediction.mean.transpose(0, 1)
    return torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist").amax(dim=(1, 2))


def ll_var(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return the variance over members of ``log N(y; mean_i, std_i)``, ``y`` the drawn next observation ``after.obs``.

    The variance divides by the number of members. Heavy-tailed. Not finite where a member's std is zero.

    Raises:
        ValueError: the model has only one member.

    Source: named in Lu et al., "Revisiting Design Choices in Offline Model-Based Reinforcement Learning", 2022.
    """
    require_members(ll_var, len(prediction.mean))
    z = (after.obs - prediction.mean) / prediction.std
    log_likelihood = -(0.5 * z.square() + prediction.std.log() + 0.5 * math.log(2 * math.pi)).sum(dim=2)
    return log_likelihood.var(dim=0, correction=0)


def loo_kl(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return ``KL(N_i || N_-i)``: the member that drew the step (``after.member``) against all others, at most 1e6.

    ``N_-i`` is the Gaussian with the mean and variance of the mixture of the other members.

    Raises:
        ValueError: the model has only one member.

    Source: Pan et al., "Trust the Model When It Is Confident: Masked Model-based Actor-Critic", 2020.
    """
    members = len(prediction.mean)
    require_members(loo_kl, members)
    own = torch.nn.functional.one_hot(after.member, members).to(prediction.mean.dtype).T[..., None]
    mean, variance = (own * prediction.mean).sum(dim=0), (own * prediction.std.square()).sum(dim=0)
    others_mean, others_variance = _mixture(prediction, (1 - own) / (members - 1))
    ratio = (variance + (mean - others_mean).square()) / others_variance
    divergence = 0.5 * (ratio - 1 - variance.log() + others_variance.log()).sum(dim=1)
    return divergence.clamp_max(KL_MAX)


def ensemble_var(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return the norm over dimensions of the mixture's variance, ``mean_i std_i^2 + var_i mean_i``.

    Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017.
    """
    return torch.linalg.vector_norm(_mixture(prediction, _equal(prediction))[1], dim=1)


def ensemble_std(
    obs: Float[Tensor, "b o"], action: Float[Tensor, "b a"], prediction: Prediction, after: State
) -> Float[Tensor, " b"]:
    """Return the norm over dimensions of the mixture's standard deviation (the root of what `ensemble_var` measures).

    Source: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017.
    """
    return torch.linalg.vector_norm(_mixture(prediction, _equal(prediction))[1].sqrt(), dim=1)


PENALTIES: dict[str, Penalty] = {
    "max_aleatoric": max_aleatoric,
    "max_pairwise_diff": max_pairwise_diff,
    "ll_var": ll_var,
    "loo_kl": loo_kl,
    "ensemble_var": ensemble_var,
    "ensemble_std": ensemble_std,
}
COMPARING = ("max_pairwise_diff", "ll_var", "loo_kl")
"""The penalties that compare members with each other."""


def require_members(penalty: Penalty, members: int) -> None:
    """Refuse a penalty that compares members where there are none to compare.

    Args:
        penalty: any; of the six here it is known whether they compare.
        members: of the model.

    Raises:
        ValueError: the penalty compares members, and the model has only one.
    """
    for name in COMPARING:
        if members < 2 and penalty is PENALTIES[name]:
            others = sorted(PENALTIES.keys() - set(COMPARING))
            raise ValueError(
                f"{name} compares the members of a model and needs at least 2, got {members}: fit a model with more "
                f"members, or take one of {others}"
            )


def _equal(prediction: Prediction) -> Float[Tensor, "e 1 1"]:
    members = len(prediction.mean)
    return prediction.mean.new_full((members, 1, 1), 1 / members)


def _mixture(
    prediction: Prediction, weight: Float[Tensor, "e _ 1"]
) -> tuple[Float[Tensor, "b o"], Float[Tensor, "b o"]]:
    """Return mean and variance of the weighted mixture of the members; weights add up to one over the first axis."""
    mean = (weight * prediction.mean).sum(dim=0)
    spread = prediction.std.square() + (prediction.mean - mean).square()
    return mean, (weight * spread).sum(dim=0)
