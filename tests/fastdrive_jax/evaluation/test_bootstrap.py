import numpy as np
import pytest

from fastdrive_jax.evaluation.bootstrap import (
    Interval,
    holm,
    interval,
    mean_intervals,
    paired_difference,
    reach,
)


def test_interval_of_independent_normals_matches_the_closed_form():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    found = interval(values, resamples=8000)
    half = 1.96 * values.std() / np.sqrt(values.size)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert (found.n, found.clusters) == (4000, 4000)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(400):
        scene = rng.normal(0, 1, 40)  # 40 scenes of 3 frames, correlated within a scene
        values = (scene[:, None] + rng.normal(0, 0.5, (40, 3))).reshape(-1)
        found = interval(values, np.repeat(np.arange(40), 3), resamples=500, seed=trial)
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 400 <= 0.98  # 0.95 less the known shortfall, +- 3 standard errors


def test_identical_frames_of_a_scene_widen_the_interval():
    scenes = np.random.default_rng(3).normal(size=50)
    frames = np.repeat(scenes, 9)  # nine equal frames tell no more than one
    clusters = np.repeat(np.arange(50), 9)
    once = interval(scenes)
    honest = interval(frames, clusters)
    naive = interval(frames)
    assert honest.low == pytest.approx(once.low)
    assert honest.high == pytest.approx(once.high)
    ratio = (honest.high - honest.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(3.0, rel=0.1)  # sqrt(9)


def test_two_clusters_by_hand():
    # draws: both A (1/4) gives 0, A and B (1/2) gives 0.75 = 3 / 4, both B (1/4) gives 1
    found = interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"], level=0.4)
    assert found.value == 0.75
    assert found.clusters == 2
    assert (found.low, found.high) == (0.75, 0.75)
    wide = interval([0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"])
    assert (wide.low, wide.high) == (0.0, 1.0)


def test_ratio_pools_numerators_and_denominators():
    found = interval([1.0, 0.0, 3.0], weights=[2.0, 0.0, 3.0])
    assert found.value == pytest.approx(4 / 5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(1.0)


def test_one_cluster_has_no_interval():
    found = interval([1.0, 2.0], [7, 7])
    assert (found.value, found.low, found.high) == (1.5, None, None)


def test_cluster_names_and_order_do_not_matter():
    values = np.arange(12.0)
    groups = np.repeat(np.arange(4), 3)
    named = interval(values, np.array(list("dcba"))[groups[::-1]])
    plain = interval(values, groups)
    assert named == plain


def test_seed_decides_the_draws():
    values = np.random.default_rng(0).normal(size=30)
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1).low != interval(values, seed=2).low


def test_blocks_of_draws_cover_many_clusters():
    values = np.random.default_rng(0).normal(size=20000)
    found = interval(values, resamples=300)  # more than one block
    assert found.low < found.value < found.high


def test_paired_difference_of_equal_arrays_is_nothing():
    values = np.random.default_rng(0).normal(size=60)
    found = paired_difference(values, values, np.repeat(np.arange(6), 10))
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_pairs_see_what_single_intervals_cannot():
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 5, 80)
    a, b = hard + rng.normal(0.0, 0.1, 80), hard + rng.normal(0.2, 0.1, 80)
    alone_a, alone_b = interval(a), interval(b)
    assert alone_a.high > alone_b.low
    found = paired_difference(a, b)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.high < 0
    assert found.p == pytest.approx(1 / 4001)


def test_few_clusters_are_tested_exactly():
    # sums 1, 2, 3: of the 8 sign patterns only +++ and --- reach |6|
    found = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert found.p == pytest.approx(2 / 8)


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(6)
    p = [
        paired_difference(rng.normal(size=25), np.zeros(25), resamples=400, seed=i).p
        for i in range(300)
    ]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize(
    ("values", "clusters", "weights"),
    [([], None, None), ([np.nan], None, None), ([1.0], [1, 2], None), ([1.0], None, [0.0])],
)
def test_meaningless_input_is_refused(values, clusters, weights):
    with pytest.raises(ValueError, match=r"values|shapes|weights"):
        interval(values, clusters, weights)


def test_unpaired_shapes_are_refused():
    with pytest.raises(ValueError, match="paired"):
        paired_difference([1.0], [1.0, 2.0])


def test_many_means_are_as_each_alone():
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(40), 5)
    values = {"a": rng.normal(3, 1, 200), "b": rng.exponential(1, 200)}
    values["b"][rng.random(200) < 0.3] = np.nan
    values["none"] = np.full(200, np.nan)
    found = mean_intervals(values, scenes)
    assert set(found) == {"a", "b"}
    for name in found:
        there = np.isfinite(values[name])
        alone = interval(values[name][there], scenes[there])
        assert found[name].value == pytest.approx(alone.value)
        assert (found[name].n, found[name].clusters) == (alone.n, alone.clusters)
        width = alone.high - alone.low  # other draws, the same distribution
        assert found[name].low == pytest.approx(alone.low, abs=0.06 * width)
        assert found[name].high == pytest.approx(alone.high, abs=0.06 * width)


def test_a_mean_within_one_scene_has_no_interval():
    found = mean_intervals({"a": np.array([1.0, 3, np.nan])}, np.array([0, 0, 1]))
    assert found["a"] == Interval(2.0, None, None, 2, 1)
    with pytest.raises(ValueError, match="infinite"):
        mean_intervals({"a": np.array([np.inf])}, np.array([0]))


def test_a_table_says_how_many_scenes_its_intervals_are_of():
    assert reach(10) == reach(334).replace("334", "10")
    assert "9 scenes" in reach(9)
    assert "too narrow" in reach(9)
    assert "no interval" in reach(1)


def test_holms_correction_by_hand():
    # 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 which is not below it, 0.9 x 1
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
