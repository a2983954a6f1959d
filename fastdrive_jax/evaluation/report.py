"""A report that one would rather look at than read, and the same figures as JSON.

`report.html` needs nothing beside it: pictures are inside, and nothing is fetched.
"""

import base64
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import jinja2
import numpy as np

from fastdrive_jax.evaluation.pictures import as_uint8, encode_jpeg, encode_png
from fastdrive_jax.evaluation.results import FORMAT, Row
from fastdrive_jax.evaluation.tables import ResultTable, pivot
from fastdrive_jax.files import write_bytes, write_text


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines."""

    kind: ClassVar[str] = "text"
    text: str


@dataclasses.dataclass(frozen=True)
class Code:
    """A command or a file, printed as it is."""

    kind: ClassVar[str] = "code"
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Figure:
    """One picture.

    Attributes:
      name: file stem of its PNG: small letters, digits, "-" and "_"; unique in the report.
      image: [H, W, 3] uint8 or float in [0, 1].
      caption: what it shows.
      alt: for those who cannot see it; the caption if empty.
      photo: stores it in the page as JPEG; plots stay PNG and turn dark with the page.
    """

    kind: ClassVar[str] = "figure"
    name: str
    image: np.ndarray
    caption: str
    alt: str = ""
    photo: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Gallery:
    """Figures beside each other, each at least `minimum` pixels wide."""

    kind: ClassVar[str] = "gallery"
    figures: tuple[Figure, ...]
    minimum: int = 320


@dataclasses.dataclass(frozen=True, eq=False)
class Flipbook:
    """Figures in one place with a switch between them, such as one for each keep ratio.

    Attributes:
      title: what the switch changes, such as "Tokens kept".
      figures: the pictures, of one size.
      labels: short text on the switch, one a figure.
    """

    kind: ClassVar[str] = "flipbook"
    title: str
    figures: tuple[Figure, ...]
    labels: tuple[str, ...]

    def __post_init__(self):
        if len(self.figures) != len(self.labels):
            raise ValueError(f"{len(self.figures)} figures but {len(self.labels)} labels")


@dataclasses.dataclass(frozen=True)
class Table:
    """Any table; numbers are right-aligned and floats printed with four digits."""

    kind: ClassVar[str] = "table"
    caption: str
    header: tuple[str, ...]
    lines: tuple[tuple[str | int | float, ...], ...]
    note: str = ""

    def __post_init__(self):
        if any(len(line) != len(self.header) for line in self.lines):
            raise ValueError(f"table {self.caption!r}: a line does not fit the header")


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Names and values, such as a configuration."""

    kind: ClassVar[str] = "pairs"
    pairs: Mapping[str, Any]


Block = Text | Code | Figure | Gallery | Flipbook | Table | ResultTable | KeyValues


@dataclasses.dataclass(frozen=True)
class Card:
    """A key figure at the top; `tone` says whether it is a success or a shortfall."""

    label: str
    value: str
    note: str = ""
    tone: Literal["plain", "good", "bad"] = "plain"


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    blocks: tuple[Block, ...]
    intro: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """All of it.

    Attributes:
      title: name of the experiment.
      summary: the finding in a few sentences.
      sections: in order.
      cards: key figures.
      hero: a block shown before the sections, such as the kept tokens of one picture.
      rows: figures that no table shows; those of the tables need not be repeated.
      meta: what was run: configuration, versions, hardware, seed. Anything JSON can hold.
    """

    title: str
    summary: str
    sections: tuple[Section, ...]
    cards: tuple[Card, ...] = ()
    hero: Block | None = None
    rows: tuple[Row, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _blocks(report: Report) -> Iterator[Block]:
    if report.hero is not None:
        yield report.hero
    for section in report.sections:
        yield from section.blocks


def _figures(block: Block) -> tuple[Figure, ...]:
    if isinstance(block, Figure):
        return (block,)
    return block.figures if isinstance(block, (Gallery, Flipbook)) else ()


def all_rows(report: Report) -> tuple[Row, ...]:
    """Every figure of the report once: those of its tables, then `report.rows`."""
    rows = [row for b in _blocks(report) if isinstance(b, ResultTable) for row in b.rows]
    return tuple(dict.fromkeys([*rows, *report.rows]))


def all_figures(report: Report) -> tuple[Figure, ...]:
    """Every picture of the report.

    Raises:
      ValueError: a name is malformed or used twice.
    """
    figures = [figure for block in _blocks(report) for figure in _figures(block)]
    names = [figure.name for figure in figures]
    for name in names:
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"figure name {name!r} must be small letters, digits, - and _")
        if names.count(name) > 1:
            raise ValueError(f"figure name {name!r} is used twice")
    return tuple(figures)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _percent(ratio: float) -> str:
    return f"{round(100 * ratio, 2):g}%"


