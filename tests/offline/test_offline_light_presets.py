"""The light presets for Reacher are the settings of the table's experiment: the two cannot drift apart."""

from pathlib import Path

import pytest
import yaml

from learneddyn import configs
from learneddyn.reproduce.offline_table import METHODS, MODEL_BASED, PARTS

PRESETS = {path.stem: path for path in (Path(configs.__file__).parent / "offline").glob("reacher-*-light.yaml")}
OF = {f"reacher-{method.lower().replace('+', '-')}-light": method for method in METHODS if method != "BC"}


@pytest.mark.parametrize("name", OF)
def test_a_light_preset_is_what_the_table_measures(name):
    preset, part, method = yaml.safe_load(PRESETS[name].read_text()), PARTS["Reacher"], OF[name]
    given = dict(preset["agent_kwargs"])
    if "dynamics_reward" in given:
        assert given["dynamics_reward"]["class"] == "learneddyn.offline.DynamicsReward"
        given["dynamics_reward"] = given["dynamics_reward"]["config"]
    assert given == part.arguments(method)
    assert preset["agent"] == method.replace("+", "")
    assert preset["updates"] == part.updates[method]
    model = {"class_path": "learneddyn.models.ProbabilisticEnsemble", "init_args": part.model}
    assert preset.get("model") == (model if method in MODEL_BASED else None)


def test_every_method_of_the_table_but_cloning_has_one():
    assert PRESETS.keys() == OF.keys()
