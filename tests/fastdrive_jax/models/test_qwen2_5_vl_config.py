import json
from dataclasses import replace

import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    TINY_DECODER,
    TINY_VISION,
    QwenVLConfig,
)
from fastdrive_jax.models.qwen2_5_vl.hf_config import config_from_hf, config_to_hf, read_config

TINY = QwenVLConfig(TINY_VISION, TINY_DECODER, image_token_id=9, eos_token_ids=(1,), pad_token_id=0)


VISION = config_to_hf(TINY)["vision_config"]


def published(config: QwenVLConfig) -> dict:
    """The flat layout of the checkpoints on the hub."""
    nested = config_to_hf(config)
    text = nested.pop("text_config")
    rope = text.pop("rope_parameters")
    nested["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    nested["rope_theta"] = rope["rope_theta"]
    nested.pop("dtype")
    return {**text, **nested}


@pytest.mark.parametrize("config", [QWEN2_5_VL_3B, QWEN2_5_VL_7B, TINY])
@pytest.mark.parametrize("layout", [config_to_hf, published])
def test_both_layouts_give_the_sizes_back(config, layout):
    assert config_from_hf(json.loads(json.dumps(layout(config)))) == config


def test_endings_of_the_generation_config_go_first(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published(TINY)))
    assert read_config(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 7}')
    assert read_config(tmp_path) == replace(TINY, eos_token_ids=(5, 6), pad_token_id=7)


def test_width_of_the_tokens_must_be_the_decoders():
    with pytest.raises(UserError, match=r"out_hidden_size=64.*hidden_size=128"):
        replace(TINY, vision=replace(TINY_VISION, out_hidden_size=64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type 'qwen2_vl'"),
        ({"model_type": None}, "model_type None"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"vision_config": {}}, r"vision_config\.depth, vision_config\.hidden_size"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"vision_config": VISION | {"window_size": 98}}, "window_size=98 must be a multiple"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [4, 6, 6]}}, "yarn"),
    ],
)
def test_other_models_are_refused(change, message):
    content = published(TINY) | change
    content = {name: value for name, value in content.items() if value is not ...}
    with pytest.raises(UserError, match=message):
        config_from_hf(content)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_whole_config_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)
