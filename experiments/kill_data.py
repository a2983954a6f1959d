"""Kills builds and reading runs at random points and counts what was lost or came twice.

    fastdrive kill-data --kills 1000

Builds of a small set are killed by SIGKILL and started again until they end; their shards must be
those of a build that nobody disturbed, and no finished shard may be written twice. Runs that read
some epochs keep the examples that they have seen and their position in one file, as a training run
keeps weights and position in one checkpoint; each goes on with another number of hosts, batch size
and threads, and in the end every epoch must hold every example once. About 3 minutes on 2 cores
for 1,000 kills. Writes OUT/kills.json.
"""

import collections
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_pipelines.build import build_shards
from data_pipelines.image_folder import read_image_folder
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.shard_files import NOTES
from data_pipelines.shards import open_shards
from fastdrive_jax.configs import check_least
from fastdrive_jax.evaluation.results import point, write_rows
from fastdrive_jax.files import write_json

PICTURES = 48
RECORDS_PER_SHARD = 4
EPOCHS = 3
SIZE = (28, 28)
_KILLS_A_RUN = 6  # about, so that kills fall on fresh and on half-done runs


@dataclass(frozen=True)
class KillDataArgs:
    """Kill shard builds and readers, and count lost and repeated examples.

    Attributes:
        out: Folder for the figures and the builds.
        kills: Number of kills, half of them of builds.
        seed: Seed of the images and of the times of the kills.
    """

    out: Path = Path("runs/kill_data")
    kills: int = 1000
    seed: int = 0

    def __post_init__(self):
        check_least(self, kills=2)


