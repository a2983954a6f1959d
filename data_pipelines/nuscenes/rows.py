"""Rows of a nuScenes table one after the other, whatever the size of the file.

`sample_data.json` and `ego_pose.json` of v1.0-trainval hold 2.6 million rows each, gigabytes as
Python objects; most are sweeps that nobody asked for.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError

_CHUNK = 1 << 22  # characters read at once
_LONGEST_ROW = 1 << 20  # text behind a failure that is longer than any row: it is damaged
_SPACE = re.compile(r"[\s,]*")


def stream_rows(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file that is a list of objects.

    Args:
        path: The table.
        fields: Names that each row must have.

    Raises:
        UserError: The file is missing, is not a list of rows, ends too early, or a row lacks a
            field.
    """
    decoder = json.JSONDecoder()
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_CHUNK).lstrip("\ufeff \t\r\n")
            if not text.startswith("["):
                raise UserError(f"{path} is not a list of rows; write it again.")
            place = 1
            while True:
                place = _SPACE.match(text, place).end()
                if text.startswith("]", place):
                    return
                try:
                    row, place = decoder.raw_decode(text, place)
                except ValueError as error:
                    more = file.read(_CHUNK)
                    if not more or len(text) - place > _LONGEST_ROW:
                        raise UserError(
                            f"{path} is not valid JSON ({error}); write it again."
                        ) from error
                    text, place = text[place:] + more, 0
                    continue
                if not isinstance(row, dict):
                    raise UserError(f"{path} is not a list of rows; write it again.")
                lacking = [name for name in fields if name not in row]
                if lacking:
                    raise UserError(
                        f"A row of {path} lacks {', '.join(lacking)} (token {row.get('token')})."
                    )
                yield row
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; restore it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it again.") from error
