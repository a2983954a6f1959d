"""`fastdrive export` of a Qwen2.5-VL with its ReconPruner: what is read, written and checked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from data_pipelines.schema import CAMERAS
from experiments.export_check import (
    Difference,
    PlanFn,
    check_frames,
    in_batches,
    of_plan,
    of_program,
    runs_here,
    same_share,
)
from experiments.export_source import Source
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export import run_program
from fastdrive_jax.export.eight_bits import EightBits
from fastdrive_jax.export.programs import Bucket, read_program, write_programs
from fastdrive_jax.export.pruned_qwen import (
    PROGRAMS,
    quantized_answer,
    qwen_program,
    read_pruned_qwen,
    read_quantized_qwen,
    write_pruned_qwen,
    write_quantized_qwen,
)
from fastdrive_jax.inference.pruned_qwen import (
    PrunedQwen,
    answer_pictures,
    cast_params,
    prompt_batch,
)
from fastdrive_jax.inference.sampling import read_sampling
from fastdrive_jax.models.attention import attention_kernel, kernels_of
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load
from fastdrive_jax.models.qwen2_5_vl.hf_config import read_config
from fastdrive_jax.models.qwen2_5_vl.image_processor import smart_resize
from fastdrive_jax.models.qwen2_5_vl.processor import read_processor

PROMPT = "What should the driver do next?"


@dataclass(frozen=True)
class QwenExport:
    """Shapes of a Qwen2.5-VL's programs.

    Attributes:
        pictures: Images per prompt.
        image_size: Height and width of the images in pixels; None uses what the pruner was trained
            on.
        prompt_ids: Maximum number of prompt ids, including one per image; shorter prompts are
            padded.
        max_new_tokens: Maximum number of answer tokens.
        dtype: Dtype of weights and arithmetic; None uses that of the training.
    """

    pictures: int = 1
    image_size: tuple[int, int] | None = None
    prompt_ids: int = 512
    max_new_tokens: int = 256
    dtype: Literal["bfloat16", "float32"] | None = None


def with_qwen(source: Source, args: QwenExport, keep_ratio: float) -> Source:
    """The source with its checkpoint read.

    Raises:
        UserError: It cannot be read, or shapes do not fit it.
    """
    training = source.facts.training or {}
    size = args.image_size or (training.get("loader") or {}).get("image_size")
    if size is None:
        raise UserError(
            f"{source.path} does not say how large the pictures were; give --qwen.image-size."
        )
    dtype = args.dtype or training.get("dtype", "bfloat16")
    asked = PrunedQwen(
        vla=read_config(source.checkpoint),
        pruner=source.pruner,
        keep_ratio=keep_ratio,
        pictures=args.pictures,
        image_size=tuple(size),
        prompt_ids=args.prompt_ids,
        sampling=read_sampling(
            source.checkpoint, max_new_tokens=args.max_new_tokens, temperature=0.0
        ),
        dtype=dtype,
    )
    resized = smart_resize(*asked.image_size, read_processor(source.checkpoint).pictures)
    if resized != asked.image_size:
        raise UserError(
            f"The checkpoint's processor would make {resized} of pictures of {asked.image_size}; "
            "give --qwen.image-size a size that it keeps."
        )
    vla = load(source.checkpoint, dtype=dtype, progress=True)[1]
    return replace(source, qwen=asked, params=source.params | {"vla": vla})


def qwen_params(source: Source) -> dict:
    """The parameters in the type that is computed in."""
    return cast_params(source.params, source.qwen.dtype)


def write_qwen(form: str, folder: Path, source: Source, buckets, platforms, cudnn: bool) -> None:
    """Writes one form of the whole model."""
    asked, params = source.qwen, qwen_params(source)
    if form == "policy":
        write_pruned_qwen(folder, asked, params, source.checkpoint)
    elif form == "stablehlo":
        write_programs(folder, qwen_program(asked), params, buckets, platforms, cudnn)
    else:
        write_quantized_qwen(folder, asked, params, source.checkpoint, EightBits())


def qwen_differences(
    out: Path, forms: tuple[str, ...], source: Source, buckets: tuple[Bucket, ...], frames: int
) -> Iterator[Difference]:
    """Reads each form of the whole model back and compares its answers about frames.

    Args:
        out: Folder of the export.
        forms: What is in it.
        source: What it was made from.
        buckets: Of its programs; the first is that of the other forms.
        frames: How many frames.
    """
    given, params = check_inputs(source.qwen, source.checkpoint, frames), qwen_params(source)
    for number, bucket in enumerate(buckets):
        asked = replace(source.qwen, keep_ratio=bucket.keep_ratio)
        wanted: dict[str, tuple] = {}
        for form, run, bound, kernels in _answerers(out, forms, bucket, first=number == 0):
            kernel = attention_kernel(asked.dtype, asked.vla.text.head_dim, kernels)
            if kernel not in wanted:
                answers = of_answer(asked, params, kernels)
                wanted[kernel] = in_batches(answers, given, bucket.batch)
            have, want = in_batches(run, given, bucket.batch), wanted[kernel]
            other = float((want[0] != have[0]).sum())
            kept = same_share(want[1], have[1])
            yield Difference(form, "ids of answers", other, bound, kept, frames)


def of_answer(asked: PrunedQwen, params: dict, kernels: str | None = None) -> PlanFn:
    """The training code's answers to images, ids and lengths; see `kernels_of`."""
    params = jax.device_put(params, jax.local_devices()[0])  # programs are known by places, too
    run = of_plan(answer_pictures, asked, params, answer="ids", static=0)
    if kernels is None:
        return run

    def call(*inputs):
        with kernels_of(kernels):
            return run(*inputs)

    return call


