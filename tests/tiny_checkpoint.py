"""A Qwen2.5-VL checkpoint small enough for tests: random weights, a byte-level tokenizer."""

import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.checkpoint import save
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
TEMPLATE = """
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{ raise_exception('nobody is called ' ~ message.role) }}
{%- endif %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
    {% for part in message.content %}
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part.text }}{% endif %}
    {% endfor %}
{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
START, END, VISION_START, IMAGE, VISION_END = range(256, 261)  # ids of MARKS, behind the bytes
CONFIG = QwenVLConfig(
    VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=48,
        fullatt_block_indexes=(1,),
    ),
    DecoderConfig(
        hidden_size=48,
        intermediate_size=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=264,
        rope_theta=10_000.0,
        mrope_section=(2, 2, 2),
        tie_word_embeddings=False,
    ),
    image_token_id=IMAGE,
    vision_start_token_id=VISION_START,
    vision_end_token_id=VISION_END,
    eos_token_ids=(END,),
    pad_token_id=START,
)


def random_params(config: QwenVLConfig = CONFIG, seed: int = 0) -> dict:
    """Weights whose answers differ from prompt to prompt and hold no picture mark."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config.vision, config.text)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    head = params["language_model"]["lm_head"]["kernel"]
    head[:, config.image_token_id] = head[:, 5]  # an earlier id wins
    return params


def random_pruner(config: ReconPrunerConfig, seed: int = 0) -> dict:
    """Weights of a ReconPruner; nothing is compiled for them."""
    rng, tokens = np.random.default_rng(seed), np.zeros((1, 4, config.layer.hidden_size))
    shapes = jax.eval_shape(ReconPruner(config).init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with Qwen's marks, as a checkpoint's files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_checkpoint(folder: Path, generation: dict | None = None, seed: int = 0) -> Path:
    """The whole folder; `generation` goes into generation_config.json."""
    save(folder, CONFIG, random_params(seed=seed))
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    picture = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 784}
    (folder / "preprocessor_config.json").write_text(json.dumps(picture | {"max_pixels": 50_000}))
    if generation is not None:
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return folder
