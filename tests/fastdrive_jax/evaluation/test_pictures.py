import cv2
import numpy as np
import pytest

from fastdrive_jax.evaluation import palette, pictures, plots
from fastdrive_jax.evaluation.results import Row
from fastdrive_jax.evaluation.tables import Method

IMAGE = np.random.default_rng(0).integers(60, 200, (56, 84, 3)).astype(np.uint8)  # 2 x 3 tokens


def test_kept_tokens_keep_their_colours_and_dropped_ones_lose_them():
    out = pictures.keep_overlay(IMAGE, np.array([1, 5]), scale=1)
    assert out.shape == IMAGE.shape
    inside = (slice(2, 26), slice(30, 54))  # token 1 without grid and outline
    np.testing.assert_array_equal(out[inside], IMAGE[inside])
    dropped = out[4:24, 4:24].astype(int)  # token 0
    assert np.ptp(dropped, axis=-1).max() == 0  # grey
    assert dropped.min() > 180


def test_the_border_of_the_kept_region_is_outlined_on_the_dropped_side():
    out = pictures.keep_overlay(IMAGE, np.array([1, 5]), scale=1)
    accent = palette.rgb(palette.ACCENT)
    assert tuple(out[14, 27]) == accent  # right edge of token 0, beside token 1
    assert tuple(out[28, 42]) == accent  # top of token 4, under token 1
    assert tuple(out[14, 0]) != accent  # the picture's own edge
    assert tuple(out[14, 28]) != accent  # the kept side


def test_all_kept_is_the_picture_with_a_grid():
    out = pictures.keep_overlay(IMAGE, np.arange(6), scale=1)
    same = (out == IMAGE).all(-1)
    rows, columns = np.nonzero(~same)
    assert set(np.unique(rows[(columns != 28) & (columns != 56)])) == {28}


def test_score_map_brightens_with_the_score():
    out = pictures.score_map(np.full_like(IMAGE, 128), np.arange(6.0), scale=1, limits=(0, 5))
    tokens = out.reshape(2, 28, 3, 28, 3).mean((1, 3, 4)).reshape(-1)
    assert (np.diff(tokens) > 0).all()


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        pictures.score_map(IMAGE, np.array([0, 1, 2, 3, 4, np.nan]))


def test_pictures_must_split_into_tokens():
    with pytest.raises(ValueError, match="does not split"):
        pictures.keep_overlay(IMAGE[:50], np.array([0]))


def test_six_cameras_are_laid_out_as_seen_from_above():
    names = (
        "CAM_FRONT",
        "CAM_FRONT_RIGHT",
        "CAM_BACK_RIGHT",
        "CAM_BACK",
        "CAM_BACK_LEFT",
        "CAM_FRONT_LEFT",
    )
    shades = [np.full((40, 60, 3), 20 * i, np.uint8) for i in range(6)]
    sheet = pictures.contact_sheet(shades, names)
    height = (sheet.shape[0] - 10) // 2
    centres = [
        [int(sheet[height - 5 + row * (height + 10), 30 + 70 * column, 0]) for column in range(3)]
        for row in range(2)
    ]
    assert centres == [[100, 0, 20], [80, 60, 40]]


def test_other_cameras_stay_in_order():
    shades = [np.full((40, 60, 3), 20 * i, np.uint8) for i in range(3)]
    sheet = pictures.contact_sheet(shades, ["wrist", "top", "side"])
    assert sheet.shape[1] == 130  # two columns
    assert sheet[-5, 30, 0] == 40


def test_reconstruction_targets_part_the_picture():
    mask = np.zeros(IMAGE.shape[:2], bool)
    mask[:, :42] = True
    black = np.zeros_like(IMAGE)
    panel = pictures.reconstruction_panel(IMAGE, mask, black, black)
    band = (panel.shape[0] - 10) // 2 - 56
    np.testing.assert_array_equal(panel[band : band + 56, :42], IMAGE[:, :42])
    assert (panel[band : band + 56, 42:84] == 236).all()
    np.testing.assert_array_equal(panel[-56:, 42:84], IMAGE[:, 42:])
    assert (panel[-56:, :42] == 236).all()
    assert (panel[-56:, 94:] == 0).all()


