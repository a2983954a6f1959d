"""Every command that the pages show is run, small, in the folder of a reader who follows them.

The page's words come first, then those that make the run small.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pages import PAGES, ROOT, commands, write_files
from tiny_checkpoint import write_checkpoint

from data_pipelines.robot import rendering
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.cli import main

pytestmark = pytest.mark.slow

LAYER = """--{0}.hidden-size 48 --{0}.intermediate-size 80 --{0}.num-layers 1 --{0}.num-heads 4
    --{0}.num-kv-heads 2 --{0}.mrope-section 2 2 2"""
QUICKSTART = """--world.train-scenes 2 --world.val-scenes 3 --world.keyframes-per-scene 2
    --world.cameras CAM_FRONT --world.workers 1 --planning-scenes 4 --quiet
    --pruner.optimizer.warmup-steps 1 --pruner.optimizer.total-steps 3
    --pruner.loader.batch-size 2 --pruner.recon.decoder.num-layers 1
    --pruner.recon.target-pixels 7 --pruner.recon.ssim-window 5"""
OF_QUICKSTART = QUICKSTART.replace("--", "--quickstart.")

# What makes a command small, by what it begins with; in the order of a reader who makes what later
# commands take.
SMALL = {
    "quickstart": QUICKSTART,
    "train-pruner --shards SHARDS --out runs/tiny": """--optimizer.total-steps 2
        --optimizer.warmup-steps 1 --loader.batch-size 2 --recon.decoder.num-layers 1""",
    "train-pruner --shards SHARDS --weights CHECKPOINT": f"""
        {LAYER.format("recon.pruner.layer")} {LAYER.format("recon.decoder")}
        --fsdp 1 --data 1 --loader.batch-size 2 --loader.image-size 56 84 --recon.target-pixels 14
        --optimizer.total-steps 2 --optimizer.warmup-steps 1 --evaluate-every 2 --eval-pictures 2
        --checkpoint-every 2""",
    "eval-planning --out runs/vla": """--methods reconpruner random --ratios 0.5 --draws 1
        --pictures 1 --qwen.samples 4 --qwen.max-new-tokens 4 --qwen.dtype float32
        --qwen.max-pixels 6272""",
    "eval-planning": """--methods random --ratios 0.5 --draws 1 --scenes 2 --pictures 1
        --benchmark.train-scenes 2 --benchmark.scenes 3 --benchmark.seeds 0
        --benchmark.pruner.optimizer.total-steps 2 --benchmark.pruner.optimizer.warmup-steps 1""",
    "bench-pruners": "--n 24 --dim 256 --k 6 --batch 1 --repeats 1",
    "compare-pruners": f"{OF_QUICKSTART} --ratios 0.5 --scenes 2 --rounds 1",
    "widen-vla": """--world.train-scenes 2 --world.val-scenes 1 --world.keyframes-per-scene 2
        --world.workers 1 --loss.keep-choices 0.25 --batch-size 8 --quiet
        --optimizer.total-steps 2 --optimizer.warmup-steps 1""",
    "drive": f"""{OF_QUICKSTART} --methods random --ratios 0.5 --routes 1 --seconds 1 --batch 2
        --workers 1 --pictures 1 --log-seconds 2""",
    "bench-efficiency --out runs/3b_predicted": "",
    "bench-efficiency": "--config tiny --height 112 --width 112 --repeats 1",
    "bench-export --run runs/3b": """--frames 2 --repeats 1 --qwen.prompt-ids 200
        --qwen.max-new-tokens 2""",
    "bench-export": "--frames 4 --repeats 1",
    "export --run runs/3b": """--check-frames 1 --platforms cpu --qwen.prompt-ids 200
        --qwen.max-new-tokens 2""",
    "export": "--check-frames 2 --platforms cpu",
    "answer --checkpoint DIR --images": "--max-new-tokens 4 --dtype float32",
    "answer": "--max-new-tokens 4 --dtype float32 --data 1 --tensor 1",
    "data build": "--workers 1",
    "data verify": "",
    "data view": "",
    "robot demos --out demos": "--episodes 1 --val-episodes 1 --workers 1",
    "robot train --demos demos": """--optimizer.total-steps 2 --optimizer.warmup-steps 1
        --batch-size 8""",
    "robot demos --out corrections": "--episodes 1 --val-episodes 1 --workers 1",
    "robot train --demos demos corrections": """--optimizer.total-steps 2 --optimizer.warmup-steps 1
        --batch-size 8""",
    "robot eval": "--trials 1 --tasks 0 --ratios 0.5 --workers 1 --batch 1 --films 1",
    "serve": "--port 0",
}
# Their words ask for what a reader's machine need not have; a test runs the command without.
ELSEWHERE = {
    "quickstart --images": "tests/e2e/test_images.py",  # a data set of eleven classes
    "data build --images": "tests/experiments/test_data_commands.py",
    "train-pruner --shards SHARDS --out runs/own": "tests/e2e/test_images.py",  # weights of DINOv2
    "train-pruner --shards SHARDS --weights CHECKPOINT --out runs/3b --hosts":
        "tests/experiments/test_train_pruner_hosts.py",
    "data mask": "tests/data_pipelines/test_maskers_run.py",  # weights of Grounded SAM
    "study-pruner": "tests/experiments/test_study_pruner.py",  # CamVid
    "compile-export": "tests/experiments/test_compile_export.py",  # a TPU's compiler
}  # fmt: skip
SHOWN = sorted({(page, words) for page in PAGES for words in commands(page)})


def place_in(table: dict[str, str], words: tuple[str, ...]) -> str | None:
    """The longest key that a command begins with."""
    line = " ".join(words)
    return max((key for key in table if line.startswith(key)), key=len, default=None)


def turn(one: tuple[Path, tuple[str, ...]]) -> int:
    """When a command comes."""
    key = place_in(SMALL, one[1])
    return len(SMALL) if key is None else list(SMALL).index(key)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The reader's folder: a nuScenes with masks, shards of it, a checkpoint, pictures, logs."""
    folder = tmp_path_factory.mktemp("reader")
    world = WorldConfig(
        train_scenes=2, val_scenes=2, keyframes_per_scene=8, height=112, width=196, workers=1
    )
    generate(folder / "NUSCENES", world, progress=False)
    write_checkpoint(folder / "CHECKPOINT")
    picture = np.random.default_rng(0).integers(0, 256, (84, 112, 3), np.uint8)
    cv2.imwrite(str(folder / "front.jpg"), picture)
    line = '{"prompt": "What is ahead?", "images": ["front.jpg"]}\n'
    (folder / "requests.jsonl").write_text(line * 2)
    for page in PAGES:
        write_files(page, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            "data mask --nuscenes NUSCENES --out MASKS masker:annotations",
            "data build --nuscenes NUSCENES --out SHARDS --workers 1",
        ):
            assert run(words.split()) == 0, words
        yield folder


