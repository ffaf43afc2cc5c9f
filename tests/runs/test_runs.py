import json
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from learneddyn import tasks
from learneddyn.core import DataError
from learneddyn.data import collect
from learneddyn.data.store import load_transitions, save_transitions
from learneddyn.models import ProbabilisticEnsemble
from learneddyn.runs import (
    RoundsConfig,
    RunExists,
    RunFolder,
    check_real_spaces,
    for_each_seed,
    rounds,
    run_rounds,
    train_in_world,
)
from learneddyn.runs.report import report_runs
from learneddyn.tasks import registry
from learneddyn.world.draw import RenderError

TINY = RoundsConfig(
    "InvertedPendulum-v5",
    algorithm_kwargs={"n_steps": 16, "batch_size": 64, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}},
    imagined_steps=256,
    lanes=8,
    rounds=2,
    real_steps=60,
    episodes=3,
)


def tiny_model():
    return ProbabilisticEnsemble(2, 2, hidden=(8,), max_epochs=2)


def tiny_data(steps=120, seed=0):
    return collect("InvertedPendulum-v5", steps=steps, lanes=1, seed=seed, progress=False)


def test_a_folder_with_a_run_is_not_touched_without_resume(tmp_path):
    RunFolder(tmp_path / "run", {"seed": 0}).write("rounds.json", [])
    with pytest.raises(RunExists, match="--resume"):
        RunFolder(tmp_path / "run", {"seed": 0})
    RunFolder(tmp_path / "run", {"seed": 0}, resume=True)


def test_a_run_that_failed_before_it_wrote_anything_may_begin_anew_with_other_settings(tmp_path):
    RunFolder(tmp_path / "run", {"dataset": "mistyped"}).child("seed-0")
    assert RunFolder(tmp_path / "run", {"dataset": "right"}).read("config.json")["config"] == {"dataset": "right"}


def test_a_folder_whose_first_write_was_killed_is_as_good_as_new(tmp_path):
    (tmp_path / ".config.json.new").write_text("{")
    RunFolder(tmp_path, {"seed": 0})
    assert RunFolder(tmp_path, {"seed": 0}, resume=True).read("config.json")["config"] == {"seed": 0}


def test_resume_needs_the_same_settings_and_names_the_difference(tmp_path):
    RunFolder(tmp_path / "run", {"seed": 0, "lanes": 8}).write("rounds.json", [])
    with pytest.raises(RunExists, match="seed: 0 -> 1"):
        RunFolder(tmp_path / "run", {"seed": 1, "lanes": 8}, resume=True)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunExists, match="holds no run"):
        RunFolder(tmp_path, {"seed": 0}, resume=True)
    assert (tmp_path / "thesis.tex").exists()


def test_transitions_come_back_bit_equal(tmp_path):
    data = tiny_data()
    save_transitions(tmp_path / "data.safetensors", data)
    again = load_transitions(tmp_path / "data.safetensors")
    assert all(torch.equal(column, again.tensors()[name]) for name, column in data.tensors().items())
    assert again.spaces == data.spaces
    with pytest.raises(DataError, match="spaces"):
        save_transitions(tmp_path / "bare.safetensors", replace(data, spaces=None))


def test_damaged_transitions_are_named(tmp_path):
    path = tmp_path / "data.safetensors"
    save_transitions(path, tiny_data())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"data\.safetensors holds no readable transitions"):
        load_transitions(path)


def square(seed, notify):
    notify("squaring", 0.5)
    assert torch.get_num_threads() == 1
    return seed**2


def fail_on_one(seed, notify):
    if seed == 1:
        raise ArithmeticError(f"seed {seed} cannot")
    time.sleep(0.1)
    return seed


def test_seeds_run_in_processes_and_come_back_by_seed():
    assert for_each_seed(square, [3, 1, 2], workers=2, progress=False) == {3: 9, 1: 1, 2: 4}


def test_one_seed_runs_here_and_reports():
    assert for_each_seed(lambda seed, notify: seed + 1, [4], progress=False) == {4: 5}


