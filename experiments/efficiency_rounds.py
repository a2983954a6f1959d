"""Rounds in which the unpruned model, methods, transformers and the machine's rates take turns."""

import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.pictures import check_picture, read_bytes
from experiments.ahead_of_time import peak_bytes
from experiments.drives import own_file_sum
from experiments.efficiency_args import At, BenchEfficiencyArgs
from experiments.efficiency_counts import MARKS, given_inputs, parameter_shapes
from experiments.efficiency_memory import memory_rows
from experiments.frame_inputs import drawn_jpeg, random_params
from experiments.frame_stages import (
    Setting,
    clock,
    compile_stages,
    late_params,
    preprocess,
    time_stages,
    trace_stages,
    vision_stage,
)
from experiments.roofline import Machine, rate_programs
from experiments.torch_qwen import (
    has_torch,
    peer_decode,
    peer_params,
    peer_prefill,
    random_peer,
    to_torch,
    torch_device,
    whole_config,
)
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point
from fastdrive_jax.files import write_text
from fastdrive_jax.inference.policy import start_state
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning.interface import VISION, stands_before

PEER = "transformers"
Times = dict[str, list[float]]  # milliseconds of each round by stage
RATE_TRIES = 10  # of a round; a rate is the best of all
LARGEST_ERROR = {4: 1e-3, 2: 0.2}  # by a number's bytes: of logits, relative to the largest one


@dataclass(frozen=True)
class Rounds:
    """What was measured.

    Attributes:
        times: Batch size -> setting -> times.
        machine: This one, the best of its rounds.
        meta: What else to say of the run.
        rows: Of memory, XLA's counts and the distance to transformers.
    """

    times: Mapping[int, Mapping[At, Times]]
    machine: Machine
    meta: Mapping[str, Any]
    rows: Sequence[Row]


def asked_of(args: BenchEfficiencyArgs, dtype: jnp.dtype) -> dict[str, Any]:
    """What makes rounds of one run those of another, as it comes back from the disk."""
    asked = asdict(args)
    for name in (
        "out",
        "batch",
        "repeats",
        "encoder_repeats",
        "errors",
        "memory",
        "predict",
        "accelerators",
    ):
        del asked[name]
    asked["method file"] = [found for name in args.methods for found in own_file_sum(name)]
    asked |= machine_of(jax.devices()[0]) | {"dtype": jnp.dtype(dtype).name}
    return json.loads(json.dumps(asked, default=str))


def machine_of(device: jax.Device) -> dict[str, Any]:
    """What tells machines apart whose times must not be mixed."""
    if device.platform != "cpu":
        return {"device": device.device_kind}
    return {"device": device.device_kind, "processor": processor(), "cores": os.cpu_count()}


