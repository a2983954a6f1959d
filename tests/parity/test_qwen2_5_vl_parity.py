"""Qwen2.5-VL against transformers: same random weights, same pictures, same ids."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, positions
from fastdrive_jax.models.qwen2_5_vl.patches import patchify
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.models.qwen2_5_vl.weights import (
    abstract_params,
    name_table,
    params_from_tensors,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)

VISION = VisionConfig(
    depth=3,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=48,
    fullatt_block_indexes=(1,),
)
IMAGE_TOKEN, VISION_START, VISION_END = 90, 91, 92
TOLERANCE = 1e-4


def text_config(tied: bool) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=96,
        rope_theta=10_000.0,
        mrope_section=(2, 2, 2),
        tie_word_embeddings=tied,
    )


def hf_config(vision: VisionConfig, text: DecoderConfig):
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.num_heads,
            "out_hidden_size": vision.out_hidden_size,
            "fullatt_block_indexes": list(vision.fullatt_block_indexes),
            "window_size": vision.window_size,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_theta,
                "mrope_section": list(text.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "tie_word_embeddings": text.tie_word_embeddings,
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=93,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=text.tie_word_embeddings,
    )


@functools.cache
def pair(tied: bool):
    """A PyTorch model with every parameter random, norms and biases too, and our parameters."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    text = text_config(tied)
    model = Qwen2_5_VLForConditionalGeneration(hf_config(VISION, text)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            drawn = rng.normal(0, 0.2, value.shape).astype(np.float32)
            value.copy_(torch.from_numpy(drawn + ("norm" in name or "ln_q" in name)))
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    return model, params_from_tensors(tensors, VISION, text), tensors


encode = jax.jit(VisionEncoder(VISION).apply)


@pytest.fixture(scope="module")
def untied():
    return pair(tied=False)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (1, height, width, 3), np.uint8)


