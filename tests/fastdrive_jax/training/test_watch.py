import signal

import jax
import numpy as np
import pytest
from PIL import Image
from test_tensorboard import PATTERN, read_events
from tiny_run import run

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.loop import StoppedBySignal
from fastdrive_jax.training.watch import WatchConfig


def pictures(state, batch):
    shade = np.full((4, 6, 3), int(state.step), np.uint8)
    return {"shade": shade, "first": np.uint8(np.abs(batch["x"][:, :, None].repeat(3, 2)))}


def test_pictures_are_files_and_in_tensorboard_once_each(tmp_path):
    def go(steps):
        watch = WatchConfig(images_every=2, tensorboard=True)
        run(tmp_path, steps, watch=watch, images=pictures, checkpoint_every=2)

    go(4)
    go(7)
    paths = sorted((tmp_path / "images/shade").iterdir())
    assert [path.name for path in paths] == [f"{step:08d}.png" for step in (0, 2, 4, 6)]
    for path in paths:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), int(path.stem))
    drawn = [
        (event.step, value.tag, value.image.width, value.image.encoded_image_string)
        for path in sorted((tmp_path / "tensorboard").glob(PATTERN))
        for event, _ in read_events(path)
        for value in event.summary.value
        if value.HasField("image")
    ]
    found = [picture for picture in drawn if picture[1] == "shade"]
    assert found == [(int(path.stem), "shade", 6, path.read_bytes()) for path in paths]
    assert len(drawn) == 8


def test_a_picture_of_another_kind_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"picture 'a' must be uint8 \[H, W, 3\], not float32 \(2"):
        run(
            tmp_path, 2, watch=WatchConfig(images_every=1),
            images=lambda state, batch: {"a": np.zeros((2, 2), np.float32)},
        )  # fmt: skip
    with pytest.raises(ValueError, match="images_every needs"):
        run(tmp_path, 2, watch=WatchConfig(images_every=1))


@pytest.fixture
def traces(monkeypatch):
    """What the profiler was asked; the profiler itself takes seconds."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder.name))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_the_profile_is_of_its_window(tmp_path, traces):
    seen = []
    run(
        tmp_path, 8, log_every=1, watch=WatchConfig(profile=(3, 5)),
        on_log=lambda record: seen.append((record["step"], len(traces))),
    )  # fmt: skip
    assert traces == ["profile", "stop"]
    # Steps that begin at 3 and 4 end as 4 and 5, and all of both is in the trace.
    assert [step for step, begun in seen if begun == 1] == [4, 5]


@pytest.mark.parametrize(("window", "expected"), [((2, 6), 1), ((1, 3), 0), ((0, 99), 1)])
def test_a_resumed_run_traces_what_is_left(tmp_path, traces, window, expected):
    run(tmp_path, 4)
    run(tmp_path, 8, watch=WatchConfig(profile=window))
    assert traces == ["profile", "stop"] * expected


def test_the_trace_is_ended_when_the_run_is(tmp_path, traces):
    def interrupt(record):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        run(tmp_path, 8, on_log=interrupt, watch=WatchConfig(profile=(1, 7)))
    assert traces == ["profile", "stop"]


def test_a_real_trace_is_written_also_on_interruption(tmp_path):
    def interrupt(record):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        run(tmp_path, 8, on_log=interrupt, watch=WatchConfig(profile=(1, 7)))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"train" in trace.read_bytes()


def test_contradictions_are_refused():
    for options, words in [
        ({"images_every": -1}, "images_every must not be negative"),
        ({"profile": (5, 5)}, r"0 <= start < stop, not \(5, 5\)"),
        ({"peak_flops": 0.0}, "peak_flops must be positive"),
        ({"flops_per_step": 1e9}, "without peak_flops"),
        ({"on_recompile": "stop"}, "must be warn or raise, not 'stop'"),
    ]:
        with pytest.raises(UserError, match=words):
            WatchConfig(**options)
