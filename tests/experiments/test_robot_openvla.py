"""Which of a published checkpoint's statistics scale the actions."""

import json

import pytest

from experiments.robot_openvla import statistics_key
from experiments.robot_policies import file_name
from experiments.robot_vla import CheckpointOptions
from fastdrive_jax.errors import UserError

SUITE, CLEANED, OWN = "libero_spatial", "libero_spatial_no_noops", "my_kitchen"


def write(folder, *keys):
    action = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    content = {"norm_stats": {key: {"action": action} for key in keys}}
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "suite", "taken"),
    [
        ((CLEANED, OWN), SUITE, CLEANED),
        ((CLEANED, SUITE), SUITE, SUITE),  # as OFT's own evaluation looks for them
        (("bridge_orig", "fractal20220817_data"), "simpler_drawer", "fractal20220817_data"),
        (("bridge_orig", "simpler_bridge"), "simpler_bridge", "bridge_orig"),
    ],
)
def test_a_suite_has_its_own(tmp_path, capsys, keys, suite, taken):
    write(tmp_path, *keys)
    assert statistics_key(tmp_path, suite) == taken
    assert capsys.readouterr().err == ""


def test_the_only_ones_are_taken_and_named(tmp_path, capsys):
    write(tmp_path, OWN)
    assert statistics_key(tmp_path, SUITE) == OWN
    assert f"{SUITE} are scaled by the statistics of {OWN}, the only" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [(OWN, "my_garage"), ("libero_goal_no_noops",), ("bridge_orig",)])
def test_those_of_another_suite_are_asked_for(tmp_path, keys):
    write(tmp_path, *keys)
    named = rf"{SUITE} takes .* {SUITE} or {CLEANED}, and .*{min(keys)}.*--asset-id"
    with pytest.raises(UserError, match=named):
        statistics_key(tmp_path, SUITE)
    assert statistics_key(tmp_path, SUITE, keys[0]) == keys[0]
    names = {file_name("openvla", tmp_path, CheckpointOptions(asset_id=key)) for key in (*keys, "")}
    assert len(names) == len(keys) + 1
