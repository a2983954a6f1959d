"""What a person can get wrong is refused before anything is computed."""

import runpy
import sys
from dataclasses import replace

import cv2
import jax
import numpy as np
import pytest

from data_pipelines.build import build_shards
from data_pipelines.image_folder import read_image_folder
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.pictures import check_picture
from data_pipelines.shards import open_shards
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments.bench_frame import BenchFrameArgs, bench_frame
from experiments.compile_train import CompileTrainArgs
from experiments.configs.pruner import TINY
from experiments.drive_closed_loop import DriveArgs, drive_closed_loop
from experiments.eval_planning import EvalPlanningArgs, eval_planning
from experiments.plan_checkpoint import CheckpointConfig
from experiments.pruner_data import shards_prior
from experiments.quickstart import QuickstartConfig, driving_vla
from experiments.report_parts import kept_section
from experiments.robot_eval import RobotEvalArgs
from experiments.train_pruner import TrainPrunerConfig, train_on_shards
from experiments.train_vla import TrainVLAConfig
from experiments.widen_vla import WidenVLAConfig
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla, save_vla
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.training.run_config import claim_run_folder


def test_vla_and_world_must_fit():
    world, vla = WorldConfig(), TrainVLAConfig()
    with pytest.raises(UserError, match="CAM_FRONT"):
        QuickstartConfig(world=replace(world, cameras=("CAM_BACK",)))
    with pytest.raises(UserError, match="252 x 392"):
        QuickstartConfig(world=replace(world, height=252))
    surround = replace(vla, model=DrivingConfig(cameras=("CAM_FRONT", "CAM_BACK")))
    with pytest.raises(UserError, match=r"vla\.model\.cameras"):
        QuickstartConfig(vla=surround)
    narrow = replace(TINY_DECODER, hidden_size=64, num_heads=2)
    recon = replace(TINY.recon, pruner=replace(TINY.recon.pruner, layer=narrow))
    with pytest.raises(UserError, match=r"hidden_size=64 .* 128"):
        QuickstartConfig(pruner=replace(TINY, recon=recon))


@pytest.mark.parametrize("split", ["train_scenes", "val_scenes"])
def test_both_splits_need_a_scene(split):
    with pytest.raises(UserError, match=f"{split}=0"):
        QuickstartConfig(world=replace(WorldConfig(), **{split: 0}))
    with pytest.raises(UserError, match="planning_scenes=0"):
        QuickstartConfig(planning_scenes=0)


def test_shards_without_a_split_to_measure_on_are_refused(tmp_path):
    world = WorldConfig(
        train_scenes=1,
        val_scenes=0,
        keyframes_per_scene=2,
        height=56,
        width=84,
        cameras=("CAM_FRONT",),
        workers=1,
    )
    source = read_nuscenes(generate(tmp_path / "world", world, progress=False))
    build_shards(source, tmp_path / "shards", progress=False)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="no split val"):
        train_on_shards(TrainPrunerConfig(tmp_path / "shards", out, quiet=True))
    assert not out.exists()


def test_masks_without_any_foreground_are_refused(tmp_path):
    """As of a class id that no label map holds."""
    for kind in ("images", "labels"):
        (tmp_path / "set" / kind).mkdir(parents=True)
        for k in range(3):
            cv2.imwrite(str(tmp_path / "set" / kind / f"{k}.png"), np.full((28, 28), k, np.uint8))
    source = read_image_folder(tmp_path / "set", foreground=(30,))
    shards = build_shards(source, tmp_path / "shards", progress=False)
    run = replace(TINY, loader=replace(TINY.loader, image_size=(28, 28)))
    with pytest.raises(UserError, match="No training picture has any foreground"):
        shards_prior(shards, run)


@pytest.mark.parametrize("ratio", [0, 1.2, -1, float("nan")])
def test_keep_ratio_is_checked_at_once(ratio):
    with pytest.raises(UserError, match="keep_ratio"):
        QuickstartConfig(keep_ratio=ratio)


def test_packaged_weights_are_refused_for_another_model():
    vla = TrainVLAConfig()
    model = replace(vla.model, text=replace(vla.model.text, num_layers=2))
    with pytest.raises(UserError, match="another config"):
        driving_vla(QuickstartConfig(vla=replace(vla, model=model)))