def check_inputs(
    asked: PrunedQwen, checkpoint: Path, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, ids and lengths of one question about each of S frames of the synthetic world.

    Raises:
        UserError: See `check_pictures` and `prompt_batch`.
    """
    images = check_pictures(asked, count)
    prompt = read_processor(checkpoint).sample(PROMPT, list(images[0])).ids
    return images, *prompt_batch(asked, [prompt] * count)


def check_pictures(asked: PrunedQwen, count: int) -> np.ndarray:
    """Frames of the synthetic world as a car's cameras see them [S, C, H, W, 3].

    Raises:
        UserError: A prompt has more pictures than a car has cameras.
    """
    if asked.pictures > len(CAMERAS):
        raise UserError(
            f"The check draws the pictures of {len(CAMERAS)} cameras, not of {asked.pictures}; say "
            "--no-check."
        )
    return check_frames(CAMERAS[: asked.pictures], asked.image_size, count).images


def _kernels_of_programs(folder: Path) -> str:
    """See `kernels_of`; of the programs for the devices at hand."""
    platform = run_program.PLATFORMS[jax.default_backend()]
    return "gpu" if platform == "cuda" and manifests.load(folder).config.get("cudnn") else platform


def _answerers(out: Path, forms, bucket: Bucket, first: bool) -> Iterator[tuple]:
    """(name, program, most other ids, kernels) of each form that has the bucket.

    A program for CUDA without cuDNN has other kernels than the library takes in half precision, and
    of near equal ids another may then be the most likely.
    """
    if "policy" in forms and first:
        for form in ("safetensors", "orbax"):
            asked, params = read_pruned_qwen(out / "policy", form)
            yield f"policy, {form}", of_answer(asked, params), 0, None
    if "stablehlo" in forms and runs_here(out / "stablehlo"):
        run = of_program(read_program(out / "stablehlo", PROGRAMS, bucket), "ids")
        name = f"stablehlo, {100 * bucket.keep_ratio:g}% kept, batch {bucket.batch}"
        yield name, run, 0, _kernels_of_programs(out / "stablehlo")
    if "int8" in forms and first:
        asked, bits, tensors = read_quantized_qwen(out / "int8")
        run = of_plan(quantized_answer(asked, bits), tensors, answer="ids")
        yield "int8 weights", run, None, None
