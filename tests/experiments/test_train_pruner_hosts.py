"""The command on two processes, beside one."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.build import build_shards
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate

COMMAND = "import sys; from experiments.cli import main; sys.exit(main())"
FLAGS = (
    "tiny",
    "--loader.image-size=224 392",
    "--loader.batch-size=4",
    "--optimizer.total-steps=20",
    "--optimizer.warmup-steps=2",
    "--recon.decoder.num-layers=1",
    "--log-every=1",
    "--evaluate-every=10",
    "--best=recall_50",
    "--ema-decay=0.9",
)


def start(shards, out, *more, run=()):
    flags = [word for flag in (*FLAGS, *run) for word in flag.replace("=", " ").split()]
    words = [sys.executable, "-c", COMMAND, "train-pruner", "--shards", shards, "--out", out]
    words += ["--quiet", *more, *flags]
    return subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def curve(out):
    with (out / "metrics.jsonl").open() as file:
        return [(r["step"], r["kind"], r["loss"]) for r in map(json.loads, file)]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Losses within 1e-5 over 20 steps; tokens cached in turn; what is kept is measured alike."""
    world = WorldConfig(
        train_scenes=2,
        val_scenes=1,
        keyframes_per_scene=3,
        height=56,
        width=84,
        cameras=("CAM_FRONT",),
        workers=1,
    )
    source = read_nuscenes(generate(tmp_path / "world", world, progress=False))
    shards = build_shards(source, tmp_path / "shards", progress=False).path
    one = start(shards, tmp_path / "one", "--cache", tmp_path / "cache one")
    _, err = one.communicate(timeout=240)
    assert one.returncode == 0, err
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    hosts = [
        start(
            shards,
            tmp_path / "two",
            f"--hosts.coordinator=localhost:{port}",
            "--hosts.count=2",
            f"--hosts.index={index}",
            f"--cache={tmp_path / 'cache'}",
            run=("--data=-1",),
        )
        for index in range(2)
    ]
    try:
        ends = [host.communicate(timeout=240) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], ends
    ours, theirs = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [point[:2] for point in ours] == [point[:2] for point in theirs]
    assert len(ours) == 23
    np.testing.assert_allclose([p[2] for p in ours], [p[2] for p in theirs], atol=1e-5)
    rows, same = (
        json.loads((tmp_path / name / "results.json").read_text())["rows"]
        for name in ("two", "one")
    )
    assert [row["value"] for row in rows] == pytest.approx([row["value"] for row in same], abs=1e-3)
    assert (tmp_path / "two" / "export" / "model.safetensors").exists()
