import json

import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.metrics_log import MetricsLog, read_log


def write(path, steps, resume=None):
    with MetricsLog(path, resume) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1 / step}, {"step_s": 0.1})
        return log.history


def test_records_are_on_the_disk_after_each_write(tmp_path):
    path = tmp_path / "a/metrics.jsonl"
    with MetricsLog(path, None) as log:
        log.write(1, "train", {"loss": 1 / 3}, {"step_s": 0.25})
        assert read_log(path) == [
            {"step": 1, "kind": "train", "loss": 1 / 3, "time": {"step_s": 0.25}}
        ]


def test_resume_keeps_up_to_the_step_and_continues(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    history = write(path, [3, 4, 5], resume=2)
    assert [record["step"] for record in history] == [1, 2, 3, 4, 5]
    assert history == read_log(path)


def test_a_run_from_the_beginning_empties_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [1], resume=None)
    assert [record["step"] for record in read_log(path)] == [1]


def test_a_line_cut_off_by_a_kill_is_dropped_and_other_damage_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(read_log(path)) == 2
    assert [record["step"] for record in write(path, [3], resume=2)] == [1, 2, 3]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "no json", lines[2]]) + "\n")
    with pytest.raises(UserError, match="line 2"):
        read_log(path)


def test_values_that_json_lacks_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, None) as log:
        log.write(1, "eval", {"recall": float("nan"), "area": float("inf")}, {})
    assert json.loads(path.read_text()) == {
        "step": 1, "kind": "eval", "recall": None, "area": None, "time": {},
    }  # fmt: skip


def test_absent_log_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        read_log(tmp_path / "none.jsonl")
