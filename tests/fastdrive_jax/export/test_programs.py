"""Programs run in a process that cannot import the library, and damaged ones are refused."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.frames import world_frames
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.export.driving import PROGRAMS, driving_program
from fastdrive_jax.export.programs import Bucket, lower, write_programs
from fastdrive_jax.export.programs import read_program as read_any
from fastdrive_jax.export.run_program import load_program
from fastdrive_jax.export.trees import flatten
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="flatbuffers is not installed (extra: export)",
)

BUCKETS = (Bucket(0.4, 4), Bucket(1.0, 4))
FRAMES = 20


@pytest.fixture(scope="module")
def policy(one_camera, small_pruner):
    config, params = one_camera
    pruner = make_pruner("reconpruner", config=small_pruner)
    return DrivingPolicy(DrivingVLA(config), pruner, 0.4), params


@pytest.fixture(scope="module")
def programs(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("p") / "programs"
    return write_programs(folder, driving_program(policy[0]), policy[1], BUCKETS, ("cpu",))


def read_program(folder, bucket=None):
    return read_any(folder, PROGRAMS, bucket)


@pytest.fixture
def copy(programs, tmp_path):
    return shutil.copytree(programs, tmp_path / "copy")


@pytest.fixture(scope="module")
def frames(policy):
    height, width = policy[0].model.config.image_size
    world = WorldConfig(
        val_scenes=1, keyframes_per_scene=4, height=height, width=width, cameras=("CAM_FRONT",)
    )
    return world_frames(world, FRAMES)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_float32_weights_are_multiplied_as_such(policy, platform):
    """By default a TPU rounds to bfloat16 and a GPU to TF32, which moves waypoints."""
    with jax.default_matmul_precision("default"):  # as a user's process has it
        program = lower(driving_program(policy[0]), flatten(policy[1]), BUCKETS[0], platform)
    products = [
        line for line in program.mlir_module().splitlines() if "stablehlo.dot_general" in line
    ]
    assert len(products) > 10
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


RUN_BACK = textwrap.dedent(
    """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("fastdrive_jax", "flax", "orbax", "experiments"):
                raise ImportError(f"{name} is not to be had here")

    sys.meta_path.insert(0, Absent())
    folder, given, answers, *ratios = sys.argv[1:]
    sys.path.insert(0, folder)
    import numpy as np
    from run import load_program

    frames, found = np.load(given), {}
    for ratio in ratios:
        plan = load_program(keep_ratio=float(ratio), batch=4)
        for at in range(0, len(frames["speed"]), 4):
            part = [frames[name][at : at + 4] for name in ("images", "speed", "command")]
            for name, value in plan(*part).items():
                found.setdefault(f"{name} {ratio}", []).append(np.asarray(value))
    np.savez(answers, **{name: np.concatenate(parts) for name, parts in found.items()})
    """
)


@pytest.fixture(scope="module")
def answers(programs, frames, tmp_path_factory):
    """Of a process in which importing the library raises."""
    folder = tmp_path_factory.mktemp("alone")
    np.savez(folder / "in.npz", **vars(frames))
    ratios = [bucket.keep_ratio for bucket in BUCKETS]
    arguments = [programs, folder / "in.npz", folder / "out.npz", *ratios]
    done = subprocess.run(
        [sys.executable, "-c", RUN_BACK, *map(str, arguments)],
        cwd=folder,
        env=alone(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "out.npz")


def alone() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_process_without_the_library_plans_the_same(answers, policy, frames, bucket):
    static, params = policy
    run = jax.jit(plan, static_argnums=0)
    static = DrivingPolicy(static.model, static.pruner, bucket.keep_ratio)
    waypoints = answers[f"waypoints {bucket.keep_ratio}"]
    kept = answers[f"keep_indices {bucket.keep_ratio}"]
    for at in range(0, FRAMES, 4):
        part = slice(at, at + 4)
        want = run(static, params, frames.images[part], frames.speed[part], frames.command[part])
        np.testing.assert_allclose(waypoints[part], want.waypoints, atol=1e-5)
        np.testing.assert_array_equal(kept[part], want.keep_indices)
    assert waypoints.shape == (FRAMES, 6, 2)
    assert kept.shape == (FRAMES, round(10 * bucket.keep_ratio))


def test_the_runner_prints_what_a_file_of_frames_gives(programs, frames, answers, tmp_path):
    given = {name: value[:4] for name, value in vars(frames).items()}
    np.savez(tmp_path / "frames.npz", **given)
    words = [sys.executable, "run.py", str(tmp_path / "frames.npz")]
    done = subprocess.run(words, cwd=programs, env=alone(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = [line for line in done.stdout.splitlines() if line.isidentifier()]
    assert names == ["keep_indices", "waypoints"]
    first = BUCKETS[0].keep_ratio
    assert str(answers[f"keep_indices {first}"][:4]) in done.stdout
    assert str(answers[f"waypoints {first}"][:4]) in done.stdout


def test_the_runner_says_what_a_program_takes(programs, frames, tmp_path):
    takes = r"images uint8\[4,1,56,140,3\], speed float32\[4\], command int32\[4\]"
    images, speed, command = (getattr(frames, name) for name in ("images", "speed", "command"))
    run = read_program(programs)
    for wrong in (
        (images[:3], speed[:3], command[:3]),
        (images[:4].astype(np.float32), speed[:4], command[:4]),
        (images[:4], command[:4], speed[:4]),
        (images[:4], speed[:4]),
    ):
        with pytest.raises(ValueError, match=takes):
            run(*wrong)

    def said(*words):
        words = [sys.executable, str(programs / "run.py"), *map(str, words)]
        done = subprocess.run(words, env=alone(), capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "run.py FRAMES.npz" in said()
    np.savez(tmp_path / "frames.npz", images=images[:4])
    assert "run.py: " in (line := said(tmp_path / "frames.npz"))
    assert "speed" in line


def test_the_runner_alone_names_what_is_not_of_programs(copy, tmp_path):
    folder = write_bundle(tmp_path / "b", {"m": {"w": np.ones(2, np.float32)}}, {"kind": "pruner"})
    with pytest.raises(ValueError, match=r"no program for cpu.* it holds 'pruner'"):
        load_program(folder)
    (copy / "config.json").write_text((copy / "config.json").read_text()[:500])
    with pytest.raises(ValueError, match=r"config\.json is not whole JSON"):
        load_program(copy)


def test_other_frames_are_planned_otherwise(programs, frames):
    """So that the comparison above cannot pass on a constant."""
    run = read_program(programs, BUCKETS[0])
    first, second = frames.images[:4], 255 - frames.images[:4]
    kept = [
        np.asarray(run(images, frames.speed[:4], frames.command[:4])["keep_indices"])
        for images in (first, second)
    ]
    assert (kept[0] != kept[1]).any()


@pytest.mark.parametrize(("platform", "splash"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_every_platform_gets_its_own_attention(policy, platform, splash):
    static, params = policy
    program = lower(driving_program(static), flatten(params), Bucket(0.4), platform)
    assert program.platforms == (platform,)
    assert ("tpu_custom_call" in program.mlir_module()) == splash
    assert program.serialize()


def test_truncated_and_changed_files_are_refused(copy):
    name = "b4_k4.cpu.stablehlo"
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{name} has {len(whole) - 100} bytes instead of"):
        read_program(copy)
    (copy / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(UserError, match="SHA-256"):
        read_program(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"lacks {name}"):
        read_program(copy)


def runner(folder):
    """The module that lies beside the programs."""
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["b4_k4.cpu.stablehlo", "model.safetensors"])
def test_the_runner_alone_refuses_damaged_files_too(copy, name):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        runner(copy).load_program()


def test_the_runner_alone_refuses_a_changed_manifest_too(copy):
    """Two buckets' programs mixed up: all sums of files are right."""
    content = json.loads((copy / "config.json").read_text())
    first, second = content["config"]["buckets"]
    first["programs"], second["programs"] = second["programs"], first["programs"]
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json was changed after it was written"):
        runner(copy).load_program()


