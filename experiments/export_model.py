"""Export a trained pruner, and the policy around it, to what others run.

    fastdrive export --run runs/quickstart --out runs/release
    fastdrive export --run runs/pruner --out runs/release --forms pruner onnx
    fastdrive export --run runs/quickstart --out runs/release --keep-ratio 0.25 0.5 --batch 1 4
    fastdrive export --run runs/3b --vla CHECKPOINT --out runs/3b_release --qwen.pictures 6

RUN is the folder of `train-pruner` or of the quick start, while it trains too, or a bundle of
theirs. OUT gets a folder for each form, README.md (the model card) and torch_pruner.py. Then every
form is read back and compared with the training code. One to two minutes on 2 CPU cores.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from experiments.export_check import (
    Difference,
    differences,
    policy_of,
    refuse_differences,
    token_grid,
)
from experiments.export_qwen import QwenExport, qwen_differences, with_qwen, write_qwen
from experiments.export_source import EXPORT, Source, read_source
from experiments.model_card import WRITTEN_BY, model_card
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.driving import driving_program, write_policy
from fastdrive_jax.export.eight_bits import need_qwix
from fastdrive_jax.export.onnx_programs import OPSET, need_converter, write_onnx
from fastdrive_jax.export.programs import (
    PLATFORMS,
    Bucket,
    float32_products,
    need_flatbuffers,
    write_programs,
)
from fastdrive_jax.export.pruner import TORCH_MODULE, write_pruner
from fastdrive_jax.export.quantized import QuantizedPolicy, write_quantized
from fastdrive_jax.files import write_bytes, write_text

Form = Literal["pruner", "policy", "stablehlo", "int8", "onnx"]
USUAL: tuple[Form, ...] = ("pruner", "policy", "stablehlo")
NEED_VLA: tuple[Form, ...] = ("policy", "stablehlo", "int8")
CARD = "README.md"


@dataclass(frozen=True)
class ExportArgs:
    """Export a trained pruner and its policy as bundles, PyTorch, StableHLO, int8 and ONNX.

    Attributes:
        run: A run folder, or a bundle.
        out: Folder to create.
        forms: What to write; None writes pruner, policy and stablehlo (for a pruner without its
            VLA, only the first).
        keep_ratio: Keep ratio of the policy, in (0, 1]; several produce one program each. None uses
            the bundle's, or 0.5.
        batch: Frames per call of the programs and of ONNX; several produce one each.
        platforms: Platforms of the programs.
        cudnn: Use cuDNN's flash attention in CUDA programs of half precision. JAX does not promise
            that other releases run them. Needs the extra `cuda` here, but no GPU.
        vla: The VLA that the pruner was trained on, if it is not the packaged one: weights of a
            tiny VLA, or the folder of a Qwen2.5-VL checkpoint.
        cameras: Cameras of a tiny VLA, in order. Required if the file of --vla does not record
            them; without --vla, naming all six selects the packaged six-camera VLA.
        check: Read everything back and compare it with the training code.
        check_frames: Number of frames of the synthetic world used for the check.
        qwen: Shapes, for a Qwen2.5-VL.
    """

    run: Path
    out: Path
    forms: tuple[Form, ...] | None = None
    keep_ratio: tuple[float, ...] | None = None
    batch: tuple[int, ...] = (1,)
    platforms: tuple[Literal["cpu", "cuda", "tpu"], ...] = PLATFORMS
    cudnn: bool = False
    vla: Path | None = None
    cameras: tuple[str, ...] | None = None
    check: bool = True
    check_frames: int = 20
    qwen: QwenExport = QwenExport()

    def __post_init__(self):
        for name in ("forms", "keep_ratio", "batch", "platforms", "cameras"):
            value = getattr(self, name)
            if value is not None and (not value or len(set(value)) < len(value)):
                raise UserError(f"{name}={value} must name at least one, and none twice.")
        for ratio in self.keep_ratio or ():
            Bucket(ratio)
        for batch in self.batch:
            Bucket(1.0, batch)
        check_least(self, check_frames=1)


def export_model(args: ExportArgs) -> Path:
    """Writes the forms, checks them and then writes the card, so that a folder with one is whole.

    Raises:
        UserError: The run cannot be read, a form cannot be made of it, or one that was read back
            is not what was trained.
    """
    source = read_source(args.run, args.vla, args.cameras)
    forms = _forms(args, source)
    ratios = args.keep_ratio or (source.keep_ratio or 0.5,)
    buckets = tuple(Bucket(ratio, batch) for ratio in ratios for batch in args.batch)
    if source.checkpoint is not None and set(forms) & set(NEED_VLA):
        source = with_qwen(source, args.qwen, ratios[0])
    if args.out.resolve() == (args.run / EXPORT).resolve():
        raise UserError(f"{args.out} is where a run keeps its own bundle; choose another folder.")
    try:
        _claim(args.out, forms)
    except OSError as error:
        raise UserError(f"{args.out} can't be written ({error.strerror}).") from error
    for form in forms:
        print(f"export: {args.out / form}", flush=True)
        _write(form, args, source, buckets)
    write_bytes(args.out / TORCH_MODULE.name, TORCH_MODULE.read_bytes())
    found: list[Difference] = []
    if args.check:
        given = args.out, forms, source, buckets, args.check_frames
        checks = [("float32", differences(*given))]
        if source.qwen is not None:
            checks.append((source.qwen.dtype, qwen_differences(*given)))
        for dtype, check in checks:
            with float32_products([dtype]):
                for one in check:
                    print(f"check: {one}", flush=True)
                    found.append(one)
        refuse_differences(found)
    device = str(jax.devices()[0].device_kind)
    card = model_card(source, forms, buckets, args.platforms, found, OPSET, device, args.check)
    path = write_text(args.out / CARD, card)
    print(f"export: {path}", flush=True)
    return path


def _forms(args: ExportArgs, source: Source) -> tuple[Form, ...]:
    if args.forms is None:
        forms = tuple(form for form in USUAL if source.whole or form not in NEED_VLA)
        if not source.whole:
            print(f"export: the pruner alone. {source.why}", flush=True)
    else:
        forms = args.forms
        if not source.whole and (missing := [form for form in forms if form in NEED_VLA]):
            raise UserError(f"{args.run} cannot be exported as {missing[0]}: {source.why}")
    if "onnx" in forms and token_grid(source) is None:
        raise UserError(
            f"{args.run} does not say how large the pictures were, which ONNX needs: give the "
            "folder of the run in place of its bundle, or leave onnx out."
        )
    need = {"stablehlo": need_flatbuffers, "int8": need_qwix, "onnx": need_converter}
    for form in forms:
        need.get(form, lambda: None)()
    return forms


def _claim(out: Path, forms: tuple[Form, ...]) -> None:
    """Refuses a folder with anything but an earlier export of the same forms."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another folder.")
    # Python leaves a cache where torch_pruner.py was imported.
    ours = {*forms, CARD, TORCH_MODULE.name, "__pycache__"}
    for form in forms:  # what an export that was killed left
        for part in (*out.glob(f".{form}.part-*"), *out.glob(f".{form}.old-*")):
            shutil.rmtree(part)
    if out.is_dir() and (other := sorted({path.name for path in out.iterdir()} - ours)):
        raise UserError(
            f"{out} holds {other[0]}, which this export would not write; choose another folder or "
            "remove it."
        )
    card = out / CARD
    if card.exists() and WRITTEN_BY not in card.read_text("utf-8", "replace"):
        raise UserError(f"{card} is not of an export; choose another folder or remove it.")
    card.unlink(missing_ok=True)  # until all is written and checked there is no card


def _write(form: Form, args: ExportArgs, source: Source, buckets: tuple[Bucket, ...]) -> None:
    folder, first = args.out / form, buckets[0]
    policy = None if source.vla is None else policy_of(source, first.keep_ratio)
    if form == "pruner":
        write_pruner(folder, source.params["pruner"], source.pruner)
    elif source.qwen is not None and form in NEED_VLA:
        write_qwen(form, folder, source, buckets, args.platforms, args.cudnn)
    elif form == "policy":
        write_policy(folder, source.params, source.vla, source.pruner, first.keep_ratio)
    elif form == "stablehlo":
        given = source.params, buckets, args.platforms, args.cudnn
        write_programs(folder, driving_program(policy), *given)
    elif form == "int8":
        write_quantized(folder, QuantizedPolicy(policy, source.pruner), source.params)
    else:
        rows, columns = token_grid(source)
        # One picture's: the policy scores each by itself.
        write_onnx(folder, source.pruner, source.params, rows * columns, policy, args.batch)
