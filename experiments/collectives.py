"""What devices send each other in a compiled program, read from its text."""

import math
import re

_BYTES = {
    "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1, "s8": 1, "f64": 8,
    "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
# Bytes that a device sends for each byte of the result of a ring over n devices.
_TRAFFIC = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
_COLLECTIVE = re.compile(
    r"%?([\w.\-]+) = (.*?) (" + "|".join(_TRAFFIC) + r")(-start|-done)?\(%?([\w.\-]+)"
)
# A TPU's compiler adds up and keeps a share at once: the sum stands in a computation of this name.
_SUM_OF_SHARES = "all-reduce-scatter"
_PIECES = ("async_collective_fusion", "fused_computation")  # of what overlaps with other work


def collective_bytes(text: str) -> dict[str, float]:
    """Bytes that a device sends in each kind of collective of a compiled program, as in a ring.

    A collective within a loop is counted once for each of its rounds where the compiler notes the
    trip count, else once. A TPU's compiler writes a collective in pieces, one in each of the
    computations that it overlaps with; of those a channel is counted once.
    """
    counts = trip_counts(text)
    moved, channels = dict.fromkeys(_TRAFFIC, 0.0), set()
    computation, groups = "", {}
    for line in text.splitlines():
        start = re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if start:
            computation = start.group(1)
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        name, result, kind, stage, operand = found.groups()
        if stage == "-start":  # its result holds the operands, too; the end's does not
            groups[name] = group_size(line)
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and computation.startswith(_PIECES):
            if channel.group(1) in channels:
                continue
            channels.add(channel.group(1))
        group = groups[operand] if stage == "-done" else group_size(line)
        sent = result_bytes(result) * counts.get(computation, 1)
        if kind == "all-reduce" and computation.startswith(_SUM_OF_SHARES):
            moved["reduce-scatter"] += sent / group * _TRAFFIC["reduce-scatter"](group)
        else:
            moved[kind] += sent * _TRAFFIC[kind](group)
    return moved


def result_bytes(result: str) -> int:
    """Bytes of a result, an array or a tuple of some.

    Raises:
        ValueError: It has a type that is not known here.
    """
    size = 0
    for kind, sides in re.findall(r"(\w+)\[([\d,]*)\]", result):
        if kind not in _BYTES:
            raise ValueError(f"the size of a {kind!r} is not known: {result[:300]}")
        size += _BYTES[kind] * math.prod(int(n) for n in sides.split(",") if n)
    return size


def group_size(line: str) -> int:
    """Devices that take part in a collective.

    Raises:
        ValueError: XLA writes its groups in a way that is not known here.
    """
    if " collective-permute" in line:
        return 2
    explicit = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if explicit:
        return len(explicit.group(1).split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    named = re.search(r"replica_groups=mesh\[(.*?)\][^{}]*\{(.*?)\}", line)
    if not named:
        raise ValueError(f"the groups of this collective cannot be read: {line.strip()[:300]}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
    return math.prod(sizes[axis] for axis in re.findall(r"'([^']+)'", named.group(2)))


def trip_counts(text: str) -> dict[str, int]:
    """Rounds of each loop's body, by the body's name."""
    found = {}
    for line in text.splitlines():
        body = re.search(r"body=%?([\w.\-]+)", line)
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
        if body and count:
            found[body.group(1)] = int(count.group(1))
    return found
