"""Whether every exported form plans what the training code plans, on frames of the synthetic world.

The training code is `inference.policy.plan` with the parameters in memory. Forms are read back from
the disk, so what is compared is what others will load.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from data_pipelines.schema import TOKEN_PIXELS
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.frames import Frames, world_frames
from experiments.export_source import Source
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export import run_program
from fastdrive_jax.export.driving import PROGRAMS, read_policy
from fastdrive_jax.export.onnx_programs import PRUNER, policy_file, read_onnx
from fastdrive_jax.export.programs import Bucket, read_program
from fastdrive_jax.export.pruner import read_pruner
from fastdrive_jax.export.quantized import quantized_plan, read_quantized
from fastdrive_jax.inference.pictures import layout_inputs
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPruner, recon_pruner

METRES, SCORES = 1e-5, 1e-5  # of forms that hold the same numbers; scores relative to the largest

ANY_GRID = (8, 14)  # of random tokens: a pruner scores pictures of any size
PlanFn = Callable[..., tuple[np.ndarray, np.ndarray]]  # images and more to plan or answer, kept


@dataclass(frozen=True)
class Difference:
    """How far a form is from the training code.

    Attributes:
        form: What was read.
        quantity: "waypoints, m" or "scores".
        largest: Of all absolute differences.
        bound: It must not exceed; None of a form that rounds weights.
        kept: Share of the kept tokens that are the same; None of scores.
        n: Frames.
    """

    form: str
    quantity: str
    largest: float
    bound: float | None
    kept: float | None
    n: int

    def __str__(self):
        kept = "" if self.kept is None else f", {self.kept:.2%} of the kept tokens the same"
        note = " (rounded weights)" if self.bound is None else ""
        return f"{self.form}: largest difference {self.largest:.2g} ({self.quantity}){kept}{note}"


def check_frames(cameras: Sequence[str], image_size: tuple[int, int], count: int) -> Frames:
    """Frames of the synthetic world for the cameras and pictures of a VLA, two of each scene."""
    height, width = image_size
    world = WorldConfig(
        train_scenes=0,
        val_scenes=1,
        keyframes_per_scene=2,
        height=height,
        width=width,
        cameras=tuple(cameras),
    )
    return world_frames(world, count)


def policy_of(source: Source, keep_ratio: float) -> DrivingPolicy:
    """The policy of a source with a VLA."""
    return DrivingPolicy(DrivingVLA(source.vla), recon_pruner(source.pruner), keep_ratio)


def in_batches(
    run: PlanFn, inputs: Sequence[np.ndarray], batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """What a program of one batch size answers to all S samples, and their kept tokens [S, K]."""
    count, parts = len(inputs[0]), []
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch).clip(max=count - 1)
        parts.append(run(*(array[rows] for array in inputs)))
    answers, kept = (
        np.concatenate([np.asarray(x) for x in part]) for part in zip(*parts, strict=True)
    )
    return answers[:count], kept[:count]


def same_share(want: np.ndarray, have: np.ndarray) -> float:
    """Share of the kept tokens [S, K] that are the same."""
    same = [len(np.intersect1d(*rows)) for rows in zip(want, have, strict=True)]
    return float(np.mean(same)) / want.shape[1]


def of_plan(
    function: Callable, *first, answer: str = "waypoints", static: int | None = None
) -> PlanFn:
    """A function that gives a plan, or another `answer` with kept tokens, as arrays, compiled.

    Args:
        function: Pure.
        first: Its first arguments.
        answer: Name of what it gives.
        static: Which of the arguments is; one program then serves all that are equal.
    """
    run = jax.jit(function, static_argnums=static)

    def call(*inputs):
        found = run(*first, *inputs)
        return getattr(found, answer), found.keep_indices

    return call


def of_program(program: Callable[..., dict], answer: str) -> PlanFn:
    """An exported program as arrays: its `answer` and the kept tokens."""

    def call(*inputs):
        found = program(*inputs)
        return found[answer], found["keep_indices"]

    return call


def training_plan(source: Source, keep_ratio: float) -> PlanFn:
    """What all else is compared with."""
    return of_plan(plan, policy_of(source, keep_ratio), source.params, static=0)


def differences(
    out: Path, forms: tuple[str, ...], source: Source, buckets: tuple[Bucket, ...], frames: int
) -> Iterator[Difference]:
    """Reads each form back and compares it.

    Args:
        out: Folder of the export.
        forms: What is in it.
        source: What it was made from.
        buckets: Of its programs; the first is that of the other forms of the policy.
        frames: How many frames.
    """
    if "pruner" in forms or "onnx" in forms:
        yield from _score_differences(out, forms, source, frames)
    if source.vla is None:
        return
    found = check_frames(source.vla.cameras, source.vla.image_size, frames)
    seen = found.images, found.speed, found.command
    for number, bucket in enumerate(buckets):
        want = in_batches(training_plan(source, bucket.keep_ratio), seen, bucket.batch)
        converted = bucket.keep_ratio == buckets[0].keep_ratio
        for form, run, bound in _planners(out, forms, bucket, number == 0, converted):
            have = in_batches(run, seen, bucket.batch)
            largest = float(np.abs(want[0] - have[0]).max())
            kept = same_share(want[1], have[1])
            yield Difference(form, "waypoints, m", largest, bound, kept, frames)


def _planners(out: Path, forms, bucket: Bucket, first: bool, converted: bool) -> Iterator[tuple]:
    """(name, program, bound) of each form that has the bucket."""
    if "policy" in forms and first:
        for form in ("safetensors", "orbax"):
            policy, params = read_policy(out / "policy", form)
            yield f"policy, {form}", of_plan(plan, policy, params, static=0), METRES
    if "stablehlo" in forms and runs_here(out / "stablehlo"):
        run = of_program(read_program(out / "stablehlo", PROGRAMS, bucket), "waypoints")
        name = f"stablehlo, {100 * bucket.keep_ratio:g}% kept, batch {bucket.batch}"
        yield name, run, METRES
    if "int8" in forms and first:
        quantized, tensors = read_quantized(out / "int8")
        yield "int8 weights", of_plan(quantized_plan(quantized), tensors), None
    if "onnx" in forms and converted:
        name = "policy, onnx" if bucket.batch == 1 else f"policy, onnx, batch {bucket.batch}"
        yield name, read_onnx(out / "onnx", policy_file(bucket.batch)), METRES


def runs_here(folder: Path) -> bool:
    """Whether programs are for the devices at hand; says so if they are not."""
    platforms = manifests.load(folder).config["buckets"][0]["programs"]
    here = jax.default_backend()
    if run_program.PLATFORMS[here] in platforms:
        return True
    print(f"check: {folder} is for {', '.join(platforms)} alone and cannot run on this {here}.")
    return False


def picture_tokens(source: Source, frames: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Visual tokens [1, n, D] of each picture of each frame, or random ones of a pruner alone.

    Behind them the position ids [3, 1, n], if the pruner takes them. Pictures go one by one because
    the policy scores them so.
    """
    seen = None
    if source.vla is not None:
        seen = check_frames(source.vla.cameras, source.vla.image_size, frames).images
        model, variables = DrivingVLA(source.vla), {"params": source.params["vla"]}
        encode = jax.jit(functools.partial(model.apply, method="encode"))
    grid, size = token_grid(source) or ANY_GRID, source.pruner.layer.hidden_size
    for number in range(frames):
        if seen is not None:
            tokens = encode(variables, seen[number : number + 1])
        else:
            key = jax.random.fold_in(jax.random.key(0), number)
            tokens = jax.random.normal(key, (1, grid[0] * grid[1], size))
        for picture in np.asarray(tokens).reshape(-1, 1, grid[0] * grid[1], size):
            if source.pruner.rope:
                yield picture, np.asarray(layout_inputs(picture, grid).position_ids)
            else:
                yield (picture,)


