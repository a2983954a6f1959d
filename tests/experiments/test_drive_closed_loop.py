"""The command `fastdrive drive` at a tiny size, with the bundled VLA and one compiled program."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.closed_loop import camera
from data_pipelines.closed_loop.clean import clean_routes
from data_pipelines.closed_loop.policies import Policy
from data_pipelines.closed_loop.simulate import LoopConfig, simulate_batches
from experiments import compare_pruners, drive_closed_loop, drive_target
from experiments.configs.pruner import TINY
from experiments.drive_closed_loop import DriveArgs
from experiments.driving_policies import driving_policy
from experiments.quickstart import QuickstartConfig
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla

SETTINGS = {
    "methods": ("ground_truth",),
    "ratios": (0.5,),
    "routes": 2,
    "seconds": 2.0,
    "batch": 2,
    "workers": 1,
    "pictures": 1,
}


@pytest.fixture(scope="module")
def world():
    model, params = load_vla()
    return SimpleNamespace(
        model=model, params=params, trained={"pruner": {}}, prior=np.ones((1, 112)), run=TINY
    )


@pytest.fixture
def args(tmp_path, monkeypatch, world):
    monkeypatch.delenv("FASTDRIVE_SHARED", raising=False)
    monkeypatch.setattr(drive_closed_loop, "prepare", lambda config, say: world)
    return DriveArgs(out=tmp_path / "run", quickstart=QuickstartConfig(quiet=True), **SETTINGS)


def test_drives_judges_and_goes_on_where_it_stopped(args, monkeypatch):
    rows, meta = read_rows(drive_closed_loop.drive_closed_loop(args))
    cells = {(row.method, row.keep_ratio, row.metric): row for row in rows}
    for setting in (("expert", None), ("constant_velocity", None), ("no_image", None),
                    ("unpruned", 1.0), ("ground_truth", 0.5)):  # fmt: skip
        score = cells[*setting, "driving_score"]
        assert score.n == 2
        assert score.low <= score.value <= score.high
    assert cells["expert", None, "driving_score"].value > 0.9
    difference = cells["ground_truth - unpruned", 0.5, "driving_score_difference"]
    assert difference.value == pytest.approx(
        cells["ground_truth", 0.5, "driving_score"].value
        - cells["unpruned", 1.0, "driving_score"].value
    )
    assert meta["routes"] == {"world": 2}
    table = (args.out / "drive.md").read_text()
    assert "| 50% | ground_truth |" in table
    film = Image.open(next((args.out / "pictures").glob("*.gif")))
    assert film.n_frames == 4
    assert film.size == (392, 224)
    assert len(list((args.out / "pictures").glob("*.png"))) == 1

    # All is there: nothing may be planned or drawn again.
    monkeypatch.setattr(camera.Studio, "draw", None)
    before = (args.out / "drive.json").read_text()
    drive_closed_loop.drive_closed_loop(args)
    assert json.loads((args.out / "drive.json").read_text()) == json.loads(before)

    damaged = args.out / "drives" / "unpruned_1.npz"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="unpruned_1"):
        drive_closed_loop.drive_closed_loop(args)


def test_a_folder_of_other_settings_is_refused(args):
    drive_closed_loop.claim(args, drive_closed_loop.prepare(None, None))
    other = DriveArgs(out=args.out, quickstart=args.quickstart, **{**SETTINGS, "seconds": 3.0})
    with pytest.raises(UserError, match="seconds"):
        drive_closed_loop.claim(other, drive_closed_loop.prepare(None, None))


def test_a_folder_of_other_logs_is_refused(args, tmp_path):
    """As many of them, by other names or of other content."""
    world = drive_closed_loop.prepare(None, None)
    folders = [tmp_path / name for name in ("first", "renamed", "edited")]
    for folder, name, text in zip(
        folders, ("scene-1", "scene-2", "scene-1"), ("a", "a", "b"), strict=True
    ):
        folder.mkdir()
        (folder / f"{name}.json").write_text(text)
    drive_closed_loop.claim(replace(args, logs=folders[0]), world)
    drive_closed_loop.claim(replace(args, logs=folders[0]), world)
    for folder in folders[1:]:
        with pytest.raises(UserError, match="logs"):
            drive_closed_loop.claim(replace(args, logs=folder), world)


def test_one_program_drives_all_frames_and_routes_do_not_depend_on_the_others(args, world):
    routes = clean_routes(args.quickstart.world, "val", 300, 3, 1.5)
    policy = driving_policy(world, "vlacache", 0.5, 0)
    loop = LoopConfig(seconds=1.5)
    programs = compare_pruners.step._cache_size()

    def drive(numbers):
        chosen = [routes[k] for k in numbers]
        with camera.FrontCameras(chosen, (224, 392), 1) as cameras:
            return simulate_batches(chosen, policy, loop, cameras, 2)

    three = drive([0, 1, 2])
    assert compare_pruners.step._cache_size() <= programs + 1
    np.testing.assert_array_equal(three.states, drive([0, 1, 2]).states)
    # The last route is driven in a batch of its own, beside itself.
    swapped = drive([2, 0])
    np.testing.assert_array_equal(three.states[2], swapped.states[0])
    np.testing.assert_array_equal(three.states[0], swapped.states[1])
    assert compare_pruners.step._cache_size() <= programs + 1
    assert three.kept.shape == (3, 3, 56)


def test_a_frame_is_timed():
    def plan(memory, view):
        time.sleep(0.02)
        return np.zeros((1, 6, 2)), None, memory

    assert 0.02 <= drive_closed_loop.frame_seconds(Policy(plan), (224, 392), 112, 3) < 0.5


def test_a_target_picks_the_ratio_of_each_method_once(args, world, monkeypatch):
    seconds = {1.0: 0.03, 0.5: 0.004, 0.25: 0.002}
    monkeypatch.setattr(drive_target, "driving_policy", lambda world, name, ratio, seed: ratio)
    monkeypatch.setattr(
        drive_target, "frame_planner", lambda ratio, *given: lambda: time.sleep(seconds[ratio])
    )
    args = replace(args, target_ms=25.0, ratios=(0.25, 0.5), methods=("uniform",))
    jobs = drive_closed_loop.settings(args, world)
    assert list(jobs)[-2:] == [("unpruned", 1.0), ("uniform", 0.5)]
    assert jobs["expert", None] == jobs["uniform", 0.5] == 0.025
    assert jobs["unpruned", 1.0] > 0.03  # later than the target, as it is
    monkeypatch.setattr(drive_target, "frame_planner", None)  # what is known is not timed again
    assert drive_closed_loop.settings(args, world) == jobs
    for damaged in ("{", "[1]", '{"uniform": 0.5}', '{"uniform": {"keep_ratio": 0.5}}'):
        (args.out / "target.json").write_text(damaged)
        with pytest.raises(UserError, match=r"target\.json is damaged .*; delete it"):
            drive_closed_loop.settings(args, world)


def test_without_a_target_all_methods_are_driven_at_all_ratios(args, world):
    jobs = drive_closed_loop.settings(replace(args, ratios=(0.5, 0.25)), world)
    assert list(jobs)[-3:] == [("unpruned", 1.0), ("ground_truth", 0.5), ("ground_truth", 0.25)]
    assert set(jobs.values()) == {args.latency}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"methods": ("nothing",)}, "nothing"),
        ({"methods": ("a.py:keep", "b.py:keep")}, "all be called 'keep'"),
        ({"ratios": (1.5,)}, "1.5"),
        ({"routes": 0}, "routes"),
        ({"latency": -1.0}, "latency"),
        ({"target_ms": 0.0}, "target_ms=0"),
        ({"target_ms": 50.0, "latency_scale": 1.0}, "give one"),
    ],
)
def test_refusals(change, named):
    with pytest.raises(UserError, match=named):
        DriveArgs(**change)


def test_a_log_folder_without_logs_is_refused(tmp_path):
    with pytest.raises(UserError, match="logs"):
        drive_closed_loop.log_files(DriveArgs(logs=tmp_path))
