"""ReconPruner's training step beside the same step in PyTorch, in one run.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 fastdrive bench-train --out runs/bench_train
    fastdrive bench-train --config 3b --out runs/bench_train_3b  # on an accelerator

On a CPU: float32, the same weights and batch on both sides, whose first losses must agree; all
cores; the sides take turns. Needs the extra "parity". Takes about 5 minutes on 2 cores.

The variable lets the C library ask for huge pages: XLA takes its memory anew each step, and with
small pages a tenth to a fifth of a step goes into that. It does not change PyTorch's time.

On an accelerator ours alone, as a share of the device's peak; 3b is the published setting in
bfloat16, from pictures.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.build import shards_of
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.shards import Shards
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.train_cases import CASES, TrainCase, draw_batch, init_frozen, init_state, make_step
from experiments.training_cost import ENCODER_FORMULA, FORMULA, peak_flops, step_flops
from fastdrive_jax.configs import check_least
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point, write_rows
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding, shard_batch
from fastdrive_jax.training.prefetch import DevicePrefetch

SIDE = 2048  # of the matrices whose product gives a CPU's rate
PRODUCTS = 4  # of those in a round
PICTURES = WorldConfig(
    train_scenes=1, val_scenes=1, keyframes_per_scene=2, height=900, width=1600, workers=1
)
AGREE = 1e-5  # relative difference of the first losses
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class BenchTrainArgs:
    """Compare ReconPruner's training step with PyTorch's, or with an accelerator's peak.

    Attributes:
        out: Folder for train.json.
        config: Which steps: "tiny" is the quick start's, "100m" has 107M trained parameters, both
            on 8 x 14 tokens; "3b" has 540M trained parameters on 57 x 57 tokens after the frozen
            vision encoder of Qwen2.5-VL-3B, on accelerators only.
        rounds: Timed rounds after a warm-up round; the two sides take turns.
        seconds: Minimum duration of one side's part of a round; at least 2 steps.
        batch_size: Images in a batch; None uses the config's.
        remat: What the backward pass recomputes, see `ReconConfig`.
        peak_flops: Peak FLOP/s of the accelerator; None looks it up in a table.
    """

    out: Path = Path("runs/bench_train")
    config: tuple[Literal["tiny", "100m", "3b"], ...] = ("tiny", "100m")
    rounds: int = 5
    seconds: float = 2.0
    batch_size: int | None = None
    remat: Literal["none", "dots", "layer"] = "none"
    peak_flops: float | None = None

    def __post_init__(self):
        if unknown := [name for name in self.config if name not in CASES]:
            raise UserError(f"config={unknown[0]!r} must be one of {', '.join(CASES)}.")
        check_least(self, rounds=1, batch_size=1)
        for name in ("seconds", "peak_flops"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be positive.")


def bench_train(args: BenchTrainArgs) -> Path:
    """Measures, prints and writes the figures; returns their path."""
    device = jax.devices()[0]
    peak, torch = None, None
    if device.platform == "cpu":
        if "3b" in args.config:
            raise UserError(
                "The step of config 3b is over 40 TFLOP a picture, minutes on a CPU: run it on an "
                "accelerator, or give --config tiny 100m."
            )
        torch = _torch()
    else:
        peak = peak_flops(device, args.peak_flops)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        world = generate(Path(folder) / "world", PICTURES, progress=False)
        shards = shards_of(read_nuscenes(world), Path(folder) / "shards", quiet=True)
        for name in args.config:
            rows += _bench(name, _case(name, args), shards, peak, args)
    meta = {
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "peak_flops": peak,
        "jax": jax.__version__,
        "torch": torch and torch.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "load_average": os.getloadavg(),
    }
    return write_rows(args.out / "train.json", rows, meta)


def _case(name: str, args: BenchTrainArgs) -> TrainCase:
    case = CASES[name]
    recon = replace(case.recon, remat=args.remat)
    return replace(case, recon=recon, batch_size=args.batch_size or case.batch_size)


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("bench-train needs torch on a CPU: pip install -e '.[parity]'.") from error
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def _bench(
    name: str, case: TrainCase, shards: Shards, peak: float | None, args: BenchTrainArgs
) -> list[Row]:
    """All figures of one step."""
    flops = step_flops(case.recon, case.size, case.encoder)
    formula = FORMULA + (ENCODER_FORMULA if case.encoder else "")
    ours = OurSide(case)
    print(
        f"{name}: {ours.parameters / 1e6:.1f}M trained parameters, {case.tokens} tokens a picture"
    )
    print(f"{name}: {flops / 1e9:.1f} GFLOP a picture = {formula}")
    sides: dict[str, Callable[[int], float]] = {"fastdrive": ours.run}
    if peak is None:
        theirs, loss = _torch_side(case, ours)
        sides["torch"] = theirs
        found = float(ours.metrics["loss"])
        if not math.isclose(found, loss, rel_tol=AGREE):
            raise RuntimeError(f"the first losses are {found} and, by torch, {loss}")
        print(f"{name}: first losses {found:.7f} and, by torch, {loss:.7f}")
    steps = {}
    for side, run in sides.items():
        steps[side] = max(2, math.ceil(args.seconds / run(1)))
        run(steps[side])
    speeds: dict[str, list[float]] = {side: [] for side in (*sides, "machine")}
    for _ in range(args.rounds):
        speeds["machine"].append(peak or matmul_rate())
        for side, run in sides.items():
            run(1)  # the first step after the other side's is slower, for both
            seconds = run(steps[side])
            speeds[side].append(case.batch_size * steps[side] / seconds)
    waited, first = input_wait(case, ours, shards, max(4, steps["fastdrive"]))
    rows = _report(name, speeds, flops, args)
    extra = {
        "compilations_after_first_step": ours.compiled,
        "dispatched_after": float(np.median(ours.dispatched[-args.rounds :])),
        "input_wait": waited,
    }
    rows += [
        point("fastdrive", None, f"{metric}_{name}", value, n=args.rounds, seed=0)
        for metric, value in extra.items()
    ]
    print(
        f"{name} fastdrive: {ours.compiled} compilations after the first step, no transfer that "
        f"was not asked for; all steps of a round dispatched after "
        f"{extra['dispatched_after']:.1%} of its time; input waited for {waited:.2%} of the time "
        f"(1600 x 900 JPEGs; first batch {first:.2f} s)",
        flush=True,
    )
    return rows


class OurSide:
    """This library's step with its state.

    Attributes:
        case: What is trained.
        step: The jitted step.
        frozen: Its third argument.
        metrics: Of the last step.
        parameters: Number of trained ones.
        dispatched: For each run the share of its time after which all steps were dispatched.
        compiled: Compilations within any run, that is, after the first step.
    """

    def __init__(self, case: TrainCase):
        """Compiles, and makes the first step."""
        devices = jax.local_devices()
        spread = case.spread and case.batch_size % len(devices) == 0
        self.mesh = make_mesh(devices=devices if spread else devices[:1])
        whole = replicated_sharding(self.mesh)
        self.case, self.step = case, make_step(case, whole)
        self.state = jax.jit(partial(init_state, case), out_shardings=whole)()
        self.frozen = jax.jit(partial(init_frozen, case), out_shardings=whole)()
        self.first_params = jax.device_get(self.state.params)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.first_params))
        self.first_key = self.state.step_key()
        self._batch = shard_batch(draw_batch(case), self.mesh)
        self.dispatched: list[float] = []
        self.compiled = 0
        self.advance(self._batch)

    def run(self, steps: int) -> float:
        """Seconds of some steps; a transfer between host and device within them raises."""
        jax.block_until_ready(self.state)
        with compilations() as compiled, jax.transfer_guard("disallow"):
            begin = time.perf_counter()
            for _ in range(steps):
                self.advance(self._batch)
            sent = time.perf_counter()
            jax.block_until_ready(self.state)
            end = time.perf_counter()
        self.compiled += len(compiled)
        self.dispatched.append((sent - begin) / (end - begin))
        return end - begin

    def advance(self, batch) -> None:
        """One step."""
        with jax.set_mesh(self.mesh):
            self.state, self.metrics = self.step(self.state, batch, self.frozen)


def _torch_side(case: TrainCase, ours: OurSide) -> tuple[Callable[[int], float], float]:
    """PyTorch's run of some steps, after its first one, and the loss of that."""
    import torch

    from experiments.torch_recon import TorchRecon, TorchStep, load_params

    model = TorchRecon(case.recon)
    load_params(model, ours.first_params)
    step = TorchStep(model, case.optimizer)
    batch = {name: torch.from_numpy(value) for name, value in draw_batch(case).items()}
    low, high = case.recon.keep_range
    # The budgets that our first step drew; their values do not change the time.
    ratio = jax.random.uniform(ours.first_key, (case.batch_size, 1), minval=low, maxval=high)
    given = [torch.from_numpy(np.array(ratio))]
    if case.recon.needs_prior:
        given.append(torch.from_numpy(np.array(ours.frozen["prior"])))

    def run(steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step(batch, *given)
        return time.perf_counter() - begin

    return run, float(step(batch, *given))


def matmul_rate() -> float:
    """FLOP/s of float32 products of large square matrices, on all cores."""
    x = jnp.ones((SIDE, SIDE))
    jax.block_until_ready(_product(x))
    begin = time.perf_counter()
    for _ in range(PRODUCTS):
        jax.block_until_ready(_product(x))
    return PRODUCTS * 2 * SIDE**3 / (time.perf_counter() - begin)


@jax.jit
def _product(x):
    return x @ x


@contextmanager
def compilations() -> Iterator[list[float]]:
    """The seconds of each compilation within the block."""
    found: list[float] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def input_wait(case: TrainCase, ours: OurSide, shards: Shards, steps: int) -> tuple[float, float]:
    """Share of the steps' time in which the loop waits for a batch, and seconds to the first.

    As in `training.loop`: JPEGs are decoded beside the step, batches are put on the device ahead of
    theirs, a step's loss is read when the next one is dispatched.
    """
    fields = ("image", "mask", "camera")
    config = LoaderConfig(case.batch_size, case.size, fields=fields)
    batches = iter(make_loader(shards, "train", config))
    ahead = DevicePrefetch(batches, partial(shard_batch, mesh=ours.mesh))
    begin = time.perf_counter()
    batch = next(ahead)
    first = time.perf_counter() - begin
    ours.advance(batch)
    jax.block_until_ready(ours.state)  # it was compiled for a batch without tokens
    begin, waited, before = time.perf_counter(), 0.0, ours.metrics
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(ahead)
        waited += time.perf_counter() - start
        ours.advance(batch)
        float(before["loss"])
        before = ours.metrics
    jax.block_until_ready(ours.state)
    share = waited / (time.perf_counter() - begin)
    batches.close()
    return share, first


def _report(
    name: str, speeds: dict[str, list[float]], flops: float, args: BenchTrainArgs
) -> list[Row]:
    rows, machine = [], speeds["machine"]

    def add(side: str, metric: str, value: float, unit: str = "") -> None:
        rows.append(point(side, None, f"{metric}_{name}", value, n=args.rounds, seed=0, unit=unit))

    what = "the peak" if "torch" not in speeds else f"the rate of {SIDE}^2 float32 products"
    add("machine", "flops_per_second", float(np.median(machine)), "FLOP/s")
    print(f"{name}: {what} is {np.median(machine) / 1e9:.1f} GFLOP/s")
    for side in (side for side in speeds if side != "machine"):
        rates = np.array(speeds[side])
        shares = rates * flops / machine  # of the same round, under the same load
        add(side, "images_per_second", float(np.median(rates)), "1/s")
        add(side, "mfu", float(np.median(shares)))
        print(
            f"{name} {side}: {np.median(rates):.2f} pictures/s, {np.median(shares):.1%} of {what} "
            f"({shares.min():.1%} to {shares.max():.1%} over {args.rounds} rounds)"
        )
    if "torch" in speeds:
        times = np.divide(speeds["fastdrive"], speeds["torch"])
        add("fastdrive", "times_torch", float(np.median(times)))
        print(
            f"{name}: {np.median(times):.2f} times as fast as torch "
            f"({times.min():.2f} to {times.max():.2f})",
            flush=True,
        )
    return rows
