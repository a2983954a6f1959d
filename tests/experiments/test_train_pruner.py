"""Training from pictures on eight virtual devices: whole, resumed on others, refused."""

import shutil
from dataclasses import replace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import traverse_util
from tiny_checkpoint import CONFIG, write_checkpoint

from data_pipelines.build import build_shards
from data_pipelines.image_folder import read_image_folder
from data_pipelines.loader import LoaderConfig
from data_pipelines.shards import open_shards
from experiments import pruner_data as module
from experiments.configs.pruner import FASTDRIVEVLA_3B, PRUNER_RUNS, PrunerRun
from experiments.encoders import FrozenEncoder
from experiments.export_model import ExportArgs, export_model
from experiments.export_source import read_source
from experiments.train_pruner import TrainPrunerConfig, check_batch, train_on_shards
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.export.bundle import read_bundle_orbax
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import ReconConfig
from fastdrive_jax.training.watch import WatchConfig

RUN = PrunerRun(
    recon=ReconConfig(
        pruner=ReconPrunerConfig(layer=replace(CONFIG.text, num_layers=1)),
        decoder=replace(CONFIG.text, num_layers=1),
        target_pixels=14,
        mask_mode="top_k",
    ),
    encoder="qwen2_5_vl",
    optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=6),
    loader=LoaderConfig(8, (56, 84), flip=True, read_threads=1),
    data=-1,
    fsdp=2,
    ema_decay=0.9,
    best="recall_25",
    evaluate_every=3,
    eval_pictures=8,
    checkpoint_every=2,
    log_every=1,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 2)):
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(count):
            name = f"{split}-{number}.png"
            picture = rng.integers(0, 256, (56, 84, 3), np.uint8)
            mask = np.where(rng.random((56, 84)) < 0.3, 255, 0).astype(np.uint8)
            cv2.imwrite(str(folder / split / "images" / name), picture)
            cv2.imwrite(str(folder / split / "masks" / name), mask)
    return build_shards(read_image_folder(folder), folder / "shards", progress=False).path


def train(shards, checkpoint, out, **changes):
    run = replace(RUN, **changes)
    watch = WatchConfig(images_every=3)
    return train_on_shards(TrainPrunerConfig(shards, out, run, checkpoint, watch=watch, quiet=True))


@pytest.fixture(scope="module")
def whole(shards, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(shards, checkpoint, out), out


def losses(result):
    return [record["loss"] for record in result.history if record["kind"] == "train"]


def test_it_trains_and_exports(whole):
    result, out = whole
    assert len(losses(result)) == 6
    assert np.isfinite(losses(result)).all()
    kernel = result.state.params["decoder"]["head"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == kernel.shape[0] // 2  # fsdp
    assert sorted(path.name for path in (out / "images").iterdir())


def test_the_average_of_the_best_step_is_exported(whole):
    result, out = whole
    evals = [record for record in result.history if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [0, 3, 6]
    best = max(evals, key=lambda record: (record["recall_25"], record["step"]))
    assert result.best_step == best["step"]
    exported, described = read_bundle_orbax(out / "export")
    assert described["kind"] == "pruner"
    mean = traverse_util.flatten_dict(jax.device_get(result.best_state.ema["pruner"]))
    for path, value in traverse_util.flatten_dict(jax.device_get(exported["pruner"])).items():
        np.testing.assert_array_equal(value, mean[path])


def test_a_run_of_a_qwen_exports_its_pruner_with_and_without_its_bundle(whole, tmp_path):
    result, out = whole
    shutil.copytree(out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "export")
    bundle, checkpoint = read_source(out), read_source(tmp_path / "run")
    assert bundle.read == out / "export"
    assert checkpoint.read == tmp_path / "run" / "checkpoints" / str(result.best_step)
    for source in (bundle, checkpoint):
        assert source.facts.step == result.best_step
        assert source.facts.data["samples"] == {"train": 12, "val": 2}
        assert source.vla is None
        assert source.why == (
            "The pruner is one for tokens of qwen2_5_vl; --vla names the folder of its checkpoint."
        )
    jax.tree.map(np.testing.assert_array_equal, bundle.params, jax.device_get(checkpoint.params))
    with pytest.raises(UserError, match="cannot be exported as stablehlo"):
        export_model(ExportArgs(out, tmp_path / "out", forms=("stablehlo",)))


def test_what_is_kept_is_measured_beside_the_controls(whole):
    _, out = whole
    rows, meta = read_rows(out / "results.json")
    assert meta["run"]["encoder"] == "qwen2_5_vl"
    assert {row.method for row in rows} >= {"reconpruner", "random", "uniform", "prior", "oracle"}
    found = {
        (row.method, row.keep_ratio): row.value for row in rows if row.metric == "foreground_recall"
    }
    assert found["reconpruner", 1.0] == pytest.approx(1)
    assert found["oracle", 0.25] >= found["reconpruner", 0.25] > 0
    assert {row.n for row in rows if row.method == "oracle"} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 1, "tensor": 2}, {"data": 1, "fsdp": 1}])
