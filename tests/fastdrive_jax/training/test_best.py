import math

import numpy as np
import pytest
from test_checkpoints import HERE, data, init
from tiny_run import run

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.state import abstract_state


def filled(folder, values, mode="min", keep=2, **more):
    """A checkpoint for each value of the metric; None was not measured. Returns those that stay."""
    with RunCheckpoints(folder, {}, keep=keep, best=Best("l2", mode)) as checkpoints:
        for step, value in enumerate(values, start=1):
            metrics = None if value is None else {"l2": value, **more}
            checkpoints.save(step, dict(init(8), step=np.int32(step)), data(), metrics)
        checkpoints.wait()
        best = checkpoints.best_step()
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir()), best


@pytest.mark.parametrize(
    ("values", "mode", "stay", "best"),
    [
        ([3.0, 1.0, 2.0, 4.0, 5.0], "min", [2, 4, 5], 2),
        ([3.0, 9.0, 2.0, 4.0, 5.0], "max", [2, 4, 5], 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0], "min", [4, 5], 5),
        ([None, 1.0, None, None, None], "min", [2, 4, 5], 2),
        ([None, None, None], "min", [2, 3], None),
        ([math.nan, 2.0, math.inf, 3.0, 4.0], "min", [2, 4, 5], 2),
        ([2.0, math.inf, 1.0, 0.0], "max", [1, 3, 4], 1),
        ([1.0, 1.0, 2.0, 2.0, 2.0], "min", [2, 4, 5], 2),
    ],
)
def test_the_newest_stay_and_the_best(tmp_path, values, mode, stay, best):
    assert filled(tmp_path, values, mode) == (stay, best)


def test_the_best_is_known_after_a_restart_and_can_be_restored(tmp_path):
    filled(tmp_path, [3.0, 1.0, 2.0, 4.0], size=7.0)
    with RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints:
        assert checkpoints.best_step() == 2
        assert checkpoints.improves({"l2": 0.9})
        assert not checkpoints.improves({"l2": 1.0})
        assert checkpoints.latest_step() == 4
        state = checkpoints.restore(abstract_state(lambda: init(8), HERE), data(), step=2)
        assert int(state["step"]) == 2
        for step in (5, 6, 7):
            checkpoints.save(step, state, data(), {"l2": 0.5 if step == 6 else 8.0})
        checkpoints.wait()
        assert checkpoints.best_step() == 6
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


@pytest.mark.parametrize(("later", "best"), [(0.5, 3), (2.0, 2)])
def test_a_step_that_a_signal_saved_unmeasured_may_be_the_best_once_it_is(tmp_path, later, best):
    filled(tmp_path, [3.0, 1.0, None])
    with RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints:
        checkpoints.save(3, dict(init(8), step=np.int32(3)), data(), {"l2": later})
        checkpoints.wait()
        assert checkpoints.best_step() == best
        assert checkpoints.latest_step() == 3
        state = checkpoints.restore(abstract_state(lambda: init(8), HERE), data(), step=3)
        assert int(state["step"]) == 3
    with RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints:
        assert checkpoints.best_step() == best


def test_a_step_that_is_saved_anew_is_never_lost(tmp_path, monkeypatch):
    """The first checkpoint of a run, killed before the new one is whole, and then with the disk
    full.
    """
    state = dict(init(8), step=np.int32(1))
    with RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints:
        checkpoints.save(1, state, data())
    checkpoints = RunCheckpoints(tmp_path, {}, best=Best("l2"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "save", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.save(1, state, data(), {"l2": 1.0})
    assert not (tmp_path / "checkpoints" / "1").exists()
    for best in (None, 1):
        with RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints:
            assert (checkpoints.latest_step(), checkpoints.best_step()) == (1, best and None)
            found = checkpoints.restore(abstract_state(lambda: init(8), HERE), data())
            assert int(found["step"]) == 1
            if best:
                checkpoints.save(1, found, data(), {"l2": 1.0})
                checkpoints.wait()
                assert checkpoints.best_step() == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.json"]


def test_metrics_are_part_of_what_is_checked(tmp_path):
    filled(tmp_path, [1.0, 2.0])
    path = tmp_path / "checkpoints/1/metrics/metrics"
    assert '"l2": 1.0' in path.read_text()
    path.write_text(path.read_text().replace("1.0", "9.0"))
    with (
        RunCheckpoints(tmp_path, {}, best=Best("l2")) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/1 is damaged: metrics/metrics has changed"),
    ):
        checkpoints.restore(abstract_state(lambda: init(8), HERE), data(), step=1)


def test_metrics_that_can_not_be_read_are_named_on_opening(tmp_path):
    filled(tmp_path, [1.0, 2.0])
    (tmp_path / "checkpoints/1/metrics/metrics").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints can't be read"):
        RunCheckpoints(tmp_path, {}, best=Best("l2"))


def test_an_absent_metric_and_a_wrong_mode_are_named(tmp_path):
    with pytest.raises(UserError, match=r"known by 'l2', but the evaluation gives area, recall"):
        Best("l2").value({"recall": 1.0, "area": 2.0})
    with pytest.raises(UserError, match="must be min or max, not least"):
        Best("l2", "least")
    with RunCheckpoints(tmp_path, {}) as checkpoints, pytest.raises(ValueError, match="name the"):
        checkpoints.best_step()


def falling_then_rising(state):
    return {"l2": abs(float(state.step) - 4)}


def test_a_run_saves_what_is_better_than_before_and_goes_on_from_the_newest(tmp_path):
    def go(steps):
        return run(
            tmp_path, steps, checkpoint_every=100, keep=1, evaluate=falling_then_rising,
            evaluate_every=2, best=Best("l2"),
        )  # fmt: skip

    assert int(go(6).state.step) == 6
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["4", "6"]
    assert int(go(9).state.step) == 9
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["4", "9"]
    with pytest.raises(UserError, match="known by 'recall', but the evaluation gives l2"):
        run(tmp_path / "b", 2, evaluate=falling_then_rising, best=Best("recall"))
