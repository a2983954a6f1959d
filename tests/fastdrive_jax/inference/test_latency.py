import math

import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import (
    QUANTILE,
    RATE,
    BucketTime,
    check_target,
    choose_bucket,
    measure_buckets,
    miss_sentence,
    next_load,
)

BUCKETS = (
    BucketTime(1.0, 112, 100.0),
    BucketTime(0.5, 56, 60.0),
    BucketTime(0.25, 28, 40.0),
)


@pytest.mark.parametrize(
    ("target", "load", "tokens", "meets"),
    [
        (100.0, 1.0, 112, True),
        (99.9, 1.0, 56, True),
        (60.0, 1.0, 56, True),
        (60.0, 1.01, 28, True),  # 60.6 and 40.4 ms
        (100.0, 2.0, 28, True),  # 200, 120, 80
        (79.9, 2.0, 28, False),
        (100.0, 0.5, 112, True),
        (50.0, 0.5, 112, True),
        (-3.0, 1.0, 28, False),  # the time is gone already
    ],
)
def test_the_largest_bucket_that_meets_the_target(target, load, tokens, meets):
    for order in (BUCKETS, BUCKETS[::-1]):
        choice = choose_bucket(order, target, load)
        assert (choice.bucket.tokens, choice.meets) == (tokens, meets)
        assert choice.expected_ms == pytest.approx(choice.bucket.median_ms * load)


def test_a_small_bucket_that_was_measured_slow_does_not_hide_a_larger_one():
    noisy = (BucketTime(0.5, 56, 11.0), BucketTime(0.25, 28, 15.0))
    assert choose_bucket(noisy, 12.0, 1.0).bucket.tokens == 56
    missed = choose_bucket(noisy, 9.0, 1.0)
    assert (missed.bucket.tokens, missed.meets) == (28, False)


def test_there_must_be_a_bucket():
    with pytest.raises(ValueError, match="bucket"):
        choose_bucket((), 10.0, 1.0)


def test_the_load_rises_on_a_slow_frame_and_falls_on_others():
    bucket = BUCKETS[1]
    slow, slower = next_load(1.0, bucket, 60.1), next_load(1.0, bucket, 60_000.0)
    assert slow == slower == pytest.approx(math.exp(0.12 * 0.9))  # 1.114
    assert next_load(1.0, bucket, 60.0) == pytest.approx(math.exp(-0.12 * 0.1))  # 0.988
    assert next_load(2.0, bucket, 119.0) == pytest.approx(2 * math.exp(-0.012))


def test_a_machine_twice_as_slow_is_followed_in_7_frames_and_trusted_again_after_58():
    load, frames = 1.0, 0
    while load < 2:
        load, frames = next_load(load, BUCKETS[0], 200.0), frames + 1
    assert frames == 7
    frames = 0
    load = 2.0
    while load > 1:
        load, frames = next_load(load, BUCKETS[0], 90.0), frames + 1
    assert frames == 58


def test_the_load_rests_where_nine_of_ten_frames_are_in_time():
    bucket, load = BUCKETS[0], 1.0
    slow = 0
    for number in range(6000):
        observed = 3 * (number * 61 % 100)  # 0, 3 ... 297 ms, evenly and in no order
        if number >= 1000:
            slow += observed > bucket.median_ms * load
        load = next_load(load, bucket, observed)
    assert slow / 5000 == pytest.approx(1 - QUANTILE, abs=0.01)
    # A tenth of the frames take more than 267 ms.
    assert load * bucket.median_ms == pytest.approx(267, rel=3 * RATE * QUANTILE)


def test_buckets_are_timed_in_turn_behind_a_clock():
    now, order = [0.0], []

    def run(ratio, seconds):
        def once():
            order.append(ratio)
            now[0] += seconds[len(order) // 2 if len(order) % 2 else len(order) // 2 - 1]

        return once

    # Two rounds of warming up that do not count, then three.
    runs = {0.5: run(0.5, [9, 9, 0.01, 0.02, 0.06]), 1.0: run(1.0, [9, 9, 0.03, 0.03, 0.03])}
    found = measure_buckets(runs, {0.5: 56, 1.0: 112}, rounds=3, clock=lambda: now[0])
    assert order == [0.5, 1.0] * 5
    assert [one.tokens for one in found.buckets] == [112, 56]
    assert [one.median_ms for one in found.buckets] == pytest.approx([30, 20])
    # Over their medians: 1/2, 1, 3 and 1, 1, 1, of which the 0.9 quantile is midway from 1 to 3.
    assert found.load == pytest.approx(2)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_is_a_positive_number(target):
    with pytest.raises(UserError, match="target_ms="):
        check_target(target)


def test_a_target_that_cannot_be_met_is_said_in_full():
    text = miss_sentence(choose_bucket(BUCKETS, 30.0, 1.5), 42.0, 12.0)
    assert "42 ms" in text
    assert "0.25 (28 tokens)" in text
    assert "60.0 ms" in text
    assert "12.0 ms were gone" in text
