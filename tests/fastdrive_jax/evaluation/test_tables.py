import dataclasses

import pytest

from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.evaluation.tables import Method, Metric, ResultTable, pivot

L2 = Metric("l2", "L2 error", "m")
METHODS = (
    Method("ours", "Ours"),
    Method("random", "Random", "control"),
    Method("oracle", "Oracle", "reference"),
    Method("none", "No image", "reference"),
)


def _row(method, ratio, value, seed=0, spread=0.1):
    return Row(method, ratio, "l2", value, value - spread, value + spread, 10, seed, "m")


TABLE = ResultTable(
    "Errors",
    (
        _row("random", 0.5, 3.0),
        _row("ours", 0.25, 2.0),
        _row("ours", 0.5, 1.0),
        _row("oracle", 0.5, 0.5),
        _row("none", None, 4.0),
    ),
    (L2,),
    METHODS,
)


def _cells(table):
    return {method.name: cells for method, cells in pivot(table).bands[0].lines}


def test_methods_go_down_and_ratios_across_from_most_to_fewest():
    laid = pivot(TABLE)
    assert laid.ratios == (0.5, 0.25)
    cells = _cells(TABLE)
    assert list(cells) == ["ours", "random", "oracle", "none"]
    assert [cell.value for cell in cells["ours"]] == [1.0, 2.0]
    assert cells["random"][1] is None
    assert len(cells["none"]) == 1
    assert cells["none"][0].keep_ratio is None
    assert cells["ours"][0].text == "1.000"
    assert cells["ours"][0].bracket == "[0.900, 1.100]"


def test_best_is_marked_among_pruners_and_controls_only():
    cells = _cells(TABLE)
    assert cells["ours"][0].best
    assert not cells["oracle"][0].best
    assert not cells["random"][0].best
    assert not cells["ours"][1].best  # alone in its column


def test_a_control_that_wins_is_the_one_marked():
    table = dataclasses.replace(TABLE, metrics=(dataclasses.replace(L2, better="higher"),))
    cells = _cells(table)
    assert cells["random"][0].best
    assert not cells["ours"][0].best


def test_no_one_wins_a_draw():
    rows = (_row("ours", 1.0, 1.0), _row("random", 1.0, 1.00001))
    cells = _cells(ResultTable("c", rows, (L2,), METHODS))
    assert not cells["ours"][0].best
    assert not cells["random"][0].best


def test_seeds_are_averaged_and_the_bracket_spans_them_all():
    rows = (_row("ours", 0.5, 1.0, seed=0), _row("ours", 0.5, 2.0, seed=1))
    table = ResultTable("c", rows, (L2,), METHODS)
    (cell,) = _cells(table)["ours"]
    assert (cell.value, cell.seeds) == (1.5, 2)
    assert (cell.low, cell.high) == (pytest.approx(0.9), pytest.approx(2.1))
    assert pivot(table).seeds == (0, 1)


def test_tracks_share_one_scale():
    cells = _cells(TABLE)
    places = [cells[name][0].track[2] for name in ("oracle", "ours", "random", "none")]
    assert places == sorted(places)
    # 0.5 to 4.0 metres: one metre is 25.5% of the padded range 0.4 - 0.148 .. 4.1 + 0.148
    assert cells["none"][0].track[2] - cells["random"][0].track[2] == pytest.approx(25.0, abs=0.1)
    start, length, dot = cells["ours"][0].track
    assert start + length / 2 == pytest.approx(dot, abs=0.02)


def test_percent_and_minus_are_typeset():
    assert Metric("r", "Recall", percent=True, digits=1).text(0.9564) == "95.6%"
    assert L2.text(-0.25) == "\N{MINUS SIGN}0.250"


def test_table_without_its_rows_is_refused():
    with pytest.raises(ValueError, match="no row"):
        pivot(dataclasses.replace(TABLE, metrics=(Metric("ade", "ADE"),)))
