"""What an exported form costs: error, size and time beside the training code, all in one run.

    fastdrive bench-export --run runs/quickstart --out runs/bench_export
    fastdrive bench-export --run runs/3b --vla CHECKPOINT --keep-ratio 0.25 --frames 20

Forms are compiled or loaded, warmed up and run one after the other, in an order drawn anew each
time, so that what slows the machine slows all of them; ratios between them mean more than the
milliseconds. Errors are on frames of the synthetic world, scores on the visual tokens that the
float32 encoder makes of them.
"""

import importlib.metadata
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.export_check import in_batches, same_share
from experiments.export_forms import Bench, driving_bench, qwen_bench
from experiments.export_qwen import QwenExport, with_qwen
from experiments.export_source import Source, read_source
from experiments.frame_stages import clock
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.export.programs import Bucket, float32_products
from fastdrive_jax.inference.pictures import layout_inputs
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning.recon_pruner import ReconPruner
from fastdrive_jax.pruning.select import num_keep

PERCENTILES = (25, 75)
WARM_UP = 3


@dataclass(frozen=True)
class BenchExportArgs:
    """Compare error, size and time of the exported forms of a pruned VLA.

    Attributes:
        run: A run folder, or a bundle.
        out: Folder for export.json.
        keep_ratio: Share of tokens kept, in (0, 1].
        batch: Frames per call.
        frames: Frames on which errors are measured.
        repeats: Timed calls of each form; the forms take turns.
        vla: See `fastdrive export`.
        cameras: See `fastdrive export`.
        qwen: Shapes, for a Qwen2.5-VL.
    """

    run: Path
    out: Path = Path("runs/bench_export")
    keep_ratio: float = 0.5
    batch: int = 1
    frames: int = 200
    repeats: int = 50
    vla: Path | None = None
    cameras: tuple[str, ...] | None = None
    qwen: QwenExport = QwenExport()

    def __post_init__(self):
        num_keep(1000, self.keep_ratio)
        if min(self.batch, self.frames, self.repeats) < 1:
            raise UserError(
                f"batch={self.batch}, frames={self.frames} and repeats={self.repeats} must be at "
                "least 1."
            )


def bench_export(args: BenchExportArgs) -> Path:
    """Measures and writes OUT/export.json.

    Raises:
        UserError: The VLA of the run is not known, or an extra is missing.
    """
    source = read_source(args.run, args.vla, args.cameras)
    if not source.whole:
        raise UserError(f"{args.run} cannot be timed as a policy: {source.why}")
    bucket = Bucket(args.keep_ratio, args.batch)
    with tempfile.TemporaryDirectory() as folder:
        if source.checkpoint is None:
            bench = driving_bench(source, bucket, args.frames, Path(folder))
        else:
            source = with_qwen(source, args.qwen, args.keep_ratio)
            bench = qwen_bench(source, bucket, args.frames, Path(folder))
        with float32_products([bench.plain]):  # as the programs do
            rows = [*_errors(source, bench, args), *_times(bench, args)]
    meta = {
        "run": str(args.run),
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "batch": args.batch,
        "versions": {name: _version(name) for name in ("jax", "qwix", "jax2onnx", "onnxruntime")},
    }
    if source.qwen is not None:
        meta |= {"dtype": source.qwen.dtype, "visual_tokens": source.qwen.visual_tokens}
    return write_rows(args.out / "export.json", rows, meta)


def _errors(source: Source, bench: Bench, args: BenchExportArgs) -> Iterator[Row]:
    """Answers and kept tokens against the training code's, and how the scores' order changes."""
    want = in_batches(bench.forms[bench.plain].run, bench.inputs, args.batch)
    compare = _waypoint_errors if source.qwen is None else _answer_errors
    scored = _scored(source, bench.inputs[0]) if source.qwen is None else None

    def row(name, metric, value, unit=""):
        return point(name, args.keep_ratio, metric, float(value), n=args.frames, unit=unit)

    for name, form in bench.forms.items():
        have = in_batches(form.run, bench.inputs, args.batch)
        yield row(name, "weights", form.size / 2**20, "MiB")
        for metric, value, unit in compare(want[0], have[0]):
            yield row(name, metric, value, unit)
        yield row(name, "kept_tokens_same", same_share(want[1], have[1]))
        if form.scores is not None:
            given, scores = scored
            found = form.scores(*given)
            ranks = [_rank_correlation(*both) for both in zip(scores, found, strict=True)]
            yield row(name, "score_rank_correlation_mean", np.mean(ranks))
            yield row(name, "score_rank_correlation_min", np.min(ranks))


def _waypoint_errors(want: np.ndarray, have: np.ndarray) -> Iterator[tuple[str, float, str]]:
    far = np.linalg.norm(have - want, axis=-1)
    yield "waypoint_distance_mean", far.mean(), "m"
    yield "waypoint_distance_max", far.max(), "m"
    yield "frames_with_another_plan", (far.max(axis=1) > 1e-3).mean(), ""


def _answer_errors(want: np.ndarray, have: np.ndarray) -> Iterator[tuple[str, float, str]]:
    same = have == want
    yield "frames_with_another_answer", (~same).any(axis=1).mean(), ""
    # Behind the first other id an answer goes its own way.
    yield "ids_before_another", np.cumprod(same, axis=1).sum(axis=1).mean(), ""


def _scored(source: Source, images: np.ndarray) -> tuple[tuple, np.ndarray]:
    """What the pruner takes of each picture, and its scores in float32.

    Picture by picture, as policies score.
    """
    model = DrivingVLA(source.vla)
    encode = jax.jit(partial(model.apply, method="encode"))
    variables = {"params": source.params["vla"]}
    tokens = np.concatenate(
        [np.asarray(encode(variables, images[at : at + 20])) for at in range(0, len(images), 20)]
    )
    tokens = tokens.reshape(-1, math.prod(source.vla.token_grid), tokens.shape[-1])
    given = (tokens,)
    if source.pruner.rope:
        given = tokens, layout_inputs(tokens, source.vla.token_grid).position_ids
    score = jax.jit(ReconPruner(source.pruner).apply)
    return given, np.asarray(score({"params": source.params["pruner"]}, *given))


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, of scores without ties."""
    ranks = [np.argsort(np.argsort(np.asarray(scores))) for scores in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def _times(bench: Bench, args: BenchExportArgs) -> Iterator[Row]:
    """Median milliseconds of a call with the middle half of them, and how many times as fast."""
    rows = np.arange(args.batch) % args.frames
    inputs = tuple(array[rows] for array in bench.inputs)
    spent: dict[str, list[float]] = {name: [] for name in bench.forms}
    rng, names = np.random.default_rng(0), list(bench.forms)
    for turn in range(args.repeats + WARM_UP):
        rng.shuffle(names)  # what ran before leaves caches and threads behind
        for name in names:
            times: dict[str, float] = {}
            clock(times, name, bench.forms[name].run, *inputs)
            if turn >= WARM_UP:
                spent[name].append(times[name])
    for name, values in spent.items():
        low, high = np.percentile(values, PERCENTILES)
        median, count = float(np.median(values)), args.repeats
        yield Row(name, args.keep_ratio, "frame_ms", median, low, high, count, None, "ms")
        ratio = float(np.median(np.asarray(spent[bench.plain]) / np.asarray(values)))
        yield point(name, args.keep_ratio, "times_as_fast", ratio, n=count)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