def processor(path: Path = Path("/proc/cpuinfo")) -> str:
    """Name of this machine's processor.

    Args:
        path: Where Linux tells it, though not for all kinds.
    """
    text = path.read_text() if path.exists() else ""
    named = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def read_rounds(path: Path, asked: Mapping[str, Any]) -> dict[str, list[dict]]:
    """Rounds of an earlier run by batch size; none if there was none.

    Args:
        path: Of `write_rounds`.
        asked: What they must be rounds of.

    Raises:
        UserError: They are of something else, or the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        rounds, before = content["rounds"], content["asked"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it to measure anew.") from error
    odd = [name for name, value in asked.items() if before.get(name) != value]
    if odd:
        raise UserError(
            f"{path} holds rounds with another {', '.join(odd)}: remove it or choose another out."
        )
    return rounds


def write_rounds(path: Path, asked: Mapping[str, Any], rounds: Mapping[str, list[dict]]) -> None:
    """All whole rounds so far: milliseconds by "METHOD@RATIO" and stage."""
    write_text(path, json.dumps({"asked": asked, "rounds": rounds}) + "\n")


def measure_rounds(
    args: BenchEfficiencyArgs, settings: Mapping[At, Setting], dtype: jnp.dtype
) -> Rounds:
    """Runs all rounds that are not there yet.

    Args:
        args: What to measure.
        settings: The unpruned model first.
        dtype: Of the model.

    Raises:
        UserError: The picture is no JPEG, or the rounds on the disk are of another run.
    """
    config = args.driving
    device = jax.devices()[0]
    asked = asked_of(args, dtype)
    path = args.out / "rounds.json"
    rounds = read_rounds(path, asked)
    jpeg = drawn_jpeg() if args.image is None else read_bytes(args.image)
    if args.image is not None:
        check_picture(jpeg, args.image)
    rows = memory_rows(args, settings) if args.memory else []
    peer = wanted_peer(args, dtype)
    if peer is None:
        vla = random_params(parameter_shapes(config), dtype)
    else:
        drawn = peer_params(peer, whole_config(config.vision, config.text))
        vla = jax.tree.map(lambda leaf: jax.device_put(leaf).astype(dtype), drawn)
    rates = rate_programs(dtype)
    for batch in args.batch:
        turns = rounds.setdefault(str(batch), [])
        save = partial(write_rounds, path, asked, rounds)
        rows += _batch_rounds(args, settings, dtype, vla, peer, jpeg, batch, rates, turns, save)
    turns = [turn["rates"] for turns in rounds.values() for turn in turns]
    best = {
        name: amount / (1e-3 * min(turn[name] for turn in turns))
        for name, (_, amount) in rates.items()
    }
    machine = Machine(f"this {device.device_kind}", best["flops"], best["bandwidth"])
    meta = {
        "device": str(device),
        "cores": os.cpu_count(),
        "machine_flops": machine.flops,
        "machine_bandwidth": machine.bandwidth,
        "peer": None if peer is None else "transformers, sdpa",
    }
    times = {batch: _by_setting(rounds[str(batch)]) for batch in args.batch}
    return Rounds(times, machine, meta, rows)


def wanted_peer(args: BenchEfficiencyArgs, dtype: jnp.dtype) -> Any:
    """The model of transformers; None, and a sentence why, where it is not compared."""
    if not args.peer:
        return None
    if not has_torch():
        print("transformers is not compared: it needs pip install -e '.[parity]'.", flush=True)
        return None
    device = torch_device()
    if device is None:
        print("transformers is not compared: PyTorch has no such device here.", flush=True)
        return None
    return random_peer(whole_config(args.driving.vision, args.driving.text), dtype, device)


def _batch_rounds(args, settings, dtype, vla, peer, jpeg, batch, rates, turns, save) -> list[Row]:
    """Adds a batch's rounds to `turns`, saving each; returns rows of its programs."""
    config = args.driving
    model = next(iter(settings.values())).policy.model
    needs = VISION & frozenset().union(*(s.policy.pruner.needs for s in settings.values()))
    jpegs = [jpeg] * (batch * args.cameras)
    given = given_inputs(config, args.text, batch)

    def pictures():
        flat = preprocess(jpegs, config.image_size)
        return flat.reshape(batch, args.cameras, *flat.shape[2:])

    images = jnp.asarray(pictures())
    encode = jax.jit(partial(vision_stage, model, needs)).lower(vla, images).compile()
    encoded = encode(vla, images)
    traced, known, starts = {}, {}, {}
    for at, setting in settings.items():
        starts[at] = start_state(setting.policy, batch, dtype, args.text - MARKS)
        traced[at] = trace_stages(setting, vla, encoded, images, given, starts[at], known)
    programs = compile_stages(traced)
    print(f"batch {batch}: compiled", flush=True)
    states, rows = {}, []
    for at, setting in settings.items():
        rows += program_rows(*at, batch, {"vision": encode} | programs[at])
        inputs = setting, vla, encoded, images, given, starts[at]
        states[at] = time_stages(programs[at], *inputs)[1].state  # warms up
    others: dict[At, Callable] = {}
    if peer is not None:
        others = _peer_programs(peer, settings, programs, vla, encoded, images, given, states)
        for at, run in others.items():
            error = run()[1]
            rows.append(point(*at, f"logits_error_batch_{batch}", error, seed=0))
            if error > LARGEST_ERROR[jnp.dtype(dtype).itemsize]:
                raise RuntimeError(f"{PEER} gives other logits at {at[1]}: relative {error}")
    while len(turns) < args.repeats:
        turn: dict[str, dict[str, float]] = {"rates": {}}
        for name, (run, _) in rates.items():
            tries: dict[str, float] = {}
            for number in range(RATE_TRIES):
                clock(tries, str(number), run)
            turn["rates"][name] = min(tries[str(number)] for number in range(RATE_TRIES))
        shared: dict[str, float] = {}
        images = jnp.asarray(clock(shared, "preprocess", pictures))
        if len(turns) < (args.encoder_repeats or args.repeats):
            encoded = clock(shared, "vision", encode, vla, images)
        for at, setting in settings.items():
            inputs = setting, vla, encoded, images, given, states[at]
            times, planned = time_stages(programs[at], *inputs)
            states[at] = planned.state
            turn[f"{at[0]}@{at[1]}"] = shared | times
        for at, run in others.items():
            turn[f"{at[0]}@{at[1]}"] = run()[0]
        turns.append(turn)
        save()
        print(f"batch {batch}: round {len(turns)} of {args.repeats}", flush=True)
    return rows