def _number(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(part) for part in value)
    return _number(value)


def _data_uris(figures: tuple[Figure, ...], pngs: Mapping[str, bytes]) -> dict[str, str]:
    uris = {}
    for figure in figures:
        kind, data = ("png", pngs[figure.name])
        if figure.photo:
            kind, data = "jpeg", encode_jpeg(figure.image)
        uris[figure.name] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return uris


def render(report: Report, pngs: Mapping[str, bytes] | None = None) -> str:
    """The page as text.

    Args:
      report: what to show.
      pngs: PNG bytes by figure name, where they were encoded already.

    Returns:
      HTML with every picture inside; all text is escaped.
    """
    figures = all_figures(report)
    pngs = pngs or {figure.name: encode_png(figure.image) for figure in figures}
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "number": _number, "plain": _plain, "slug": _slug}
    template = (
        resources.files("fastdrive_jax.evaluation").joinpath("report.html").read_text("utf-8")
    )
    sizes = {figure.name: as_uint8(figure.image).shape for figure in figures}
    return environment.from_string(template).render(
        report=report,
        rows=all_rows(report),
        uris=_data_uris(figures, pngs),
        sizes=sizes,
        pivot=pivot,
        paragraphs=lambda text: [p for p in re.split(r"\n\s*\n", text.strip()) if p],
    )


def _json(report: Report) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "title": report.title,
        "summary": report.summary,
        "meta": dict(report.meta),
        "cards": [dataclasses.asdict(card) for card in report.cards],
        "rows": [dataclasses.asdict(row) for row in all_rows(report)],
        "tables": [
            _json_table(block)
            for block in _blocks(report)
            if isinstance(block, (Table, ResultTable))
        ],
        "pictures": [
            {"name": f.name, "file": f"pictures/{f.name}.png", "caption": f.caption}
            for f in all_figures(report)
        ],
    }


def _json_table(table: Table | ResultTable) -> dict[str, Any]:
    if isinstance(table, ResultTable):
        return {"caption": table.caption, "cells": list(_json_cells(table))}
    lines = [list(line) for line in table.lines]
    return {"caption": table.caption, "header": list(table.header), "lines": lines}


def _json_cells(table: ResultTable) -> Iterator[dict[str, Any]]:
    for band in pivot(table).bands:
        for method, cells in band.lines:
            for cell in filter(None, cells):
                yield {
                    "metric": band.metric.name,
                    "method": method.name,
                    "keep_ratio": cell.keep_ratio,
                    "value": cell.value,
                    "low": cell.low,
                    "high": cell.high,
                    "seeds": cell.seeds,
                }


def write_report(folder: str | Path, report: Report) -> Path:
    """Write `report.html`, `report.json` and `pictures/*.png`.

    Each file appears whole or not at all, the page last. Pictures that an earlier report in the
    folder listed and this one does not are removed.

    Args:
      folder: where the files go; made if absent.
      report: what to write.

    Returns:
      The path of `report.html`.

    Raises:
      ValueError: a figure's name is malformed or used twice.
      UserError: the folder cannot be written.
    """
    folder = Path(folder)
    pngs = {figure.name: encode_png(figure.image) for figure in all_figures(report)}
    page = render(report, pngs)
    content = json.dumps(_json(report), indent=1, allow_nan=False) + "\n"
    earlier = _earlier_pictures(folder / "report.json")
    for name, data in pngs.items():
        write_bytes(folder / "pictures" / f"{name}.png", data)
    write_text(folder / "report.json", content)
    for name in earlier - set(pngs):
        (folder / "pictures" / f"{name}.png").unlink(missing_ok=True)
    return write_text(folder / "report.html", page)


def _earlier_pictures(path: Path) -> set[str]:
    # an absent or foreign report.json names no picture of ours, so nothing is removed
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        pictures = json.loads(path.read_text("utf-8"))["pictures"]
        return {p["name"] for p in pictures if re.fullmatch(r"[a-z0-9_-]+", p["name"])}
    return set()
