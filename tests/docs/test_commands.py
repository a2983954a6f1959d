"""Every command that a page shows is one that the command line takes."""

import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT, commands, write_files

from experiments.cli import COMMANDS, parse

SHOWN = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(
    ("page", "words"),
    SHOWN,
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:50],
)
def test_it_is_understood(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the reader has the page's files, and weights of a run
    write_files(next(path for path in PAGES if path.name == page), tmp_path)
    for word in words:
        if word.endswith(".safetensors"):
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).touch()
    try:
        parse(words)
    except SystemExit as stopped:
        pytest.fail(f"{page} shows `fastdrive {' '.join(words)}`, which ends with {stopped.code}")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"• {name} " in shown for name in COMMANDS)


def test_pages_show_commands():
    assert len(SHOWN) > 20


def test_every_page_is_on_the_site_and_every_link_leads_somewhere():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        if page.parent.name == "docs" and page.stem != "index":
            assert re.search(rf"^{page.stem}$", index, re.MULTILINE), f"{page.name} is not listed"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
