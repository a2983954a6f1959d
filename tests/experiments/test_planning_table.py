"""The planning table on a model that plans what its tokens say, so that errors are known."""

import dataclasses

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.build import build_shards
from data_pipelines.features import TokenEncoder, cache_features
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments import planning
from experiments.planning import PlanningSplit, plan_split, planning_split, planning_table
from fastdrive_jax.errors import UserError

S, N, T = 5, 8, 6
METHODS = ("reconpruner", "random", "prior")
MODEL = None  # its compiled call is replaced in these tests


@pytest.fixture
def data() -> PlanningSplit:
    rng = np.random.default_rng(0)
    future = np.cumsum(rng.uniform(0, 2, (S, T, 2)), axis=1).astype(np.float32)
    # Channels of every token: its sample, its place.
    tokens = np.stack(np.meshgrid(np.arange(S), np.arange(N), indexing="ij"), axis=-1)
    return PlanningSplit(
        tokens=tokens.astype(np.float32),
        images=np.zeros((S, 1, 56, 112, 3), np.uint8),
        labels=np.zeros((S, 1, 56, 112), np.uint8),
        speed=np.arange(S, dtype=np.float32),
        ego_state=np.zeros((S, 3), np.float32),
        command=np.ones(S, np.int32),
        future=future,
        future_valid=np.ones((S, T), bool),
        history=np.zeros((S, T, 2), np.float32),
        history_valid=np.zeros((S, T), bool),
        scene=np.array([0, 0, 1, 1, 2], np.int32),
    )


@pytest.fixture
def calls(monkeypatch, data) -> list[np.ndarray]:
    """The kept indices of every call; each plan is K + (place of the first token) metres off."""
    seen = []

    def fake(model, params, tokens, kept, speed, command):
        kept = np.asarray(kept)
        seen.append(kept)
        sample = tokens[:, 0, 0].astype(int)
        assert (sample == np.asarray(speed)).all(), "rows of different samples were mixed"
        first = kept[:, 0] if kept.shape[1] else np.full(len(kept), 20)
        off = np.zeros((len(kept), T, 2), np.float32)
        off[..., 1] = (kept.shape[1] + first)[:, None]
        return jnp.asarray(data.future[sample] + off)

    monkeypatch.setattr(planning, "_plan", fake)
    return seen


def scores(first: int) -> np.ndarray:
    """All samples rank token `first` best, then those after it."""
    return np.tile(-(((np.arange(N) - first) % N).astype(np.float32)), (S, 1))


def value(rows, method, ratio, metric="ade") -> float:
    found = [r for r in rows if (r.method, r.keep_ratio, r.metric) == (method, ratio, metric)]
    assert len(found) == 1, (method, ratio, metric)
    return found[0].value


def test_rows_of_all_settings_with_the_errors_of_their_plans(calls, data):
    given = {
        "reconpruner": [scores(0)],
        "random": [scores(2), scores(4)],
        "prior": [scores(1)],
    }
    rows, plans = planning_table(MODEL, {}, data, given, (0.5, 0.25), quiet=True)
    assert value(rows, "unpruned", 1.0) == pytest.approx(N, abs=1e-4)
    assert value(rows, "no_image", None) == pytest.approx(20, abs=1e-4)
    for ratio, k in ((0.5, 4), (0.25, 2)):
        assert value(rows, "reconpruner", ratio) == pytest.approx(k, abs=1e-4)
        assert value(rows, "prior", ratio) == pytest.approx(k + 1, abs=1e-4)
        assert value(rows, "random", ratio) == pytest.approx(k + 3, abs=1e-4)  # mean of two draws
        assert value(rows, "random", ratio, "fde") == pytest.approx(k + 3, abs=1e-4)
    assert set(plans) == {("unpruned", 1.0), ("no_image", None)} | {
        (name, ratio) for name in METHODS for ratio in (0.5, 0.25)
    }
    assert all(plan.shape == (S, T, 2) for plan in plans.values())


