import math

import pytest
import torch
from world_doubles import Shifts

from learneddyn.core import Prediction, State, Task
from learneddyn.world import World
from learneddyn.world.penalties import KL_MAX, PENALTIES, loo_kl, max_aleatoric

CLOSED_FORM = {
    # Two heads N(0, 1) and N(1, 1), one dimension, drawn y = 2 by member 0.
    "max_aleatoric": 1.0,
    "max_pairwise_diff": 1.0,
    "ll_var": ((-2.0) - (-0.5)) ** 2 / 4,
    "loo_kl": 0.5,
    "ensemble_var": 1.25,
    "ensemble_std": math.sqrt(1.25),
}


def heads(mean, std, **more):
    """Members along the first axis, one row, dimensions along the last."""
    mean, std = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    return Prediction(mean, std, torch.arange(len(mean)), **more)


def ask(name, prediction, *, y=None, member=0):
    rows, columns = prediction.mean.shape[1:]
    after = State(torch.full((rows, columns), 0.0 if y is None else y), torch.full((rows,), member))
    return PENALTIES[name](torch.zeros(rows, columns), torch.zeros(rows, 1), prediction, after)


@pytest.mark.parametrize("name", PENALTIES)
def test_two_unit_gaussians_one_apart(name):
    value = ask(name, heads([[0.0], [1.0]], [[1.0], [1.0]]), y=2.0)
    assert value == pytest.approx(CLOSED_FORM[name], abs=1e-6)


@pytest.mark.parametrize("name", PENALTIES)
def test_rows_are_judged_apart(name):
    torch.manual_seed(0)
    mean, std = torch.randn(4, 6, 3), torch.rand(4, 6, 3) + 0.5
    obs, action = torch.zeros(6, 3), torch.zeros(6, 2)
    after = State(torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]))
    together = PENALTIES[name](obs, action, Prediction(mean, std, torch.arange(4)), after)
    for row in range(6):
        one = slice(row, row + 1)
        alone = PENALTIES[name](
            obs[one],
            action[one],
            Prediction(mean[:, one], std[:, one], torch.arange(4)),
            State(after.obs[one], after.member[one]),
        )
        assert together[row] == pytest.approx(alone.item(), rel=1e-5)
    assert together.std() > 0


@pytest.mark.parametrize("name", ["max_pairwise_diff", "ll_var", "loo_kl"])
def test_one_member_repeated_does_not_disagree(name):
    torch.manual_seed(0)
    mean, std = torch.randn(1, 5, 3).expand(7, -1, -1), (torch.rand(1, 5, 3) + 0.1).expand(7, -1, -1)
    prediction = Prediction(mean, std, torch.arange(7))
    value = ask(name, prediction, y=0.3, member=3)
    torch.testing.assert_close(value, torch.zeros(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PENALTIES)
def test_all_members_are_asked_not_only_elites(name):
    outlier = heads([[0.0], [0.1], [9.0]], [[1.0], [1.0], [3.0]])
    agreeing = heads([[0.0], [0.1], [0.2]], [[1.0], [1.0], [1.0]])
    assert ask(name, outlier._replace(elites=torch.tensor([0, 1]))) > ask(name, agreeing)


def test_norms_run_over_dimensions():
    prediction = heads([[0.0, 0.0], [3.0, 4.0]], [[3.0, 4.0], [0.0, 0.0]])
    assert ask("max_aleatoric", prediction) == pytest.approx(5.0)
    assert ask("max_pairwise_diff", prediction) == pytest.approx(5.0)
    variance = [4.5 + 2.25, 8 + 4]
    assert ask("ensemble_var", prediction) == pytest.approx(math.hypot(*variance), rel=1e-6)
    assert ask("ensemble_std", prediction) == pytest.approx(math.sqrt(sum(variance)), rel=1e-6)


def test_reward_head_counts_for_max_aleatoric_only():
    bare = heads([[0.0], [1.0]], [[3.0], [1.0]])
    rewarded = bare._replace(reward_mean=torch.tensor([[0.0], [50.0]]), reward_std=torch.tensor([[4.0], [1.0]]))
    assert ask("max_aleatoric", rewarded) == pytest.approx(5.0)
    for name in PENALTIES.keys() - {"max_aleatoric"}:
        assert ask(name, rewarded) == pytest.approx(ask(name, bare).item())


def test_ll_var_follows_the_drawn_next_observation():
    prediction = heads([[0.0], [1.0]], [[1.0], [1.0]])
    # log N(y; 0, 1) - log N(y; 1, 1) = 1/2 - y, so the variance of the two is (1/2 - y)^2 / 4.
    for y in (-3.0, 0.5, 7.0):
        assert ask("ll_var", prediction, y=y) == pytest.approx((0.5 - y) ** 2 / 4, rel=1e-5)


def test_loo_kl_follows_the_member_that_drew():
    prediction = heads([[0.0], [0.0], [6.0]], [[1.0], [1.0], [2.0]])
    # Member 2 against N(0, 1); member 0 against the mixture of N(0, 1) and N(6, 4): mean 3, variance 2.5 + 9.
    assert ask("loo_kl", prediction, member=2) == pytest.approx(math.log(1 / 2) + (4 + 36) / 2 - 0.5, rel=1e-5)
    assert ask("loo_kl", prediction, member=0) == pytest.approx(
        0.5 * math.log(11.5) + (1 + 9) / (2 * 11.5) - 0.5, rel=1e-5
    )


def test_loo_kl_is_clipped():
    assert ask("loo_kl", heads([[0.0], [0.0], [1e4]], [[1e-3], [1e-3], [1e-3]]), member=2).item() == KL_MAX


@pytest.mark.parametrize("name", PENALTIES)
def test_a_model_of_one_member_has_nobody_to_differ_from(name):
    single = heads([[0.0]], [[1.0]])
    model, task = Shifts([[0.0]]), Task("Single-v0")
    if name not in ("max_pairwise_diff", "ll_var", "loo_kl"):
        assert ask(name, single) == pytest.approx(1.0)
        World(model, task, penalty=PENALTIES[name], penalty_weight=1.0)
        return
    told = rf"{name} compares the members of a model and needs at least 2, got 1: .* \['ensemble_std', 'ensemble_var'"
    with pytest.raises(ValueError, match=told):
        ask(name, single)
    with pytest.raises(ValueError, match=told):
        World(model, task, penalty=PENALTIES[name], penalty_weight=1.0)


def test_noise_hides_the_unknown_from_max_aleatoric():
    known = heads([[0.0], [0.0]], [[0.01], [0.01]])
    unknown = heads([[-5.0], [5.0]], [[0.01], [0.01]])
    assert ask("max_aleatoric", known) == ask("max_aleatoric", unknown)
    for name in ("max_pairwise_diff", "ensemble_std", "ensemble_var", "loo_kl"):
        assert ask(name, unknown) > ask(name, known)
    assert PENALTIES["max_aleatoric"] is max_aleatoric
    assert PENALTIES["loo_kl"] is loo_kl
