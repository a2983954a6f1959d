"""The efficiency table of FastDriveVLA (Table 4) for any size, method, ratio and batch, in one run.

    fastdrive bench-efficiency --config 100m --methods reconpruner divprune fastv
    fastdrive bench-efficiency --config 3b --predict

Weights and pictures are random: what a token scores does not change the time. Stages of a frame are
compiled apart, and unpruned, methods, transformers (with the extra "parity") and the machine's own
rates take turns, after a round of warming up; figures are medians of the rounds with quartiles.
float32 on a CPU, bfloat16 elsewhere. `--predict` allocates nothing: it counts, and divides by what
makers' data sheets say. A run that was cut off goes on after its last whole round, on a machine of
the same kind and with the same files of own methods.

Writes OUT/efficiency.json and OUT/efficiency.md and, given the errors of methods, a plot of speed
against error. On 2 idle cores "100m" with three methods, transformers and two rounds of the encoder
takes about 3 minutes, "1b" with one method several, and predicting "3b" about 20 seconds.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.efficiency_args import UNPRUNED, At, BenchEfficiencyArgs, settings_of
from experiments.efficiency_counts import (
    Counts,
    frame_counts,
    parameter_shapes,
    stage_rooflines,
    traced_flops,
)
from experiments.efficiency_rounds import PEER, Rounds, measure_rounds
from experiments.efficiency_table import markdown, write_plots
from experiments.frame_stages import BUSY, STAGES
from experiments.roofline import ACCELERATORS, Machine
from fastdrive_jax.evaluation.results import Row, read_rows, write_rows
from fastdrive_jax.files import write_text
from fastdrive_jax.models.attention import attention_kernel
from fastdrive_jax.pruning import builds_on_recon
from fastdrive_jax.pruning.accounting import FORMULA


def bench_efficiency(args: BenchEfficiencyArgs) -> Path:
    """Measures or predicts, prints and writes; returns the path of the rows."""
    errors = () if args.errors is None else read_rows(args.errors)[0]
    half = args.predict or jax.default_backend() != "cpu"
    dtype = jnp.bfloat16 if half else jnp.float32
    settings = settings_of(args, dtype, abstract=args.predict)
    found = None if args.predict else measure_rounds(args, settings, dtype)
    meta = {
        "config": asdict(args.driving),
        "name": args.config,
        "parameters": {
            part: sum(leaf.size for leaf in jax.tree.leaves(tree))
            for part, tree in parameter_shapes(args.driving).items()
        },
        "visual_tokens": args.driving.visual_tokens,
        "text_tokens": args.text,
        "decode_steps": args.driving.vocabulary.plan_length - 1,
        "dtype": jnp.dtype(dtype).name,
        "predicted": args.predict,
        "flops": FORMULA,
    }
    known: dict = {}
    programs = {
        at: traced_flops(setting, args.text, dtype, known) for at, setting in settings.items()
    }

    def counts(batch: int) -> dict[At, Counts]:
        return {
            at: frame_counts(
                setting,
                at[0] != UNPRUNED and builds_on_recon(at[0]),
                args.text,
                batch,
                programs[at],
                jnp.dtype(dtype).itemsize,
            )
            for at, setting in settings.items()
        }

    meta["attention"] = attention_kernel(dtype, args.driving.text.head_dim)
    seen = meta["attention"] in ("blockwise", "chunked")
    if not seen:
        print(
            "programs are not counted: their attention is a kernel of another library", flush=True
        )
    rows = []
    if found is None:
        machines = {name: ACCELERATORS[name] for name in args.accelerators}
        meta["machines"] = {name: asdict(machine) for name, machine in machines.items()}
        for batch, counted in ((batch, counts(batch)) for batch in args.batch):
            rows += count_rows(counted, batch, seen)
            for name, machine in machines.items():
                rows += predicted_rows(counted, batch, name, machine, meta["decode_steps"])
    else:
        meta |= found.meta
        for batch, counted in ((batch, counts(batch)) for batch in args.batch):
            rows += count_rows(counted, batch, seen)
            rows += measured_rows(found, counted, batch, meta["decode_steps"])
        rows += found.rows
    path = write_rows(args.out / "efficiency.json", rows, meta)
    text = markdown(rows, meta)
    write_text(args.out / "efficiency.md", text)
    print(text, flush=True)
    if errors:
        write_plots(args.out, rows, errors)
    return path


def count_rows(counts: Mapping[At, Counts], batch: int, seen: bool) -> list[Row]:
    """What is counted of a batch, on whatever machine; of programs only if all can be `seen`."""
    rows = []
    whole = counts[UNPRUNED, 1.0]
    for (name, ratio), found in counts.items():
        prefill = found.cost.prefill_flops + found.cost.method_flops
        values = {
            "vision_flops": (found.stages["vision"][0], "FLOP"),
            "pruner_flops": (found.cost.method_flops, "FLOP"),
            "prefill_flops": (prefill, "FLOP"),
            "decode_flops": (found.cost.decode_flops, "FLOP"),
            "bound": (whole.cost.prefill_flops / prefill, ""),
            "kv_bytes": (found.cost.kv_bytes, "B"),
            "weight_bytes": (found.cost.weight_bytes, "B"),
            "equivalent_tokens": (found.cost.equivalent_tokens, ""),
        }
        if seen:
            traced = found.programs["pruner"] + found.programs["prefill"]
            values["prefill_program_flops"] = batch * traced, "FLOP"
            values["program_bound"] = whole.programs["prefill"] / traced, ""
        for metric, (value, unit) in values.items():
            rows.append(_row(name, ratio, f"{metric}_batch_{batch}", value, unit, 1))
    return rows


def predicted_rows(
    counts: Mapping[At, Counts],
    batch: int,
    machine_name: str,
    machine: Machine,
    steps: int,
) -> list[Row]:
    """Rooflines of a batch on a machine that is not here, "predicted" in the metric's name."""
    rows = []
    whole = stage_rooflines(counts[UNPRUNED, 1.0], machine, steps)
    for (name, ratio), found in counts.items():
        times = stage_rooflines(found, machine, steps)
        for stage, value in times.items():
            metric = f"predicted_{machine_name}_{stage}_batch_{batch}"
            rows.append(_row(name, ratio, f"{metric}_ms", value, "ms", 1))
            if stage in ("prefill", "decode", "frame"):
                rows.append(_row(name, ratio, f"{metric}_speedup", whole[stage] / value, "", 1))
    return rows


