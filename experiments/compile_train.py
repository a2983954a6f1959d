"""Compile the training step of a published size ahead of time: what each device would need.

    fastdrive compile-train --run fastdrivevla_3b --devices 64

Nothing is allocated: the devices are virtual ones of the CPU. Per device it writes memory, FLOPs
and the bytes that collectives move, and from them the share of the time that an accelerator of
given rates would compute. XLA's CPU compiler counts a loop's FLOPs once, so FLOPs are those of
`training_cost`, and its copies in float32 make the peak an upper bound. About a minute on 2 cores.
Writes OUT/train_RUN_DEVICES.json.
"""

import functools
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.ahead_of_time import abstract_shards, peak_bytes
from experiments.configs.pruner import PRUNER_RUNS, PrunerRun
from experiments.training_cost import step_flops
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import point, write_rows
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
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1}
# Bytes that a device sends for each byte of the result of a ring over n devices.
_TRAFFIC = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


@dataclass(frozen=True)
class CompileTrainArgs:
    """Compile a training step without weights or data and report what each device needs.

    Attributes:
        run: Setting to compile.
        devices: Number of virtual devices.
        fsdp: Devices that shard the parameters; the others hold copies.
        tensor: Devices that share each layer.
        per_device: Images per batch for each group of `tensor` devices.
        peak_flops: Peak FLOP/s of a device, for the prediction; by default an H100's dense
            bfloat16.
        link: Bytes per second that a device sends; by default NVLink within an H100 node.
        used: Share of `peak_flops` that a step without communication reaches.
        out: Folder for the figures.
    """

    run: Literal["fastdrivevla_3b", "fastdrivevla_7b"] = "fastdrivevla_3b"
    devices: int = 8
    fsdp: int = 8
    tensor: int = 1
    per_device: int = 1
    peak_flops: float = 989e12
    link: float = 450e9
    used: float = 0.4
    out: Path = Path("runs/compile")

    def __post_init__(self):
        check_least(self, devices=1, fsdp=1, tensor=1, per_device=1)
        for name in ("link", "used"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive.")
        if self.devices % (self.fsdp * self.tensor):
            raise UserError(
                f"devices={self.devices} must be a multiple of fsdp x tensor = "
                f"{self.fsdp * self.tensor}."
            )


def compile_train(args: CompileTrainArgs) -> Path:
    """Compiles, prints and writes the figures; returns their path."""
    jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = make_mesh(args.devices // (args.fsdp * args.tensor), args.fsdp, args.tensor)
    run, vision = PRUNER_RUNS[args.run], ENCODERS[args.run]
    batch = args.per_device * batch_parts(mesh)
    compiled, state = compile_step(run, vision, mesh, batch)
    moved = collective_bytes(compiled.as_text())
    flops = step_flops(run.recon, run.loader.image_size, vision) * batch / args.devices
    compute = flops / (args.used * args.peak_flops)
    wire = sum(moved.values()) / args.link
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
    meta = {"devices": args.devices, "mesh": dict(mesh.shape), "peak_flops": args.peak_flops}
    path = args.out / f"train_{args.run}_{args.devices}.json"
    return write_rows(path, rows, meta | {"link": args.link, "used": args.used})


def compile_step(
    run: PrunerRun, vision: VisionConfig, mesh: Mesh, batch: int
) -> tuple[jax.stages.Compiled, Any]:
    """The compiled step and its abstract state.

    Args:
        run: The setting.
        vision: Published sizes of its frozen encoder.
        mesh: Of virtual devices.
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
        return jitted.lower(state, given, {"encoder": encoder}).compile(), state


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that a device sends in each kind of collective of a compiled program, as in a ring.

    A collective within a loop is counted once for each of its rounds where the compiler notes the
    trip count, else once.
    """
    counts = trip_counts(text)
    moved = dict.fromkeys(_TRAFFIC, 0.0)
    computation = ""
    for line in text.splitlines():
        start = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            computation = start.group(1)
        found = re.search(r"= (.*?) (" + "|".join(_TRAFFIC) + r")(?:-start)?\(", line)
        if not found:
            continue
        size = sum(
            _BYTES[kind] * math.prod(int(n) for n in sides.split(",") if n)
            for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", found.group(1))
            if kind in _BYTES
        )
        group = group_size(line)
        moved[found.group(2)] += size * _TRAFFIC[found.group(2)](group) * counts.get(computation, 1)
    return moved


def group_size(line: str) -> int:
    """Devices that take part in a collective.

    Raises:
        ValueError: XLA writes its groups in a way that is not known here.
    """
    if " collective-permute" in line:
        return 2
    explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if explicit:
        return len(explicit.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    named = re.search(r"replica_groups=mesh\[(.*?)\][^{}]*\{(.*?)\}", line)
    if not named:
        raise ValueError(f"the groups of this collective cannot be read: {line.strip()[:300]}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
    return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", named.group(2)))


def trip_counts(text: str) -> dict[str, int]:
    """Rounds of each loop's body, by the body's name."""
    found = {}
    for line in text.splitlines():
        body = re.search(r"body=%?([\w.\-]+)", line)
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        if body and count:
            found[body.group(1)] = int(count.group(1))
    return found
