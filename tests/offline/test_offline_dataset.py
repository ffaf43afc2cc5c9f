from dataclasses import replace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

from learneddyn import tasks
from learneddyn.core import DataError, Task, Transitions
from learneddyn.data import collect
from learneddyn.offline import BC, IQL, TD3BC
from learneddyn.offline.dataset import check, next_actions, read, return_range, scaled
from learneddyn.spaces import Spaces
from learneddyn.tasks.endless import never


def spoilt(log: Transitions, case: str) -> Transitions:
    nan = log.obs.clone()
    nan[7, 1] = torch.nan
    box, far = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), log.action.clone()
    far[5] = 1.5
    flat, discrete = Spaces(log.spaces.observation, box), Spaces(log.spaces.observation, gym.spaces.Discrete(2))

    def equal(reward: float) -> Transitions:
        return replace(log, reward=torch.full_like(log.reward, reward))

    return {
        "nan": lambda: replace(log, obs=nan),
        "no rows": lambda: log[:0],
        "one episode": lambda: replace(log, episode=torch.zeros_like(log.episode)),
        "equal rewards": lambda: replace(equal(2.5), terminated=torch.zeros_like(log.terminated)),
        "equal episodes": lambda: replace(equal(-1.0), episode=torch.arange(400) // 20),
        "zero rewards": lambda: equal(0.0),
        "no actions": lambda: replace(log, action=log.action[:, :0], spaces=None),
        "nan actions": lambda: replace(log, action=torch.full_like(log.action, torch.nan)),
        "some actions": lambda: replace(log, action=torch.where(torch.arange(400)[:, None] < 4, log.action, torch.nan)),
        "no spaces": lambda: replace(log, spaces=None),
        "unbounded": lambda: replace(log, spaces=flat),
        "discrete": lambda: replace(log, spaces=discrete),
        "outside": lambda: replace(log, action=far),
    }[case]()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan", "1 of 400 rows hold NaN or infinity in 'obs', the first is row 7"),
        ("no rows", "no transitions"),
        ("one episode", "one episode of 400 rows"),
        ("equal rewards", "all 400 rewards .* equal 2.5 and no episode terminates: no action"),
        ("equal episodes", "all 400 rewards .* equal -1.0 and all episodes have the same length: no action"),
        ("zero rewards", "all 400 rewards .* equal 0.0: no action"),
        ("no actions", "holds no action in 400 of its 400 rows; fill them in with learneddyn.offline.semi_supervised"),
        ("nan actions", "holds no action in 400 of its 400 rows"),
        ("some actions", "holds no action in 396 of its 400 rows"),
        ("no spaces", "names no spaces"),
        ("unbounded", "bounded Box as action space"),
        ("discrete", "bounded Box as action space, got Discrete"),
        ("outside", "1 of 400 actions .* lie outside .* row 5"),
    ],
)
def test_bad_data_is_named(log, case, message):
    with pytest.raises(DataError, match=message):
        IQL("MlpPolicy", spoilt(log, case), device="cpu")


def test_missing_terminal_flags_are_found_by_the_task(log):
    task = Task("Example-v0", terminated=lambda next_obs: next_obs[:, 0] > 1.2)
    bare = replace(log, terminated=torch.zeros_like(log.terminated))
    assert bool(log.terminated.any())
    read(log, task)
    read(bare, Task("Example-v0", terminated=never))
    with pytest.raises(DataError, match=r"flags no termination, but .* terminal states of Example-v0"):
        TD3BC("MlpPolicy", bare, task=task, device="cpu")


