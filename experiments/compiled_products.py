"""Which types a compiled program multiplies, read from its text: int8 may end up as bfloat16."""

import re
from collections import Counter

_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\w+)\[")
_PRODUCT = re.compile(r" (?:dot|convolution|custom-call)\(%?([\w.\-]+), %?([\w.\-]+)")
_CUBLAS = "__cublas"  # begins the names of its calls


def products_of(text: str) -> Counter[str]:
    """How many matrix products there are of each type, such as "s8" or "bf16 x f32".

    One in a loop is counted once. Attention kernels of libraries and Pallas are not seen into.
    """
    types: dict[str, str] = {}
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            types = {}  # names are a computation's own
        defined = _DEFINED.match(line)
        if defined:
            types[defined.group(1)] = defined.group(2)
        product = _PRODUCT.search(line)
        if product and (" custom-call(" not in line or f'="{_CUBLAS}' in line):
            left, right = (types[name] for name in product.groups())
            found[left if left == right else f"{left} x {right}"] += 1
    return found
