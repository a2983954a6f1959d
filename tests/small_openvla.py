"""A small OpenVLA with random weights, and what stands between it and a robot."""

from dataclasses import replace

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.robot_openvla import openvla_body
from fastdrive_jax.models.openvla.actions import ActionStatistics, Bounds
from fastdrive_jax.models.openvla.config import TINY_OPENVLA
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.openvla.policy_file import abstract_params
from fastdrive_jax.models.openvla.prompt import word_prompts

WORDS = "<s> In : Out What action should the robot take to pick up cube ? USER ASSISTANT"


def small_openvla(views=2):
    """An OpenVLA that compiles fast, 3 x 3 tokens a view of 24 px pictures, and random weights."""
    tiny = TINY_OPENVLA
    encoders = tuple(
        replace(vit, depth=2, hidden_size=16, intermediate_size=32, num_heads=2, image_size=24)
        for vit in tiny.encoders
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 320}
    text = replace(tiny.text, **sizes, mrope_section=(4, 0, 0))
    model = OpenVLA(replace(tiny, encoders=encoders, text=text, views=views))
    return model, random_params(abstract_params(model))


def random_params(shapes, seed=0):
    """Parameters of these shapes; nothing is compiled for them."""
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        values = rng.normal(size=leaf.shape) / (leaf.shape[0] ** 0.5 if leaf.ndim > 1 else 5)
        return (values + (leaf.ndim == 1)).astype(np.float32)

    return jax.device_put(jax.tree.map(drawn, shapes))


def unit_body(instructions, model, **parts):
    """What stands between such a model and a robot whose actions are in [-1, 1]."""
    prompts = word_prompts(instructions, model.config)
    size = model.config.action_dim
    bounds = Bounds((-1.0,) * size, (1.0,) * size, (True,) * size, (False,) * size)
    return openvla_body(prompts, ActionStatistics(bounds), views=(0, 1), **parts)


def write_tokenizer(folder, bos: bool = True):
    """One that knows words only: each is one id, BOS has 1 and the empty token Llama's."""
    vocabulary = {"<unk>": 0} | {word: number for number, word in enumerate(WORDS.split(" "), 1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.enable_padding(length=64)  # as a file may have it; prompts are padded here
    tokenizer.save(str(folder / "tokenizer.json"))
    return {number: word for word, number in vocabulary.items()}
