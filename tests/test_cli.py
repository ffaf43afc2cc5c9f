"""The command line from one end to the other, on tiny budgets, and what it says about bad input."""

from pydoc import locate

import gymnasium as gym
import minari
import pytest
import yaml

from learneddyn import cli
from learneddyn import reproduce as experiments
from learneddyn.cli import main
from learneddyn.data import collect as collect_steps

TINY_MODEL = {"class_path": "ProbabilisticEnsemble", "init_args": {"num_members": 2, "num_elites": 2, "hidden": [8],
              "max_epochs": 2}}  # fmt: skip
TINY_PPO = {"n_steps": 16, "batch_size": 64, "n_epochs": 1, "policy_kwargs": {"net_arch": [8]}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(home, **entries):
    path = home / "settings.yaml"
    path.write_text(yaml.safe_dump(entries))
    return str(path)


def test_collect_fit_train_evaluate_render_in_a_row(home, capsys):
    main(["collect", "InvertedPendulum-v5", "pendulum/random-v0", "--steps", "150", "--progress", "false"])
    assert "pendulum/random-v0" in minari.list_local_datasets()
    model = config(home, model=TINY_MODEL)
    main(["fit", "InvertedPendulum-v5", "[pendulum/random-v0]", "--config", model, "--out", "world", "--seed", "3"])
    env = gym.make("LearnedDyn-v0", world="world")
    assert env.observation_space == gym.make("InvertedPendulum-v5").observation_space

    settings = config(home, algorithm_kwargs=TINY_PPO, imagined_steps=256, lanes=8, episodes=2)
    main(["train", "InvertedPendulum-v5", "--config", settings, "--world", "world", "--out", "run"])
    agent = "run/seed-0/round-0/agent.zip"
    main(["evaluate", "world", agent, "--episodes", "2", "--out", "judged"])
    main(["render", "world", "--agent", agent, "--steps", "10", "--panel", "64", "--out", "both.gif"])
    main(["render", "world", "--steps", "10", "--panel", "64", "--out", "random.gif"])
    for made in ("run/report.html", "judged/report.html", "judged/metrics.json", "both.gif", "random.gif"):
        assert (home / made).stat().st_size > 0, made
    told = capsys.readouterr().out
    assert "seed 0: final real return" in told
    assert "150 steps" in told


def test_train_collects_refits_and_resumes(home, capsys):
    settings = config(home, env_id="InvertedPendulum-v5", grades={"random": 120}, model=TINY_MODEL, rounds=2,
                      real_steps=50, algorithm_kwargs=TINY_PPO, imagined_steps=256, lanes=8, episodes=2)  # fmt: skip
    main(["train", "--config", settings, "--out", "run"])
    first = (home / "run" / "seed-0" / "rounds.json").read_text()
    assert (home / "run" / "seed-0" / "round-1" / "world" / "world.json").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", settings, "--out", "run"])
    assert stopped.value.code == 1
    assert "--resume" in capsys.readouterr().err
    main(["train", "--config", settings, "--out", "run", "--resume", "true"])
    assert (home / "run" / "seed-0" / "rounds.json").read_text() == first


def test_an_agent_can_collect_beside_the_random_policy(home):
    settings = config(home, algorithm_kwargs=TINY_PPO, imagined_steps=128, lanes=8, episodes=1)
    main(["train", "InvertedPendulum-v5", "--config", settings, "--world", "truth:InvertedPendulum-v5", "--out", "run"])
    main(["collect", "InvertedPendulum-v5", "mixed-v0", "--agent", "run/seed-0/round-0/agent.zip", "--algorithm", "PPO",
          "--random_share", "0.5", "--noise", "0.1", "--steps", "40", "--progress", "false"])  # fmt: skip
    assert minari.load_dataset("mixed-v0").total_steps == 40


def test_list_shows_what_there_is(home, capsys):
    main(["list"])
    told = capsys.readouterr().out
    for word in ("Hopper-v5", "inverted-pendulum", "demo/inverted-pendulum", "train/inverted-pendulum", "PPO", "TQC"):
        assert word in told


@pytest.mark.parametrize(
    "path", sorted(cli._PRESETS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_preset_parses(path, home, capsys):
    command = "train" if path.parent.name == "demo" else path.parent.name
    with pytest.raises(SystemExit) as stopped:
        main([command, "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    parts = {"model", "planner"} & set(given)
    assert all(parsed[name] == value for name, value in given.items() if name not in parts)
    assert all(parsed[part]["init_args"].items() >= given[part]["init_args"].items() for part in parts)
    if "model" in given:
        locate(given["model"]["class_path"])(**given["model"]["init_args"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--config", "nowhere"], 2, "no file or train preset 'nowhere'; presets are"),
        (["train", "--config=nowhere"], 2, "no file or train preset 'nowhere'; presets are"),
        (["train", "Foo-v0", "--grades", "{random: 10}"], 1, "no task is known for environment 'Foo-v0'"),
        (["train", "Hopper-v5"], 1, "give exactly one of --world, --dataset and --grades"),
        (["train", "Hopper-v5", "--dataset", "[]"], 1, "give exactly one of --world, --dataset and --grades"),
        (["fit", "Hopper-v5", "[]"], 1, "must name at least one data set, got []"),
        (["train", "Hopper-v5", "--world", "w", "--rounds", "2"], 1, "give --dataset or --grades instead of --world"),
        (["train", "Hopper-v5", "--grades", "{random: 9}", "--algorithm", "SARSA"], 1, "algorithm must be one of"),
        (["train", "Hopper-v5", "--grades", "{random: 9}", "--lanes", "0"], 1, "lanes must be at least 1, got 0"),
        (["train", "Hopper-v5", "--colour", "red"], 2, "--colour"),
        (["fit", "Hopper-v5", "[nobody/has-this-v0]"], 1, "learneddyn collect"),
        (["evaluate", "atlantis", "agent.zip"], 1, "there is no world 'atlantis': shipped worlds are"),
        (["collect", "Moon-v5", "moon/random-v0"], 1, "Environment `Moon` doesn't exist"),
        (["collect", "Hopper-v5", "hop-v0", "--agent", "gone.zip"], 1, "there is no agent 'gone.zip'"),
        (["evaluate", "inverted-pendulum", "gone.zip"], 1, "there is no agent 'gone.zip'"),
        (["render", "inverted-pendulum", "--steps", "0"], 1, "steps must be at least 1, got 0"),
        (["train", "Hopper-v5", "--world", "inverted-pendulum"], 1, "but Hopper-v5 has"),
        (
            ["train", "Hopper-v5", "--grades", "{random: 9}", "--algorithm_kwargs", "{nsteps: 8}"],
            1,
            "PPO does not take nsteps; algorithm_kwargs may hold batch_size",
        ),
        (
            ["train", "InvertedPendulum-v5", "--world", "inverted-pendulum", "--algorithm", "DQN"],
            1,
            "DQN cannot act here",
        ),
        (["demo", "--task", "moonwalk"], 2, "no file or demo preset 'moonwalk'; presets are"),
    ],
)
def test_mistakes_are_named(home, capsys, words, code, message):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_named(home, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", config(home, env_id="Hopper-v5", colour="red")])
    assert stopped.value.code == 2
    assert "colour" in capsys.readouterr().err


def test_words_go_on_top_of_a_file_wherever_it_stands(home, capsys):
    settings = config(home, env_id="Hopper-v5", lanes=8, seed=5)
    for words in (["--seed", "7", "--config", settings], ["--config", settings, "--seed", "7"]):
        with pytest.raises(SystemExit):
            main(["train", *words, "--print_config"])
        parsed = yaml.safe_load(capsys.readouterr().out)
        assert (parsed["seed"], parsed["lanes"], parsed["env_id"]) == (7, 8, "Hopper-v5")


def test_presets_go_by_the_names_that_list_shows(home, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--config", "demo/inverted-pendulum", "--trust_margin", "null", "--print_config"])
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert (parsed["target"], parsed["trust_margin"]) == (950.0, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--horizon", "0"], "horizon must be None or an integer of at least 1, got 0"),
        (["--trust_margin", "-1"], "trust_margin must be None or a finite number of at least 0, got -1"),
        (["--penalty", "fear"], "unknown penalty 'fear'"),
        (["--bounds", "{angle: [2]}"], "bounds must be null or hold some of"),
        (["--penalty", "ll_var", "--model", "Koopman"], "ll_var compares the members of a model"),
        (["--max_rows", "0"], "max_rows must be null or at least 2, got 0"),
        (["--out", "thesis"], "thesis exists and holds no world or model"),
    ],
)
def test_mistakes_in_the_settings_of_a_world_cost_no_fit(home, capsys, monkeypatch, words, message):
    (home / "thesis").mkdir()
    (home / "thesis" / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(cli, "load", lambda *_, **__: pytest.fail("the settings were looked at too late"))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "InvertedPendulum-v5", "[some/data-v0]", *words])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_data_of_another_environment_is_refused_and_the_last_world_stays(home, capsys):
    main(["collect", "InvertedPendulum-v5", "pendulum/random-v0", "--steps", "60", "--progress", "false"])
    model = config(home, model=TINY_MODEL)
    main(["fit", "InvertedPendulum-v5", "[pendulum/random-v0]", "--config", model, "--out", "world"])
    before = (home / "world" / "model.json").read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "HalfCheetah-v5", "[pendulum/random-v0]", "--config", model, "--out", "world"])
    assert stopped.value.code == 1
    assert "the data 'pendulum/random-v0' has the spaces" in capsys.readouterr().err
    assert (home / "world" / "model.json").read_text() == before


def test_collect_counts_the_episodes_of_the_rows_it_kept(home, capsys, monkeypatch):
    data = collect_steps("InvertedPendulum-v5", steps=60, lanes=1, progress=False)
    late = data[data.episode >= 3]
    monkeypatch.setattr(cli, "collect_grade", lambda *_, **__: late)
    main(["collect", "InvertedPendulum-v5", "late-v0", "--grade", "replay"])
    assert f"{len(late)} steps, {int(data.episode.max()) - 2} episodes" in capsys.readouterr().out


def test_several_experiments_are_one_command(home, capsys, monkeypatch):
    played = []
    monkeypatch.setattr(cli, "run_claim", lambda claim, *_, resume, **__: played.append((claim, resume)) or [])
    main(["reproduce", "icem,penalties", "--resume", "true"])
    assert played == [(experiments.get(name), True) for name in ("icem", "penalties")]
    with pytest.raises(SystemExit):
        main(["reproduce", "icem,nothing"])
    assert "there is no experiment 'nothing'" in capsys.readouterr().err
    assert len(played) == 2
