"""`fastdrive export` of a Qwen2.5-VL and the ReconPruner that was trained on its tokens."""

import functools
import importlib.util
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_export_model import Position
from tiny_checkpoint import CONFIG, write_checkpoint

from experiments import export_forms
from experiments.bench_export import BenchExportArgs, bench_export
from experiments.cli import main
from experiments.configs.pruner import TINY
from experiments.encoders import load_encoder, qwen_digest
from experiments.export_check import torch_scorer
from experiments.export_model import ExportArgs, export_model
from experiments.export_qwen import QwenExport, check_pictures
from experiments.export_source import read_source
from experiments.train_pruner import RunIdentity
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows, select
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.export.eight_bits import EightBits
from fastdrive_jax.export.pruned_qwen import PROCESSOR, read_pruned_qwen
from fastdrive_jax.export.pruner import read_pruner
from fastdrive_jax.inference.pruned_qwen import answer_pictures, prompt_batch
from fastdrive_jax.models.qwen2_5_vl.processor import read_processor
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import init_train_state

PRUNER = ReconPrunerConfig(layer=CONFIG.text)
RUN = replace(
    TINY,
    encoder="qwen2_5_vl",
    loader=replace(TINY.loader, image_size=(56, 112)),
    recon=replace(TINY.recon, pruner=PRUNER, decoder=CONFIG.text),
    dtype="float32",
)
SHAPES = QwenExport(pictures=2, prompt_ids=120, max_new_tokens=4)
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("flatbuffers", "qwix")),
    reason="flatbuffers or qwix is not installed (extra: export)",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pruner"
    identity = RunIdentity(RUN, qwen_digest(checkpoint, "float32"), "digest-of-shards")
    draw = functools.partial(init_params, RUN.recon)
    shapes = jax.eval_shape(lambda: init_train_state(draw, make_optimizer(RUN.optimizer), RUN.seed))
    rng = np.random.default_rng(0)  # numbers of the host: no program is compiled to draw them
    state = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    with RunCheckpoints(folder, identity) as checkpoints:
        checkpoints.save(3, state, Position())
    return folder


