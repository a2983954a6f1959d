import base64
import dataclasses
import html
import json
import re

import cv2
import numpy as np
import pytest

from fastdrive_jax import files
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.report import (
    Card,
    Code,
    Figure,
    Flipbook,
    Gallery,
    KeyValues,
    Report,
    Section,
    Table,
    Text,
    all_rows,
    render,
    write_report,
)
from fastdrive_jax.evaluation.results import Row, read_rows
from fastdrive_jax.evaluation.tables import Method, Metric, ResultTable

RNG = np.random.default_rng(0)
EVIL = '<script src="http://evil.example/x.js">&amp;</script>'


def _figure(name, photo=False):
    return Figure(name, RNG.integers(0, 255, (20, 30, 3)).astype(np.uint8), f"Of {name}", "", photo)


ROWS = tuple(
    Row(method, ratio, "l2", value, value - 0.0123, value + 0.0123, 40, 7, "m")
    for method, ratio, value in (
        ("ours", 0.5, 0.51234),
        ("random", 0.5, 0.71234),
        ("ours", 0.25, 0.61234),
        ("none", None, 1.31234),
    )
)
EXTRA = Row("ours", 0.5, "prefill", 12.75, None, None, 50, None, "ms")
REPORT = Report(
    title="Quick start " + EVIL,
    summary="First.\n\nSecond " + EVIL,
    cards=(Card("L2 " + EVIL, "0.512 m", EVIL, "good"),),
    hero=Flipbook("Kept", (_figure("kept-50", True), _figure("kept-25", True)), ("50%", "25%")),
    sections=(
        Section("Run " + EVIL, (Code(EVIL), KeyValues({"seed": 0, EVIL: [1, 0.5, EVIL]}))),
        Section("Pictures", (Gallery((_figure("a"), _figure("b"))), _figure("loss")), EVIL),
        Section(
            "Planning",
            (
                ResultTable(
                    "Errors " + EVIL,
                    ROWS,
                    (Metric("l2", "L2 " + EVIL, "m"),),
                    (
                        Method("ours", "Ours"),
                        Method("random", "Random", "control"),
                        Method("none", "No image", "reference"),
                    ),
                    note=EVIL,
                ),
                Table("Times", ("Stage", "ms", EVIL), (("prefill", 12.75, EVIL),), EVIL),
                Text("One.\n\nTwo " + EVIL),
            ),
        ),
    ),
    rows=(EXTRA,),
    meta={"seed": 7, "config": {"steps": 10}},
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder, REPORT)


@pytest.fixture(scope="module")
def page(written):
    return written.read_text("utf-8")


def test_nothing_is_fetched(page):
    links = re.findall(r'(?:src|href|action|data|poster|srcset)\s*=\s*"([^"]*)"', page)
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"@import|url\(|<link|<script|<iframe|<object|<embed", page)


def test_all_text_is_escaped(page):
    assert "<script" not in page
    assert page.count(html.escape(EVIL).replace("&#x27;", "'").replace("&quot;", "&#34;")) >= 14


def test_every_picture_is_inside(page):
    images = re.findall(r'<img src="data:image/(png|jpeg);base64,([^"]+)"', page)
    assert [kind for kind, _ in images] == ["jpeg"] * 2 + ["png"] * 3
    for kind, data in images:
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (20, 30, 3), kind
    assert page.count("<img") == len(images)


def test_pictures_are_written_as_png(written):
    names = sorted(path.name for path in (written.parent / "pictures").iterdir())
    assert names == ["a.png", "b.png", "kept-25.png", "kept-50.png", "loss.png"]
    (figure,) = (b for b in REPORT.sections[1].blocks if isinstance(b, Figure))
    stored = cv2.imread(str(written.parent / "pictures" / "loss.png"))[..., ::-1]
    np.testing.assert_array_equal(stored, figure.image)


def test_json_and_page_hold_the_same_figures(written, page):
    rows, meta = read_rows(written.parent / "report.json")
    assert rows == (*ROWS, EXTRA) == all_rows(REPORT)
    assert meta == {"seed": 7, "config": {"steps": 10}}
    every = page[page.index('<section id="every-figure"') :]
    for row in rows:
        line = next(
            line
            for line in every.splitlines()
            if f">{row.method}<" in line and f">{row.value:.6g}<" in line
        )
        assert f">{row.metric}<" in line
        for end in (row.low, row.high):
            assert end is None or f">{end:.6g}<" in line
    for row in ROWS:  # and each cell of the table that people read
        assert f'<span class="value">{row.value:.3f}</span>' in page
        assert f"[{row.low:.3f}, {row.high:.3f}]" in page
    content = json.loads((written.parent / "report.json").read_text())
    cells = content["tables"][0]["cells"]
    assert {(c["method"], c["keep_ratio"], c["value"]) for c in cells} == {
        (r.method, r.keep_ratio, r.value) for r in ROWS
    }
    assert content["tables"][1]["lines"] == [["prefill", 12.75, EVIL]]
    assert [p["name"] for p in content["pictures"]] == ["kept-50", "kept-25", "a", "b", "loss"]


def test_best_and_controls_are_marked(page):
    best = re.search(r'<td class="best"><span class="value">([^<]*)', page)
    assert best.group(1) == "0.512"
    assert page.count('<td class="best">') == 1
    assert re.search(r'<tr class="control"><th scope="row">Random<span class="tag">control', page)


def test_switch_has_a_label_for_each_picture(page):
    ids = re.findall(r'<input type="radio" name="flip1" id="(flip1-\d)"', page)
    assert ids == ["flip1-1", "flip1-2"]
    assert re.findall(r'<label for="(flip1-\d)">', page) == ids


def test_page_adapts_to_dark_and_narrow(page):
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "max-width: 640px" in page


def test_writing_again_gives_the_same_files_and_drops_old_pictures(tmp_path):
    first = write_report(tmp_path, REPORT).read_bytes()
    assert write_report(tmp_path, REPORT).read_bytes() == first
    (tmp_path / "pictures" / "mine.png").write_bytes(b"not ours")
    smaller = dataclasses.replace(REPORT, hero=None)
    write_report(tmp_path, smaller)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["a.png", "b.png", "loss.png", "mine.png"]


def test_foreign_json_removes_nothing(tmp_path):
    (tmp_path / "report.json").write_text('{"pictures": [{"name": "../x"}, {"name": 3}]}')
    (tmp_path / "x.png").write_bytes(b"other")
    write_report(tmp_path, REPORT)
    assert (tmp_path / "x.png").read_bytes() == b"other"


@pytest.mark.parametrize("names", [("a", "a"), ("../a", "b"), ("A", "b")])
def test_bad_figure_names_are_refused(names, tmp_path):
    report = Report("t", "s", (Section("x", tuple(_figure(name) for name in names)),))
    with pytest.raises(ValueError, match="figure name"):
        write_report(tmp_path / "out", report)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_new_page(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(tmp_path, REPORT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_empty_report_is_a_page():
    page = render(Report("Empty", "Nothing yet.", ()))
    assert "Nothing yet." in page
    assert "every-figure" not in page


def test_lines_must_fit_the_header():
    with pytest.raises(ValueError, match="does not fit"):
        Table("t", ("a", "b"), (("x",),))
    with pytest.raises(ValueError, match="labels"):
        Flipbook("t", (), ("a",))