def test_a_part_of_the_terminal_flags_is_not_enough(log):
    task = Task("Example-v0", terminated=lambda next_obs: next_obs[:, 0] > 1.2)
    whole = replace(log, terminated=task.terminated(log.next_obs))
    count = int(whole.terminated.sum())
    assert count >= 4
    half = replace(whole, terminated=whole.terminated & (whole.terminated.cumsum(0) <= count // 2))
    read(whole, task)
    missing = f"flags only {count // 2} terminations, but {count - count // 2} more of its 400 next observations"
    with pytest.raises(DataError, match=missing):
        read(half, task)


def test_time_limits_among_the_terminal_flags_are_found_by_the_task(log):
    """``done = terminated | truncated``, stored as terminated."""
    task = Task("Example-v0", terminated=lambda next_obs: next_obs[:, 0] > 1.2)
    whole = replace(log, terminated=task.terminated(log.next_obs))
    limits = (torch.arange(400) % 50 == 49) & ~whole.terminated
    message = rf"{int(limits.sum())} of them lead to no terminal state of Example-v0 .* look like time limits"
    with pytest.raises(DataError, match=message):
        read(replace(whole, terminated=whole.terminated | limits), task)
    assert int(limits.sum()) > 1


@pytest.mark.parametrize("flag", [False, True])
def test_one_flag_may_be_rounded_away_in_a_small_log(log, flag):
    task = Task("Example-v0", terminated=lambda next_obs: next_obs[:, 0] > 1.2)
    ends = task.terminated(log.next_obs)
    assert 1 < int(ends.sum()) < 100
    row = int((ends != flag).nonzero()[0])
    read(replace(log, terminated=torch.where(torch.arange(400) == row, torch.tensor(flag), ends)), task)
    lone = replace(log, terminated=torch.zeros_like(ends), obs=-log.obs.abs(), next_obs=-log.next_obs.abs())
    lone.next_obs[7, 0] = 2.0
    with pytest.raises(DataError, match="flags no termination, but 1 more"):
        read(lone, task)


def test_missing_terminal_flags_are_found_by_the_lengths_of_episodes(log):
    """Where observations do not show terminations: a limit makes equal lengths, a failure different ones."""
    task, bare = Task("Example-v0", max_episode_steps=50), replace(log, terminated=torch.zeros_like(log.terminated))
    assert len(log.episode.unique(return_counts=True)[1].unique()) > 2
    with pytest.raises(DataError, match=r"flags no termination, but \d+ of its .* limit .* 50 steps.*endless\.never"):
        read(bare, task)
    read(replace(bare, episode=torch.arange(400) // 30), task)
    read(bare, Task("Example-v0", max_episode_steps=5))
    read(bare, Task("Example-v0"))
    read(log, task)


def test_steps_that_all_cost_the_same_can_be_learned_from(log):
    """-1 until the goal: the sooner an episode ends, the more it is worth."""
    costly = replace(log, reward=torch.full_like(log.reward, -1.0))
    assert read(costly) == (costly, None)


ACTION = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


def drift(steps: int, copied: bool, terminated: bool = False) -> Transitions:
    """Episodes of 20 steps up from 0; ``copied``: the last next_obs is the first observation of the next episode."""
    rng = torch.Generator().manual_seed(0)
    move = 1 + 0.1 * torch.randn(steps // 20, 20, 3, generator=rng)
    after = move.cumsum(1)
    before = after - move
    if copied:
        after[:-1, -1] = before[1:, 0]
    last = torch.arange(steps) % 20 == 19
    spaces = Spaces(gym.spaces.Box(-np.inf, np.inf, (3,), np.float32), ACTION)
    columns = before.reshape(-1, 3), torch.zeros(steps, 1), before.sum(2).flatten(), after.reshape(-1, 3)
    return Transitions(*columns, last & terminated, torch.arange(steps) // 20, spaces)


def test_time_outs_that_lead_to_the_next_episode_are_found():
    """D4RL's bug; not a log cut into pieces, whose next episode really begins where the last one ended."""
    with pytest.raises(DataError, match=r"last next_obs of 9 of 9 episodes .* of the next one \(the first is row 19"):
        read(drift(200, copied=True))
    read(drift(200, copied=False))
    read(drift(200, copied=True, terminated=True))  # no time-outs
    one = drift(200, copied=False)
    stream = torch.linspace(0, 200, 201)[:, None].expand(-1, 3)
    read(replace(one, obs=stream[:-1].contiguous(), next_obs=stream[1:].contiguous()))


def test_goals_that_change_between_episodes_are_no_time_out_bug():
    """The state goes on, and the last next_obs holds the goal that has been drawn anew."""
    stream, spaces = torch.linspace(0, 200, 201)[:, None], Spaces(gym.spaces.Box(-np.inf, np.inf, (2,)), ACTION)
    goal = torch.arange(200)[:, None] // 20
    after = torch.cat((goal[1:], goal[-1:] + 1))
    obs, next_obs = torch.cat((stream[:-1], goal), 1), torch.cat((stream[1:], after), 1)
    rows = replace(drift(200, copied=True), obs=obs, next_obs=next_obs, spaces=spaces)
    read(rows)
    read(replace(rows, obs=obs[:, [1, 1]], next_obs=next_obs[:, [1, 1]]))  # nothing moves within an episode


def test_resets_are_found_in_columns_that_jitter():
    """HalfCheetah's velocities: no single jump is larger than steps are, but all episodes begin alike."""
    rng = torch.Generator().manual_seed(0)
    stream = torch.randn(2001, 17, generator=rng)
    spaces = Spaces(gym.spaces.Box(-np.inf, np.inf, (17,)), ACTION)
    rows = replace(drift(2000, copied=True), obs=stream[:-1].clone(), next_obs=stream[1:].clone(), spaces=spaces)
    for length in (20, 100, 300):
        read(replace(rows, episode=torch.arange(2000) // length))
        begun = stream * torch.where(torch.arange(2001) % length == 0, 0.1, 1.0)[:, None]
        with pytest.raises(DataError, match="first observation of the next one"):
            read(replace(rows, episode=torch.arange(2000) // length, obs=begun[:-1], next_obs=begun[1:]))


def test_cloning_needs_no_rewards(log):
    BC("MlpPolicy", spoilt(log, "equal rewards"), device="cpu")


def test_cloning_needs_neither_time_outs_nor_terminal_flags(log):
    task = Task("Example-v0", terminated=lambda next_obs: next_obs[:, 0] > 1.2)
    BC("MlpPolicy", replace(log, terminated=torch.zeros_like(log.terminated)), task=task, device="cpu")
    BC("MlpPolicy", drift(200, copied=True), device="cpu")
    with pytest.raises(DataError, match="of the next one"):
        check(drift(200, copied=True), rewards=False)  # fitted Q evaluation


def test_returns_that_are_all_equal_cannot_scale_rewards(log):
    rows = log[:12]
    twice = Transitions.cat([rows, rows])
    assert len(set(rows.episode.tolist())) == 1
    with pytest.raises(DataError, match="all 2 episodes have the same return"):
        IQL("MlpPolicy", twice, device="cpu")
    IQL("MlpPolicy", twice, reward_scale=0.1, device="cpu")


def test_return_range(log):
    returns = [float(log.reward[log.episode == number].double().sum()) for number in log.episode.unique()]
    assert return_range(log) == pytest.approx(max(returns) - min(returns))


def test_next_actions_stay_within_their_episode(log):
    following, known = next_actions(log)
    for row in range(len(log)):
        inside = row + 1 < len(log) and log.episode[row + 1] == log.episode[row] and not log.terminated[row]
        assert bool(known[row]) == bool(inside)
        wanted = log.action[row + 1] if inside else torch.zeros(2)
        assert torch.equal(following[row], wanted)


def test_the_action_of_a_dropped_row_is_not_known(log):
    """The row before the gap knows no next action; all others know what they knew."""
    following, known = next_actions(log)
    row = int((known[:-2] & known[1:-1]).nonzero()[0])
    kept = torch.arange(len(log)) != row + 1
    after, still = next_actions(log[kept])
    wanted = known.clone()
    wanted[row] = False
    assert torch.equal(still, wanted[kept])
    assert torch.equal(after, (following * wanted[:, None])[kept])


def test_actions_are_scaled_to_their_box(log):
    box = gym.spaces.Box(np.array([0, -3], np.float32), np.array([4, 1], np.float32))
    data = replace(log, action=torch.tensor([[0.0, -3.0], [4.0, 1.0], [2.0, -1.0], [3.0, 0.0]]).repeat(100, 1))
    data = scaled(replace(data, spaces=Spaces(log.spaces.observation, box)))
    wanted = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(data.action[:4], wanted)


def test_minari_ids_bring_their_task(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collect("Pendulum-v1", "mine/pendulum-v0", steps=450, progress=False)
    agent = BC("MlpPolicy", "mine/pendulum-v0", seed=0, device="cpu")
    assert agent.task == tasks.get("Pendulum-v1")
    assert len(agent.replay) == 450
    assert minari.load_dataset("mine/pendulum-v0").env_spec.id == "Pendulum-v1"