@pytest.fixture(scope="module")
def exported(run, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "export"
    forms = ("pruner", "policy", "stablehlo", "int8")
    args = ExportArgs(
        run, out, forms, platforms=("cpu",), vla=checkpoint, check_frames=3, qwen=SHAPES
    )
    assert export_model(args) == out / "README.md"
    return out


def test_the_digest_is_that_of_the_encoder_that_is_trained_on(checkpoint):
    mesh = make_mesh(1, devices=jax.local_devices()[:1])
    encoder = load_encoder("qwen2_5_vl", checkpoint, mesh, np.dtype("float32"), quiet=True)
    assert encoder.digest == qwen_digest(checkpoint, "float32")


@needs_extra
def test_every_form_is_written_checked_and_described(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {"pruner", "policy", "stablehlo", "int8", "torch_pruner.py", "README.md"}
    card = (exported / "README.md").read_text()
    assert card.startswith("# Pruned Qwen2.5-VL\n")
    same = ("policy, safetensors", "policy, orbax", "stablehlo, 50% kept, batch 1")
    for form in same:
        assert f"| {form} | ids of answers | 0 | 100.00% |" in card
    assert re.search(r"\| int8 weights \| ids of answers \| \d+ \| \d", card)
    assert "On 3 frames of the synthetic world" in card
    assert "16 tokens of 2 pictures of 56 x 112" in card
    assert "Encoder: qwen2_5_vl" in card


@needs_extra
def test_the_card_says_how_the_model_is_loaded(exported, monkeypatch, capsys):
    """Its own lines, run where the card lies."""
    card = (exported / "README.md").read_text()
    shown = dict.fromkeys(("policy", "stablehlo", "int8"))
    for part in card.split("```python\n")[1:]:
        code = part.split("```")[0]
        for name in shown:
            if f'"{name}"' in code or f"{name}.run" in code:
                shown[name] = code
    monkeypatch.chdir(exported)
    monkeypatch.syspath_prepend(str(exported))
    images = check_pictures(read_pruned_qwen(exported / "policy")[0], 1)
    names = {"images": images, "pictures": list(images[0])}
    exec(shown["policy"], names)
    names |= dict(
        zip(("ids", "lengths"), prompt_batch(names["asked"], [names["prompt"]]), strict=True)
    )
    assert isinstance(names["text"], str)
    for name in ("stablehlo", "int8"):
        exec(shown[name], names)
    np.testing.assert_array_equal(
        names["answer"]["ids"],
        jax.jit(answer_pictures, static_argnums=0)(
            *read_pruned_qwen("policy"), images, names["ids"], names["lengths"]
        ).ids,
    )


@needs_extra
def test_the_pruner_is_that_of_the_run_in_both_folders(exported, run):
    alone, whole = read_pruner(exported / "pruner"), read_pruner(exported / "policy")
    assert alone[0] == whole[0] == PRUNER
    jax.tree.map(np.testing.assert_array_equal, alone[1], read_source(run).params["pruner"])
    jax.tree.map(np.testing.assert_array_equal, alone[1], whole[1])
    assert read_processor(exported / "policy" / PROCESSOR).config == CONFIG


@needs_extra
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_pytorch_reads_the_pruner_of_either_folder(exported):
    tokens = np.random.default_rng(0).normal(size=(2, 16, 48)).astype(np.float32)
    alone, whole = (torch_scorer(exported / name)(tokens) for name in ("pruner", "policy"))
    np.testing.assert_array_equal(alone, whole)
    config, params = read_pruner(exported / "policy")
    want = jax.jit(ReconPruner(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(whole, want, atol=1e-5)


@needs_extra
def test_forms_are_timed_side_by_side(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_forms, "EIGHT_BITS", {"int8_weights": EightBits("int8")})
    out = tmp_path / "bench"
    args = BenchExportArgs(run, out, frames=3, repeats=2, vla=checkpoint, qwen=SHAPES)
    rows, meta = read_rows(bench_export(args))
    assert meta["visual_tokens"] == 16

    def value(method, metric):
        return select(rows, method=method, metric=metric)[0].value

    assert {row.method for row in rows} == {"float32", "int8_weights", "stablehlo"}
    for same in ("float32", "stablehlo"):
        assert value(same, "frames_with_another_answer") == 0
        assert value(same, "ids_before_another") == SHAPES.max_new_tokens
        assert value(same, "kept_tokens_same") == 1
    assert 0 <= value("int8_weights", "ids_before_another") <= SHAPES.max_new_tokens
    assert value("int8_weights", "weights") < value("float32", "weights")
    assert value("float32", "times_as_fast") == 1
    assert value("stablehlo", "frame_ms") > 0


def test_without_the_checkpoint_the_pruner_goes_alone(run, tmp_path, capsys):
    out = tmp_path / "out"
    export_model(ExportArgs(run, out, check_frames=1))
    assert "--vla names the folder of its checkpoint" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"pruner", "torch_pruner.py", "README.md"}


def test_another_checkpoint_is_refused(run, tmp_path, capsys):
    other = write_checkpoint(tmp_path / "other", seed=1)
    words = ["export", "--run", str(run), "--out", str(tmp_path / "out"), "--vla", str(other)]
    assert main(words) == 2
    assert "is not the VLA whose tokens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (QwenExport(image_size=(56, 100)), "not made of 28 x 28 tokens"),
        (QwenExport(image_size=(280, 280)), r"would make \(196, 196\) of pictures of \(280, 280\)"),
        (QwenExport(prompt_ids=1), "prompt_ids=1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(run, checkpoint, tmp_path, shapes, said):
    args = ExportArgs(run, tmp_path / "out", ("policy",), vla=checkpoint, qwen=shapes)
    with pytest.raises(UserError, match=said):
        export_model(args)
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_does_not_say_its_pictures_asks_for_them(run, checkpoint, tmp_path):
    config = {"kind": "pruner", "pruner": to_plain(PRUNER), "encoder": "qwen2_5_vl"}
    bundle = write_bundle(tmp_path / "b", {"pruner": read_source(run).params["pruner"]}, config)
    args = ExportArgs(bundle, tmp_path / "out", ("policy",), vla=checkpoint, check=False)
    with pytest.raises(UserError, match=r"give --qwen\.image-size"):
        export_model(args)
    shapes = replace(SHAPES, image_size=(56, 112), dtype="float32")
    export_model(replace(args, qwen=shapes))
    assert read_pruned_qwen(tmp_path / "out" / "policy")[0].dtype == "float32"