def token_grid(source: Source) -> tuple[int, int] | None:
    """Token rows and columns of a picture; None where neither a VLA nor a run says."""
    if source.vla is not None:
        return source.vla.token_grid
    size = ((source.facts.training or {}).get("loader") or {}).get("image_size")
    return size and (size[0] // TOKEN_PIXELS, size[1] // TOKEN_PIXELS)


def _score_differences(out, forms, source: Source, frames: int) -> Iterator[Difference]:
    apply = jax.jit(ReconPruner(source.pruner).apply)

    def scorer(params):
        return lambda *inputs: apply({"params": params}, *inputs)

    reference = scorer(source.params["pruner"])
    scorers = dict(_scorers(out, forms, source, scorer))
    largest, peak = dict.fromkeys(scorers, 0.0), 1.0
    for inputs in picture_tokens(source, frames):
        want = np.asarray(reference(*inputs))
        peak = max(peak, float(np.abs(want).max()))
        for form, score in scorers.items():
            far = np.abs(want - np.asarray(score(*inputs))).max()
            largest[form] = float(np.maximum(largest[form], far))  # what is not a number stays it
    for form in scorers:
        yield Difference(f"pruner, {form}", "scores", largest[form], SCORES * peak, None, frames)


def _scorers(out: Path, forms, source: Source, scorer: Callable) -> Iterator[tuple]:
    """(name, tokens and ids to scores) of each form of the pruner alone."""
    if "pruner" in forms:
        for form in ("safetensors", "orbax"):
            config, params = read_pruner(out / "pruner", form)
            if config != source.pruner:
                raise RuntimeError(f"{out / 'pruner'} came back with another config")
            yield form, scorer(params)
        if importlib.util.find_spec("torch") is not None:
            yield "PyTorch", torch_scorer(out / "pruner")
    if "onnx" in forms:
        run = read_onnx(out / "onnx", PRUNER)
        yield "onnx", lambda *inputs: run(*inputs)[0]


def torch_scorer(folder: Path) -> Callable[..., np.ndarray]:
    """The PyTorch module on arrays."""
    import torch

    from fastdrive_jax.export.torch_pruner import load_pruner

    pruner = load_pruner(folder)

    def score(*inputs):
        with torch.no_grad():
            return pruner(*(torch.from_numpy(np.array(array)) for array in inputs)).numpy()

    return score


def refuse_differences(found: list[Difference]) -> None:
    """Raises if a form that holds the same numbers plans something else.

    Raises:
        UserError: It does.
    """
    wrong = [one for one in found if one.bound is not None and not one.largest <= one.bound]
    if wrong:
        raise UserError(
            "The export is not what was trained: "
            + "; ".join(map(str, wrong))
            + ". Do not use it; please report this with the versions in its config.json."
        )
