"""What states and actions are scaled by, by values worked out by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_pi0 import ACTIONS, STATE, write_json, write_lerobot, write_weights

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.pi0.scaling import by_range, scale, unscale, unscaled
from fastdrive_jax.models.pi0.statistics import read_statistics

TWO = {"mean": [1.0, -2.0], "std": [0.5, 0.0], "q01": [-1.0, 3.0], "q99": [3.0, 3.0]}


def write_assets(folder, *ids, content=None):
    for asset_id in ids:
        content = content or {"norm_stats": {"state": TWO, "actions": TWO}}
        write_json(folder / "assets" / asset_id / "norm_stats.json", content)
    return folder


def test_openpis_means_and_deviations(tmp_path):
    found = read_statistics(write_assets(tmp_path, "physical-intelligence/libero"))
    shown = scale(np.float32([[2.0, -2.0], [1.0, -1.999]]), found.state)
    np.testing.assert_allclose(shown, [[2.0, 0.0], [0.0, 1000.0]], rtol=2e-3, atol=1e-6)
    # 1 / 0.500001, and a number that never changed is 0.001 / 0.000001.
    assert found.state.divisor == (0.500001, 1e-6)
    np.testing.assert_allclose(
        unscale(np.float32([2.0, 5.0]), found.action), [2.000002, -1.999995], atol=1e-6
    )


def test_lerobots_processors(tmp_path):
    found = read_statistics(write_lerobot(tmp_path))
    assert found.state.offset == pytest.approx(STATE["mean"])
    assert found.state.divisor == pytest.approx(STATE["std"])
    assert found.action.offset == pytest.approx(ACTIONS["mean"])
    assert found.action.factor == tuple(np.float32(ACTIONS["std"]).tolist())


def test_lerobots_kinds_of_scaling(tmp_path):
    """Each by its formula; an empty interval has the width that is added."""
    write_lerobot(tmp_path)
    path = tmp_path / "policy_postprocessor.json"
    content = json.loads(path.read_text())
    step = content["steps"][1]
    ends = {"min": [-2.0, 1.0], "max": [2.0, 1.0], "q10": [0.0, 0.0], "q90": [4.0, 1.0]}
    ends |= {name: TWO[name] for name in ("q01", "q99")}
    tensors = {f"action.{name}": np.float32(values) for name, values in ends.items()}
    save_file(tensors, tmp_path / step["state_file"])
    for mode, low, high in (
        ("MIN_MAX", [-2, 1], [2, 1]),
        ("QUANTILES", [-1, 3], [3, 3]),
        ("QUANTILE10", [0, 0], [4, 1]),
    ):
        step["config"]["norm_map"]["ACTION"] = mode
        path.write_text(json.dumps(content))
        action = read_statistics(tmp_path).action
        np.testing.assert_allclose(unscale(np.float32([-1, -1]), action), low, atol=1e-6)
        np.testing.assert_allclose(unscale(np.float32([1, 1]), action), high, atol=1e-6)
    step["config"] |= {"features": {"action": {"shape": [3]}}, "norm_map": {"ACTION": "IDENTITY"}}
    path.write_text(json.dumps(content))
    assert read_statistics(tmp_path).action == unscaled(3)
    assert by_range([0.0], [0.0], 1e-8).factor == (5e-9,)


def test_buffers_of_older_lerobot(tmp_path):
    extra = {
        "normalize_inputs.buffer_observation_state.mean": STATE["mean"],
        "normalize_inputs.buffer_observation_state.std": STATE["std"],
        "normalize_targets.buffer_action.mean": [9.0] * 7,
        "unnormalize_outputs.buffer_action.mean": ACTIONS["mean"],
        "unnormalize_outputs.buffer_action.std": ACTIONS["std"],
    }
    write_weights(tmp_path, {name: np.float32(values) for name, values in extra.items()})
    found = read_statistics(tmp_path)
    assert found.state.divisor == pytest.approx(STATE["std"])
    assert found.action.offset == pytest.approx(ACTIONS["mean"])
    # lerobot fills them with infinity until there are data.
    empty = {name: np.full(7, np.inf, np.float32) for name in extra}
    write_weights(tmp_path, empty)
    with pytest.raises(UserError, match="not finite"):
        read_statistics(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"norm_stats\.json, or lerobot's policy_preprocessor"):
        read_statistics(tmp_path)
    write_assets(tmp_path, "droid", "trossen")
    for asset_id, named in ((None, "holds no norm_stats.json: "), ("ur5e", "asset id 'ur5e': ")):
        with pytest.raises(UserError, match=rf"{named}choose the asset id from droid, trossen"):
            read_statistics(tmp_path, asset_id)
    assert read_statistics(tmp_path, "droid").state.offset == (1.0, -2.0)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state": TWO}, "no norm_stats of state"),
        ({"norm_stats": {"state": TWO}}, "no norm_stats of actions"),
        ({"norm_stats": {"state": {"mean": [1.0]}}}, "no mean and std of state"),
        ({"norm_stats": {"state": {"mean": [1.0], "std": [1.0, 2.0]}}}, "in shapes"),
        ({"norm_stats": {"state": {"mean": [1.0], "std": ["x"]}}}, "no mean and std of state"),
    ],
)
def test_damaged_statistics_are_refused(tmp_path, content, named):
    with pytest.raises(UserError, match=named):
        read_statistics(write_assets(tmp_path, "libero", content=content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"norm_map": {"STATE": "ROBUST"}}, "by ROBUST, which is not built"),
        ({"state_file": None}, "names no state_file"),
        ({"state_file": "absent.safetensors"}, r"absent\.safetensors is missing"),
        ({"registry_name": "other"}, "no step normalizer_processor"),
        ({"state_file": "config.json"}, "can't be read"),
    ],
)
def test_damaged_processors_are_refused(tmp_path, change, named):
    write_lerobot(tmp_path)
    path = tmp_path / "policy_preprocessor.json"
    content = json.loads(path.read_text())
    step = content["steps"][1]
    step["config"]["norm_map"] |= change.pop("norm_map", {})
    step |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=named):
        read_statistics(tmp_path)
