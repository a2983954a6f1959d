"""TensorBoard event files of a run, cut back on resume as the log is.

Written with tensorboardX, which needs numpy and protobuf only (the extra "watch"), through its
writer without a thread: what was written is in the file when a run is killed.
"""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.training.metrics_log import Record

PATTERN = "events.out.tfevents.*"


class EventLog:
    """Scalars and images by step; use it as a context manager."""

    def __init__(self, folder: Path, resume_step: int | None):
        """Open a folder and drop what the restored run will write again.

        Args:
            folder: of the event files of one run.
            resume_step: the restored step; None starts empty.

        Raises:
            UserError: tensorboardX is absent, or the folder can't be written.
        """
        _protos()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(PATTERN)):
                _cut(path, resume_step)
            from tensorboardX.event_file_writer import EventsWriter

            # Its own suffix is the second, and a run may be started twice within one.
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        except OSError as error:
            raise UserError(f"{folder} can't be written ({error.strerror}).") from error
        self._folder = folder

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_) -> None:
        self._writer.close()

    def write(self, record: Record) -> None:
        """Add a record of the log: KIND/METRIC for its metrics and time/NAME for its times."""
        scalars = {
            f"{record['kind']}/{name}": value
            for name, value in record.items()
            if name not in ("step", "kind", "time") and value is not None
        }
        if record["kind"] == "train":
            scalars |= {f"time/{name}": value for name, value in record["time"].items()}
        self._add(record["step"], [{"tag": tag, "simple_value": v} for tag, v in scalars.items()])

    def image(self, step: int, name: str, png: bytes, height: int, width: int) -> None:
        """Add a picture."""
        picture = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        self._add(step, [{"tag": name, "image": picture}])

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        event = _protos()(step=step, wall_time=time.time(), summary={"value": values})
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            raise UserError(f"{self._folder} can't be written ({error.strerror}).") from error


def read_events(path: Path) -> Iterator[tuple[Any, bytes]]:
    """Events of a file with their bytes in it; a last one that was cut off by a kill is left out.

    A record is its length in 8 bytes, their checksum in 4, the event, and its checksum in 4.
    """
    event_type, content, place = _protos(), path.read_bytes(), 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        end = place + 12 + length + 4
        if end > len(content):
            return
        yield event_type.FromString(content[place + 12 : end - 4]), content[place:end]
        place = end


def _cut(path: Path, resume_step: int | None) -> None:
    kept = [raw for event, raw in read_events(path) if _stays(event, resume_step)]
    if resume_step is None:
        path.unlink()
        return
    temporary = path.with_name(f".{path.name.replace('tfevents', 'cut')}.{os.getpid()}.tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)


def _stays(event: Any, resume_step: int | None) -> bool:
    if resume_step is None:
        return False
    # Images of a step are drawn after its checkpoint was saved, records before.
    drawn = any(value.HasField("image") for value in event.summary.value)
    return event.step < resume_step or (event.step == resume_step and not drawn)


def _protos() -> Any:
    """The message type of an event, by which the import is also tried."""
    try:
        from tensorboardX.proto.event_pb2 import Event
    except ImportError as error:
        raise UserError(
            "TensorBoard files need tensorboardX: run `pip install -e '.[watch]'` in the clone, or "
            "leave tensorboard off."
        ) from error
    return Event
