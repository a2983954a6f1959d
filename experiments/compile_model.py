"""Compile a published VLA ahead of time, without its weights: what a device would need.

    fastdrive compile-model --model 3b --devices 8
    fastdrive compile-model --model 3b --chip v5e

Of Qwen2.5-VL it encodes one picture of 3,249 visual tokens, reads it with a prompt and decodes one
token; of OpenVLA the same with one picture of 256; of OpenVLA-OFT a chunk of actions from two, of
pi0 from three.
Nothing is allocated and no accelerator is needed. Virtual devices are those of the CPU, whose
compiler keeps float32 copies of bfloat16 weights, so that a peak is an upper bound, and counts the
FLOPs of a loop, as in attention, once; for a real chip no FLOPs are counted. The 3B takes 22 s on
one virtual device (2 cores).
Writes OUT/compile_MODEL_DEVICES.json, with the name of a real chip before the number.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.ahead_of_time import abstract_shards, compile_for, peak_bytes, whole_shapes
from experiments.chips import CHIPS, ChipName, chip_devices
from experiments.compile_openvla import openvla_stages
from experiments.compile_pi0 import pi0_stages
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import point, write_rows
from fastdrive_jax.models.attention import attention_kernel, kernels_of
from fastdrive_jax.models.openvla.config import OPENVLA_7B, OPENVLA_OFT_7B
from fastdrive_jax.models.openvla.weights import abstract_params as abstract_openvla
from fastdrive_jax.models.pi0.config import PI0
from fastdrive_jax.models.pi0.weights import abstract_params as abstract_pi0
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, QWEN2_5_VL_7B, QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import layout_of
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.parallel.mesh import make_mesh

QWENS = {"3b": QWEN2_5_VL_3B, "7b": QWEN2_5_VL_7B}
OPENVLAS = {"openvla_7b": OPENVLA_7B, "openvla_oft_7b": OPENVLA_OFT_7B}
PI0S = {"pi0": PI0}
GRID = (114, 114)  # patches of 1596 x 1596 pixels
TENSOR_MOST = 4  # divides the heads and hidden units of all models, eight does not


@dataclass(frozen=True)
class CompileModelArgs:
    """Compile a published VLA without its weights and report what each device needs.

    Attributes:
        model: Qwen2.5-VL's 3B or 7B, OpenVLA, OpenVLA-OFT or pi0.
        devices: Devices to shard it over.
        prompt_tokens: Text tokens in addition to the images.
        out: Folder for the figures.
        chip: Accelerator to compile for; "virtual" takes devices of the CPU.
    """

    model: Literal["3b", "7b", "openvla_7b", "openvla_oft_7b", "pi0"] = "3b"
    devices: int = 1
    prompt_tokens: int = 256
    out: Path = Path("runs/compile")
    chip: ChipName = "virtual"


def compile_model(args: CompileModelArgs) -> Path:
    """Compiles, prints and writes the figures; returns their path."""
    if args.devices < 1 or args.prompt_tokens < 1:
        raise UserError("devices and prompt_tokens must be at least 1.")
    chip, devices = CHIPS[args.chip], chip_devices(args.chip, args.devices)
    tensor = int(np.gcd(args.devices, TENSOR_MOST))
    mesh = make_mesh(1, args.devices // tensor, tensor, devices)
    if args.model in QWENS:
        config, build = QWENS[args.model], qwen_stages
        shapes = abstract_params(config.vision, config.text)
        visual_tokens = GRID[0] * GRID[1] // config.vision.spatial_merge_size**2
    elif args.model in PI0S:
        config, build = PI0S[args.model], pi0_stages
        shapes, visual_tokens = abstract_pi0(config), config.visual_tokens
    else:
        config, build = OPENVLAS[args.model], openvla_stages
        shapes, visual_tokens = abstract_openvla(config), config.visual_tokens
    shapes = abstract_shards(shapes, mesh)
    decoder = config.prefix if args.model in PI0S else config.text
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    rows = [point(args.model, None, "parameters", parameters)]
    with kernels_of(chip.platform):
        print(
            f"attention: {attention_kernel(jnp.bfloat16, decoder.head_dim)}; bfloat16; "
            f"mesh {dict(mesh.shape)}",
            flush=True,
        )
        stages = build(config, shapes, mesh, args.prompt_tokens)
    for stage, lowered in stages.items():
        compiled = compile_for(args.chip, lowered, f"{stage} of {args.model}")
        found = {
            "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
            "peak_bytes": peak_bytes(compiled),
        }
        if chip.platform == "cpu":
            found["flops"] = compiled.cost_analysis()["flops"]
        for name, value in found.items():
            metric = f"{stage}_{name}_per_device"
            rows.append(point(args.model, None, metric, float(value)))
    for row in rows:
        print(f"{row.metric}: {row.value:,.0f}", flush=True)
    meta = {"devices": args.devices, "mesh": dict(mesh.shape), "visual_tokens": visual_tokens}
    meta |= {"kind": devices[0].device_kind}
    known = args.model if args.chip == "virtual" else f"{args.model}_{args.chip}"
    return write_rows(args.out / f"compile_{known}_{args.devices}.json", rows, meta)


def qwen_stages(
    config: QwenVLConfig, params: Any, mesh: Mesh, prompt_tokens: int
) -> dict[str, jax.stages.Lowered]:
    """Vision encoder, prefill and decoding step, of one sample with one picture."""
    model = QwenVL(config, jnp.bfloat16)
    layout = layout_of([GRID], config.vision)
    patches = GRID[0] * GRID[1]
    length = patches // config.vision.spatial_merge_size**2 + prompt_tokens
    shape = whole_shapes(mesh)

    def encode(params, rows):
        return model.apply({"params": params}, rows, layout, method="encode")

    def prefill(params, embeddings, positions, lengths):
        inputs = embeddings, positions, lengths
        return model.apply({"params": params}, *inputs, room=256, method="prefill")

    def decode(params, ids, position, caches):
        return model.apply({"params": params}, ids, position, caches, method="decode")

    embeddings = shape(1, length, config.text.hidden_size, dtype=jnp.bfloat16)
    inputs = params, embeddings, shape(3, 1, length), shape(1)
    caches = jax.eval_shape(prefill, *inputs)[1]
    caches = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype), caches)
    rows = shape(1, patches, 3 * config.vision.patch_size**2, dtype=jnp.uint8)
    with jax.set_mesh(mesh):
        return {
            "vision": jax.jit(encode).lower(params, rows),
            "prefill": jax.jit(prefill).lower(*inputs),
            "decode": jax.jit(decode, donate_argnums=3).lower(params, shape(1), shape(1), caches),
        }
