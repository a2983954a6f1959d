"""What the config of a pi0's folder tells."""

from dataclasses import replace

import pytest
from tiny_pi0 import SIZES, lerobot_config, write_json

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.pi0.checkpoint import Checkpoint, read_checkpoint
from fastdrive_jax.models.pi0.config import PI0


def told(folder, **content):
    write_json(folder / "config.json", content)
    return read_checkpoint(folder, SIZES)


def test_without_a_config_all_is_as_published(tmp_path):
    found = read_checkpoint(tmp_path)
    assert found == Checkpoint(PI0, 48, (), None)
    assert (found.config.horizon, found.config.action_dim, found.config.flow_steps) == (50, 32, 10)


def test_openpis(tmp_path):
    content = {
        "action_dim": 32,
        "action_horizon": 10,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": "bfloat16",
    }
    assert told(tmp_path, **content).config == replace(SIZES, action_dim=32, horizon=10)


def test_lerobots(tmp_path):
    content = lerobot_config() | {"chunk_size": 10, "num_inference_steps": 5}
    found = told(tmp_path, **content, unknown=3)
    assert found.config == replace(SIZES, horizon=10, flow_steps=5)
    assert found.cameras == ("observation.images.image", "observation.images.image2")
    assert (found.prompt_tokens, found.relative) == (48, None)
    older = {"type": "pi0", "num_steps": 4, "resize_imgs_with_padding": [32, 32]}
    assert told(tmp_path, **older).config == replace(SIZES, flow_steps=4)


def test_relative_actions_go_by_their_names(tmp_path):
    content = lerobot_config() | {"use_relative_actions": True}
    names = ["x", "y", "z", "roll", "pitch", "yaw", "Gripper.pos"]
    given = {"action_feature_names": names, "relative_exclude_joints": ["gripper"]}
    assert told(tmp_path, **content, **given).relative == (*[True] * 6, False)
    assert told(tmp_path, **content).relative == (True,) * 7


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"type": "pi05"}, "of type 'pi05'"),
        ({"model_type": "openvla"}, "model_type 'openvla'"),
        ({"type": "pi0", "paligemma_variant": "gemma_2b_lora"}, "gemma_2b_lora"),
        ({"type": "pi0", "adapt_to_pi_aloha": True}, "adapt_to_pi_aloha=True"),
        ({"type": "pi0", "image_resolution": [64, 64]}, r"image_resolution=\[64, 64\]"),
        ({"type": "pi0", "max_state_dim": 8}, "max_state_dim=8 and max_action_dim=12"),
        ({"action_horizon": "ten"}, "horizon='ten'"),
        ({"action_horizon": 0}, "horizon=0"),
    ],
)
def test_other_models_are_refused(tmp_path, content, named):
    with pytest.raises(UserError, match=named):
        told(tmp_path, **content)
