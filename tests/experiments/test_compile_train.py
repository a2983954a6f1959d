import pytest

from experiments.compile_train import ENCODERS, CompileTrainArgs
from experiments.configs.pruner import FASTDRIVEVLA_3B
from experiments.training_cost import step_flops
from fastdrive_jax.errors import UserError


def test_the_published_run():
    """Ten epochs of 240,942 pictures; the count of FLOPs is that of the README."""
    assert FASTDRIVEVLA_3B.optimizer.total_steps == 10 * 240_942 // 64
    assert FASTDRIVEVLA_3B.optimizer.learning_rate == 2e-5
    flops = step_flops(FASTDRIVEVLA_3B.recon, (1596, 1596), ENCODERS["fastdrivevla_3b"])
    assert flops == pytest.approx(43.3e12, rel=0.01)


@pytest.mark.parametrize(
    "change",
    [{"devices": 0}, {"devices": 6, "fsdp": 4}, {"per_device": 0}, {"peak_flops": 0.0}],
)
def test_what_is_asked_wrongly_is_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        CompileTrainArgs(**change)