def kill_data(args: KillDataArgs) -> Path:
    """Runs both halves, writes the figures and returns their path.

    Raises:
        RuntimeError: An example was lost or came twice, or a shard differs or was written twice.
    """
    folder = args.out / "work"
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(args.seed)
    _draw_pictures(folder / "pictures", rng)
    # A child is forked, not started anew, which would take seconds; nothing here has threads yet.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    seconds = _undisturbed(lambda: _build(folder, folder / "reference"))
    counts = _kill_builds(folder, args.kills // 2, seconds, rng)
    counts |= _kill_readers(folder, args.kills - args.kills // 2, rng)
    rows = [
        point("kill_data", None, name, value, n=args.kills, seed=args.seed)
        for name, value in counts.items()
    ]
    for name, value in counts.items():
        print(f"{name}: {value}")
    shutil.rmtree(folder)
    path = write_rows(args.out / "kills.json", rows, {"pictures": PICTURES, "epochs": EPOCHS})
    wrong = {name: counts[name] for name in FAULTS if counts[name]}
    if wrong:
        raise RuntimeError(f"{wrong}: see {path}")
    return path


FAULTS = ("shards_that_differ", "shards_written_twice", "examples_lost", "examples_repeated")


def _draw_pictures(folder: Path, rng: np.random.Generator) -> None:
    for part, count in (("train", PICTURES * 3 // 4), ("val", PICTURES // 4)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True)
        for number in range(count):
            picture = rng.integers(0, 256, (*SIZE, 3), np.uint8)
            mask = np.where(picture[..., 0] > 127, 255, 0).astype(np.uint8)
            cv2.imwrite(str(folder / part / "images" / f"{part}-{number}.png"), picture)
            cv2.imwrite(str(folder / part / "masks" / f"{part}-{number}.png"), mask)


def _build(folder: Path, out: Path) -> None:
    source = read_image_folder(folder / "pictures")
    build_shards(source, out, progress=False, records_per_shard=RECORDS_PER_SHARD)


def _start(work: Callable[[], None]) -> int:
    """Forks a child that does some work."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _ended(child: int, wait: float | None) -> bool:
    """Waits some seconds, or to the end, and kills; whether the child came to its end before."""
    end = None if wait is None else time.perf_counter() + wait
    while True:
        pid, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if pid:
            if status:
                raise RuntimeError(f"a run failed by itself (status {status}), see above")
            return True
        if time.perf_counter() >= end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1] == 0
        time.sleep(0.0005)


def _undisturbed(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    _ended(_start(work), None)
    return time.perf_counter() - begin


def _kill_builds(folder: Path, kills: int, seconds: float, rng) -> dict[str, int]:
    out, building = folder / "set", folder / "set.building"
    reference = _hashes(folder / "reference")
    counts = collections.Counter(dict.fromkeys(FAULTS[:2], 0))
    finished: dict[str, int] = {}
    # It goes on behind the last kill until a build has ended: what was killed must end well.
    while counts["kills_of_builds"] < kills or building.is_dir() or not counts["builds"]:
        waiting = rng.exponential(seconds / _KILLS_A_RUN)
        if counts["kills_of_builds"] >= kills:
            waiting = None  # the last build may end
        if not _ended(_start(lambda: _build(folder, out)), waiting):
            counts["kills_of_builds"] += 1
        place = out if out.is_dir() else building
        now = {path.name: path.stat().st_mtime_ns for path in place.glob("driving*")}
        counts["shards_written_twice"] += sum(
            now.get(name) != written for name, written in finished.items()
        )
        if out.is_dir():
            counts["builds"] += 1
            found = _hashes(out)
            counts["shards_that_differ"] += sum(
                found.get(name) != sha for name, sha in reference.items()
            ) + len(found.keys() - reference.keys())
            shutil.rmtree(out)
            finished = {}
        else:
            # A shard counts as finished by its note; without one it may be written again.
            noted = {path.stem for path in (building / NOTES).glob("*.json")}
            finished = {name: written for name, written in now.items() if name in noted}
        _progress("builds", counts["kills_of_builds"], kills)
    return dict(counts)


def _kill_readers(folder: Path, kills: int, rng) -> dict[str, int]:
    state, total = folder / "state.json", PICTURES * 3 // 4
    counts = collections.Counter(dict.fromkeys(FAULTS[2:], 0))

    def read() -> None:
        # In the child: its own randomness must differ from kill to kill.
        _read(folder / "reference", state, np.random.default_rng(time.time_ns()))

    seconds = _undisturbed(read)
    while True:
        last = counts["kills_of_readers"] >= kills
        if not state.exists() and last:
            return dict(counts)
        waiting = None if last else rng.exponential(seconds / _KILLS_A_RUN)
        if not _ended(_start(read), waiting):
            counts["kills_of_readers"] += 1
        else:
            seen = json.loads(state.read_text())["seen"]
            counts["epochs_read"] += EPOCHS
            lost, repeated = count_faults(seen, total)
            counts["examples_lost"] += lost
            counts["examples_repeated"] += repeated
            state.unlink()
        _progress("readers", counts["kills_of_readers"], kills)


def count_faults(seen: list[int], total: int) -> tuple[int, int]:
    """Examples of `EPOCHS` epochs of 0 .. total - 1, one after the other, lost and repeated."""
    lost = repeated = 0
    for epoch in range(EPOCHS):
        part = seen[epoch * total : (epoch + 1) * total]
        lost += total - len(set(part))
        repeated += len(part) - len(set(part))
    return lost, repeated + max(0, len(seen) - EPOCHS * total)


def _read(shards_dir: Path, state: Path, rng: np.random.Generator) -> None:
    """Goes on reading to the end, with any number of hosts, batch size and threads."""
    shards = open_shards(shards_dir)
    kept = json.loads(state.read_text()) if state.exists() else {"position": None, "seen": []}
    count, batch, threads = (int(n) for n in rng.integers(1, 5, 3))
    config = LoaderConfig(
        batch,
        SIZE,
        num_epochs=EPOCHS,
        remainder="pad",
        fields=("image", "index"),
        seed=7,
        read_threads=threads,
    )
    readers = [iter(make_loader(shards, "train", config, host, count)) for host in range(count)]
    if kept["position"] is not None:
        for reader in readers:
            reader.set_state(kept["position"])
    while True:
        batches = [next(reader, None) for reader in readers]
        if batches[0] is None:
            return
        # Host after host, their parts are the next examples of the stream.
        index = np.concatenate([one["index"] for one in batches])
        valid = np.concatenate([one["valid"] for one in batches])
        kept["seen"] += index[valid].tolist()
        kept["position"] = readers[0].get_state()
        write_json(state, kept)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


def _progress(name: str, done: int, total: int) -> None:
    if done and done % 50 == 0:
        print(f"{name}: {done} of {total} kills", file=sys.stderr, flush=True)