def _peer_programs(peer, settings, programs, vla, encoded, images, given, states) -> dict:
    """(transformers, ratio) -> a round: its times, and how far its logits are from ours.

    It reads what a method that stands before the model hands over: the same rows and positions.
    """
    found = {}
    for (name, ratio), setting in settings.items():
        model, pruner = setting.policy.model, setting.policy.pruner
        if (PEER, ratio) in found or not (setting.whole or stands_before(pruner)):
            continue
        params = {"vla": vla, "pruner": setting.pruner_params}
        state = states[name, ratio]
        chosen = programs[name, ratio]["pruner"](params, encoded, images, given, state)
        read = programs[name, ratio]["prefill"](late_params(setting, vla), chosen, given)
        ours = read.prefilled.logits
        embeddings, where = model.apply(
            {"params": vla}, chosen.tokens, chosen.position_ids, given.prompt, method="sequence"
        )
        rows = to_torch(embeddings, peer), to_torch(where, peer)
        found[PEER, ratio] = partial(_peer_round, peer, model, *rows, np.asarray(ours, np.float32))
    return found


def _peer_round(peer, model: DrivingVLA, embeddings, where, ours) -> tuple[dict, float]:
    times: dict[str, float] = {}
    vocabulary = model.config.vocabulary
    first, last = vocabulary.first_displacement, vocabulary.size
    prompt = int(where[0, 0, -1]) + 1
    state = clock(times, "prefill", peer_prefill, peer, embeddings, where)
    theirs = state.logits[:, -1].float().cpu().numpy()
    error = np.abs(theirs - ours).max() / np.abs(ours).max()

    def choose(logits):
        return first + logits[:, first:last].argmax(dim=-1)

    clock(times, "decode", peer_decode, peer, state, prompt, vocabulary.plan_length, choose)
    return times, float(error)


def program_rows(
    name: str, ratio: float, batch: int, programs: Mapping[str, jax.stages.Compiled]
) -> list[Row]:
    """What XLA says of the programs: FLOPs, a loop's body once, and the most bytes they hold."""
    rows = []
    for stage, program in programs.items():
        for metric, value, unit in (
            ("xla_flops", program.cost_analysis().get("flops", 0.0), "FLOP"),
            ("peak_bytes", peak_bytes(program), "B"),
        ):
            metric = f"{stage}_{metric}_batch_{batch}"
            rows.append(point(name.rpartition(":")[2], ratio, metric, value, seed=0, unit=unit))
    return rows


def _by_setting(rounds: Sequence[Mapping]) -> dict[At, Times]:
    found: dict[At, Times] = {}
    for turn in rounds:
        for name, times in turn.items():
            if name == "rates":
                continue
            method, _, ratio = name.rpartition("@")
            spent = found.setdefault((method, float(ratio)), {})
            for stage, value in times.items():
                spent.setdefault(stage, []).append(value)
    return found
