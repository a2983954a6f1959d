"""OpenVLA's sizes from a published `config.json`, which names its encoders and lists no default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.hf_files import CONFIG_FILE, read_json
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
        checkpoint_dir: Holds `config.json`.

    Raises:
        UserError: There is no such file, or it is of a model that is not built here.
    """
    path = Path(checkpoint_dir) / CONFIG_FILE
    return config_from_hf(read_json(path), path)


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
    _refuse_variants(content, text, encoders, path)
    sizes = {ours: text[theirs] for theirs, ours in _TEXT_NAMES.items() if theirs in text}
    sizes = {"vocab_size": _VOCABULARY} | sizes
    heads = sizes.get("num_heads", LLAMA_2_7B.num_heads)
    width = sizes.get("hidden_size", LLAMA_2_7B.hidden_size)
    decoder = {field: getattr(LLAMA_2_7B, field) for field in LLAMA_2_7B.__dataclass_fields__}
    decoder |= sizes | {
        "num_kv_heads": text.get("num_key_value_heads", heads),
        "mrope_section": (width // heads // 2, 0, 0),
    }
    return OpenVLAConfig(
        encoders,
        DecoderConfig(**decoder),
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
    llama = content.get("llm_backbone_id", "llama2-7b-pure")
    sizes = [encoder.image_size for encoder in encoders]
    odd = {
        "llm_backbone_id": (llama, llama if llama.startswith(_LLAMAS) else "llama2-7b-pure"),
        "use_fused_vision_backbone": (
            content.get("use_fused_vision_backbone", len(encoders) > 1),
            len(encoders) > 1,
        ),
        "image_sizes": (content.get("image_sizes", sizes), sizes),
        "timm_override_act_layers": (
            content.get("timm_override_act_layers", [None] * len(encoders)),
            [None] * len(encoders),
        ),
        "text_config.model_type": (text.get("model_type", "llama"), "llama"),
        "text_config.hidden_act": (text.get("hidden_act", "silu"), "silu"),
        "text_config.rope_scaling": (text.get("rope_scaling"), None),
        "text_config.mlp_bias": (text.get("mlp_bias", False), False),
    }
    found = [f"{name}={value!r}" for name, (value, known) in odd.items() if value != known]
    if found:
        raise UserError(f"{path} asks for {', '.join(found)}, which is not built here.")
