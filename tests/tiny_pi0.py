"""A pi0 of random weights in the folders of its releases, small enough to compile in seconds."""

import json
from dataclasses import replace

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, processors

from fastdrive_jax.models.pi0.config import TINY_PI0, Pi0Config
from fastdrive_jax.models.pi0.weights import name_table

_PREFIX = replace(
    TINY_PI0.prefix,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    vocab_size=64,
    mrope_section=(4, 0, 0),
    head_size=8,
)
SIZES = Pi0Config(
    replace(
        TINY_PI0.vision, depth=1, hidden_size=16, intermediate_size=24, num_heads=2, image_size=32
    ),
    _PREFIX,
    replace(_PREFIX, hidden_size=16, intermediate_size=32),
    views=3,
    action_dim=12,
    horizon=7,
    flow_steps=3,
)
PAD, EOS, BOS, UNKNOWN, LINE = range(5)
LETTERS = {letter: 5 + place for place, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzBC34567")}
STATE = {"mean": [0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 0.02, -0.02], "std": [0.5, 1, 2, 0.25] * 2}
ACTIONS = {"mean": [0.2, 0.1, -0.3, 0.0, 0.05, 0.0, -0.1], "std": [0.5, 0.25, 1, 0.1, 0.2, 0.3, 1]}
PREFIXES = {
    "vision_tower.": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.",
    "multi_modal_projector.": "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.",
    "language_model.": "paligemma_with_expert.paligemma.model.language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}


def write_openpi(folder, statistics=None, asset_id="physical-intelligence/libero"):
    """A folder as openpi's conversion to PyTorch writes it, with a tokenizer."""
    write_weights(folder)
    write_tokenizer(folder)
    write_json(folder / "config.json", {"action_dim": 12, "action_horizon": 7})
    statistics = statistics or {"state": STATE, "actions": ACTIONS}
    write_json(folder / "assets" / asset_id / "norm_stats.json", {"norm_stats": statistics})
    return folder


def write_lerobot(folder, **config):
    """A folder as lerobot writes it, without weights."""
    write_tokenizer(folder)
    write_json(folder / "config.json", lerobot_config() | config)
    norms = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"}
    found = {"observation.state": STATE, "action": ACTIONS}
    for name, registered, number in (
        ("policy_preprocessor", "normalizer_processor", 6),
        ("policy_postprocessor", "unnormalizer_processor", 0),
    ):
        file = f"{name}_step_{number}_{registered}.safetensors"
        step = {"registry_name": registered, "config": {"eps": 1e-8, "norm_map": norms}}
        steps = [{"registry_name": "rename_observations_processor", "config": {}}]
        write_json(
            folder / f"{name}.json", {"name": name, "steps": [*steps, step | {"state_file": file}]}
        )
        tensors = {
            f"{feature}.{part}": np.array(values, np.float32)
            for feature, one in found.items()
            for part, values in one.items()
        }
        # What is not scaled may be of any type.
        save_file(tensors | {"action.count": np.array([7])}, folder / file)
    return folder


def lerobot_config():
    """A config of lerobot for LIBERO, of these sizes."""
    return {
        "type": "pi0",
        "n_obs_steps": 1,
        "input_features": {
            "observation.images.image": {"type": "VISUAL", "shape": [3, 256, 256]},
            "observation.images.image2": {"type": "VISUAL", "shape": [3, 256, 256]},
            "observation.state": {"type": "STATE", "shape": [8]},
            "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 32, 32]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [7]}},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "chunk_size": 7,
        "n_action_steps": 7,
        "max_state_dim": 12,
        "max_action_dim": 12,
        "num_inference_steps": 3,
        "image_resolution": [32, 32],
        "tokenizer_max_length": 48,
        "use_relative_actions": False,
    }


def write_weights(folder, extra=None):
    """Random tensors under openpi's names."""
    rng = np.random.default_rng(0)
    tensors = {
        published(name): (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)
        for name, (_, shape) in name_table(SIZES).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | (extra or {}), folder / "model.safetensors")


def published(name):
    for own, theirs in PREFIXES.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def write_tokenizer(folder):
    """A letter is a token; BOS, padding and cutting are in the file, as they may be."""
    special = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNKNOWN, "\n": LINE}
    tokenizer = Tokenizer(models.BPE(special | LETTERS, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", BOS)])
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(9)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
