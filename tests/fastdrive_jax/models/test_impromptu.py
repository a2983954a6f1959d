import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.image_processor import smart_resize
from fastdrive_jax.models.qwen2_5_vl.impromptu import (
    EgoStatus,
    parse_answer,
    planning_answer,
    planning_prompt,
    shrunk_size,
)

PAST = np.array([[-4.126, 0.004], [-2.0, -0.0012], [0.0, 0.0]])


def test_entries_of_the_past_by_hand():
    prompt = planning_prompt(PAST)
    assert prompt.endswith(
        "last 1.0 seconds (at 0.5-second intervals). This includes the x and y coordinates of the "
        "ego vehicle. Positive x means forward direction while positive y means leftwards. The "
        "data is presented in the format [x, y]:"
        "(t-1.0s) [-4.13, 0.0], (t-0.5s) [-2.0, 0.0], (t-0.0s) [0.0, 0.0]\n"
    )
    assert prompt.startswith("You are an autonomous driving agent. You have access to a front view")


def test_status_stands_behind_each_position():
    status = [EgoStatus((0.123, -0.5), 8.0 + i, -0.016) for i in range(3)]
    assert planning_prompt(PAST, status).count(", Acceleration: X 0.12, Y -0.5 m/s^2, Velocity: X ")
    assert (
        "(t-0.5s) [-2.0, 0.0], Acceleration: X 0.12, Y -0.5 m/s^2, Velocity: X 9.0, Steering "
        "angle: -0.02 (positive: left turn, negative: right turn), (t-0.0s)"
    ) in planning_prompt(PAST, status)


@pytest.mark.parametrize(("views", "marks"), [("none", 0), ("1v", 1), ("6v", 6)])
def test_each_view_has_a_mark(views, marks):
    assert planning_prompt(PAST, views=views).count("<image>") == marks


def test_answers_come_back():
    future = np.array([[1.234, 0.0], [2.5, -0.001], [3.0, 0.5], [4.0, 1.0], [5.0, 1.5], [6.0, 2.0]])
    text = planning_answer(future)
    assert text.endswith(
        "formatted as [x, y]: [1.23, 0.0], [2.5, 0.0], [3.0, 0.5], [4.0, 1.0], [5.0, 1.5], "
        "[6.0, 2.0]</PLANNING>"
    )
    found, count = parse_answer(f"Well. {text} Bye [7, 8]")
    assert count == 6
    np.testing.assert_allclose(found, future.round(2), atol=1e-9)


def test_short_answers_stand_still_at_their_last_point():
    found, count = parse_answer("<PLANNING>[x, y]: [1, 2], [3.5, -4]</PLANNING>")
    assert count == 2
    assert found.tolist() == [[1, 2], *[[3.5, -4]] * 5]


@pytest.mark.parametrize(
    ("text", "ahead"),
    [
        # Without an end the last letter is lost, here that which closes the last point.
        ("<PLANNING>[x, y]: [1, 0], [2, 0], [3, 0]", [1, 2, 2, 2, 2, 2]),
        # Without a beginning the first nine letters are lost.
        ("The plan: [1, 0], [2, 0]</PLANNING>", [1, 2, 2, 2, 2, 2]),
        ("[x, y]: [7, 0], [1, 0], [2, 0]</PLANNING>", [1, 2, 2, 2, 2, 2]),
        ("<PLANNING>[1, 0, 9], [2, 0, 9]</PLANNING>", [1, 2, 2, 2, 2, 2]),
        ("<PLANNING>[1, 0], [2, 0, 9]</PLANNING>", None),
        ("<PLANNING>[x, y] [x, y] [1, 0]</PLANNING>", None),
    ],
)
def test_answers_that_are_not_as_asked_are_read_as_published(text, ahead):
    """By hand from the published evaluation's slices."""
    found, count = parse_answer(text)
    assert found[:, 0].tolist() == (ahead or [0.0] * 6)
    assert (count > 0) == (ahead is not None)


def test_places_are_rounded_twice():
    """1.2349 is 1.235 to three places, and that 1.24 to two (halves go to even)."""
    past = [[-1.2349, 2.6749], [0, 0]]
    assert "[-1.24, 2.68]" in planning_prompt(past)


def test_the_size_between_camera_and_processor():
    assert shrunk_size(900, 1600, 262_144) == (384, 682)
    assert smart_resize(384, 682) == (392, 672)  # 14 x 24 = 336 tokens
    assert shrunk_size(384, 682, 262_144) == (384, 682)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "<PLANNING>[1, 2]",
        "</PLANNING>[1, 2]<PLANNING>",
        "<PLANNING>[one, two]</PLANNING>",
        "<PLANNING>[1]</PLANNING>",
        "<PLANNING>[1.0], [2.0], [3.0], [4.0]</PLANNING>",
        "<PLANNING>[nan, 1]</PLANNING>",
    ],
)
def test_what_cannot_be_read_says_so(text):
    found, count = parse_answer(text)
    assert count == 0
    assert not found.any()


def test_impossible_pasts_and_plans_are_refused():
    with pytest.raises(UserError, match=r"\(8, 2\)"):
        planning_prompt(np.zeros((8, 2)))
    with pytest.raises(UserError, match=r"\(0, 2\)"):
        planning_prompt(np.zeros((0, 2)))
    with pytest.raises(UserError, match="1 steps of status do not fit 3"):
        planning_prompt(PAST, [EgoStatus((0, 0), 1, 0)])
    with pytest.raises(UserError, match=r"\(5, 2\)"):
        planning_answer(np.zeros((5, 2)))
