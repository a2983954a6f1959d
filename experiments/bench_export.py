"""What an exported form costs: error, size and time beside the training code, all in one run.

    fastdrive bench-export --run runs/quickstart --out runs/bench_export

Forms are compiled or loaded, warmed up and run one after the other, in an order drawn anew each
time, so that what slows the machine slows all of them; ratios between them mean more than the
milliseconds. Errors are on frames of the synthetic world, scores on the visual tokens that the
float32 encoder makes of them.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from experiments.export_check import PlanFn, check_frames, in_batches, of_plan, policy_of
from experiments.export_source import Source, read_source
from experiments.frame_stages import clock
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, write_rows
from fastdrive_jax.export.driving import PROGRAMS, driving_program
from fastdrive_jax.export.onnx_programs import POLICY, read_onnx, write_onnx
from fastdrive_jax.export.programs import Bucket, read_program, write_programs
from fastdrive_jax.export.quantized import (
    QuantizedPolicy,
    quantize_params,
    quantized_plan,
    quantized_scores,
)
from fastdrive_jax.export.run_program import PLATFORMS
from fastdrive_jax.inference.policy import plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPruner
from fastdrive_jax.pruning.select import num_keep

PLAIN = "float32"
EIGHT_BITS = {  # weights and inputs of linear layers
    "int8_weights": ("int8", None),
    "int8_products": ("int8", "int8"),
    "fp8_products": ("float8_e4m3fn", "float8_e4m3fn"),
}
PERCENTILES = (25, 75)


@dataclass(frozen=True)
class BenchExportArgs:
    """Error, size and time of the exported forms of a driving policy.

    Attributes:
        run: Folder of a run, or a bundle, with its VLA.
        out: Folder for export.json.
        keep_ratio: In (0, 1].
        batch: Frames of a call.
        frames: On which errors are measured.
        repeats: Timed calls of each form, in turn.
    """

    run: Path
    out: Path = Path("runs/bench_export")
    keep_ratio: float = 0.5
    batch: int = 1
    frames: int = 200
    repeats: int = 50

    def __post_init__(self):
        num_keep(1000, self.keep_ratio)
        if min(self.batch, self.frames, self.repeats) < 1:
            raise UserError(
                f"batch={self.batch}, frames={self.frames} and repeats={self.repeats} must be at "
                "least 1."
            )


@dataclass(frozen=True)
class Form:
    """One way to run the policy.

    Attributes:
        run: To arrays.
        size: Bytes of the weights that it reads.
        scores: Of tokens [B, N, D] by its pruner; None where they are float32's.
    """

    run: PlanFn
    size: int
    scores: Callable | None = None


def bench_export(args: BenchExportArgs) -> Path:
    """Measures and writes OUT/export.json.

    Raises:
        UserError: The run has no VLA, or an extra is missing.
    """
    source = read_source(args.run)
    if source.vla is None:
        raise UserError(f"{args.run} cannot be timed as a policy: {source.why}")
    found = check_frames(source.vla.cameras, source.vla.image_size, args.frames)
    frames = found.images, found.speed, found.command
    with tempfile.TemporaryDirectory() as folder:
        forms = make_forms(source, Bucket(args.keep_ratio, args.batch), Path(folder))
        rows = _errors(source, forms, frames, args) + _times(forms, frames, args)
    meta = {
        "run": str(args.run),
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "batch": args.batch,
        "versions": {name: _version(name) for name in ("jax", "qwix", "jax2onnx", "onnxruntime")},
    }
    return write_rows(args.out / "export.json", rows, meta)


def make_forms(source: Source, bucket: Bucket, folder: Path) -> dict[str, Form]:
    """The forms by name; where ONNX is left out it is said why.

    Args:
        source: With a VLA.
        bucket: Keep ratio and batch.
        folder: For what must be written to be run.
    """
    policy, params = policy_of(source, bucket.keep_ratio), source.params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    forms = {PLAIN: Form(of_plan(functools.partial(plan, policy), params), size)}
    for name, (weights, activations) in EIGHT_BITS.items():
        quantized = QuantizedPolicy(policy, source.pruner, weights, activations)
        tensors = quantize_params(quantized, params)
        forms[name] = Form(
            of_plan(quantized_plan(quantized), tensors),
            sum(leaf.nbytes for leaf in jax.tree.leaves(tensors)),
            functools.partial(jax.jit(quantized_scores(quantized)), tensors),
        )
    platform = PLATFORMS[jax.default_backend()]
    write_programs(folder / "stablehlo", driving_program(policy), params, (bucket,), (platform,))
    program = read_program(folder / "stablehlo", PROGRAMS)

    def run(*inputs):
        answer = program(*inputs)
        return answer["waypoints"], answer["keep_indices"]

    forms["stablehlo"] = Form(run, size)
    if bucket.batch > 1 or importlib.util.find_spec("jax2onnx") is None:
        why = "it takes one frame" if bucket.batch > 1 else "jax2onnx is not installed"
        print(f"bench-export: onnx is left out, since {why}")
        return forms
    write_onnx(folder / "onnx", source.pruner, params, math.prod(source.vla.token_grid), policy)
    forms["onnx"] = Form(read_onnx(folder / "onnx", POLICY), size)
    return forms


def _errors(source: Source, forms: dict[str, Form], frames, args) -> list[Row]:
    """Waypoints and kept tokens against float32's, and how the scores' order changes."""
    want = in_batches(forms[PLAIN].run, frames, args.batch)
    model = DrivingVLA(source.vla)
    encode = jax.jit(functools.partial(model.apply, method="encode"))
    tokens = np.concatenate(
        [
            np.asarray(encode({"params": source.params["vla"]}, frames[0][at : at + 20]))
            for at in range(0, args.frames, 20)
        ]
    )
    # Picture by picture, as the policy scores them.
    tokens = tokens.reshape(-1, math.prod(source.vla.token_grid), tokens.shape[-1])
    score = jax.jit(ReconPruner(source.pruner).apply)
    scores = np.asarray(score({"params": source.params["pruner"]}, tokens))
    rows = []

    def add(name, metric, value, unit=""):
        ratio, count = args.keep_ratio, args.frames
        rows.append(Row(name, ratio, metric, float(value), None, None, count, None, unit))

    for name, form in forms.items():
        have = in_batches(form.run, frames, args.batch)
        far = np.linalg.norm(have[0] - want[0], axis=-1)
        same = [len(np.intersect1d(*both)) for both in zip(have[1], want[1], strict=True)]
        add(name, "weights", form.size / 2**20, "MiB")
        add(name, "waypoint_distance_mean", far.mean(), "m")
        add(name, "waypoint_distance_max", far.max(), "m")
        add(name, "frames_with_another_plan", (far.max(axis=1) > 1e-3).mean())
        add(name, "kept_tokens_same", np.mean(same) / want[1].shape[1])
        if form.scores is not None:
            ranks = [
                _rank_correlation(*both) for both in zip(scores, form.scores(tokens), strict=True)
            ]
            add(name, "score_rank_correlation_mean", np.mean(ranks))
            add(name, "score_rank_correlation_min", np.min(ranks))
    return rows


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, of scores without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(scores))) for scores in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def _times(forms: dict[str, Form], frames, args) -> list[Row]:
    """Median milliseconds of a call with the middle half of them, and how many times as fast."""
    rows = np.arange(args.batch) % args.frames
    inputs = tuple(array[rows] for array in frames)
    spent: dict[str, list[float]] = {name: [] for name in forms}
    rng, names = np.random.default_rng(0), list(forms)
    for turn in range(args.repeats + 3):
        rng.shuffle(names)  # what ran before leaves caches and threads behind
        for name in names:
            times: dict[str, float] = {}
            clock(times, name, forms[name].run, *inputs)
            if turn >= 3:
                spent[name].append(times[name])
    found = []
    for name, values in spent.items():
        low, high = np.percentile(values, PERCENTILES)
        median, count = float(np.median(values)), args.repeats
        found.append(Row(name, args.keep_ratio, "frame_ms", median, low, high, count, None, "ms"))
        ratio = np.median(np.asarray(spent[PLAIN]) / np.asarray(values))
        found.append(
            Row(name, args.keep_ratio, "times_as_fast", float(ratio), None, None, count, None)
        )
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