def torch_patches(images: np.ndarray) -> np.ndarray:
    """Patch rows of the published order, by loops over rows, columns, colours and frames."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    image = (images[0] / 255 - mean) / std
    rows = []
    for top in range(0, image.shape[0], 28):
        for left in range(0, image.shape[1], 28):
            for y in (top, top + 14):
                for x in (left, left + 14):
                    patch = image[y : y + 14, x : x + 14]
                    rows.append([[patch[..., colour]] * 2 for colour in range(3)])
    return np.array(rows, np.float32).reshape(len(rows), -1)


def torch_grid(images: np.ndarray):
    import torch

    return torch.tensor([[1, images.shape[1] // 14, images.shape[2] // 14]])


def assert_near(ours, theirs, what: str):
    error = np.abs(np.asarray(ours) - theirs.detach().numpy()).max()
    print(f"{what}: max abs error {error:.2e} of values up to {theirs.abs().max():.2f}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("size", [(224, 392), (112, 112), (28, 84)])
def test_patch_rows(size):
    images = picture(*size)
    np.testing.assert_allclose(patchify(images, VISION)[0], torch_patches(images), atol=1e-5)


def test_patch_rows_equal_the_published_processors():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    images = picture(224, 392)
    got = module.Qwen2VLImageProcessorPil()(images[0], return_tensors="np")
    assert got["image_grid_thw"].tolist() == [[1, 16, 28]]
    np.testing.assert_allclose(patchify(images, VISION)[0], got["pixel_values"], atol=1e-5)


# Windows are cut off at the right, at the bottom, at both, in the only one; the rest divide evenly.
@pytest.mark.parametrize(
    "size", [(224, 392), (252, 224), (140, 308), (28, 28), (112, 112), (224, 336)]
)
def test_visual_tokens(untied, size):
    import torch

    model, params, _ = untied
    images = picture(*size)
    with torch.no_grad():
        theirs = model.model.visual(
            torch.from_numpy(torch_patches(images)), grid_thw=torch_grid(images)
        ).pooler_output
    ours = encode({"params": params["visual"]}, images)[0]
    assert_near(ours, theirs, f"visual tokens of {size}")


def test_windows_matter(untied):
    """Else the comparison above could not tell window attention from full attention."""
    _, params, _ = untied
    images = picture(224, 392)
    wide = VisionConfig(**{**vars(VISION), "fullatt_block_indexes": (0, 1, 2)})
    windowed = encode({"params": params["visual"]}, images)
    full = jax.jit(VisionEncoder(wide).apply)({"params": params["visual"]}, images)
    assert np.abs(windowed - full).max() > 100 * TOLERANCE


def sequence_of(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids [1, n] of two text tokens, the picture, an end mark and a little text; their types."""
    tokens = (images.shape[1] // 28) * (images.shape[2] // 28)
    ids = [5, VISION_START] + [IMAGE_TOKEN] * tokens + [VISION_END, 7, 11, 13, 7]
    return np.array([ids]), np.array([[int(i == IMAGE_TOKEN) for i in ids]])


@functools.partial(jax.jit, static_argnums=1)
def our_hidden(params, text: DecoderConfig, ids, where, tokens):
    """Hidden states and logits of ids with the picture's tokens in place of IMAGE_TOKEN."""
    decoder, variables = Decoder(text), {"params": params["language_model"]}
    embeddings = decoder.apply(variables, ids, method="embed")
    places = jnp.flatnonzero(ids[0] == IMAGE_TOKEN, size=len(tokens))
    hidden, _ = decoder.apply(variables, embeddings.at[0, places].set(tokens), where)
    return hidden, decoder.apply(variables, hidden, method="logits")


@pytest.mark.parametrize("size", [(224, 392), (112, 140)])
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_states_and_logits(tied, size):
    import torch

    model, params, _ = pair(tied)
    assert ("lm_head" in params["language_model"]) != tied
    images = picture(*size)
    ids, types = sequence_of(images)
    keys = {
        "input_ids": torch.from_numpy(ids),
        "pixel_values": torch.from_numpy(torch_patches(images)),
        "image_grid_thw": torch_grid(images),
        "mm_token_type_ids": torch.from_numpy(types),
    }
    with torch.no_grad():
        where, _ = model.model.get_rope_index(
            keys["input_ids"], keys["mm_token_type_ids"], keys["image_grid_thw"]
        )
        theirs = model.model(**keys).last_hidden_state
        their_logits = model(**keys).logits
    tokens = encode({"params": params["visual"]}, images)[0]
    hidden, logits = our_hidden(params, text_config(tied), ids, where.numpy(), tokens)
    assert_near(hidden, theirs, f"hidden states, {tied=}, {size}")
    assert_near(logits, their_logits, f"logits, {tied=}, {size}")


@pytest.mark.parametrize("size", [(224, 392), (392, 224)])
def test_position_ids(untied, size):
    import torch

    images = picture(*size)
    ids, types = sequence_of(images)
    theirs, _ = untied[0].model.get_rope_index(
        torch.from_numpy(ids), torch.from_numpy(types), torch_grid(images)
    )
    ours = positions(DrivingConfig(image_size=size))
    ours = np.concatenate([ours.before, ours.visual, ours.after], axis=1)
    np.testing.assert_array_equal(ours[:, : ids.shape[1]], theirs[:, 0].numpy())


def test_published_file_names_give_the_same_parameters(untied):
    _, params, tensors = untied
    published = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in tensors.items()
    }
    assert set(published) != set(tensors)
    again = params_from_tensors(published, VISION, text_config(False))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_sizes_of_the_published_3b():
    """Names and shapes of the 3B model, on PyTorch's device without storage."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = hf_config(VisionConfig(), DecoderConfig())
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    ours = abstract_params(VisionConfig(), DecoderConfig())
    for mine, theirs in (
        (ours["visual"], model.model.visual),
        (ours["language_model"], model.model.language_model),
    ):
        count = sum(leaf.size for leaf in jax.tree.leaves(mine))
        print(f"{count:,} parameters")
        assert count == sum(value.numel() for value in theirs.parameters())


GOLDEN_FILE = "fastdrive_jax/models/qwen2_5_vl_golden.json"


def sizes(fields: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def golden_of_transformers(golden: dict) -> dict:
    """Visual tokens and logits, three channels each, for the sizes, picture and ids in `golden`."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    vision, text = VisionConfig(**sizes(golden["vision"])), DecoderConfig(**sizes(golden["text"]))
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.uniform(-0.5, 0.5, shape).astype(np.float32) + ("norm" in name)
        for name, (_, shape) in sorted(name_table(vision, text).items())
    }
    model = Qwen2_5_VLForConditionalGeneration(hf_config(vision, text)).eval()
    model.load_state_dict(
        {
            name if name == "lm_head.weight" else f"model.{name}": torch.from_numpy(value)
            for name, value in tensors.items()
        },
        strict=True,
    )
    row, column, colour = np.mgrid[: golden["size"][0], : golden["size"][1], :3]
    images = (row * 37 + column * 11 + row * column + colour * 101) % 256
    images = images.astype(np.uint8)[None]
    count = images.shape[1] * images.shape[2] // 28**2
    ids = [*golden["ids"][:2], *[IMAGE_TOKEN] * count, *golden["ids"][2:]]
    keys = {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.from_numpy(torch_patches(images)),
        "image_grid_thw": torch_grid(images),
        "mm_token_type_ids": torch.tensor([[int(i == IMAGE_TOKEN) for i in ids]]),
    }
    with torch.no_grad():
        tokens = model.model.visual(
            keys["pixel_values"], grid_thw=keys["image_grid_thw"]
        ).pooler_output
        logits = model(**keys).logits[0]
    return {
        "tokens": [[round(float(x), 5) for x in line] for line in tokens[:, :3]],
        "logits": [[round(float(x), 5) for x in line] for line in logits[:, :3]],
    }


def test_golden_numbers():
    """Those that the tests without PyTorch compare with."""
    golden = json.loads((Path(__file__).parents[1] / GOLDEN_FILE).read_text())
    for name, values in golden_of_transformers(golden).items():
        np.testing.assert_allclose(values, golden[name], atol=3e-5)
