"""A Qwen2.5-VL with its ReconPruner: as a bundle, with eight-bit weights, and as a program.

    OUT/config.json          sizes, keep ratio, pictures and prompt, the SHA-256 of every file
    OUT/model.safetensors    "vla/..." and "pruner/...", with eight bits as `eight_bits` says
    OUT/orbax/               the same tree
    OUT/processor/           the checkpoint's own files for text and pictures

Whoever has the folder needs neither the checkpoint nor the training run.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fastdrive_jax.configs import from_plain, to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export.bundle import read_bundle, write_bundle
from fastdrive_jax.export.eight_bits import (
    EightBits,
    Part,
    QType,
    Tensors,
    check_kept,
    round_params,
    rounded_run,
)
from fastdrive_jax.export.programs import Program
from fastdrive_jax.export.trees import flatten, unflatten
from fastdrive_jax.inference.pruned_qwen import PrunedQwen, answer_pictures
from fastdrive_jax.models.qwen2_5_vl.device_batch import device_batch
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.pruning.recon_pruner import ReconPruner
from fastdrive_jax.pruning.select import num_keep

KIND, QUANTIZED = "pruned qwen2_5_vl", "quantized pruned qwen2_5_vl"
PROGRAMS = "pruned qwen2_5_vl programs"
PROCESSOR = "processor"
Form = Literal["safetensors", "orbax"]


def write_pruned_qwen(folder: Path, asked: PrunedQwen, params: dict, checkpoint: Path) -> Path:
    """Writes {"vla": ..., "pruner": ...} with its config; see `write_bundle`.

    Args:
        folder: To make.
        asked: What the parameters are of.
        params: Of the type that `asked` names.
        checkpoint: Folder in the Hugging Face layout, whose small files go along.

    Raises:
        UserError: The folder cannot be written.
    """
    config = {"kind": KIND, **to_plain(asked)}
    return write_bundle(folder, params, config, {PROCESSOR: processor_files(checkpoint)})


def read_pruned_qwen(folder: Path, form: Form = "safetensors") -> tuple[PrunedQwen, dict]:
    """The model of such a bundle and its params, ready for `answer_pictures`.

    Raises:
        UserError: It is no whole bundle, or one of another kind.
    """
    params, config = read_bundle(folder, form)
    return _asked(folder, config, KIND), params


def write_quantized_qwen(
    folder: Path, asked: PrunedQwen, params: dict, checkpoint: Path, bits: EightBits
) -> Path:
    """The same with the kernels of linear layers in eight bits.

    Raises:
        UserError: qwix is not installed, the weights are of fp8, or the folder cannot be written.
    """
    check_kept(bits)
    rounded = unflatten(round_params(parts(asked), bits, params))
    config = {"kind": QUANTIZED, **to_plain(asked), "weights": bits.weights}
    return write_bundle(folder, rounded, config, {PROCESSOR: processor_files(checkpoint)})


def read_quantized_qwen(
    folder: Path, form: Form = "safetensors", activations: QType | None = None
) -> tuple[PrunedQwen, EightBits, Tensors]:
    """The model of such a bundle, how it was rounded and its flat tensors, for `quantized_answer`.

    Args:
        folder: Of `write_quantized_qwen`.
        form: Which of its two forms is read.
        activations: See `EightBits`; the weights are the same.

    Raises:
        UserError: It is no whole bundle, or one of another kind.
    """
    params, config = read_bundle(folder, form)
    asked = _asked(folder, config, QUANTIZED)
    return asked, EightBits(config["weights"], activations), flatten(params)


def quantized_answer(asked: PrunedQwen, bits: EightBits) -> Callable[..., Any]:
    """`(tensors, images, ids, lengths)` to the answer: pure, to be jitted.

    Raises:
        UserError: qwix is not installed.
    """

    def run(params, *inputs):
        return answer_pictures(asked, params, *inputs)

    return rounded_run(parts(asked), bits, run)


def qwen_program(asked: PrunedQwen) -> Program:
    """The model for `write_programs`; its own keep ratio is not used."""

    def run(keep_ratio, params, *inputs):
        found = answer_pictures(replace(asked, keep_ratio=keep_ratio), params, *inputs)
        return {"ids": found.ids, "lengths": found.lengths, "keep_indices": found.keep_indices}

    return Program(
        kind=PROGRAMS,
        run=run,
        inputs={
            "images": jax.ShapeDtypeStruct((asked.pictures, *asked.image_size, 3), jnp.uint8),
            "ids": jax.ShapeDtypeStruct((asked.prompt_ids,), jnp.int32),
            "lengths": jax.ShapeDtypeStruct((), jnp.int32),
        },
        outputs={
            "ids": ["batch", asked.sampling.max_new_tokens],
            "lengths": ["batch"],
            "keep_indices": ["batch", "kept"],
        },
        budget=lambda ratio: num_keep(asked.visual_tokens, ratio),
        model=to_plain(asked),
    )


def parts(asked: PrunedQwen) -> dict[str, Part]:
    """The modules whose parameters are exported."""
    config, dtype = asked.vla, jnp.dtype(asked.dtype)
    inputs = [
        jax.ShapeDtypeStruct((1, *array.shape), array.dtype)
        for array in qwen_program(asked).inputs.values()
    ]
    batch = jax.eval_shape(partial(device_batch, config=config), *inputs)
    tokens = jax.ShapeDtypeStruct((1, asked.visual_tokens, config.text.hidden_size), dtype)
    places = jax.ShapeDtypeStruct((3, 1, asked.visual_tokens), jnp.int32)
    return {
        "vla": Part(QwenVL(config, dtype), (batch,)),
        "pruner": Part(ReconPruner(asked.pruner), (tokens, places)),
    }


def processor_files(checkpoint: Path) -> list[Path]:
    """What a checkpoint's processor is read from, all but the weights, and its licence."""
    small, terms = (".json", ".jinja", ".txt"), ("LICENSE", "NOTICE")
    files = (
        path
        for path in checkpoint.iterdir()
        if path.is_file() and (path.suffix in small or path.name.startswith(terms))
    )
    return sorted(path for path in files if not path.name.endswith(".safetensors.index.json"))


def _asked(folder: Path, config: dict, kind: str) -> PrunedQwen:
    if config.get("kind") != kind:
        raise UserError(f"{folder} holds a {config.get('kind')!r}, not a {kind}.")
    folder = Path(folder)
    manifests.check_files(folder, manifests.load(folder), PROCESSOR)
    names = (field.name for field in fields(PrunedQwen))
    return from_plain(PrunedQwen, {name: config[name] for name in names if name in config})