def measured_rows(found: Rounds, counts: Mapping[At, Counts], batch: int, steps: int) -> list[Row]:
    """Times, speed-ups in the same round, and rooflines of this machine."""
    rows, rounds = [], found.times[batch]
    kinds = ("", BUSY) if jax.default_backend() == "cpu" else ("",)
    for (name, ratio), times in rounds.items():
        for kind in kinds:
            spent = frame_times(times, steps, kind)
            unpruned = rounds[name if name == PEER else UNPRUNED, 1.0]
            whole = frame_times(unpruned, steps, kind)
            for stage, values in spent.items():
                metric = f"{stage}_batch_{batch}_{kind}"
                rows.append(_measured(name, ratio, f"{metric}ms", values, "ms"))
                if stage in ("prefill", "decode", "frame"):
                    speed = whole[stage] / values
                    rows.append(_measured(name, ratio, f"{metric}speedup", speed, ""))
        if (name, ratio) in counts:
            roofs = stage_rooflines(counts[name, ratio], found.machine, steps)
            for stage, value in roofs.items():
                metric = f"{stage}_batch_{batch}_roofline_ms"
                rows.append(_row(name, ratio, metric, value, "ms", 1))
    return rows


def frame_times(
    times: Mapping[str, list[float]], steps: int, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Rounds of each stage as they are reported: a prefill with the method's work, one decode step.

    Args:
        times: Stage -> milliseconds of each round; the encoder may have run in some only, whose
            median then stands in all frames.
        steps: Of decoding.
        prefix: Of the stages, "" for the time that passed or `BUSY`.
    """
    spent = {stage: np.array(times[prefix + stage]) for stage in STAGES if prefix + stage in times}
    found = {stage: spent[stage] for stage in ("preprocess", "vision", "pruner") if stage in spent}
    found["language_model"] = spent["prefill"]
    found["prefill"] = spent["prefill"] + spent.get("pruner", 0.0)
    found["decode"] = spent["decode"] / steps
    if "vision" in spent:
        vision = spent.pop("vision")
        whole = len(vision) == len(spent["prefill"])
        found["frame"] = sum(spent.values()) + (vision if whole else np.median(vision))
    return found


def _measured(name, ratio, metric, values, unit) -> Row:
    low, high = np.percentile(values, [25, 75])
    return _row(name, ratio, metric, float(np.median(values)), unit, len(values), low, high)


def _row(name, ratio, metric, value, unit, n, low=None, high=None) -> Row:
    return Row(name.rpartition(":")[2], ratio, metric, value, low, high, n, 0, unit)
