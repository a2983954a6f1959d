import numpy as np
import pytest

from data_pipelines.feature_loader import FeatureLoaderConfig, make_feature_loader
from data_pipelines.features import SplitFeatures
from fastdrive_jax.errors import UserError


def split(count=7):
    rng = np.random.default_rng(0)
    return SplitFeatures(
        tokens=rng.standard_normal((count, 4, 3)).astype(np.float16),
        images=rng.integers(0, 256, (count, 56, 56, 3), np.uint8),
        masks=rng.integers(0, 2, (count, 56, 56), np.uint8),
        labels=rng.integers(0, 12, (count, 56, 56), np.uint8),
        camera=np.arange(count, dtype=np.int32) % 2,
        scene=np.arange(count, dtype=np.int32),
    )


def same(first, second):
    assert first.keys() == second.keys()
    return all(np.array_equal(first[key], second[key]) for key in first)


def which(features, batch):
    """Record number of each picture of a batch, found by its pixels."""
    return [
        next(i for i, image in enumerate(features.images) if np.array_equal(image, found))
        for found in batch["image"]
    ]


def test_a_batch_holds_the_records_it_names():
    features = split()
    batch = next(iter(make_feature_loader(features, FeatureLoaderConfig(batch_size=3))))
    records = which(features, batch)
    assert batch["tokens"].dtype == np.float32
    assert np.array_equal(batch["tokens"], features.tokens[records].astype(np.float32))
    assert np.array_equal(batch["mask"], features.masks[records])
    assert np.array_equal(batch["camera"], features.camera[records])


def test_an_epoch_gives_every_picture_once_in_an_order_of_its_seed():
    features = split()
    orders = []
    for seed in (0, 0, 1):
        config = FeatureLoaderConfig(2, seed=seed, num_epochs=1, drop_remainder=False)
        orders.append(
            [i for b in make_feature_loader(features, config) for i in which(features, b)]
        )
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    plain = FeatureLoaderConfig(3, shuffle=False, num_epochs=1)
    batches = list(make_feature_loader(features, plain))
    assert [which(features, batch) for batch in batches] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("after", [0, 1, 5])  # 5 is in the second epoch
def test_a_restored_position_gives_the_batches_that_would_have_followed(after):
    loader = make_feature_loader(split(), FeatureLoaderConfig(batch_size=2, seed=4))
    first = iter(loader)
    for _ in range(after):
        next(first)
    position = first.get_state()
    expected = [next(first) for _ in range(4)]
    assert not same(expected[0], expected[1])
    second = iter(loader)
    next(second)
    second.set_state(position)
    assert all(same(batch, next(second)) for batch in expected)


def test_fewer_pictures_than_a_batch_and_odd_numbers_are_refused():
    with pytest.raises(UserError, match=r"7 pictures.*batch of 8"):
        make_feature_loader(split(), FeatureLoaderConfig(batch_size=8))
    with pytest.raises(UserError, match="batch_size=0"):
        FeatureLoaderConfig(batch_size=0)
    with pytest.raises(UserError, match="num_epochs=0"):
        FeatureLoaderConfig(num_epochs=0)
