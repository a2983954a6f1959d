import sys

import pytest
from tiny_run import run

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.metrics_log import read_log
from fastdrive_jax.training.tensorboard import PATTERN, EventLog, read_events
from fastdrive_jax.training.watch import WatchConfig

RECORD = {"step": 1, "kind": "train", "loss": 0.5, "gone": None, "time": {"step_s": 0.25}}


def scalars(folder):
    """(step, tag) -> value of all files; a pair that comes twice fails the test."""
    found = {}
    for path in sorted(folder.glob(PATTERN)):
        for event, _ in read_events(path):
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def write(folder, steps, resume=None, images=()):
    with EventLog(folder, resume) as log:
        for step in steps:
            log.write(dict(RECORD, step=step, loss=step / 2))
        for step in images:
            log.image(step, "picture", b"png", 3, 5)


def test_a_record_is_in_the_file_before_it_is_closed(tmp_path):
    log = EventLog(tmp_path, None)
    log.write(RECORD)
    assert scalars(tmp_path) == {(1, "train/loss"): 0.5, (1, "time/step_s"): 0.25}
    with log:
        log.write({"step": 2, "kind": "eval", "l2": 0.125, "time": {}})
    assert scalars(tmp_path)[2, "eval/l2"] == 0.125


def test_the_files_have_the_framing_that_tensorboard_reads(tmp_path):
    """Length and both checksums of each record, computed here anew from the bytes."""
    from tensorboardX.crc32c import crc32c

    def masked(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")

    write(tmp_path, [1, 2])
    (path,) = tmp_path.glob(PATTERN)
    events = list(read_events(path))
    assert events[0][0].file_version == "brain.Event:2"
    assert b"".join(raw for _, raw in events) == path.read_bytes()
    for _, raw in events:
        assert int.from_bytes(raw[:8], "little") == len(raw) - 16
        assert raw[8:12] == masked(raw[:8])
        assert raw[-4:] == masked(raw[12:-4])


def test_resume_keeps_what_the_restored_run_knew(tmp_path):
    write(tmp_path, [1, 2, 3, 4], images=[0, 2, 4])
    write(tmp_path, [3, 4, 5], resume=2, images=[2, 4])
    found = scalars(tmp_path)
    assert [step for step, tag in found if tag == "train/loss"] == [1, 2, 3, 4, 5]
    assert sorted(step for step, tag in found if tag == "picture") == [0, 2, 4]
    write(tmp_path, [1], resume=None)
    assert {step for step, _ in scalars(tmp_path)} == {1}


def test_an_event_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    (path,) = tmp_path.glob(PATTERN)
    path.write_bytes(path.read_bytes()[:-3])
    write(tmp_path, [2, 3], resume=2)
    assert [step for step, tag in scalars(tmp_path) if tag == "train/loss"] == [1, 2, 3]


def test_a_resumed_run_has_the_log_in_tensorboard_once(tmp_path):
    def go(steps):
        run(
            tmp_path, steps, log_every=1, checkpoint_every=2, evaluate_every=2,
            evaluate=lambda state: {"updates": float(state.step)},
            watch=WatchConfig(tensorboard=True),
        )  # fmt: skip

    go(3)
    go(6)
    found = scalars(tmp_path / "tensorboard")
    for record in read_log(tmp_path / "metrics.jsonl"):
        tag = "eval/updates" if record["kind"] == "eval" else "train/loss"
        assert found[record["step"], tag] == pytest.approx(record[tag.split("/")[1]])
    assert len([tag for _, tag in found if tag == "train/loss"]) == 6
    assert sorted(step for step, tag in found if tag == "eval/updates") == [0, 2, 3, 4, 6]


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[watch\]'"):
        run(tmp_path, 2, watch=WatchConfig(tensorboard=True))
