"""OpenVLA's sizes from a published `config.json`, which names its encoders and lists no default."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import CONFIG_FILE, read_json
from fastdrive_jax.models.openvla.actions import stored_statistics
from fastdrive_jax.models.openvla.config import (
    DINOV2_LARGE_REGISTERS,
    LLAMA_2_7B,
    SIGLIP_SO400M,
    OpenVLAConfig,
)

MODEL_TYPE = "openvla"
BACKBONES = {
    "dinosiglip-vit-so-224px": (DINOV2_LARGE_REGISTERS, SIGLIP_SO400M),
    "siglip-vit-so400m": (SIGLIP_SO400M,),
}
_LLAMAS = ("llama2-", "vicuna-")
_TEXT_NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "attention_bias": "attention_bias",
}
_VOCABULARY = 32_000  # of a Llama whose config does not say
_ACTION_DIM = 7  # of a model without statistics


def read_config(checkpoint_dir: Path) -> OpenVLAConfig:
    """The sizes of the checkpoint in a folder, without OFT's parts.

    Args:
        checkpoint_dir: Holds `config.json` and perhaps `dataset_statistics.json`, whose actions go
            before those of the first.

    Raises:
        UserError: There is no such file, or it is of a model that is not built here.
    """
    folder = Path(checkpoint_dir)
    path = folder / CONFIG_FILE
    content = read_json(path)
    found, place = stored_statistics(folder)
    if place != path:  # a fine-tuned model's actions may be of another size than the base model's
        content = content | {"norm_stats": found}
    return config_from_hf(content, path)


def config_from_hf(content: Mapping[str, Any], path: Path | str = CONFIG_FILE) -> OpenVLAConfig:
    """The sizes that a parsed `config.json` gives; see `read_config`."""
    kind = content.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(
            f"{path} is of model_type {kind!r}; only {MODEL_TYPE!r} (OpenVLA) can be read here."
        )
    backbone = content.get("vision_backbone_id")
    if backbone not in BACKBONES:
        raise UserError(
            f"{path} has vision_backbone_id {backbone!r}; {' and '.join(BACKBONES)} are built here."
        )
    encoders, text = BACKBONES[backbone], content.get("text_config") or {}
    rope = text.get("rope_parameters") or {}  # where transformers 5 writes it
    sizes = {ours: text[theirs] for theirs, ours in _TEXT_NAMES.items() if theirs in text}
    width, heads = (
        sizes.get(name, getattr(LLAMA_2_7B, name)) for name in ("hidden_size", "num_heads")
    )
    sizes["num_kv_heads"] = text.get("num_key_value_heads", heads)
    sizes.setdefault("vocab_size", _VOCABULARY)
    sizes.setdefault("rope_theta", rope.get("rope_theta", LLAMA_2_7B.rope_theta))
    _refuse_variants(content, text | {"rope_type": rope.get("rope_type")}, encoders, path)
    decoder = replace(LLAMA_2_7B, mrope_section=(width // heads // 2, 0, 0), **sizes)
    return OpenVLAConfig(
        encoders,
        decoder,
        bins=content.get("n_action_bins", 256),
        action_dim=_action_dim(content.get("norm_stats") or {}, path),
        padding_ids=content.get("pad_to_multiple_of", 64),
    )


def _action_dim(statistics, path) -> int:
    """Numbers of an action, which only the statistics of the data sets tell."""
    try:
        found = {len(one["action"]["q01"]) for one in statistics.values()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds norm_stats without action percentiles ({error}).") from error
    if len(found) > 1:
        raise UserError(f"{path} holds norm_stats of actions of {sorted(found)} numbers; keep one.")
    return found.pop() if found else _ACTION_DIM


def _refuse_variants(content, text, encoders, path) -> None:
    """Settings that would change the result without changing a shape."""
    fused = len(encoders) > 1
    known = {
        "arch_specifier": ["no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp"],
        "use_fused_vision_backbone": [fused],
        "image_sizes": [[encoder.image_size for encoder in encoders]],
        "timm_override_act_layers": [[None] * len(encoders)],
    }
    known_text = {
        "model_type": ["llama"],
        "hidden_act": ["silu"],
        "rope_scaling": [None],
        "rope_type": [None, "default"],
        "mlp_bias": [False],
    }
    found = [
        f"{k}={content[k]!r}" for k, v in known.items() if k in content and content[k] not in v
    ]
    found += [
        f"text_config.{k}={text[k]!r}"
        for k, v in known_text.items()
        if k in text and text[k] not in v
    ]
    llama = content.get("llm_backbone_id", _LLAMAS[0])
    found += [] if llama.startswith(_LLAMAS) else [f"llm_backbone_id={llama!r}"]
    if found:
        raise UserError(f"{path} asks for {', '.join(found)}, which is not built here.")