def test_paired_differences_compare_ours_with_each_other_method(calls, data):
    given = {"reconpruner": [scores(0)], "random": [scores(3)], "prior": [scores(1)]}
    rows, _ = planning_table(MODEL, {}, data, given, (0.5,), quiet=True)
    pairs = {r.method: r for r in rows if r.metric == "ade_difference"}
    assert set(pairs) == {"reconpruner - random", "reconpruner - prior"}
    for name, gap in (("random", -3), ("prior", -1)):
        row = pairs[f"reconpruner - {name}"]
        # the same gap in every scene
        assert [row.value, row.low, row.high] == pytest.approx([gap] * 3, abs=1e-4)


def test_samples_without_a_whole_future_do_not_count(calls, data):
    valid = data.future_valid.copy()
    valid[1, -1] = False
    data = dataclasses.replace(data, future_valid=valid)
    rows, _ = planning_table(MODEL, {}, data, {"reconpruner": [scores(0)]}, (0.5,), quiet=True)
    assert {row.n for row in rows if row.metric == "ade"} == {S - 1}


def test_batches_have_one_shape_and_the_last_is_cut(calls, data):
    kept = np.tile(np.arange(3), (S, 1))
    plans = plan_split(MODEL, {}, data, kept, batch_size=2)
    assert plans.shape == (S, T, 2)
    assert [call.shape for call in calls] == [(2, 3)] * 3
    off = np.broadcast_to([0.0, 3.0], (S, T, 2))
    np.testing.assert_allclose(plans - data.future, off, atol=1e-5)


def test_front_pictures_meet_the_plans_of_their_samples(tmp_path):
    world = WorldConfig(
        train_scenes=1,
        val_scenes=2,
        keyframes_per_scene=3,
        cameras=("CAM_FRONT", "CAM_BACK"),
        height=56,
        width=112,
        workers=1,
    )
    source = read_nuscenes(generate(tmp_path / "world", world, progress=False))
    shards = build_shards(source, tmp_path / "shards", progress=False)

    def encode(images):
        return images.reshape(len(images), 2, 28, 4, 28, 3).mean((2, 4)).reshape(-1, 8, 3) / 255

    features = cache_features(
        shards, TokenEncoder("mean colour", 3, encode), tmp_path / "features", progress=False
    )
    val = features.splits["val"]
    data = planning_split(shards, "val", val, (56, 112))
    records = [source.load(ref) for ref in source.samples["val"]]
    fronts = [record for sample in records for record in sample if record.camera == "CAM_FRONT"]
    assert len(fronts) == 6
    np.testing.assert_allclose(data.future, [r.future for r in fronts], atol=1e-6)
    np.testing.assert_array_equal(data.future_valid, [r.future_valid for r in fronts])
    np.testing.assert_allclose(data.speed, [r.ego_state[0] for r in fronts], atol=1e-6)
    np.testing.assert_array_equal(data.command, [r.command for r in fronts])
    for row, record in enumerate(fronts):
        picture = cv2.imdecode(np.frombuffer(record.image, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_array_equal(data.images[row, 0], picture)
    front = encode(data.images[:, 0])
    np.testing.assert_allclose(data.tokens, front, atol=1e-3)  # kept as float16
    assert len(set(data.scene)) == 2

    both = planning_split(shards, "val", val, (56, 112), ("CAM_FRONT", "CAM_BACK"))
    np.testing.assert_array_equal(both.images[:, 0], data.images[:, 0])
    np.testing.assert_array_equal(both.tokens[:, :8], data.tokens)
    np.testing.assert_allclose(both.tokens[:, 8:], encode(both.images[:, 1]), atol=1e-3)
    with pytest.raises(UserError, match=r"no pictures of CAM_FRONT_LEFT"):
        planning_split(shards, "val", val, (56, 112), ("CAM_FRONT", "CAM_FRONT_LEFT"))
