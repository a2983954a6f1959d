"""What a client asks for: the JSON part of a request, checked field by field."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import check_target
from fastdrive_jax.serving.refusals import Refusal

COMMANDS = ("left", "straight", "right")
_DRIVE = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_FIELDS = ("speed", "command", "drive", "frame", "keep_ratio", "target_ms")
_MOST_FRAMES = 2**31
_MOST_SHOWN = 80  # letters of a value that is refused
_MOST_DIGITS = 20  # of whole numbers


@dataclass(frozen=True)
class PlanRequest:
    """A frame to plan, without its pictures.

    Attributes:
        speed: Metres per second.
        command: Index into `COMMANDS`.
        drive: Name of the drive that the frame continues; None for a frame by itself.
        frame: Its number in the drive, from 0; None is the next.
        keep_ratio: A compiled one; None leaves it to the target or the service.
        target_ms: Milliseconds from the request's arrival; None leaves it to the service.
    """

    speed: float
    command: int
    drive: str | None = None
    frame: int | None = None
    keep_ratio: float | None = None
    target_ms: float | None = None


def parse_request(text: str | bytes, ratios: Sequence[float]) -> PlanRequest:
    """The JSON part of a request.

    Args:
        text: Of the part.
        ratios: That are compiled.

    Raises:
        Refusal: 422 with what is wrong with which field.
    """
    try:
        given = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise _wrong(f"The part 'request' is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise _wrong('The part \'request\' must be an object such as {"speed": 5, "command": ...}')
    unknown = sorted(set(given) - set(_FIELDS))
    if unknown:
        raise _wrong(f"The request has unknown {_cut(', '.join(unknown))}; it may have {_FIELDS}")
    command = given.get("command")
    if command not in COMMANDS:
        raise _wrong(f"command={_short(command)} must be one of {', '.join(COMMANDS)}")
    drive = given.get("drive")
    if drive is not None and not (isinstance(drive, str) and _DRIVE.fullmatch(drive)):
        raise _wrong("drive must be 1 to 64 letters, digits or _ . : -")
    frame = given.get("frame")
    if frame is not None and drive is None:
        raise _wrong("frame is a number within a drive: name the drive too")
    if frame is not None and not (type(frame) is int and 0 <= frame < _MOST_FRAMES):
        raise _wrong(f"frame={_short(frame)} must be a whole number from 0 to {_MOST_FRAMES - 1}")
    return PlanRequest(
        speed=_speed(given),
        command=COMMANDS.index(command),
        drive=drive,
        frame=frame,
        **_budget(given, ratios),
    )


def check_cameras(names: Sequence[str], cameras: Sequence[str]) -> None:
    """Refuses anything but one picture for each camera.

    Args:
        names: Of the parts with pictures.
        cameras: Of the policy.

    Raises:
        Refusal: 422 that names what is missing, twice there or unknown.
    """
    if sorted(names) == sorted(cameras):
        return
    missing = [name for name in cameras if name not in names]
    unknown = sorted({name for name in names if name not in cameras})
    twice = sorted({name for name in names if name in cameras and names.count(name) > 1})
    found = [
        f"{what} {', '.join(which)}"
        for what, which in (("missing:", missing), ("unknown:", unknown), ("twice:", twice))
        if which
    ]
    raise Refusal(
        422,
        "cameras",
        f"The policy looks through {len(cameras)} camera{'s' * (len(cameras) > 1)}, "
        f"{', '.join(cameras)}; {len(names)} came ({'; '.join(found)}). Send one picture for each, "
        "in a part of its name.",
    )


def _speed(given: Mapping[str, Any]) -> float:
    speed = _number(given, "speed")
    if speed is None or not 0 <= speed <= 100:
        raise _wrong(f"speed={_short(given.get('speed'))} must be 0 to 100 metres per second")
    return speed


def _budget(given: Mapping[str, Any], ratios: Sequence[float]) -> dict[str, float | None]:
    ratio, target = _number(given, "keep_ratio"), _number(given, "target_ms")
    if ratio is not None and target is not None:
        raise _wrong("keep_ratio and target_ms exclude each other: give one")
    if ratio is not None and ratio not in ratios:
        listed = ", ".join(f"{one:g}" for one in ratios)
        raise _wrong(f"keep_ratio={ratio:g} is not compiled; choose from {listed}")
    if target is not None:
        try:
            check_target(target)
        except UserError as error:
            raise Refusal(422, "request", str(error)) from error
    return {"keep_ratio": ratio, "target_ms": target}


def _whole(digits: str) -> int | float:
    """A whole number; one beyond any use is a float, infinite at worst."""
    # Of thousands of digits `int` makes nothing, and of hundreds what no float can hold.
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _number(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(f"{name}={_short(value)} must be a finite number")
    return float(value)


def _short(value: Any) -> str:
    """A value as a sentence can show it."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _wrong(sentence: str) -> Refusal:
    return Refusal(422, "request", f"{sentence}.")