def test_every_seed_computes_on_one_thread_wherever_it_runs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert for_each_seed(lambda seed, notify: torch.get_num_threads(), [4, 5], workers=1, progress=False) == {
            4: 1,
            5: 1,
        }
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_failing_seed_raises_its_own_error_once_the_running_ones_have_ended(capfd):
    with pytest.raises(ArithmeticError, match="seed 1 cannot"):
        for_each_seed(fail_on_one, [1, 0, 2, 3, 4, 5, 6], workers=2, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_be_distinct(seeds):
    with pytest.raises(ValueError, match="seeds must be distinct and at least one"):
        for_each_seed(square, seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"start": "moon"}, "start must be 'task', 'data' or 'data:first', got 'moon'"),
        ({"algorithm": "SARSA"}, "algorithm must be one of .*PPO.*got 'SARSA'"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def weights(folder):
    return PPO.load(folder / "agent.zip").policy.state_dict()


def test_a_killed_run_resumes_to_the_same_result(tmp_path, monkeypatch):
    whole = run_rounds(TINY, tiny_model(), tiny_data(), tmp_path / "whole", seed=3)
    assert [entry.real_steps for entry in whole] == [120, 180]

    learn, calls = rounds._learn, []

    def dying(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rounds, "_learn", dying)
        with pytest.raises(KeyboardInterrupt):
            run_rounds(TINY, tiny_model(), tiny_data(), tmp_path / "killed", seed=3)
    assert len(json.loads((tmp_path / "killed" / "rounds.json").read_text())) == 1
    again = run_rounds(TINY, tiny_model(), None, tmp_path / "killed", seed=3)
    assert again == whole
    one, other = weights(tmp_path / "whole" / "round-1"), weights(tmp_path / "killed" / "round-1")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rounds_stop_at_the_target(tmp_path):
    played = run_rounds(replace(TINY, target=1.0), tiny_model(), tiny_data(), tmp_path, seed=0)
    assert len(played) == 1
    assert played[0].real.value >= 1.0


def test_real_steps_stop_at_their_bound(tmp_path):
    config = replace(TINY, rounds=5, max_real_steps=200)
    played = run_rounds(config, tiny_model(), tiny_data(), tmp_path, seed=0)
    assert [entry.real_steps for entry in played] == [120, 180, 200]


def test_judged_episodes_are_never_learned_from(tmp_path):
    run_rounds(TINY, tiny_model(), tiny_data(), tmp_path, seed=0)
    first, last = (load_transitions(tmp_path / f"round-{k}" / "data.safetensors") for k in (0, 1))
    assert torch.equal(first.obs, tiny_data().obs)
    assert torch.equal(last.obs[:120], first.obs)
    assert len(last) == 180


def test_an_empty_folder_needs_data(tmp_path):
    with pytest.raises(ValueError, match="data is needed to begin"):
        run_rounds(TINY, tiny_model(), None, tmp_path)


def test_training_in_the_truth_is_judged_as_agreeing(tmp_path):
    """Error-free dynamics: the same policy from the same starts earns the same in imagination."""
    [entry] = train_in_world(TINY, "truth:InvertedPendulum-v5", tmp_path / "seed-0", seed=0)
    assert entry.gap.value == pytest.approx(0.0, abs=1.0)
    assert entry.model_error < 1e-3
    assert (tmp_path / "seed-0" / "round-0" / "agent.zip").exists()


def test_off_policy_agents_go_through_refits(tmp_path):
    config = replace(
        TINY, algorithm="SAC", algorithm_kwargs={"learning_starts": 64, "policy_kwargs": {"net_arch": [8]}}
    )
    assert len(run_rounds(config, tiny_model(), tiny_data(), tmp_path, seed=0)) == 2


def test_agents_of_short_episodes_are_judged_on_full_ones(tmp_path):
    """Both sides of the comparison run to the task's time limit, whatever horizon the agent learned on."""
    config = replace(TINY, real_id="Pendulum-v1", horizon=5, trust_margin=None, rounds=1, episodes=2)
    data = collect("Pendulum-v1", steps=120, lanes=1, seed=0, progress=False)
    [entry] = run_rounds(config, tiny_model(), data, tmp_path, seed=0)
    # 200 steps of an untrained pendulum cost hundreds, five steps at most 5 * 16.3.
    assert entry.real.value < -300
    assert entry.imagined.value < -300


def test_the_report_says_what_the_first_data_earned(tmp_path):
    data = tiny_data()
    data = replace(data, reward=torch.ones(len(data)))
    lengths = data.episode.bincount()
    run_rounds(replace(TINY, rounds=2), tiny_model(), data, tmp_path / "seed-0", seed=0)
    report_runs(tmp_path, TINY, [0], title="tiny", settings={})
    notes = json.loads((tmp_path / "metrics.json").read_text())["notes"]
    earned = f"{float(data.reward.sum()) / len(lengths):.1f} on average, {int(lengths.max())}.0 at best"
    assert f"seed 0: {earned}, in {len(lengths)} episodes" in notes[1]


def test_the_report_judges_the_last_agents_on_fresh_episodes(tmp_path):
    for seed in (0, 1):
        run_rounds(TINY, tiny_model(), tiny_data(seed=seed), tmp_path / f"seed-{seed}", seed=seed)
    path, final = report_runs(tmp_path, TINY, [0, 1], title="tiny", settings={"lanes": 8})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert Path(path).exists()
    assert set(metrics["seeds"]) == {"0", "1"}
    assert len(metrics["seeds"]["0"]) == 2
    assert f"seed 0: {final[0].mean:.1f}" in metrics["notes"][0]
    assert [metrics["fresh"][seed]["real"]["value"] for seed in ("0", "1")] == [final[0].mean, final[1].mean]
    assert metrics["headline"]["real"]["value"] == pytest.approx((final[0].mean + final[1].mean) / 2)
    assert metrics["curves"]["Imagined return while learning"]["seed 1"]["y"]
    assert np.all(final[0].returns > 0)
    assert (tmp_path / "side_by_side.gif").read_bytes()[:3] == b"GIF"


def test_a_recurrent_agent_gets_the_policy_it_needs(tmp_path):
    recurrent = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}}
    config = replace(TINY, algorithm="RecurrentPPO", algorithm_kwargs=recurrent, imagined_steps=128)
    assert len(train_in_world(config, "inverted-pendulum", tmp_path, seed=0)) == 1


