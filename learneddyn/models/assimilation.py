"""What an imperfect model gets wrong, seen through noisy observations: increments of an ensemble Kalman filter.

Source: Evensen, "Sequential data assimilation with a nonlinear quasi-geostrophic model using Monte Carlo methods to
forecast error statistics" (1994); its increments as the target of model-error discovery in Mojgani, Chattopadhyay,
Hassanzadeh, "Discovery of interpretable structural model errors by combining Bayesian sparse regression and data
assimilation" (2022).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from learneddyn.models.angles import apart, near

Step = Callable[[Float[Tensor, "b o"], Float[Tensor, "b a"]], Float[Tensor, "b o"]]


def enkf_increments(
    step: Step,
    obs: Float[Tensor, "n o"],
    action: Float[Tensor, "n a"],
    next_obs: Float[Tensor, "n o"],
    noise: Float[Tensor, " o"],
    rng: torch.Generator,
    members: int = 100,
    angles: Sequence[int] = (),
) -> Float[Tensor, "n o"]:
    """Return the forecast errors that one noisy observation at each end of a step shows, corrected for the gain.

    Every row gets an ensemble around its observation with the spread of the observation noise, forecast by ``step``.
    The analysis moves by the row's own gain times its innovation; because a filter that trusts model and observation
    alike recovers only about half of a systematic error, the increments are multiplied by the inverse of the rows'
    mean gain. (The source feeds its filter the truth with fresh noise per member, so that the noise averages out and
    the gain matters less; a robot's log holds one noisy observation.)

    Args:
        step: the imperfect model, ``(obs [b o], action [b a]) -> next obs [b o]``.
        obs: noisy observations before the step.
        action: applied during the step.
        next_obs: noisy observations after it.
        noise: standard deviation of the observation noise per column, all positive.
        rng: of the ensembles.
        members: of each row's ensemble.
        angles: columns in radians; forecasts and innovations are taken the short way round.

    Raises:
        ValueError: noise that is not positive, or fewer than two members.
    """
    if members < 2 or not bool((noise > 0).all()):
        raise ValueError(f"members must be at least 2 and noise positive, got {members} and {noise.tolist()}")
    n, o = obs.shape
    start = obs[:, None] + noise * torch.randn(n, members, o, generator=rng, device=obs.device)
    forecast = step(start.flatten(0, 1), action.repeat_interleave(members, dim=0)).view(n, members, o)
    forecast = near(forecast, obs[:, None].expand_as(forecast), angles)
    mean = forecast.mean(dim=1)
    offset = forecast - mean[:, None]
    covariance = offset.transpose(1, 2) @ offset / (members - 1)
    gain = torch.linalg.solve(covariance + noise.square().diag(), covariance).transpose(1, 2)
    increment = (gain @ apart(next_obs, mean, angles)[..., None])[..., 0]
    return torch.linalg.solve(gain.mean(dim=0), increment.T).T
