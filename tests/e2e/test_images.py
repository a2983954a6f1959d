"""The quick start on a folder of pictures, with a small random encoder; and what it refuses."""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.build import shards_of
from data_pipelines.image_folder import read_image_folder
from experiments.cli import main
from experiments.own_images import ImagesConfig, own_images
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle_orbax, read_bundle_safetensors

WIDTH = 64  # of the encoder and of the pruner's layer
CLASSES = {
    "names": ["sky", "ground", "road", "car"],
    "foreground": [2, 3],
    "objects": [3],
    "ignore": [],
}
LAYER = "--pruner.recon.pruner.layer"
SMALL = [
    f"{LAYER}.hidden-size={WIDTH}",
    f"{LAYER}.intermediate-size=64",
    f"{LAYER}.num-heads=2",
    f"{LAYER}.num-kv-heads=1",
    f"{LAYER}.mrope-section",
    "4",
    "6",
    "6",
    "--pruner.recon.decoder.num-layers=1",
    "--pruner.recon.target-pixels=7",
    "--pruner.recon.ssim-window=5",
    "--pruner.optimizer.warmup-steps=1",
    "--pruner.optimizer.total-steps=4",
    "--pruner.checkpoint-every=2",
    "--pruner.log-every=1",
    "--pruner.loader.batch-size=3",
    "--quiet",
]


