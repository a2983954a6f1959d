"""One set of colours for every picture and table (Okabe and Ito's, safe for colour-blind eyes)."""

INK = "#1b2430"
MUTED = "#66717f"
GRID = "#e3e7ec"
PAPER = "#ffffff"
ACCENT = "#0072b2"
WARM = "#d55e00"

CYCLE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a6a00", "#66717f")
STAGES = ("#9fc6e0", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#66717f")


def rgb(colour: str) -> tuple[int, int, int]:
    """Three numbers in 0..255 from "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
