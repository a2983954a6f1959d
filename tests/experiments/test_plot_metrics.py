import json

import cv2
import numpy as np
import pytest
import tyro

from experiments.plot_metrics import (
    PlotMetricsArgs,
    default_metrics,
    last_values,
    named,
    plot_metrics,
    series,
)
from fastdrive_jax.errors import UserError


def record(step, kind="train", **metrics):
    times = {"step_s": 0.5} if kind == "train" else {}
    return {"step": step, "kind": kind, **metrics, "time": times}


def write(folder, records):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(each) + "\n" for each in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path):
    one = [record(step, loss=1 / step) for step in range(1, 9)] + [record(8, "eval", l2=0.5)]
    two = [record(step, loss=2 / step, ssim=0.0) for step in range(1, 5)]
    return write(tmp_path / "one", one), write(tmp_path / "two/train", two).parent


def test_records_become_series_without_what_was_not_finite():
    found = series([record(1, loss=2.0), record(2, loss=None), record(2, "eval", l2=3.0)])
    assert found == {
        "train/loss": ([1], [2.0]),
        "eval/l2": ([2], [3.0]),
        "time/step_s": ([1, 2], [0.5, 0.5]),
    }


def test_a_picture_with_a_panel_for_each_metric(tmp_path, runs):
    path = plot_metrics(PlotMetricsArgs(runs, out=tmp_path / "new/all.png"))
    both = cv2.imread(str(path))
    path = plot_metrics(PlotMetricsArgs(runs, ("train/loss",), tmp_path / "loss.png"))
    one = cv2.imread(str(path))
    assert both.shape == (one.shape[0], 2 * one.shape[1] + 10, 3)  # loss and eval/l2
    np.testing.assert_array_equal(both[:, : one.shape[1]], one)
    alone = plot_metrics(PlotMetricsArgs(runs[:1], ("train/loss",), tmp_path / "alone.png"))
    assert (cv2.imread(str(alone)) != one).any()  # the second run is drawn


def test_a_page_with_the_last_values(tmp_path, runs):
    path = plot_metrics(PlotMetricsArgs(runs, out=tmp_path / "all.html", smooth=3, log=True))
    page = path.read_text()
    assert page.count("data:image/png") == 2
    for text in ("train/loss", "eval/l2", "0.125", "Last values"):
        assert text in page
    found = {"one": series([record(8, loss=0.125)]), "two": series([record(4, ssim=0.0)])}
    table = last_values(found, ("train/loss", "train/ssim"))
    assert table.lines == (("one", 8, 0.125, "-"), ("two", 4, "-", 0.0))


def test_a_run_that_is_going_on_may_be_drawn(tmp_path, runs):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "ki')
    assert plot_metrics(PlotMetricsArgs(runs, out=tmp_path / "a.png")).exists()


def test_the_loss_comes_first_and_every_evaluation_after_it():
    found = {"a": series([record(0, "eval", area=1.0, l2=1.0), record(1, loss=1.0, ssim=1.0)])}
    assert default_metrics(found) == ("train/loss", "eval/area", "eval/l2")
    with pytest.raises(UserError, match="a hold no loss"):
        default_metrics({"a": {}})


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    first, second = tmp_path / "x/seed0/train", tmp_path / "x/seed1/train"
    assert list(named([first, second])) == ["seed0/train", "seed1/train"]
    assert list(named([first])) == ["train"]
    with pytest.raises(UserError, match="named twice"):
        named([first, first])


def test_what_can_not_be_drawn_is_said(tmp_path, runs):
    out = tmp_path / "a.png"
    with pytest.raises(UserError, match=r"No run has eval/f1; there are eval/l2, time/step_s, tr"):
        plot_metrics(PlotMetricsArgs(runs, ("eval/f1",), out))
    with pytest.raises(UserError, match=r"train/ssim goes down to 0, which a logarithmic"):
        plot_metrics(PlotMetricsArgs(runs, ("train/ssim",), out, log=True))
    with pytest.raises(UserError, match=r"absent is no run folder: neither"):
        plot_metrics(PlotMetricsArgs((tmp_path / "absent",), out=out))
    with pytest.raises(UserError, match=r"a\.pdf must end in \.png or \.html"):
        PlotMetricsArgs(runs, out=tmp_path / "a.pdf")
    with pytest.raises(UserError, match="at least one run"):
        PlotMetricsArgs(())
    with pytest.raises(UserError, match="smooth must not be negative"):
        PlotMetricsArgs(runs, smooth=-1)
    assert not out.exists()


def test_the_command_line(runs):
    words = [str(runs[0]), str(runs[1]), "--metrics", "train/loss", "eval/l2", "--out", "a.html"]
    args = tyro.cli(PlotMetricsArgs, args=words)
    assert args.runs == runs
    assert args.metrics == ("train/loss", "eval/l2")