def write_pictures(folder: Path, count: int = 8) -> Path:
    """Pictures of 84 x 112 (3 x 4 tokens): sky over ground, a road, a car at a changing place."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(count):
        labels = np.zeros((84, 112), np.uint8)
        labels[28:] = 1
        labels[56:, 28:84] = 2
        left = int(rng.integers(0, 80))
        labels[40:60, left : left + 30] = 3
        colours = np.array([[220, 180, 120], [60, 130, 60], [90, 90, 90], [30, 30, 200]])
        picture = colours[labels] + rng.normal(0, 12, (84, 112, 3))
        name = f"drive_{number:04d}"
        cv2.imwrite(str(folder / "images" / f"{name}.jpg"), picture.clip(0, 255).astype(np.uint8))
        cv2.imwrite(str(folder / "labels" / f"{name}.png"), labels)
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random DINOv2 of one layer, with the names of transformers 5."""
    rng = np.random.default_rng(0)
    first = "encoder.layer.0."
    shapes = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 10, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
        f"{first}mlp.fc1.weight": (4 * WIDTH, WIDTH),
        f"{first}mlp.fc1.bias": (4 * WIDTH,),
        f"{first}mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        f"{first}mlp.fc2.bias": (WIDTH,),
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        shapes[f"{first}attention.{name}.weight"] = (WIDTH, WIDTH)
        shapes[f"{first}attention.{name}.bias"] = (WIDTH,)
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
        shapes[first + name] = (WIDTH,)
    for name in ("layer_scale1", "layer_scale2"):
        shapes[f"{first}{name}.lambda1"] = (WIDTH,)
    path = tmp_path_factory.mktemp("encoder") / "model.safetensors"
    save_file({k: rng.normal(0, 0.2, s).astype(np.float32) for k, s in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def fastdrive(weights):
    """Runs the command in a process of its own."""
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, name, f"--weights={weights}", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def command(fastdrive):
    """Runs `fastdrive quickstart --images` with a small training."""

    def run(images: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
        return fastdrive("quickstart", f"--images={images}", f"--out={out}", *SMALL, *more)

    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("own") / "pictures")


@pytest.fixture(scope="module")
def finished(weights, pictures, tmp_path_factory) -> Path:
    """A run in this process; a second start is in one of its own."""
    out = tmp_path_factory.mktemp("runs") / "run"
    given = [f"--weights={weights}", f"--images={pictures}", f"--out={out}"]
    assert main(["quickstart", *given, *SMALL, "--seeds", "0", "1"]) == 0
    return out


@functools.cache
def rows_of(out: Path) -> list[dict]:
    return json.loads((out / "report.json").read_text())["rows"]


def test_recall_of_every_method_at_every_ratio_for_each_seed(finished):
    cells = [(r["method"], r["keep_ratio"], r["metric"], r["seed"]) for r in rows_of(finished)]
    assert len(set(cells)) == len(cells), "a row is there twice"
    for ratio in (1.0, 0.75, 0.5, 0.25):
        for metric in ("foreground_recall", "object_recall"):
            for seed in (0, 1):
                assert ("reconpruner", ratio, metric, seed) in cells
                assert ("random", ratio, metric, seed) in cells
            for method in ("uniform", "prior", "ground_truth", "oracle"):
                assert (method, ratio, metric, None) in cells


def test_recalls_are_possible_ones(finished):
    found = {
        (r["method"], r["keep_ratio"], r["seed"]): r["value"]
        for r in rows_of(finished)
        if r["metric"] == "foreground_recall"
    }
    for (_, ratio, _), value in found.items():
        assert 0 <= value <= found["oracle", ratio, None] + 1e-9
        if ratio == 1.0:
            assert value == pytest.approx(1)


def test_the_report_is_one_page_with_pictures_beside_it(finished):
    page = (finished / "report.html").read_text()
    for mark in ('src="http', "src='http", "@import", "<link", "url(http"):
        assert mark not in page
    assert "data:image/" in page
    pngs = list((finished / "pictures").glob("*.png"))
    assert pngs
    assert all(cv2.imread(str(path)) is not None for path in pngs)


def test_both_exported_forms_hold_the_encoder_and_the_trained_pruner(finished, weights):
    first, config = read_bundle_safetensors(finished / "export")
    second, same = read_bundle_orbax(finished / "export")
    assert config == same
    assert config["kind"] == "pruned encoder"
    assert config["image_size"] == [84, 112]
    assert config["pruner"]["layer"]["hidden_size"] == WIDTH
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert set(first) == {"encoder", "pruner"}
    assert first["encoder"]["norm"]["scale"].shape == (WIDTH,)


def test_a_second_start_changes_no_figure_and_no_weight(command, pictures, finished):
    def digest():
        return hashlib.sha256((finished / "export" / "model.safetensors").read_bytes()).hexdigest()

    before, rows = digest(), list(rows_of(finished))
    (finished / "report.json").unlink()
    done = command(pictures, finished, "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert digest() == before
    assert json.loads((finished / "report.json").read_text())["rows"] == rows


@pytest.mark.slow
def test_training_on_the_shards_measures_what_the_quick_start_measured(
    finished, fastdrive, tmp_path
):
    """From pictures in place of cached tokens, in another order: the controls are the same."""
    shards, run = next(finished.glob("shards-*")), tmp_path / "run"
    small = [flag.replace("--pruner.", "--") for flag in SMALL if flag != "--quiet"]
    size = ("--loader.image-size", "84", "112")
    given = ("train-pruner", f"--shards={shards}", f"--out={run}", "--quiet", "camvid")
    done = fastdrive(*given, *size, *small)
    assert done.returncode == 0, done.stderr[-3000:]

    def values(rows, drawn):
        return {
            (row["method"], row["keep_ratio"], row["metric"]): row["value"]
            for row in rows
            if row["metric"] in ("foreground_recall", "foreground_precision", "object_recall")
            and (row["seed"] is not None) == drawn
        }

    found = json.loads((run / "results.json").read_text())["rows"]
    controls = values(rows_of(finished), False)
    assert len(controls) > 20
    assert values(found, False) == pytest.approx(controls, abs=1e-6)
    assert ("reconpruner", 0.5, "object_recall") in values(found, True)
    params, config = read_bundle_safetensors(run / "export")
    assert config["kind"] == "pruner"
    whole, _ = read_bundle_safetensors(finished / "export")
    shapes = jax.tree.map(np.shape, {"pruner": whole["pruner"]})
    assert jax.tree.map(np.shape, params) == shapes


def refused(code: int, said: str, *named: str) -> None:
    assert code == 2, said[-2000:]
    (line,) = said.strip().splitlines()
    assert line.startswith("fastdrive: ")
    for name in named:
        assert name in line


@pytest.fixture
def refuse(capsys, weights):
    """The quick start in this process, which must answer with one sentence."""

    def refuse(images: Path, out: Path, arguments: list[str], *named: str) -> None:
        given = [f"--weights={weights}", f"--images={images}", f"--out={out}"]
        code = main(["quickstart", *given, *SMALL, *arguments])
        refused(code, capsys.readouterr().err, *named)

    return refuse


def test_a_run_of_another_config_is_refused_by_the_differing_field(refuse, pictures, finished):
    other = ["--pruner.optimizer.learning-rate=0.01"]
    refuse(pictures, finished, other, "another config", "optimizer.learning_rate", "0.01")


def _none(folder: Path) -> str:
    return "is not a folder"


def _empty(folder: Path) -> str:
    (folder / "images").mkdir(parents=True)
    return "images holds no picture"


def _bare(folder: Path) -> str:
    folder.mkdir()
    return "images is missing"


def _no_mask(folder: Path) -> str:
    write_pictures(folder)
    (folder / "labels" / "drive_0003.png").unlink()
    return "drive_0003.png"


def _torn(folder: Path) -> str:
    write_pictures(folder)
    path = folder / "images" / "drive_0002.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return "drive_0002.jpg"


def _no_jpeg(folder: Path) -> str:
    write_pictures(folder)
    (folder / "images" / "drive_0007.jpg").write_bytes(b"nothing of the kind")
    return "drive_0007.jpg"


def _too_small(folder: Path) -> str:
    write_pictures(folder)
    for kind, name in (("images", "drive_0001.jpg"), ("labels", "drive_0001.png")):
        cv2.imwrite(str(folder / kind / name), np.zeros((20, 112), np.uint8))
    return "smaller than one 28 x 28 token"


def _other_size(folder: Path) -> str:
    write_pictures(folder)
    cv2.imwrite(str(folder / "labels" / "drive_0004.png"), np.zeros((28, 28), np.uint8))
    return "make them the same size"


def _no_classes(folder: Path) -> str:
    write_pictures(folder)
    (folder / "classes.json").unlink()
    return "which class ids are foreground"


def _no_training(folder: Path) -> str:
    write_pictures(folder / "train", 2)
    write_pictures(folder / "val", 2)
    (folder / "train" / "classes.json").rename(folder / "classes.json")
    return "none is left to train on"


@pytest.mark.parametrize(
    "spoil",
    [
        _none,
        _empty,
        _bare,
        _no_mask,
        _torn,
        _no_jpeg,
        _too_small,
        _other_size,
        _no_classes,
        _no_training,
    ],
    ids=lambda function: function.__name__.strip("_"),
)
def test_bad_folders_are_one_sentence_and_leave_no_data_set(tmp_path, spoil, weights):
    folder = tmp_path / "pictures"
    named = spoil(folder)
    config = ImagesConfig(images=folder, out=tmp_path / "run", weights=weights, quiet=True)
    with pytest.raises(UserError, match=named) as caught:
        own_images(config)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    left = [path.name for path in (tmp_path / "run").iterdir()] if config.out.exists() else []
    assert all(name.endswith(".building") for name in left)  # what a next run goes on from
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_the_command_turns_a_refusal_into_exit_code_2(command, tmp_path):
    _torn(tmp_path / "pictures")
    done = command(tmp_path / "pictures", tmp_path / "run")
    refused(done.returncode, done.stderr, "drive_0002.jpg")
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_a_pruner_of_another_width_than_the_encoder_is_refused(refuse, pictures, tmp_path):
    wide = [f"{LAYER}.hidden-size=96", f"{LAYER}.num-heads=3"]
    refuse(pictures, tmp_path / "run", wide, "96", str(WIDTH))


def test_a_batch_larger_than_the_folder_is_refused(refuse, pictures, tmp_path):
    refuse(pictures, tmp_path / "run", ["--pruner.loader.batch-size=64"], "batch_size")


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a memory disk of the given size; only root may do that."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def mount(size: str) -> Path:
        call = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no memory disk can be mounted: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param("48k", id="shards", marks=pytest.mark.slow),
        pytest.param("600k", id="features", marks=pytest.mark.slow),
        pytest.param("2m", id="checkpoints"),
    ],
)
def test_a_full_disk_is_one_sentence(refuse, pictures, small_disk, size):
    out = small_disk(size) / "run"
    refuse(pictures, out, [], str(out))
    assert not (out / "report.html").exists()
    assert not (out / "export").exists()


def test_shards_of_other_pictures_are_not_taken(tmp_path):
    pictures, other = (
        write_pictures(tmp_path / name, count) for name, count in (("a", 4), ("b", 5))
    )
    shards = shards_of(read_image_folder(pictures), tmp_path / "shards", quiet=True)
    copied = pictures.rename(tmp_path / "moved")
    again = shards_of(read_image_folder(copied), tmp_path / "shards", quiet=True)
    assert again.digest == shards.digest
    with pytest.raises(UserError, match="shards holds shards of other files than images:b now has"):
        shards_of(read_image_folder(other), tmp_path / "shards", quiet=True)
