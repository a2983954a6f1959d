"""The pages of the documentation: the commands that they show, and their files."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def commands(page: Path) -> list[tuple[str, ...]]:
    """The arguments of each `fastdrive` in the page's shell blocks."""
    found = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                places = [k for k, word in enumerate(words) if Path(word).name == "fastdrive"]
                found += [tuple(words[place + 1 :]) for place in places[:1]]
    return found


def write_files(page: Path, folder: Path) -> None:
    """The files that a page tells its reader to write."""
    for name, content in re.findall(r"```python file=(\S+)\n(.*?)```", page.read_text(), re.DOTALL):
        (folder / name).write_text(content)