def test_a_stopped_run_goes_on_with_other_devices(whole, shards, checkpoint, tmp_path, mesh):
    result, _ = whole
    with pytest.raises(KeyboardInterrupt):
        stop_after(5, shards, checkpoint, tmp_path / "run", RUN)
    resumed = train(shards, checkpoint, tmp_path / "run", **mesh)
    np.testing.assert_allclose(losses(resumed), losses(result), atol=1e-5)


def stop_after(step, shards, checkpoint, out, run):
    """A run that dies after some steps, as by Ctrl-C in the middle of one."""
    loader = module.make_loader

    class Dying:
        def __init__(self, batches):
            self.batches, self.given = batches, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.given += 1
            if self.given > step:
                raise KeyboardInterrupt
            return next(self.batches)

        def get_state(self):
            return self.batches.get_state()

        def set_state(self, state):
            self.batches.set_state(state)

    def dying(shards, split, config, *hosts):
        made = loader(shards, split, config, *hosts)
        trains = split == "train" and "image" in config.fields
        return Dying(iter(made)) if trains else made

    module.make_loader = dying
    try:
        train_on_shards(TrainPrunerConfig(shards, out, run, checkpoint, quiet=True))
    finally:
        module.make_loader = loader


def test_a_cache_is_encoded_by_all_devices_of_the_training(shards, tmp_path):
    mesh, parts = make_mesh(4, 2), []

    def apply(params, pictures):
        whole = pictures.shape
        jax.debug.inspect_array_sharding(
            pictures, callback=lambda s: parts.append((whole[0], s.shard_shape(whole)[0]))
        )
        return jnp.full((len(pictures), 6, 4), params)

    params = jax.device_put(jnp.float32(2), replicated_sharding(mesh))
    encoder = FrozenEncoder("of a test", 4, apply, params)
    tokens = module.cached_tokens(tmp_path, open_shards(shards), RUN, encoder, mesh, None, True)
    assert parts == [(8 * module.ENCODED_AT_ONCE, module.ENCODED_AT_ONCE)]
    assert len(tokens) == 12
    assert (tokens[11] == 2).all()


@pytest.mark.slow
def test_tokens_may_be_cached(shards, checkpoint, tmp_path):
    still = replace(RUN.loader, flip=False)
    run = replace(RUN, loader=still, data=1, fsdp=1, ema_decay=None, best=None)
    config = TrainPrunerConfig(shards, tmp_path / "a", run, checkpoint, quiet=True)
    plain = losses(train_on_shards(config))
    cache = tmp_path / "cache"
    cached = losses(train_on_shards(replace(config, out=tmp_path / "b", cache=cache)))
    assert plain != cached  # stored in half precision
    np.testing.assert_allclose(cached, plain, atol=5e-3)
    assert list(cache.glob("*.array_record*"))
    with pytest.raises(UserError, match="flip"):
        train_on_shards(replace(config, run=RUN, out=tmp_path / "d", cache=cache))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loader": replace(RUN.loader, batch_size=6)}, "multiple of 8 parts"),
        ({"fsdp": 16}, "mesh of"),
        ({"recon": FASTDRIVEVLA_3B.recon}, "hidden_size=2048 must be the size"),
    ],
)
def test_what_does_not_fit_is_refused(shards, checkpoint, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train(shards, checkpoint, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_encoder_or_setting_is_refused(whole, shards, checkpoint, tmp_path):
    _, out = whole
    with pytest.raises(UserError, match=r"run\.seed was 0 and is now 1"):
        train(shards, checkpoint, out, seed=1)
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="encoder was"):
        train(shards, other, out)
    with pytest.raises(UserError, match="--weights"):
        train(shards, None, tmp_path / "run")


def test_runs_that_contradict_themselves_are_refused():
    with pytest.raises(UserError, match="accumulate=3"):
        replace(FASTDRIVEVLA_3B, accumulate=3)
    with pytest.raises(UserError, match=r"loader\.num_epochs"):
        replace(RUN, loader=replace(RUN.loader, num_epochs=2))
    with pytest.raises(UserError, match="mask_surprise"):
        replace(RUN, recon=replace(RUN.recon, mask_weight=1.0, mask_surprise=0.2))
    with pytest.raises(UserError, match="ema_decay"):
        replace(RUN, ema_decay=1.0)


def test_settings_are_chosen_by_name_on_the_command_line():
    args = tyro.cli(
        TrainPrunerConfig,
        args=["--shards", "a", "--out", "b", "fastdrivevla-3b", "--fsdp", "8"],
    )
    assert args.run == replace(FASTDRIVEVLA_3B, fsdp=8)
    assert set(PRUNER_RUNS) == {
        "tiny",
        "camvid",
        "faithful",
        "fastdrivevla_3b",
        "fastdrivevla_7b",
    }


def test_hosts_without_a_part_of_the_batch_are_refused_before_anything_is_read(monkeypatch):
    mesh = make_mesh(1, devices=jax.local_devices()[:1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = replace(RUN, loader=replace(RUN.loader, batch_size=8))
    with pytest.raises(UserError, match=r"1 parts \(data x fsdp\).*give --data -1"):
        check_batch(run, mesh)
