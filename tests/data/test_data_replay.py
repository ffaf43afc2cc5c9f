import pytest
import torch
from safetensors.torch import save_file

from learneddyn.core import Transitions, generator
from learneddyn.data.replay import MixedReplay, Replay, ReplayFileError


def rows(first: int, count: int, obs_dim: int = 2, action_dim: int = 1) -> Transitions:
    """Transitions whose reward numbers them, and whose other columns follow from the number."""
    number = torch.arange(first, first + count, dtype=torch.float32)
    return Transitions(
        obs=number[:, None] + torch.arange(obs_dim) / 10,
        action=-number[:, None].repeat(1, action_dim),
        reward=number,
        next_obs=number[:, None] + 1 + torch.arange(obs_dim) / 10,
        terminated=number % 3 == 0,
        episode=torch.zeros(count, dtype=torch.long),
    )


def numbers(replay: Replay) -> list[float]:
    return replay.unpack(replay.rows()).reward.tolist()


def test_keeps_the_newest_rows_whatever_the_sizes_of_the_additions() -> None:
    replay, seen = Replay(7, 2, 1), 0
    for count in (3, 0, 3, 5, 1, 7, 2, 20, 4):
        replay.add(rows(seen, count))
        seen += count
        assert numbers(replay) == list(range(max(0, seen - 7), seen))
        assert len(replay) == min(seen, 7)


def test_a_sampled_row_is_one_of_the_added_transitions() -> None:
    replay = Replay(100, 2, 1)
    replay.add(rows(0, 50))
    batch = replay.sample(400, generator(0))
    asked = rows(0, 50)[batch.reward.long()]
    for name in ("obs", "action", "next_obs", "reward"):
        assert torch.equal(getattr(batch, name), getattr(asked, name)), name
    assert torch.equal(batch.terminated.bool(), asked.terminated)


def test_samples_every_row_equally_often_and_no_row_that_was_never_written() -> None:
    replay = Replay(1000, 2, 1)
    replay.add(rows(0, 10))
    counts = torch.bincount(replay.sample(20_000, generator(0)).reward.long(), minlength=10)
    assert len(counts) == 10
    chi_square = ((counts - 2000.0) ** 2 / 2000).sum()
    assert chi_square < 27.9  # 0.1 % point of chi-square with 9 degrees of freedom


def test_one_generator_state_gives_one_batch() -> None:
    replay = Replay(50, 2, 1)
    replay.add(rows(0, 50))
    first, again, other = (replay.sample(20, generator(seed)).reward for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("capacity", [3, 10, 30])
def test_resize_keeps_the_newest_and_goes_on_as_a_ring(capacity: int) -> None:
    replay = Replay(10, 2, 1)
    replay.add(rows(0, 14))
    replay.resize(capacity)
    assert numbers(replay) == list(range(14 - min(capacity, 10), 14))
    replay.add(rows(14, 2))
    assert numbers(replay) == list(range(16 - min(capacity, 12), 16))


def test_a_saved_replay_comes_back_and_draws_the_same(tmp_path) -> None:
    replay = Replay(10, 2, 1)
    replay.add(rows(0, 14))
    replay.save(tmp_path / "replay.safetensors")
    back = Replay.load(tmp_path / "replay.safetensors")
    assert numbers(back) == numbers(replay)
    assert (back.capacity, back.obs_dim, back.action_dim) == (10, 2, 1)
    assert torch.equal(back.draw(20, generator(0)), replay.draw(20, generator(0)))
    back.add(rows(14, 1))
    assert numbers(back) == list(range(5, 15))
    assert [path.name for path in tmp_path.iterdir()] == ["replay.safetensors"]


def test_unreadable_files_are_named(tmp_path) -> None:
    with pytest.raises(ReplayFileError, match=r"missing\.safetensors is not a readable replay"):
        Replay.load(tmp_path / "missing.safetensors")
    replay = Replay(10, 2, 1)
    replay.add(rows(0, 10))
    replay.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-20])
    with pytest.raises(ReplayFileError, match="cut is not a readable replay"):
        Replay.load(tmp_path / "cut")
    save_file({"rows": torch.zeros(2, 3)}, tmp_path / "other")
    with pytest.raises(ReplayFileError, match="format None, this version reads '1'"):
        Replay.load(tmp_path / "other")


@pytest.mark.parametrize(("share", "batch", "real"), [(0.05, 256, 13), (0.05, 100, 5), (0.0, 64, 0), (1.0, 64, 64)])
def test_every_batch_has_the_same_number_of_real_rows(share: float, batch: int, real: int) -> None:
    parts = Replay(100, 2, 1), Replay(100, 2, 1)
    parts[0].add(rows(0, 100))
    parts[1].add(rows(1000, 100))
    mixed, rng = MixedReplay(*parts, share), generator(0)
    for _ in range(5):
        reward = mixed.sample(batch, rng).reward
        assert len(reward) == batch
        assert (reward[:real] < 1000).all()
        assert (reward[real:] >= 1000).all()


def test_while_one_part_is_empty_the_other_gives_the_batch() -> None:
    real, imagined = Replay(10, 2, 1), Replay(10, 2, 1)
    mixed = MixedReplay(real, imagined, 0.5)
    with pytest.raises(ValueError, match="empty replay"):
        mixed.sample(4, generator(0))
    imagined.add(rows(1000, 10))
    assert (mixed.sample(4, generator(0)).reward >= 1000).all()
    imagined.clear()
    real.add(rows(0, 10))
    assert (mixed.sample(4, generator(0)).reward < 1000).all()
    assert len(mixed) == 10


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Replay(0, 2, 1)
    with pytest.raises(ValueError, match=r"7 columns \(obs 2, action 1, next_obs 2.*got 9"):
        Replay(5, 2, 1).add(rows(0, 3, obs_dim=3))
    with pytest.raises(ValueError, match="empty replay"):
        Replay(5, 2, 1).sample(3, generator(0))
    with pytest.raises(ValueError, match=r"real_share must be in \[0, 1\], got 1.5"):
        MixedReplay(Replay(5, 2, 1), Replay(5, 2, 1), 1.5)
    with pytest.raises(ValueError, match="differ"):
        MixedReplay(Replay(5, 2, 1), Replay(5, 3, 1))