def test_a_vla_is_named_or_trained(tmp_path):
    with pytest.raises(UserError, match="give one"):
        QuickstartConfig(vla_weights=tmp_path / "vla.safetensors", train_vla=True)
    with pytest.raises(UserError, match=r"mine\.safetensors can't be read"):
        driving_vla(QuickstartConfig(vla_weights=tmp_path / "mine.safetensors"))
    own = tmp_path / "own.safetensors"
    _, packaged = load_vla()
    save_vla(own, jax.tree.map(lambda leaf: 2 * leaf, packaged))
    _, found = driving_vla(QuickstartConfig(vla_weights=own))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), packaged, found)


def test_weights_of_another_training_are_not_taken(tmp_path):
    """Another seed gives weights of the same shapes, so only the run's config tells."""
    vla = TrainVLAConfig()
    claim_run_folder(tmp_path / "vla" / "train", vla)
    (tmp_path / "vla.safetensors").write_bytes(b"of seed 0")
    asked = QuickstartConfig(out=tmp_path, train_vla=True, vla=replace(vla, seed=3))
    with pytest.raises(UserError, match="seed was 0 and is now 3"):
        driving_vla(asked)


def test_bench_frame_checks_its_arguments_first(tmp_path):
    path = tmp_path / "frame.jpg"
    with pytest.raises(UserError, match=r"frame\.jpg is missing"):
        bench_frame(BenchFrameArgs(image=path, out=tmp_path / "out"))
    cv2.imwrite(str(path), np.zeros((56, 56, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=r"frame\.jpg cannot be decoded"):
        bench_frame(BenchFrameArgs(image=path, out=tmp_path / "out"))
    for ratios in ((0.0,), (1.0, 1.2)):
        with pytest.raises(UserError, match="keep_ratio"):
            BenchFrameArgs(image=path, ratios=ratios)
    with pytest.raises(UserError, match="repeats=0"):
        BenchFrameArgs(image=path, repeats=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda at: QuickstartConfig(vla_weights=at / "no.safetensors"), "no such file of weights"),
        (lambda at: WidenVLAConfig(cameras=("CAM_FOO",)), "no camera CAM_FOO"),
        (lambda at: drive_closed_loop(DriveArgs(out=at / "o", logs=at)), "There is no log"),
        (lambda at: open_shards(at / "s"), r"s has no manifest\.json.*; name the folder that"),
        (lambda at: manifests.load(at / "b"), "no such folder; name that of an export"),
    ],
)
def test_what_is_missing_is_said_before_the_work(tmp_path, make, said):
    with pytest.raises(UserError, match=said):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_picture_is_named_without_its_buffer(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.jpg cannot be decoded as JPEG or PNG \(it is none\)"):
        check_picture(b"no picture", tmp_path / "a.jpg")


def test_a_folder_is_not_taken_by_a_checkpoint_that_is_not_there(tmp_path):
    qwen = CheckpointConfig(checkpoint=tmp_path / "no", shards=tmp_path / "no")
    with pytest.raises(UserError):
        eval_planning(EvalPlanningArgs(out=tmp_path / "out", qwen=qwen))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: EvalPlanningArgs(ratios=(0.5, 0.5)),
            r"ratios=\(0\.5, 0\.5\) must name none twice",
        ),
        (lambda: DriveArgs(target_ms=50, latency=0.4), "target_ms and latency both say"),
        (lambda: RobotEvalArgs(tasks=(0, 0)), r"tasks=\(0, 0\) must name none twice"),
        (lambda: RobotEvalArgs(ratios=(0.5, 0.5)), "must name none twice"),
        (lambda: CompileTrainArgs(link=0), "link=0 must be positive"),
        (lambda: CompileTrainArgs(used=0), "used=0 must be positive"),
    ],
)
def test_values_that_would_do_nothing_or_harm(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_page_without_objects_has_no_empty_figure():
    """Masks alone tell no objects apart."""
    rows = [
        Row(name, ratio, metric, 0.5, 0.4, 0.6, 9, None)
        for name in ("reconpruner", "random")
        for ratio in (0.5, 0.25)
        for metric in ("foreground_recall", "foreground_precision")
    ]
    gallery = kept_section(rows).blocks[1]
    assert [figure.name for figure in gallery.figures] == ["foreground_recall"]


def test_the_benchmark_is_not_prepared_by_a_job_of_several_processes(tmp_path, monkeypatch):
    """One of them would train and wait for the others, which wait for it."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="These 2 processes are one job"):
        eval_planning(EvalPlanningArgs(out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_as_the_command_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdrive", "bench-pruners", "--k", "0"])
    monkeypatch.delitem(sys.modules, "experiments.cli", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("experiments.cli", run_name="__main__")
    assert end.value.code == 2
    assert "k=0" in capsys.readouterr().err