def test_a_changed_manifest_is_refused(copy):
    manifest = json.loads((copy / "config.json").read_text())
    manifest["config"]["buckets"][0]["kept"] = 5
    (copy / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was changed"):
        read_program(copy)


def test_a_bucket_that_is_not_there_is_refused(programs):
    with pytest.raises(UserError, match=r"no program for cpu, keep_ratio=0.5, batch=4"):
        read_program(programs, Bucket(0.5, 4))


def test_a_bundle_of_another_kind_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "b", {"m": {"w": np.ones(2, np.float32)}}, {"kind": "pruner"})
    with pytest.raises(UserError, match="'pruner', not driving policy programs"):
        read_program(folder)


def test_buckets_out_of_range_are_refused():
    with pytest.raises(UserError, match="keep_ratio=0"):
        Bucket(0.0)
    with pytest.raises(UserError, match="batch=0"):
        Bucket(0.5, 0)


def test_methods_that_need_more_than_a_frame_are_refused(policy, tmp_path):
    static, params = policy
    for name in ("random", "vlapruner"):
        other = DrivingPolicy(static.model, make_pruner(name), 0.4)
        with pytest.raises(ValueError, match="needs a state or a key"):
            write_programs(tmp_path / "p", driving_program(other), params, BUCKETS)
    assert not list(tmp_path.iterdir())
