"""Compile exported programs for a chip that is not here: do they compile, and what do they hold?

    fastdrive compile-export --programs runs/release/stablehlo --chip v5e
    fastdrive compile-export --model 3b --keep-ratio 0.25 --chip h100

Programs of an export are read and compiled without their weights. Without an export, a published
Qwen2.5-VL with a ReconPruner is compiled in the forms that `bench-export` compares, from shapes
alone. Of each program it writes the bytes of its weights and inputs, the most that it holds, and
how many matrix products of which type the compiler left: of int8 ones, those that the chip cannot
do become bfloat16. Nothing is run, so neither errors nor times are known.
Writes OUT/export_MODEL_CHIP.json, or export_programs_CHIP.json.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from experiments.ahead_of_time import compile_for, peak_bytes
from experiments.chips import CHIPS, ChipName, chip_devices
from experiments.compile_model import QWENS
from experiments.compiled_products import products_of
from experiments.export_forms import EIGHT_BITS
from experiments.export_qwen import QwenExport
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export.eight_bits import round_params
from fastdrive_jax.export.programs import Bucket, lower, need_flatbuffers
from fastdrive_jax.export.pruned_qwen import parts, quantized_answer, qwen_program
from fastdrive_jax.export.run_program import PLATFORMS
from fastdrive_jax.export.trees import SEPARATOR
from fastdrive_jax.inference.pruned_qwen import PrunedQwen, answer_pictures
from fastdrive_jax.inference.sampling import SamplingConfig
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.pruning.select import num_keep

PICTURE = (1596, 1596)  # 3,249 tokens


@dataclass(frozen=True)
class CompileExportArgs:
    """Compile exported programs for a chip, without weights and without the chip.

    Attributes:
        programs: Folder `stablehlo` of an export; None compiles the forms of `model`.
        model: Published Qwen2.5-VL.
        chip: Accelerator to compile for.
        keep_ratio: Share of tokens kept, of `model`.
        batch: Frames per call, of `model`.
        qwen: Shapes, of `model`; by default one image of 3,249 tokens, in bfloat16.
        out: Folder for the figures.
    """

    programs: Path | None = None
    model: Literal["3b", "7b"] = "3b"
    chip: ChipName = "h100"
    keep_ratio: float = 0.25
    batch: int = 1
    qwen: QwenExport = field(default_factory=QwenExport)
    out: Path = Path("runs/compile")

    def __post_init__(self):
        num_keep(1000, self.keep_ratio)
        if self.batch < 1:
            raise UserError(f"batch={self.batch} must be at least 1.")


class Form(NamedTuple):
    """What is compiled.

    Attributes:
        name: In the table.
        keep_ratio: In (0, 1].
        run: The function, or a program of `jax.export`.
        given: Shapes of its arguments.
        kernels: See `attention.kernels_of`; a program has its own already.
    """

    name: str
    keep_ratio: float
    run: Callable[..., Any]
    given: tuple
    kernels: str = "any"


def compile_export(args: CompileExportArgs) -> Path:
    """Compiles, prints and writes the figures; returns their path.

    Raises:
        UserError: The folder is no export or has no program for the chip, an extra is missing, or
            a program does not fit the chip.
    """
    need_flatbuffers()
    device = chip_devices(args.chip, 1)[0]
    place = SingleDeviceSharding(device)
    forms = _model_forms(args) if args.programs is None else _read_forms(args.programs, args.chip)
    rows: list[Row] = []
    for form in tqdm(forms, desc="programs", unit="program"):
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), form.given
        )
        with kernels_of(form.kernels):
            lowered = jax.jit(form.run).lower(*given)
        compiled = compile_for(args.chip, lowered, form.name)
        found = {
            "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
            "peak_bytes": peak_bytes(compiled),
        }
        for kind, count in products_of(compiled.as_text()).most_common():
            found[f"products {kind}"] = count
        rows += [point(form.name, form.keep_ratio, name, float(v)) for name, v in found.items()]
    for row in rows:
        tqdm.write(f"{row.method}, {row.keep_ratio:g}, {row.metric}: {row.value:,.0f}")
    meta = {"kind": device.device_kind}
    if args.programs is None:
        return write_rows(args.out / f"export_{args.model}_{args.chip}.json", rows, meta)
    meta["programs"] = str(args.programs)
    return write_rows(args.out / f"export_programs_{args.chip}.json", rows, meta)


def _read_forms(folder: Path, chip: ChipName) -> Iterator[Form]:
    """The programs of an export for a chip's platform."""
    manifest, platform = manifests.load(folder), PLATFORMS[CHIPS[chip].platform]
    buckets = [
        bucket for bucket in manifest.config.get("buckets", ()) if platform in bucket["programs"]
    ]
    if not buckets:
        raise UserError(f"{folder} has no program for {platform}; export it with --platforms.")
    for bucket in buckets:
        file = bucket["programs"][platform]
        manifests.check_files(folder, manifest, file)
        yield _exported(file, bucket["keep_ratio"], (folder / file).read_bytes())


def _exported(name: str, ratio: float, program: bytes) -> Form:
    found = jax.export.deserialize(bytearray(program))
    args, _ = jax.tree.unflatten(found.in_tree, found.in_avals)
    return Form(name, ratio, found.call, args)


def _model_forms(args: CompileExportArgs) -> Iterator[Form]:
    """A published model in the forms of `bench-export`."""
    config, bucket = QWENS[args.model], Bucket(args.keep_ratio, args.batch)
    platform = CHIPS[args.chip].platform
    asked = PrunedQwen(
        vla=config,
        pruner=ReconPrunerConfig(config.text),
        keep_ratio=args.keep_ratio,
        pictures=args.qwen.pictures,
        image_size=args.qwen.image_size or PICTURE,
        prompt_ids=args.qwen.prompt_ids,
        sampling=SamplingConfig(args.qwen.max_new_tokens),
        dtype=args.qwen.dtype or "bfloat16",
    )
    params, program = _abstract(asked), qwen_program(asked)
    inputs = tuple(
        jax.ShapeDtypeStruct((args.batch, *array.shape), array.dtype)
        for array in program.inputs.values()
    )
    run = partial(answer_pictures, asked)
    yield Form(asked.dtype, args.keep_ratio, run, (params, *inputs), platform)
    for name, bits in EIGHT_BITS.items():
        tensors = jax.eval_shape(partial(round_params, parts(asked), bits), params)
        run = quantized_answer(asked, bits)
        yield Form(name, args.keep_ratio, run, (tensors, *inputs), platform)
    tensors = flatten_dict(params, sep=SEPARATOR)
    for name, cudnn in (("stablehlo", False), ("stablehlo_cudnn", True))[: 1 + (platform == "gpu")]:
        lowered = lower(program, tensors, bucket, PLATFORMS[platform], cudnn)
        yield _exported(name, args.keep_ratio, lowered.serialize())


def _abstract(asked: PrunedQwen) -> dict:
    """Shapes of the parameters, in the type that is computed in."""
    dtype = jnp.dtype(asked.dtype)
    tokens = jax.ShapeDtypeStruct((1, 4, asked.vla.text.hidden_size), dtype)
    pruner = jax.eval_shape(ReconPruner(asked.pruner).init, jax.random.key(0), tokens)["params"]
    shapes = {"vla": abstract_params(asked.vla.vision, asked.vla.text), "pruner": pruner}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