def test_pixels_become_bytes():
    floats = np.array([[0.0, 0.5, 1.0, 2.0, -1.0]])
    assert pictures.as_uint8(floats)[0, :, 0].tolist() == [0, 128, 255, 255, 0]
    assert pictures.as_uint8(np.array([[True, False]]))[0, :, 1].tolist() == [255, 0]
    with pytest.raises(ValueError, match="picture must be"):
        pictures.as_uint8(np.zeros((2, 2, 4)))


def test_png_comes_back_equal(tmp_path):
    path = pictures.write_png(tmp_path / "a" / "x.png", IMAGE)
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], IMAGE)


def _has(image, colour):
    return (np.abs(image.astype(int) - palette.rgb(colour)).sum(-1) < 12).any()


def test_plots_are_rgb_and_show_their_series():
    steps, values = np.arange(50), np.linspace(1, 0.1, 50)
    loss = plots.loss_curves({"a": (steps, values), "b": (steps, values / 2)}, smooth=5, log=True)
    assert loss.dtype == np.uint8
    assert loss.shape[2] == 3
    assert _has(loss, palette.CYCLE[0])
    assert _has(loss, palette.CYCLE[1])
    assert not _has(loss, palette.CYCLE[2])

    curve = plots.Curve("ours", [1, 0.5], [1.0, 2.0], [0.9, 1.8], [1.1, 2.2])
    assert _has(plots.ratio_curves([curve], "m", reference=("none", 3.0)), palette.CYCLE[0])

    bars = plots.timing_bars({"all": {"vit": 2.0, "prefill": 3.0}, "half": {"prefill": 1.0}})
    assert _has(bars, palette.STAGES[0])
    assert _has(bars, palette.STAGES[1])

    path = np.stack([np.arange(1.0, 7), np.zeros(6)], 1)
    assert _has(plots.birds_eye(path, {"plan": path + 1}), palette.CYCLE[0])

    dots = plots.interval_bars(["a", "b"], [1, -1], [0.5, None], [1.5, None], "m", highlight=["a"])
    assert _has(dots, palette.ACCENT)
    above = plots.interval_bars(["a", "b"], [5, 6], [4.9, 5.9], [5.1, 6.1], "m")
    zero = (above == palette.rgb(palette.INK)).all(-1).mean(0).max()
    assert zero > 0.4  # a line from bottom to top, though nothing is near it
    band = plots.interval_bars(["a"], [0.5], [0.0], [1.0], "m", highlight=["a"]).astype(int)
    begin = (band == palette.rgb(palette.INK)).all(-1).mean(0).argmax()
    pale = (band[..., 2] - band[..., 0] > 40).any(0)  # the band or its dot, both blue
    assert begin - 2 <= np.flatnonzero(pale)[0] <= begin + 2


def test_curves_average_seeds_and_leave_single_points_out():
    rows = [
        Row("ours", 0.5, "l2", 1.0, 0.9, 1.1, 9, 0),
        Row("ours", 0.5, "l2", 3.0, 2.5, 3.5, 9, 1),
        Row("ours", 1.0, "l2", 0.5, 0.4, 0.6, 9, 0),
        Row("ours", 1.0, "ade", 9.0, 8.0, 10.0, 9, 0),
        Row("random", 1.0, "l2", 0.5, None, None, 9, 0),
        Row("random", 0.5, "l2", 4.0, 3.0, 5.0, 9, 0),
        Row("none", None, "l2", 7.0, 6.0, 8.0, 9, 0),
    ]
    methods = (Method("ours", "Ours"), Method("random", "R", "control"), Method("none", "N"))
    ours, random = plots.curves(rows, "l2", methods)
    assert (ours.name, list(ours.x), list(ours.y)) == ("Ours", [1.0, 0.5], [0.5, 2.0])
    assert (list(ours.low), list(ours.high)) == ([0.4, 0.9], [0.6, 3.5])
    assert not ours.control
    assert random.control
    assert random.low is None


def test_left_is_left_in_the_birds_eye_view():
    future = np.stack([np.arange(1.0, 7), np.zeros(6)], 1)
    left = future + np.array([0.0, 2.5])  # y points left
    drawn = plots.birds_eye(future, {"plan": left})
    rows = slice(0, int(0.7 * drawn.shape[0]))  # without the legend
    colour = np.abs(drawn[rows].astype(int) - palette.rgb(palette.CYCLE[0])).sum(-1) < 12
    assert np.nonzero(colour)[1].mean() < 0.45 * drawn.shape[1]
