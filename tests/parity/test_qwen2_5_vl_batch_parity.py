"""Batches of several lengths and pictures of several sizes against transformers."""

import dataclasses
import functools
import importlib.util

import jax
import numpy as np
import pytest

from fastdrive_jax.inference.sampling import SamplingConfig, answer_batch
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load, save
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.hf_config import config_to_hf
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import normalise
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate
from fastdrive_jax.models.qwen2_5_vl.weights import params_from_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)
PAD, END, IMAGE, START, STOP = 0, 1, 90, 91, 92
CONFIG = QwenVLConfig(
    vision=VisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        fullatt_block_indexes=(1,),
    ),
    text=DecoderConfig(
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=96,
        rope_theta=10_000.0,
        mrope_section=(2, 2, 2),
        tie_word_embeddings=False,
    ),
    image_token_id=IMAGE,
    vision_start_token_id=START,
    vision_end_token_id=STOP,
    eos_token_ids=(END,),
    pad_token_id=PAD,
)
TOLERANCE = 1e-4
GREEDY = SamplingConfig(max_new_tokens=32)


@pytest.fixture(scope="module")
def theirs():
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(**config_to_hf(CONFIG), video_token_id=93)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            drawn = rng.normal(0, 0.2, value.shape).astype(np.float32)
            value.copy_(torch.from_numpy(drawn + ("norm" in name or "ln_q" in name)))
    return model


@pytest.fixture(scope="module")
def variables(theirs):
    tensors = {name: value.numpy() for name, value in theirs.state_dict().items()}
    return {"params": params_from_tensors(tensors, CONFIG.vision, CONFIG.text)}


@functools.cache
def samples() -> list[Sample]:
    """Two pictures of other sizes, one picture, and text alone."""
    rng = np.random.default_rng(0)
    sizes = [[(140, 252), (84, 56)], [(112, 196)], []]
    out = []
    for number, own in enumerate(sizes):
        pictures = [rng.integers(0, 256, (*size, 3), np.uint8) for size in own]
        rows, grids = process_pictures(pictures) if pictures else ([], [])
        ids = [5, 7 + number]
        for _ in own:
            ids += [START, IMAGE, STOP, 11]
        out.append(Sample([*ids, 20, 21, 22 + number], rows, grids))
    return out


def torch_inputs(samples: list[Sample], left: bool) -> dict:
    import torch

    batch = collate(samples, CONFIG)
    width = batch.ids.shape[1]
    ids = np.full_like(batch.ids, PAD)
    mask = np.zeros_like(ids)
    for row, length in enumerate(batch.lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = batch.ids[row, :length], 1
    values = {
        "input_ids": ids.astype(np.int64),
        "attention_mask": mask.astype(np.int64),
        "mm_token_type_ids": (ids == IMAGE).astype(np.int64),
    }
    every = [one for sample in samples for one in sample.rows]
    if every:
        rows = [np.asarray(normalise(one, CONFIG.vision)) for one in every]
        grids = [(1, *grid) for sample in samples for grid in sample.grids]
        values |= {"pixel_values": np.concatenate(rows), "image_grid_thw": np.array(grids)}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def test_positions(theirs):
    batch = collate(samples(), CONFIG)
    given = torch_inputs(samples(), left=False)
    expected, _ = theirs.model.get_rope_index(
        given["input_ids"],
        given["mm_token_type_ids"],
        given["image_grid_thw"],
        attention_mask=given["attention_mask"],
    )
    for row, length in enumerate(batch.lengths):
        np.testing.assert_array_equal(
            batch.positions[:, row, :length], expected[:, row, :length].numpy()
        )


def test_visual_tokens_of_pictures_of_several_sizes(theirs, variables):
    import torch

    batch = collate(samples(), CONFIG)
    given = torch_inputs(samples(), left=False)
    with torch.no_grad():
        expected = theirs.model.visual(
            given["pixel_values"], grid_thw=given["image_grid_thw"]
        ).pooler_output.numpy()
    run = jax.jit(functools.partial(QwenVL(CONFIG).apply, method="encode"))
    tokens = np.asarray(run(variables, batch.rows, batch.layout))
    own = np.concatenate(
        [one[: count // 4] for one, count in zip(tokens, batch.layout.count, strict=True)]
    )
    error = np.abs(own - expected).max()
    print(f"visual tokens: max abs error {error:.2e} of values up to {np.abs(expected).max():.2f}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("spare", [0, 13])
def test_logits_of_a_padded_batch(theirs, variables, spare):
    import torch

    batch = collate(samples(), CONFIG)
    batch = collate(samples(), CONFIG, batch.ids.shape[1] + spare, 180 + 4 * spare)
    with torch.no_grad():
        expected = theirs(**torch_inputs(samples(), left=False)).logits.numpy()
    logits = np.asarray(jax.jit(QwenVL(CONFIG).apply)(variables, batch))
    for row, length in enumerate(batch.lengths):
        error = np.abs(logits[row, :length] - expected[row, :length]).max()
        print(f"logits of sample {row}: max abs error {error:.2e}")
        assert error <= TOLERANCE


def answers(variables, config):
    """Of all samples in one batch, and their lengths."""
    run, batch = jax.jit(answer_batch, static_argnums=(0, 4)), collate(samples(), CONFIG)
    return [np.asarray(x) for x in run(QwenVL(CONFIG), variables, batch, jax.random.key(0), config)]


def test_greedy_answers(theirs, variables):
    import torch

    batch = collate(samples(), CONFIG)
    with torch.no_grad():
        expected = theirs.generate(
            **torch_inputs(samples(), left=True), max_new_tokens=32, do_sample=False
        )[:, batch.ids.shape[1] :].numpy()
    answer, lengths = answers(variables, GREEDY)
    np.testing.assert_array_equal(answer[:, : expected.shape[1]], expected)
    assert len(set(answer.ravel().tolist())) > 5
    print("lengths", lengths)


def test_greedy_answers_under_a_repetition_penalty(theirs, variables):
    """Theirs sample by sample: transformers counts the padding of a batch as said."""
    config = SamplingConfig(max_new_tokens=32, repetition_penalty=1.3)
    answer, lengths = answers(variables, config)
    changed = (answers(variables, GREEDY)[0] != answer).any()
    for sample, row, length in zip(samples(), answer, lengths, strict=True):
        given = torch_inputs([sample], left=True)
        expected = theirs.generate(
            **given, max_new_tokens=32, do_sample=False, repetition_penalty=1.3
        )[0, given["input_ids"].shape[1] :].tolist()
        assert row[:length].tolist() == expected
    assert changed  # the penalty does something


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_checkpoints_go_both_ways_bit_for_bit(tmp_path, tied, dtype):
    """transformers writes, we read and write, transformers reads."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dataclasses.replace(CONFIG.text, tie_word_embeddings=tied)
    config = dataclasses.replace(CONFIG, text=text)
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config_to_hf(config)))
    theirs = theirs.to(getattr(torch, dtype)).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    read, params = load(tmp_path / "theirs")
    assert read == config
    save(tmp_path / "ours", read, params, shard_bytes=40_000)
    again, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = theirs.state_dict()
    assert set(again.state_dict()) == set(expected)
    for name, value in again.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
