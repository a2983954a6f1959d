"""Tables as Markdown has them."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """Lines of text of a table; cells are printed as they are, and must hold no "|"."""
    return [f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *lines)]


def kept_share(ratio: float | None) -> str:
    """A keep ratio as a cell; nothing where it has no meaning."""
    return "" if ratio is None else f"{100 * ratio:g}%"
