import errno
import json
import os

import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, point, read_rows, select, write_rows
from fastdrive_jax.files import write_bytes

ROWS = (
    Row("reconpruner", 0.5, "l2_temavg", 0.1 + 0.2, 0.29, 0.31, 40, 0, "m"),
    Row("no image", None, "l2_temavg", np.float32(1.5), None, None, np.int64(40), None, "m"),
)


def test_rows_come_back_equal(tmp_path):
    path = write_rows(tmp_path / "deep" / "rows.json", ROWS, {"seed": 3, "jax": "0.10"})
    rows, meta = read_rows(path)
    assert rows == ROWS
    assert meta == {"seed": 3, "jax": "0.10"}
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="not a number"):
        Row("random", 0.5, "l2", value, None, None, 1, 0)


def test_half_an_interval_is_refused():
    with pytest.raises(ValueError, match="one end"):
        Row("random", 0.5, "l2", 1.0, 0.5, None, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "rows": [', "not JSON"),
        ('{"format": 9, "rows": [], "meta": {}}', "format 9"),
        ("[]", "format None"),
        ('{"format": 1, "meta": {}, "rows": [{"method": "a"}]}', "malformed"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(path)
    assert "rows.json" in str(caught.value)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read results"):
        read_rows(tmp_path / "none.json")


def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = write_bytes(tmp_path / "a.bin", b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_bytes(path, b"new content")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_figure_without_an_interval():
    assert point("a", 0.5, "m", 2) == Row("a", 0.5, "m", 2.0, None, None, 1, None)
    told = point("a", None, "m", 2, n=3, seed=4, unit="ms")
    assert told == Row("a", None, "m", 2.0, None, None, 3, 4, "ms")


def test_select_matches_all_fields():
    assert select(ROWS, method="reconpruner", keep_ratio=0.5) == ROWS[:1]
    assert select(ROWS, method="reconpruner", keep_ratio=None) == ()


def test_json_is_plain(tmp_path):
    content = json.loads(write_rows(tmp_path / "r.json", ROWS, {}).read_text())
    assert content["rows"][1]["value"] == 1.5
    assert content["rows"][1]["low"] is None