def test_data_of_other_spaces_is_refused_before_anything_is_learned(tmp_path):
    with pytest.raises(ValueError, match=r"the data 'CartPole.*has the spaces .*, but InvertedPendulum-v5 has"):
        run_rounds(TINY, tiny_model(), replace(collect("CartPole-v1", steps=30, progress=False), source="CartPole"),
                   tmp_path / "seed-0")  # fmt: skip
    assert not (tmp_path / "seed-0" / "round-0").exists()


def test_spaces_that_differ_in_bounds_can_be_judged_but_not_joined():
    spaces = tiny_data().spaces
    narrow = spaces._replace(action=gym.spaces.Box(-1.0, 1.0, (1,)))
    check_real_spaces("InvertedPendulum-v5", narrow, "the log")
    with pytest.raises(ValueError, match="the log has the spaces"):
        check_real_spaces("InvertedPendulum-v5", narrow, "the log", exactly=True)
    with pytest.raises(ValueError, match=r"Plant-v0 cannot be made.*LearnedVecEnv"):
        check_real_spaces("Plant-v0", spaces, "the log")


@pytest.mark.parametrize("reason", ["the task has no codec", "nothing can be drawn here"])
def test_what_cannot_be_drawn_is_still_reported(tmp_path, monkeypatch, reason):
    if reason == "the task has no codec":
        monkeypatch.setitem(registry._registered, TINY.real_id, replace(tasks.get(TINY.real_id), codec=None))
    else:

        def fail(*_, **__):
            raise RenderError(reason)

        monkeypatch.setattr("learneddyn.runs.report.side_by_side", fail)
    train_in_world(TINY, "inverted-pendulum", tmp_path / "seed-0", seed=0)
    report_runs(tmp_path, TINY, [0], title="tiny", settings={}, world="inverted-pendulum")
    notes = json.loads((tmp_path / "metrics.json").read_text())["notes"]
    assert any(note.startswith("No picture: ") and reason.split()[-1] in note for note in notes)
    assert (tmp_path / "report.html").exists()
