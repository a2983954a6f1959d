"""Bytes that devices send each other, by hand."""

import pytest

from experiments.collectives import collective_bytes, result_bytes, trip_counts

PROGRAM = """
%body.1 (x: f32[4]) -> f32[4] {
  %gather = bf16[8,16]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %sum = (f32[10]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}
  %w = f32[4] while(%x), body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %m = f32[7]{0} all-gather(%d), replica_groups=mesh['a'=2,'c'=8], device_ids=([16]) {'a','c'}
  %one = bf16[100]{0} collective-permute(%c), source_target_pairs={{0,1}}
}
"""
# As the compilers of GPUs and TPUs write them.
ASYNC = """
%all-reduce-scatter.3 (input: bf16[40,8]) -> bf16[10,8] {
  %all-reduce.1 = bf16[40,8]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}
}
%async_collective_fusion.1 (x: f32[6]) -> f32[24] {
  %piece.1 = f32[24]{0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}
}
%async_collective_fusion.2 (x: f32[6]) -> f32[24] {
  %piece.2 = f32[24]{0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}
}
ENTRY %main.1 (x: f32[4]) -> f32[4] {
  %g-start.2 = ((bf16[2,5]{1,0}, f32[3]{0}), (bf16[8,5]{1,0}, f32[12]{0})) all-gather-start(%x, %y), replica_groups=[2,4]<=[8]
  %g-done = (bf16[8,5]{1,0}, f32[12]{0}) all-gather-done(%g-start.2)
  %r-start = (f32[16]{0}, f32[4]{0}) reduce-scatter-start(%z), replica_groups={{0,1,2,3}}
  %r-done = f32[4]{0} reduce-scatter-done(%r-start)
}
"""  # noqa: E501


def test_bytes_of_collectives():
    """Rings: n - 1 of n parts are sent in a gather, twice that in a sum; loops count each round."""
    moved = collective_bytes(PROGRAM)
    assert trip_counts(PROGRAM) == {"body.1": 5}
    assert moved["all-gather"] == 5 * 8 * 16 * 2 * 3 / 4 + 7 * 4 * 15 / 16
    assert moved["all-reduce"] == (10 + 6) * 4 * 2 * 1 / 2
    assert moved["collective-permute"] == 200
    assert moved["reduce-scatter"] == 0


def test_what_starts_and_ends_is_counted_once():
    """As is a channel in several pieces, and a sum of which a share is kept is half of one."""
    moved = collective_bytes(ASYNC)
    assert moved["all-gather"] == (8 * 5 * 2 + 12 * 4 + 24 * 4) * 3 / 4
    assert moved["reduce-scatter"] == 4 * 4 * 3 + 40 * 8 * 2 * 3 / 4
    assert moved["all-reduce"] == 0


def test_groups_that_cannot_be_read_are_not_guessed():
    with pytest.raises(ValueError, match=r"cannot be read: .*replica_groups=anything"):
        collective_bytes("  %x = f32[7]{0} all-gather(%d), replica_groups=anything")


def test_sizes_that_are_not_known_are_not_guessed():
    assert result_bytes("(f8e4m3fn[2,3]{1,0}, pred[], s64[5]{0:S(1)})") == 6 + 1 + 40
    with pytest.raises(ValueError, match="'c64' is not known"):
        result_bytes("c64[3]{0}")