def run(words: list[str]) -> int:
    """The command, in this process."""
    try:
        return main(words)
    except SystemExit as stopped:
        return stopped.code or 0


def served(words: list[str]) -> int:
    """A service that says where it is, and is asked to end."""
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line + process.stdout.read()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=120)


@pytest.mark.parametrize(
    ("page", "words"),
    sorted(SHOWN, key=turn),
    ids=lambda value: value.name if isinstance(value, Path) else " ".join(value)[:60],
)
def test_it_runs(page, words, place):
    if elsewhere := place_in(ELSEWHERE, words):
        assert (ROOT / ELSEWHERE[elsewhere]).is_file()
        pytest.skip(f"run by {ELSEWHERE[elsewhere]}")
    if words[0] == "robot" and rendering.absent():
        pytest.skip(str(rendering.absent()))
    small = place_in(SMALL, words)
    assert small, f"say in {Path(__file__).name} how `fastdrive {' '.join(words)}` is run small"
    shared = Path(os.environ.get("FASTDRIVE_SHARED") or ROOT.parent / "shared")
    logs = shared / "data" / "nuscenes_mini_logs"
    if "LOGS" in words and not logs.is_dir():
        words = words[: words.index("--logs")]
    own = {"DIR": "CHECKPOINT", "ROOT": "NUSCENES", "LOGS": str(logs)}
    if words[:2] == ("data", "build"):
        own["SHARDS"] = "MINE"
    given = [own.get(word, word) for word in (*words, *SMALL[small].split())]
    assert (served if words[0] == "serve" else run)(given) == 0, f"{page.name}: {' '.join(given)}"
