"""`fastdrive export`: what it makes of bundles, runs and checkpoints, checks, says and refuses."""

import functools
import importlib.util
import json
import re
import shutil
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_policy import PRUNER, small_config, small_params

from data_pipelines.shards import shards_digest
from experiments.cli import main
from experiments.configs.pruner import TINY
from experiments.encoders import frozen_vla
from experiments.export_check import (
    Difference,
    check_frames,
    picture_tokens,
    refuse_differences,
)
from experiments.export_model import ExportArgs, export_model
from experiments.export_source import read_source
from experiments.train_pruner import RunIdentity
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, write_rows
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.export.driving import read_policy, write_policy
from fastdrive_jax.export.manifest import load
from fastdrive_jax.export.onnx_programs import PRUNER as ONNX_PRUNER
from fastdrive_jax.export.onnx_programs import read_onnx
from fastdrive_jax.export.pruner import write_pruner
from fastdrive_jax.inference.pictures import driving_inputs
from fastdrive_jax.inference.pruned import keep_before
from fastdrive_jax.models.qwen2_5_vl.bundled import AROUND, BUNDLED, FRONT, load_vla, save_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.packaged import packaged
from fastdrive_jax.pruning.recon_pruner import recon_pruner
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import evaluation_params, init_train_state

NO_FLATBUFFERS = importlib.util.find_spec("flatbuffers") is None
needs_flatbuffers = pytest.mark.skipif(
    NO_FLATBUFFERS, reason="flatbuffers is not installed (extra: export)"
)
needs_converter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnxruntime")),
    reason="jax2onnx and onnxruntime are not installed (docs/export.md)",
)
SHARDS = {"part-0": {"sha256": "ab" * 32}}
DIGEST = shards_digest(SHARDS)
RUN = replace(
    TINY,
    recon=replace(TINY.recon, pruner=PRUNER, decoder=PRUNER.layer),
    ema_decay=0.9,
    best="recall_25",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    config = small_config()
    folder = tmp_path_factory.mktemp("source") / "bundle"
    return write_policy(folder, small_params(config), config, PRUNER, 0.4)


@pytest.fixture(scope="module")
def exported(bundle, tmp_path_factory):
    if NO_FLATBUFFERS:
        pytest.skip("flatbuffers is not installed (extra: export)")
    out = tmp_path_factory.mktemp("out") / "export"
    args = ExportArgs(bundle, out, platforms=("cpu",), check_frames=4)
    assert export_model(args) == out / "README.md"
    return out


def test_the_usual_forms_are_written_and_checked(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"pruner", "policy", "stablehlo", "torch_pruner.py", "README.md"}
    card = (exported / "README.md").read_text()
    forms = ["pruner, safetensors", "pruner, orbax", "policy, safetensors", "policy, orbax"]
    forms += ["stablehlo, 40% kept, batch 1"]
    for form in forms:
        assert re.search(rf"\| {form} \| (scores|waypoints, m) \| (\d\S*) \|", card), form
    assert "On 4 frames of the synthetic world" in card
    assert "does not say how it was trained" in card
    assert "holds no figures" in card
    assert "Apache-2.0" in card
    # who has nothing but the folder
    assert "Kept tokens K, of 10: 4 at 0.4." in card
    assert "| in | `images` | uint8 [B, 1, 56, 140, 3] | RGB" in card
    assert "| out | `waypoints` | float32 [B, 6, 2] | metres ahead and to the left" in card


def test_the_policy_is_that_of_the_source(exported, bundle):
    (_, want), (policy, have) = read_policy(bundle), read_policy(exported / "policy")
    jax.tree.map(np.testing.assert_array_equal, want, have)
    assert policy.keep_ratio == 0.4
    assert list(load(exported / "pruner").tensors) == [
        name for name in load(bundle).tensors if name.startswith("pruner/")
    ]


@needs_flatbuffers
def test_an_export_may_be_made_again_but_not_of_other_forms(exported, bundle, tmp_path):
    out = shutil.copytree(exported, tmp_path / "out")
    args = ExportArgs(bundle, out, forms=("pruner",), check=False)
    with pytest.raises(UserError, match="holds policy, which this export would not write"):
        export_model(args)
    assert (out / "README.md").exists()
    (out / "policy").rename(tmp_path / "policy")
    (out / "stablehlo").rename(tmp_path / "stablehlo")
    export_model(args)
    assert "Not checked" in (out / "README.md").read_text()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        export_model(args)


def test_somebodys_own_readme_is_not_taken_away(bundle, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "README.md").write_text("# My notes\n")
    with pytest.raises(UserError, match=r"mine/README\.md is not of an export"):
        export_model(ExportArgs(bundle, out, forms=("pruner",), check=False))
    assert (out / "README.md").read_text() == "# My notes\n"


def test_a_damaged_source_is_refused(bundle, tmp_path, capsys):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-5])
    assert main(["export", "--run", str(copy), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{len(whole) - 5} bytes instead of {len(whole)}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "package"), [("int8", "qwix"), ("onnx", "jax2onnx"), ("onnx", "onnxruntime")]
)
def test_a_missing_extra_is_said_before_anything_is_written(
    bundle, tmp_path, monkeypatch, form, package
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"need.*{package}|{package}.*install"):
        export_model(ExportArgs(bundle, tmp_path / "out", forms=("pruner", form)))
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a bundle nor the folder of a run"):
        read_source(tmp_path)
    other = write_bundle(tmp_path / "b", {"m": {"w": np.ones(2, np.float32)}}, {"kind": "encoder"})
    with pytest.raises(UserError, match="'encoder', without a pruner"):
        read_source(other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep_ratio": (1.5,)}, "keep_ratio=1.5"),
        ({"keep_ratio": (0.5, 0.5)}, "none twice"),
        ({"batch": (0,)}, "batch=0"),
        ({"forms": ()}, "at least one"),
        ({"check_frames": 0}, "check_frames=0"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, fields, said):
    with pytest.raises(UserError, match=said):
        ExportArgs(tmp_path, tmp_path / "out", **fields)


@pytest.mark.parametrize("largest", [2e-5, float("nan")])
def test_a_form_that_plans_something_else_is_refused(largest):
    same = Difference("policy, orbax", "waypoints, m", 0.0, 1e-5, 1.0, 20)
    rounded = Difference("int8 weights", "waypoints, m", 0.3, None, 0.9, 20)
    refuse_differences([same, rounded])
    with pytest.raises(UserError, match=r"not what was trained: policy, orbax"):
        refuse_differences([same, replace(same, largest=largest)])


class Position:
    def get_state(self):
        return {"next_index": 0}

    def set_state(self, state):
        del state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was stopped: step 2 is its best, step 3 its newest."""
    folder = tmp_path_factory.mktemp("run") / "pruner"
    identity = RunIdentity(RUN, frozen_vla(*load_vla()).digest, DIGEST)
    optimizer = make_optimizer(RUN.optimizer)

    @jax.jit
    def init():
        draw = functools.partial(init_params, RUN.recon)
        return init_train_state(draw, optimizer, RUN.seed, ema=True)

    best = init()
    newest = best.replace(ema=jax.tree.map(lambda leaf: leaf + 1, best.ema))
    states = {}
    with RunCheckpoints(folder, identity, best=Best("recall_25", "max")) as checkpoints:
        for step, state, recall in ((2, best, 0.8), (3, newest, 0.6)):
            states[step] = jax.device_get(evaluation_params(state)["pruner"])
            checkpoints.save(step, state, Position(), {"recall_25": recall})
    return folder, states


def test_the_best_checkpoint_of_a_run_is_read(run):
    folder, states = run
    before = sorted(path for path in folder.rglob("*"))
    source = read_source(folder)
    assert source.facts.step == 2
    assert source.facts.data_digest == DIGEST
    assert source.pruner == RUN.recon.pruner
    jax.tree.map(np.testing.assert_array_equal, source.params["pruner"], states[2])
    assert sorted(path for path in folder.rglob("*")) == before  # it may still be training
    # the digest says that it prunes the packaged VLA's tokens
    assert source.vla == load_vla()[0].config
    assert source.params["vla"]


def test_a_vla_is_exported_with_the_cameras_that_it_was_trained_for(run, tmp_path):
    folder, _ = run
    packaged_six = packaged(BUNDLED[AROUND])
    with pytest.raises(UserError, match=r"tiny_vla_six.* does not say which cameras.*--cameras"):
        read_source(folder, packaged_six)
    assert read_source(folder, packaged_six, AROUND).vla.cameras == AROUND

    model, six = load_vla(config=DrivingConfig(cameras=AROUND))
    source = read_source(folder, cameras=AROUND)  # the packaged one of six
    assert source.vla == model.config
    jax.tree.map(np.testing.assert_array_equal, source.params["vla"], six)

    own = tmp_path / "own.safetensors"
    save_vla(own, six, AROUND)
    args = ExportArgs(folder, tmp_path / "out", forms=("policy",), vla=own, check=False)
    export_model(args)
    assert read_policy(tmp_path / "out" / "policy")[0].model.config == model.config
    assert read_source(folder, own, AROUND).vla.cameras == AROUND
    with pytest.raises(UserError, match=r"looks through CAM_FRONT, .*, not CAM_FRONT; leave"):
        read_source(folder, own, FRONT)


def test_a_pruner_of_the_wider_vla_goes_with_it_alone(run, tmp_path):
    """Its digest is of the six cameras."""
    own, folder = tmp_path / "own.safetensors", shutil.copytree(run[0], tmp_path / "copy")
    save_vla(own, load_vla(config=DrivingConfig(cameras=AROUND))[1], AROUND)
    identity = json.loads((folder / "config.json").read_text())
    identity["encoder"] = frozen_vla(*load_vla(own)).digest
    assert identity["encoder"] != frozen_vla(*load_vla()).digest
    (folder / "config.json").write_text(json.dumps(identity))
    assert read_source(folder, own).vla.cameras == AROUND
    assert not read_source(folder).whole


def test_cameras_are_refused_where_they_say_nothing(bundle, run, tmp_path):
    with pytest.raises(UserError, match="holds its VLA; leave --cameras out"):
        read_source(bundle, cameras=AROUND)
    other = write_pruner(tmp_path / "b", run[1][2], PRUNER)
    with pytest.raises(UserError, match="no tiny VLA; leave --cameras out"):
        read_source(other, cameras=AROUND)
    with pytest.raises(UserError, match="none twice"):
        ExportArgs(bundle, tmp_path / "out", cameras=("CAM_FRONT", "CAM_FRONT"))


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    config = small_config(("CAM_FRONT", "CAM_BACK"))
    folder = tmp_path_factory.mktemp("two") / "bundle"
    return write_policy(folder, small_params(config), config, PRUNER, 0.5)


def test_scores_are_checked_picture_by_picture(two_cameras):
    source = read_source(two_cameras)
    rows, columns = source.vla.token_grid
    frames = check_frames(source.vla.cameras, source.vla.image_size, 2).images
    encode = jax.jit(functools.partial(DrivingVLA(source.vla).apply, method="encode"))
    whole = encode({"params": source.params["vla"]}, frames)
    found = list(picture_tokens(source, 2))
    assert [tokens.shape for (tokens,) in found] == 4 * [(1, rows * columns, 32)]
    joined = np.concatenate([tokens for (tokens,) in found]).reshape(whole.shape)
    np.testing.assert_allclose(joined, whole, atol=1e-5)

    turned = replace(source, pruner=replace(PRUNER, rope=True))
    for _, ids in picture_tokens(turned, 1):
        assert ids.shape == (3, 1, rows * columns)


@needs_converter
def test_onnx_scores_a_picture_as_the_policy_does(two_cameras, tmp_path):
    export_model(ExportArgs(two_cameras, tmp_path / "out", forms=("onnx",), check_frames=2))
    source = read_source(two_cameras)
    rows, columns = source.vla.token_grid
    inputs = load(tmp_path / "out" / "onnx").config["inputs"]
    assert inputs[ONNX_PRUNER]["tokens"][1] == [1, rows * columns, 32]
    score = read_onnx(tmp_path / "out" / "onnx", ONNX_PRUNER)
    tokens = np.random.default_rng(0).normal(size=(2, rows * columns, 32)).astype(np.float32)
    scores = np.concatenate([score(picture[None])[0][0] for picture in tokens])

    @jax.jit
    def kept(params, tokens):
        given = driving_inputs(source.vla, tokens.reshape(1, -1, 32))
        return keep_before(recon_pruner(PRUNER), params, given, 0.5).indices[0]

    want = kept(source.params["pruner"], tokens)
    np.testing.assert_array_equal(np.sort(np.argsort(-scores, kind="stable")[: len(want)]), want)


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    largest = max((folder / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoints/2"):
        read_source(folder)


def test_a_pruner_of_another_vla_goes_alone(run, tmp_path, capsys):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    identity = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(identity | {"encoder": "vla of someone"}))
    out = tmp_path / "out"
    export_model(ExportArgs(folder, out, check_frames=2))
    said = capsys.readouterr().out
    assert "another VLA than the packaged one; --vla names it" in said
    assert {path.name for path in out.iterdir()} == {"pruner", "torch_pruner.py", "README.md"}
    assert "On 2 pictures of random tokens" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="cannot be exported as policy"):
        export_model(ExportArgs(folder, tmp_path / "other", forms=("policy",)))


def test_the_card_says_what_the_run_holds(run, tmp_path):
    folder, states = run
    out, shards = tmp_path / "run", tmp_path / "shards"
    shutil.copytree(folder, out)
    write_pruner(out / "export", states[2], RUN.recon.pruner)
    manifest = {
        "source": "pictures:somewhere",
        "samples": {"train": 31, "val": 7},
        "cameras": ["CAM_FRONT"],
        "image_size": [224, 392],
        "classes": {"names": ["sky", "car"], "foreground": [1], "objects": [1], "ignore": []},
        "shards": SHARDS,
    }
    shards.mkdir()
    (shards / "manifest.json").write_text(json.dumps(manifest))
    rows = [
        Row("reconpruner", 0.25, "object_recall", 0.625, 0.58, 0.68, 7, 0),
        Row("random", 0.25, "object_recall", 0.25, None, None, 7, 0),
        Row("random", 0.25, "object_recall", 0.35, None, None, 7, 1),
        Row("reconpruner", 0.25, "prefill_ms", 3.0, None, None, 7, None, "ms"),
    ]
    write_rows(out / "results.json", rows, {"shards": str(shards), "step": 2})
    export_model(ExportArgs(out, tmp_path / "x", forms=("pruner",), check=False))
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| object_recall | 25% | 0.625 (0.580 to 0.680) | 0.300 (mean of 2 seeds) | 7 |" in card
    assert "prefill_ms" not in card
    assert f"made from pictures:somewhere, digest `{DIGEST}`" in card
    assert "| train | 31 | CAM_FRONT |" in card
    assert f"{'ab' * 32}  part-0" in card
    assert "Foreground: car." in card
    assert "step 2" in card
    assert '"learning_rate": 0.001' in card
    manifest["shards"] = {"part-0": {"sha256": "cd" * 32}}  # built anew since
    (shards / "manifest.json").write_text(json.dumps(manifest))
    export_model(ExportArgs(out, tmp_path / "y", forms=("pruner",), check=False))
    card = (tmp_path / "y" / "README.md").read_text()
    assert (
        f"Shards with the digest `{DIGEST}`; where the run says they are, there are others" in card
    )
    assert "cdcd" not in card

    (out / "results.json").unlink()  # as of a quick start that still trains
    shutil.move(shards, out / "shards")
    assert read_source(out).facts.data is None
    (out / "shards" / "manifest.json").write_text(json.dumps(manifest | {"shards": SHARDS}))
    assert read_source(out).facts.data["source"] == "pictures:somewhere"


def test_what_a_killed_export_left_is_no_strange_file(run, tmp_path):
    folder, _ = run
    out = tmp_path / "out"
    (out / ".pruner.part-abcd").mkdir(parents=True)
    export_model(ExportArgs(folder, out, forms=("pruner",), check=False))
    assert {path.name for path in out.iterdir()} == {"pruner", "torch_pruner.py", "README.md"}
    assert "This folder holds the pruner alone." in (out / "README.md").read_text()
    (out / "__pycache__").mkdir()  # nor is what Python left that imported torch_pruner.py
    export_model(ExportArgs(folder, out, forms=("pruner",), check=False))


def test_places_that_are_not_for_an_export_are_refused(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "run")  # as if it still trained: without a bundle
    with pytest.raises(UserError, match="where a run keeps its own bundle"):
        export_model(ExportArgs(folder, folder / "export", forms=("pruner",), check=False))
    assert not (folder / "export").exists()
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    with pytest.raises(UserError, match=r"file/out can't be written \(Not a directory\)"):
        export_model(ExportArgs(folder, out, forms=("pruner",), check=False))


def test_a_bundle_without_its_run_is_checked_too_but_is_no_onnx(run, tmp_path):
    """Nothing says how large its pictures were."""
    source = write_pruner(tmp_path / "b", run[1][2], PRUNER)
    out = tmp_path / "out"
    export_model(ExportArgs(source, out, check_frames=2))
    assert "On 2 pictures of random tokens" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="which ONNX needs"):
        export_model(ExportArgs(source, tmp_path / "onnx", forms=("pruner", "onnx")))
    assert not (tmp_path / "onnx").exists()


@needs_flatbuffers
def test_the_card_says_why_nothing_was_checked(two_cameras, tmp_path):
    said = {}
    for check in (True, False):
        args = ExportArgs(
            two_cameras, tmp_path / str(check), ("stablehlo",), platforms=("tpu",), check=check
        )
        said[check] = export_model(args).read_text()
    assert "Not checked: none of these forms runs on this device." in said[True]
    assert "Not checked: it was exported with `--no-check`." in said[False]
