"""Compile the training step of a published size ahead of time: what each device would need.

    fastdrive compile-train --run fastdrivevla_3b --devices 64
    fastdrive compile-train --chip v5p --devices 64

Nothing is allocated and no accelerator is needed. Per device it writes memory, FLOPs and the bytes
that collectives move, and from them the share of the time that an accelerator of given rates would
compute. FLOPs are those of `training_cost`, for compilers count a loop's once and a kernel's not at
all. For virtual devices the CPU's compiler is asked: its copies in float32 make peak and bytes
upper bounds, and it takes about a minute on 2 cores; the compilers of GPUs and TPUs take longer.
Writes OUT/train_RUN_DEVICES.json, with the name of a real chip before the number.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.ahead_of_time import abstract_shards, compile_for, peak_bytes
from experiments.chips import CHIPS, ChipName, chip_devices
from experiments.collectives import collective_bytes
from experiments.configs.pruner import PRUNER_RUNS, PrunerRun
from experiments.training_cost import step_flops
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import point, write_rows
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.models.qwen2_5_vl.alignment import aligned_config
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, QWEN2_5_VL_7B, VisionConfig
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.parallel.mesh import batch_parts, batch_sharding, make_mesh
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.picture_loss import encode_pictures, picture_loss
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import abstract_state, init_train_state, make_train_step

ENCODERS = {"fastdrivevla_3b": QWEN2_5_VL_3B.vision, "fastdrivevla_7b": QWEN2_5_VL_7B.vision}


@dataclass(frozen=True)
class CompileTrainArgs:
    """Compile a training step without weights or data and report what each device needs.

    Attributes:
        run: Setting to compile.
        chip: Accelerator to compile for; "virtual" takes devices of the CPU.
        devices: Number of devices.
        fsdp: Devices that shard the parameters; the others hold copies.
        tensor: Devices that share each layer.
        per_device: Images per batch for each group of `tensor` devices.
        peak_flops: Peak FLOP/s of a device, for the prediction; by default the chip's dense
            bfloat16, of virtual devices an H100's.
        link: Bytes per second that a device sends; by default the chip's, which is NVLink within
            an H100 node, or one axis of a TPU's torus.
        used: Share of `peak_flops` that a step without communication reaches.
        out: Folder for the figures.
    """

    run: Literal["fastdrivevla_3b", "fastdrivevla_7b"] = "fastdrivevla_3b"
    chip: ChipName = "virtual"
    devices: int = 8
    fsdp: int = 8
    tensor: int = 1
    per_device: int = 1
    peak_flops: float | None = None
    link: float | None = None
    used: float = 0.4
    out: Path = Path("runs/compile")

    def __post_init__(self):
        check_least(self, devices=1, fsdp=1, tensor=1, per_device=1)
        for name in ("peak_flops", "link", "used"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be positive.")
        if self.devices % (self.fsdp * self.tensor):
            raise UserError(
                f"devices={self.devices} must be a multiple of fsdp x tensor = "
                f"{self.fsdp * self.tensor}."
            )


def compile_train(args: CompileTrainArgs) -> Path:
    """Compiles, prints and writes the figures; returns their path."""
    chip, devices = CHIPS[args.chip], chip_devices(args.chip, args.devices)
    mesh = make_mesh(args.devices // (args.fsdp * args.tensor), args.fsdp, args.tensor, devices)
    run, vision = PRUNER_RUNS[args.run], ENCODERS[args.run]
    batch = args.per_device * batch_parts(mesh)
    with kernels_of(chip.platform):
        lowered, state = lower_step(run, vision, mesh, batch)
    compiled = compile_for(args.chip, lowered, f"The step of {args.run}")
    moved = collective_bytes(compiled.as_text())
    flops = step_flops(run.recon, run.loader.image_size, vision) * batch / args.devices
    peak_flops, link = args.peak_flops or chip.peak_flops, args.link or chip.link
    compute = flops / (args.used * peak_flops)
    wire = sum(moved.values()) / link
    figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "batch": batch,
        "flops_per_device": flops,
        "argument_bytes_per_device": compiled.memory_analysis().argument_size_in_bytes,
        "peak_bytes_per_device": peak_bytes(compiled),
        **{f"{name}_bytes_per_device": size for name, size in moved.items()},
        "predicted_efficiency_without_overlap": compute / (compute + wire),
        "predicted_efficiency_with_overlap": compute / max(compute, wire),
    }
    rows = [point(args.run, None, name, float(v)) for name, v in figures.items()]
    for row in rows:
        print(f"{row.metric}: {row.value:,.4g}", flush=True)
    meta = {"devices": args.devices, "mesh": dict(mesh.shape), "kind": devices[0].device_kind}
    meta |= {"peak_flops": peak_flops, "link": link, "used": args.used}
    known = args.run if args.chip == "virtual" else f"{args.run}_{args.chip}"
    return write_rows(args.out / f"train_{known}_{args.devices}.json", rows, meta)


def lower_step(
    run: PrunerRun, vision: VisionConfig, mesh: Mesh, batch: int
) -> tuple[jax.stages.Lowered, Any]:
    """The lowered step and its abstract state.

    Args:
        run: The setting.
        vision: Published sizes of its frozen encoder.
        mesh: Of the devices.
        batch: Pictures of an update.
    """
    optimizer = make_optimizer(run.optimizer)
    init = functools.partial(
        init_train_state, functools.partial(init_params, run.recon), optimizer, run.seed
    )
    state = abstract_state(init, tree_shardings(jax.eval_shape(init), mesh))
    dtype = jnp.dtype(run.dtype)
    sides = run.loader.image_size
    picture = jax.ShapeDtypeStruct((1, *sides, 3), jnp.uint8)
    vision = aligned_config(vision)
    encoder = jax.eval_shape(VisionEncoder(vision).init, jax.random.key(0), picture)["params"]
    encoder = abstract_shards(encoder, mesh, dtype)
    place = batch_sharding(mesh)
    given = {
        "image": jax.ShapeDtypeStruct((batch, *sides, 3), jnp.uint8, sharding=place),
        "mask": jax.ShapeDtypeStruct((batch, *sides), jnp.uint8, sharding=place),
    }
    encode = functools.partial(encode_pictures, config=vision, dtype=dtype)
    loss = functools.partial(picture_loss, config=run.recon, encode=encode, dtype=dtype)
    step = make_train_step(loss, optimizer)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        return jitted.lower(state, given, {"encoder": encoder}), state
