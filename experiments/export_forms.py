"""The exported forms of one model side by side, each ready to be called: what the bench times."""

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from experiments.export_check import PlanFn, check_frames, of_plan, of_program, policy_of
from experiments.export_qwen import check_inputs, of_answer, qwen_params
from experiments.export_source import Source
from fastdrive_jax.export.driving import driving_program
from fastdrive_jax.export.eight_bits import EightBits, Tensors, round_params
from fastdrive_jax.export.onnx_programs import policy_file, read_onnx, write_onnx
from fastdrive_jax.export.programs import Bucket, Program, read_program, write_programs
from fastdrive_jax.export.pruned_qwen import parts, quantized_answer, qwen_program
from fastdrive_jax.export.quantized import (
    QuantizedPolicy,
    quantize_params,
    quantized_plan,
    quantized_scores,
)
from fastdrive_jax.export.run_program import PLATFORMS
from fastdrive_jax.inference.policy import plan

EIGHT_BITS = {
    "int8_weights": EightBits("int8"),
    "int8_products": EightBits("int8", "int8"),
    "fp8_products": EightBits("float8_e4m3fn", "float8_e4m3fn"),
}


@dataclass(frozen=True)
class Form:
    """One way to run the model.

    Attributes:
        run: Inputs to the plan or answer, and the kept tokens.
        size: Bytes of the weights that it reads.
        scores: Of tokens [B, N, D] by its pruner; None where they are the training code's, or not
            compared.
    """

    run: PlanFn
    size: int
    scores: Callable | None = None


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        inputs: Of S frames [S, ...].
        forms: By name.
        plain: The name of the training code's, which is the type that it computes in.
    """

    inputs: tuple[np.ndarray, ...]
    forms: dict[str, Form]
    plain: str


def driving_bench(source: Source, bucket: Bucket, frames: int, folder: Path) -> Bench:
    """The forms of a driving policy; where ONNX is left out it is said why.

    Args:
        source: With a driving VLA.
        bucket: Keep ratio and batch.
        frames: S, of the synthetic world.
        folder: For what must be written to be run.
    """
    found = check_frames(source.vla.cameras, source.vla.image_size, frames)
    policy, params = policy_of(source, bucket.keep_ratio), source.params
    size, plain = _num_bytes(params), "float32"
    forms = {plain: Form(of_plan(plan, policy, params, static=0), size)}
    for name, bits in EIGHT_BITS.items():
        quantized = QuantizedPolicy(policy, source.pruner, bits.weights, bits.activations)
        tensors = quantize_params(quantized, params)
        forms[name] = Form(
            of_plan(quantized_plan(quantized), tensors),
            _num_bytes(tensors),
            functools.partial(jax.jit(quantized_scores(quantized)), tensors),
        )
    forms["stablehlo"] = _stablehlo(folder, driving_program(policy), params, bucket, "waypoints")
    if importlib.util.find_spec("jax2onnx") is None:
        print("bench-export: onnx is left out, since jax2onnx is not installed")
    else:
        tokens, batch = math.prod(source.vla.token_grid), bucket.batch
        write_onnx(folder / "onnx", source.pruner, params, tokens, policy, (batch,))
        forms["onnx"] = Form(read_onnx(folder / "onnx", policy_file(batch)), size)
    return Bench((found.images, found.speed, found.command), forms, plain)


def qwen_bench(source: Source, bucket: Bucket, frames: int, folder: Path) -> Bench:
    """The forms of a pruned Qwen2.5-VL, which all decode as many ids as answers may have.

    An answer that ends early would take less time in one form than in another.

    Args:
        source: Of `export_qwen.with_qwen`.
        bucket: See `driving_bench`.
        frames: See `driving_bench`.
        folder: See `driving_bench`.
    """
    endless = replace(source.qwen.vla, eos_token_ids=())
    asked = replace(source.qwen, vla=endless, keep_ratio=bucket.keep_ratio)
    params = qwen_params(source)
    size, plain = _num_bytes(params), asked.dtype
    forms = {plain: Form(of_answer(asked, params), size)}
    rounded: dict[str, Tensors] = {}  # with rounded inputs or not the weights are the same
    for name, bits in EIGHT_BITS.items():
        if bits.weights not in rounded:
            rounded[bits.weights] = round_params(parts(asked), bits, params)
        tensors = rounded[bits.weights]
        run = of_plan(quantized_answer(asked, bits), tensors, answer="ids")
        forms[name] = Form(run, _num_bytes(tensors))
    forms["stablehlo"] = _stablehlo(folder, qwen_program(asked), params, bucket, "ids")
    return Bench(check_inputs(source.qwen, source.checkpoint, frames), forms, plain)


def _stablehlo(folder: Path, program: Program, params: dict, bucket: Bucket, answer: str) -> Form:
    """The program for the devices at hand, written and read back."""
    place, platform = folder / "stablehlo", PLATFORMS[jax.default_backend()]
    write_programs(place, program, params, (bucket,), (platform,))
    return Form(of_program(read_program(place, program.kind), answer), _num_bytes(params))


def _num_bytes(params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
