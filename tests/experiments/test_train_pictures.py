"""Training from pictures on eight virtual devices: whole, resumed on others, refused."""

from dataclasses import replace

import cv2
import jax
import numpy as np
import pytest
from flax import traverse_util
from tiny_checkpoint import CONFIG, write_checkpoint

from data_pipelines.build import build_shards
from data_pipelines.image_folder import read_image_folder
from data_pipelines.loader import LoaderConfig
from experiments.configs.pictures import FASTDRIVEVLA_3B, FASTDRIVEVLA_7B, PictureRun
from experiments.train_pictures import TrainPicturesConfig, train_pictures
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle_orbax
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import ReconConfig

jax.config.update("jax_num_cpu_devices", 8)
RUN = PictureRun(
    recon=ReconConfig(
        pruner=ReconPrunerConfig(layer=replace(CONFIG.text, num_layers=1)),
        decoder=replace(CONFIG.text, num_layers=1),
        target_pixels=14,
        mask_mode="top_k",
    ),
    encoder=CONFIG.vision,
    optimizer=OptimizerConfig(learning_rate=1e-3, total_steps=6),
    batch_size=8,
    loader=LoaderConfig(1, (56, 84), fields=("image", "mask"), flip=True, read_threads=1),
    dtype="float32",
    fsdp=2,
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
    return train_pictures(TrainPicturesConfig(shards, checkpoint, out, run, quiet=True))


@pytest.fixture(scope="module")
def whole(shards, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(shards, checkpoint, out), out


def losses(result):
    return [record["loss"] for record in result.history if "loss" in record]


def test_it_trains_and_exports(whole):
    result, out = whole
    assert len(losses(result)) == 6
    assert np.isfinite(losses(result)).all()
    exported, described = read_bundle_orbax(out / "export")
    assert described["kind"] == "pruner"
    trained = traverse_util.flatten_dict(jax.device_get(result.state.params["pruner"]))
    for path, value in traverse_util.flatten_dict(jax.device_get(exported["pruner"])).items():
        np.testing.assert_array_equal(value, trained[path])
    kernel = result.state.params["decoder"]["head"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == kernel.shape[0] // 2  # fsdp


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 1, "tensor": 2}, {"data": 1, "fsdp": 1}])
def test_a_stopped_run_goes_on_with_other_devices(whole, shards, checkpoint, tmp_path, mesh):
    result, _ = whole
    with pytest.raises(KeyboardInterrupt):
        stop_after(5, shards, checkpoint, tmp_path / "run", RUN)
    resumed = train(shards, checkpoint, tmp_path / "run", **mesh)
    np.testing.assert_allclose(losses(resumed), losses(result), atol=1e-5)


def stop_after(step, shards, checkpoint, out, run):
    """A run that dies after some steps, as by Ctrl-C in the middle of one."""
    from experiments import train_pictures as module

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

    module.make_loader = lambda *args: Dying(iter(loader(*args)))
    try:
        train_pictures(TrainPicturesConfig(shards, checkpoint, out, run, quiet=True))
    finally:
        module.make_loader = loader


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 6}, "multiple of 8 parts"),
        ({"fsdp": 16}, "mesh of"),
        ({"encoder": replace(CONFIG.vision, depth=1)}, "other sizes than run.encoder"),
    ],
)
def test_what_does_not_fit_is_refused(shards, checkpoint, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train(shards, checkpoint, tmp_path / "run", **changes)


def test_runs_that_contradict_themselves_are_refused():
    with pytest.raises(UserError, match="accumulate=3"):
        replace(FASTDRIVEVLA_3B, accumulate=3)
    with pytest.raises(UserError, match="hidden_size=2048"):
        replace(FASTDRIVEVLA_3B, encoder=FASTDRIVEVLA_7B.encoder)
    with pytest.raises(UserError, match="mask_surprise"):
        replace(
            FASTDRIVEVLA_3B,
            recon=replace(RUN.recon, mask_weight=1.0, mask_surprise=0.2),
            encoder=RUN.encoder,
        )
