"""Qwen2.5-VL sizes from and to a Hugging Face `config.json`.

Published files hold the decoder's sizes at the top level, those that transformers 5 writes hold
them under `text_config`; both are read, the second is written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.hf_files import CONFIG_FILE, read_json
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)

MODEL_TYPE = "qwen2_5_vl"
GENERATION_FILE = "generation_config.json"
_VISION_NAMES = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "out_hidden_size",
    "patch_size",
    "temporal_patch_size",
    "spatial_merge_size",
    "window_size",
    "fullatt_block_indexes",
)
_TEXT_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
}
_TOKEN_NAMES = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


def read_config(checkpoint_dir: Path) -> QwenVLConfig:
    """The sizes of the checkpoint in a folder.

    Args:
        checkpoint_dir: Holds `config.json` and perhaps `generation_config.json`, whose ending ids
            go before those of the first.

    Raises:
        UserError: There is no such file, or it is of a model that is not built here.
    """
    path = Path(checkpoint_dir) / CONFIG_FILE
    content = read_json(path)
    generation = Path(checkpoint_dir) / GENERATION_FILE
    ends = read_json(generation) if generation.exists() else {}
    return config_from_hf(content, ends, path)


def config_from_hf(
    content: Mapping[str, Any],
    generation: Mapping[str, Any] | None = None,
    path: Path | str = CONFIG_FILE,
) -> QwenVLConfig:
    """The sizes that a parsed `config.json` gives.

    Args:
        content: Of `config.json`.
        generation: Of `generation_config.json`.
        path: Named in errors.

    Raises:
        UserError: A size is missing, or the model is not one that is built here.
    """
    generation, kind = generation or {}, content.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(
            f"{path} is of model_type {kind!r}; only {MODEL_TYPE!r} (Qwen2.5-VL) can be read here."
        )
    text, vision = content.get("text_config") or content, content.get("vision_config") or {}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    missing = [f"vision_config.{n}" for n in _VISION_NAMES[:2] if n not in vision]
    missing += [name for name in _TEXT_NAMES if name not in text]
    missing += [] if "mrope_section" in rope else ["rope_scaling.mrope_section"]
    if missing:
        raise UserError(f"{path} does not give {', '.join(missing)}; take the checkpoint's own.")
    _refuse_variants(text, vision, rope, path)
    sizes = {name: _plain(vision[name]) for name in _VISION_NAMES if name in vision}
    sizes.setdefault("out_hidden_size", text["hidden_size"])
    tied = content.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    ids = {name: content[name] for name in _TOKEN_NAMES if name in content}
    ends = generation.get("eos_token_id", text.get("eos_token_id"))
    if ends is not None:
        ids["eos_token_ids"] = (ends,) if isinstance(ends, int) else tuple(ends)
    padding = generation.get("pad_token_id", text.get("pad_token_id"))
    if padding is not None:
        ids["pad_token_id"] = padding
    return QwenVLConfig(
        vision=VisionConfig(**sizes),
        text=DecoderConfig(
            **{ours: text[theirs] for theirs, ours in _TEXT_NAMES.items()},
            rope_theta=rope.get("rope_theta", text.get("rope_theta", 1_000_000.0)),
            mrope_section=tuple(rope["mrope_section"]),
            tie_word_embeddings=tied,
        ),
        **ids,
    )


def config_to_hf(config: QwenVLConfig, dtype: str = "float32") -> dict[str, Any]:
    """The content of a `config.json` that transformers opens as this model.

    Args:
        config: Sizes.
        dtype: Of the tensors beside it, "float32" or "bfloat16".
    """
    text = {theirs: getattr(config.text, ours) for theirs, ours in _TEXT_NAMES.items()}
    rope = {
        "rope_type": "default",
        "rope_theta": config.text.rope_theta,
        "mrope_section": list(config.text.mrope_section),
    }
    ends = {"eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id}
    vision = {name: _plain(getattr(config.vision, name)) for name in _VISION_NAMES}
    vision["fullatt_block_indexes"] = list(config.vision.fullatt_block_indexes)
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": text
        | ends
        | {
            "model_type": "qwen2_5_vl_text",
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": rope,
            "bos_token_id": None,
            "tie_word_embeddings": config.text.tie_word_embeddings,
        },
        "vision_config": vision | {"model_type": "qwen2_5_vl_vision", "hidden_act": "silu"},
        **{name: getattr(config, name) for name in _TOKEN_NAMES},
    }


def _refuse_variants(text, vision, rope, path) -> None:
    """Settings that would change the result without changing a shape."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    odd = {
        "hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "vision_config.hidden_act": (vision.get("hidden_act", "silu"), "silu"),
        "use_sliding_window": (bool(text.get("use_sliding_window")), False),
        "rope type": ("default" if kind == "mrope" else kind, "default"),
    }
    found = [f"{name}={value!r}" for name, (value, known) in odd.items() if value != known]
    if found:
        raise UserError(f"{path} asks for {', '.join(found)}, which is not built here.")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
