"""The quick start as a person runs it, at the smallest size: whole, resumed, killed, refused."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from experiments.cli import main
from fastdrive_jax.export.driving import read_policy
from fastdrive_jax.inference.policy import plan
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla, save_vla

SMALL = [
    "--world.train-scenes=2",
    "--world.val-scenes=3",
    "--world.keyframes-per-scene=2",
    "--world.cameras",
    "CAM_FRONT",
    "--world.workers=1",
    "--planning-scenes=4",
    "--pruner.optimizer.warmup-steps=1",
    "--pruner.loader.batch-size=2",
    "--pruner.checkpoint-every=4",
    "--pruner.log-every=1",
    "--pruner.recon.decoder.num-layers=1",
    "--pruner.recon.target-pixels=7",
    "--pruner.recon.ssim-window=5",
    "--quiet",
]
STEPS = 12


def given(out: Path) -> list[str]:
    return ["quickstart", f"--out={out}", *SMALL, f"--pruner.optimizer.total-steps={STEPS}"]


def command(out: Path) -> list[str]:
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, *given(out)]


@pytest.fixture(scope="module")
def run():
    def run(out: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(out),
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return run


def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "report.json").read_text())["rows"]


@pytest.fixture
def refuse(capsys):
    """The quick start in this process, which must answer with one sentence."""

    def refuse(out: Path, argument: str, *named: str) -> None:
        assert main([*given(out), argument]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("fastdrive: ")
        for name in named:
            assert name in line

    return refuse


def weights_digest(out: Path) -> str:
    return hashlib.sha256((out / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run in this process; those that are compared with it are in processes of their own."""
    out = tmp_path_factory.mktemp("quickstart") / "run"
    assert main(given(out)) == 0
    return out


def timeless(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["unit"] != "ms"]


def test_report_holds_every_method_ratio_and_control(whole):
    rows = rows_of(whole)
    cells = {(row["method"], row["keep_ratio"], row["metric"]) for row in rows}
    for ratio in (0.75, 0.5, 0.25):
        for method in ("reconpruner", "random", "uniform", "prior", "ground_truth"):
            for metric in ("ade", "l2_temavg", "foreground_recall", "object_recall"):
                assert (method, ratio, metric) in cells
    assert ("unpruned", 1.0, "ade") in cells
    assert ("no_image", None, "ade") in cells
    for stage in ("preprocess", "vision", "pruner", "prefill", "decode", "frame"):
        assert ("reconpruner", 0.25, f"{stage}_ms") in cells


def test_report_is_one_page_that_needs_no_network(whole):
    page = (whole / "report.html").read_text()
    for mark in ('src="http', "src='http", "@import", "<link", "url(http"):
        assert mark not in page
    assert "data:image/" in page
    pngs = list((whole / "pictures").glob("*.png"))
    assert pngs
    assert all(cv2.imread(str(path)) is not None for path in pngs)


def test_prefill_of_fewer_tokens_counts_fewer_flops(whole):
    rows = rows_of(whole)
    flops = {r["keep_ratio"]: r["value"] for r in rows if r["metric"] == "prefill_gflop"}
    assert flops[0.25] < flops[0.5] < flops[0.75] < flops[1.0]


def test_both_exports_plan_the_same_bits(whole):
    images = np.random.default_rng(0).integers(0, 255, (4, 1, 224, 392, 3), np.uint8)
    inputs = images, np.array([3, 8, 5, 0], np.float32), np.array([0, 1, 2, 0], np.int32)
    policy, params = read_policy(whole / "export", "safetensors")
    same_policy, same = read_policy(whole / "export", "orbax")
    assert policy.keep_ratio == same_policy.keep_ratio == 0.5
    step = jax.jit(plan, static_argnums=0)
    first, second = (step(policy, jax.device_get(x), *inputs) for x in (params, same))
    np.testing.assert_array_equal(first.waypoints, second.waypoints)
    np.testing.assert_array_equal(first.keep_indices, second.keep_indices)
    assert first.keep_indices.shape == (4, 56)


def test_a_folder_of_another_config_is_refused(refuse, whole):
    refuse(whole, "--pruner.seed=7", "another config", "seed was 0 and is now 7")


def test_a_world_of_another_config_is_refused(refuse, whole):
    refuse(whole, "--world.seed=7", "world", "this config")


def test_a_pruner_of_another_vlas_tokens_is_not_taken(refuse, whole, tmp_path):
    """Its tokens are other ones, and the folder's pruner knows nothing of them."""
    _, params = load_vla()
    params["visual"] = jax.tree.map(lambda leaf: 1.01 * leaf, params["visual"])
    save_vla(tmp_path / "mine.safetensors", params)
    refuse(whole, f"--vla-weights={tmp_path / 'mine.safetensors'}", "another config", "encoder")


@pytest.mark.slow
def test_a_second_start_takes_what_is_there_and_finds_the_same(run, whole):
    rows, weights = rows_of(whole), weights_digest(whole)
    before = (whole / "pruner" / "metrics.jsonl").read_bytes()
    (whole / "report.json").unlink()
    done = run(whole)
    assert done.returncode == 0, done.stderr[-3000:]
    assert timeless(rows_of(whole)) == timeless(rows)
    assert len(rows_of(whole)) == len(rows)
    assert weights_digest(whole) == weights
    assert (whole / "pruner" / "metrics.jsonl").read_bytes() == before  # nothing trained again


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(run, whole, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = out / "pruner" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.html").exists()
    done = run(out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert weights_digest(out) == weights_digest(whole)
    assert timeless(rows_of(out)) == timeless(rows_of(whole))


@pytest.mark.slow
def test_methods_are_compared_on_the_drives_of_a_quick_start(whole, tmp_path):
    arguments = [part.replace("--", "--quickstart.", 1) for part in SMALL]
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [
            *(sys.executable, "-c", code, "compare-pruners", f"--out={tmp_path}"),
            f"--quickstart.out={whole}",
            *arguments,
            f"--quickstart.pruner.optimizer.total-steps={STEPS}",
            *("--methods", "reconpruner", "random", "vlapruner", "--ratios", "0.5", "--rounds=1"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    found = {(row["method"], row["keep_ratio"], row["metric"]): row["value"] for row in rows}
    report = {
        (row["method"], row["keep_ratio"], row["metric"]): row["value"] for row in rows_of(whole)
    }
    # The same plans as the quick start's, whose tokens were kept as float16.
    for method, ratio in (("unpruned", 1.0), ("reconpruner", 0.5)):
        cell = method, ratio, "ade"
        assert found[cell] == pytest.approx(report[cell], abs=0.05)
    for metric in ("object_recall", "prefill_gflop", "equivalent_tokens", "frame_ms"):
        assert ("vlapruner", 0.5, metric) in found
    assert found["vlapruner", 0.5, "equivalent_tokens"] == pytest.approx((112 + 4 * 56) / 5)
    pair = "reconpruner - vlapruner"
    assert (pair, 0.5, "ade_difference") in found
    assert found[pair, 0.5, "ade_p_holm"] >= found[pair, 0.5, "ade_p"]
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in table[2:3]] == ["unpruned"]
    assert len(table) == (2 + 1 + 3) + 3 + (2 + 4)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--keep-ratio=0", "keep_ratio=0"),
        ("--keep-ratio=1.2", "1.2"),
        ("--world.height=200", "200"),
    ],
)
def test_bad_values_are_one_sentence_and_exit_code_2(refuse, tmp_path, argument, named):
    refuse(tmp_path / "run", argument, named)
    assert not (tmp_path / "run").exists()
