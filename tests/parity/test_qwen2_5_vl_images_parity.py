"""The image processor and config files of Qwen2.5-VL against transformers' own."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, QWEN2_5_VL_7B
from fastdrive_jax.models.qwen2_5_vl.hf_config import config_from_hf, config_to_hf, read_config
from fastdrive_jax.models.qwen2_5_vl.image_processor import (
    ImageProcessorConfig,
    process_pictures,
    read_image_processor,
    smart_resize,
)
from fastdrive_jax.models.qwen2_5_vl.patches import normalise

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)
BOUNDS = [(56 * 56, 28 * 28 * 16_384), (56 * 56, 262_144), (1_000_000, 2_000_000)]


def theirs(low: int, high: int):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})


def assert_equal_rows(pictures: list[Image.Image], low: int, high: int) -> None:
    found = theirs(low, high)(images=pictures, return_tensors="np")
    rows, grids = process_pictures(pictures, ImageProcessorConfig(low, high))
    np.testing.assert_array_equal(found["image_grid_thw"], [(1, *grid) for grid in grids])
    ours = np.asarray(normalise(np.concatenate(rows), QWEN2_5_VL_3B.vision))
    np.testing.assert_allclose(ours, found["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_real_pictures(low, high):
    shared = os.environ.get("FASTDRIVE_SHARED") or Path(__file__).parents[3] / "shared"
    data = Path(shared) / "data"
    paths = sorted(data.glob("nuscenes_samples/original/CAM_*/*.jpg"))[:3]
    paths += sorted(data.glob("camvid/val/images/*.jpg"))[:2]
    if len(paths) < 5:
        pytest.skip(f"no real pictures under {data} (set FASTDRIVE_SHARED)")
    assert_equal_rows([Image.open(path) for path in paths], low, high)


def test_odd_sizes_and_modes():
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        for height, width in [(1, 1), (37, 91), (300, 40), (56, 84), (129, 333)]
    ]
    pictures.append(pictures[4].convert("L"))
    assert_equal_rows(pictures, *BOUNDS[0])


def test_sizes_everywhere():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published

    rng = np.random.default_rng(0)
    for low, high in BOUNDS:
        config = ImageProcessorConfig(low, high)
        for height, width in rng.integers(20, 4000, (2000, 2)).tolist():
            assert smart_resize(height, width, config) == published(height, width, 28, low, high)


def test_the_processor_file_that_transformers_writes(tmp_path):
    theirs(4000, 262_144).save_pretrained(tmp_path)
    assert read_image_processor(tmp_path) == ImageProcessorConfig(4000, 262_144)


@pytest.mark.parametrize("config", [QWEN2_5_VL_3B, QWEN2_5_VL_7B])
def test_config_files_go_both_ways(config, tmp_path):
    from transformers import AutoConfig, Qwen2_5_VLConfig

    opened = Qwen2_5_VLConfig(**config_to_hf(config))
    opened.save_pretrained(tmp_path)
    assert read_config(tmp_path) == config
    assert config_from_hf(AutoConfig.from_pretrained(tmp_path).to_dict()) == config
    assert opened.text_config.layer_types == ["full_attention"] * config.text.num_layers
    assert opened.vision_config.hidden_size == 1280
