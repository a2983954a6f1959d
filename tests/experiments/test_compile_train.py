import pytest

from experiments.compile_train import ENCODERS, CompileTrainArgs, collective_bytes, trip_counts
from experiments.configs.pruner import FASTDRIVEVLA_3B
from experiments.training_cost import step_flops
from fastdrive_jax.errors import UserError

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


def test_bytes_of_collectives():
    """Rings: n - 1 of n parts are sent in a gather, twice that in a sum; loops count each round."""
    moved = collective_bytes(PROGRAM)
    assert trip_counts(PROGRAM) == {"body.1": 5}
    assert moved["all-gather"] == 5 * 8 * 16 * 2 * 3 / 4 + 7 * 4 * 15 / 16
    assert moved["all-reduce"] == (10 + 6) * 4 * 2 * 1 / 2
    assert moved["collective-permute"] == 200
    assert moved["reduce-scatter"] == 0


def test_groups_that_cannot_be_read_are_not_guessed():
    with pytest.raises(ValueError, match=r"cannot be read: .*replica_groups=anything"):
        collective_bytes("  %x = f32[7]{0} all-gather(%d), replica_groups=anything")


def test_the_published_run():
    """Ten epochs of 240,942 pictures; the count of FLOPs is that of the README."""
    assert FASTDRIVEVLA_3B.optimizer.total_steps == 10 * 240_942 // 64
    assert FASTDRIVEVLA_3B.optimizer.learning_rate == 2e-5
    flops = step_flops(FASTDRIVEVLA_3B.recon, (1596, 1596), ENCODERS["fastdrivevla_3b"])
    assert flops == pytest.approx(43.3e12, rel=0.01)


@pytest.mark.parametrize("change", [{"devices": 0}, {"devices": 6, "fsdp": 4}, {"per_device": 0}])
def test_what_is_asked_wrongly_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        CompileTrainArgs(**change)
