import itertools
import json

import numpy as np
import pytest

from data_pipelines.maskers.interface import (
    BACKGROUND,
    BARRIER,
    CLASSES,
    PERSON,
    ROAD,
    TRAFFIC_LIGHT,
    TRAFFIC_SIGN,
    VEHICLE,
)
from data_pipelines.maskers.prompts import (
    DEFAULT_PROMPTS,
    ClassPrompt,
    Instance,
    check_prompts,
    paint,
    prompt_settings,
)
from fastdrive_jax.errors import UserError

SIZE = (8, 10)


def box(class_id, score, rows, columns) -> Instance:
    mask = np.zeros(SIZE, bool)
    mask[rows[0] : rows[1], columns[0] : columns[1]] = True
    return Instance(class_id, score, mask)


def test_the_defaults_cover_every_foreground_class_once():
    assert {p.class_id for p in check_prompts(DEFAULT_PROMPTS)} == set(CLASSES.foreground)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"name": "tree"}, '"tree"'),
        ({"name": "background"}, '"background"'),
        ({"prompts": ()}, "person"),
        ({"prompts": "person"}, "person"),
        ({"prompts": ("person", "  ")}, "'  '"),
        ({"prompts": ("a person. a dog",)}, "a person. a dog"),
        ({"prompts": ("who?",)}, "who?"),
        ({"box_threshold": 1.2}, "1.2"),
        ({"text_threshold": -0.1}, "-0.1"),
        ({"mask_threshold": float("nan")}, "nan"),
        ({"box_threshold": "0.3"}, "'0.3'"),
        ({"box_threshold": True}, "True"),
    ],
)
def test_a_wrong_prompt_is_named(values, named):
    with pytest.raises(UserError) as caught:
        ClassPrompt(**({"name": "person", "prompts": ("person",)} | values))
    assert named in str(caught.value)


def test_a_class_or_phrase_given_twice_is_named():
    person = ClassPrompt("person", ("person",))
    with pytest.raises(UserError, match='class "person"'):
        check_prompts((person, ClassPrompt("person", ("pedestrian",))))
    with pytest.raises(UserError, match='prompt "person"'):
        check_prompts((person, ClassPrompt("vehicle", ("car", " Person "))))
    with pytest.raises(UserError, match="at least one"):
        check_prompts(())


def test_settings_are_json():
    settings = prompt_settings(DEFAULT_PROMPTS)
    assert json.loads(json.dumps(settings)) == settings
    assert settings[1]["prompts"][0] == "car"


def test_road_lies_below_objects_whatever_its_score_and_size():
    road = box(ROAD, 0.99, (6, 8), (0, 2))
    car = box(VEHICLE, 0.1, (4, 8), (0, 6))
    expected = np.zeros(SIZE, np.uint8)
    expected[4:8, 0:6] = VEHICLE
    for order in itertools.permutations([road, car]):
        np.testing.assert_array_equal(paint(order, SIZE), expected)


def test_smaller_lies_on_larger_even_when_less_sure():
    bus = box(VEHICLE, 0.9, (0, 8), (0, 8))
    person = box(PERSON, 0.4, (4, 8), (3, 5))
    light = box(TRAFFIC_LIGHT, 0.35, (4, 5), (3, 4))
    expected = np.zeros(SIZE, np.uint8)
    expected[0:8, 0:8] = VEHICLE
    expected[4:8, 3:5] = PERSON
    expected[4, 3] = TRAFFIC_LIGHT
    for order in itertools.permutations([bus, person, light]):
        np.testing.assert_array_equal(paint(order, SIZE), expected)


def test_of_equal_sizes_the_surer_lies_on_top():
    sign = box(TRAFFIC_SIGN, 0.5, (0, 4), (0, 4))
    cone = box(BARRIER, 0.6, (0, 4), (2, 6))
    out = paint([cone, sign], SIZE)
    assert (out[:4, 2:6] == BARRIER).all()
    assert (out[:4, :2] == TRAFFIC_SIGN).all()


def test_the_same_thing_under_two_names_gets_the_surer_one():
    sign = box(TRAFFIC_SIGN, 0.6, (0, 5), (0, 10))
    light = box(TRAFFIC_LIGHT, 0.5, (0, 5), (0, 9))  # smaller, so it would lie on top
    for order in ([sign, light], [light, sign]):
        assert (paint(order, SIZE)[:5] == TRAFFIC_SIGN).all()


def test_two_of_one_class_both_stay():
    out = paint([box(VEHICLE, 0.9, (0, 5), (0, 10)), box(VEHICLE, 0.8, (0, 5), (0, 9))], SIZE)
    assert (out[:5] == VEHICLE).all()
    assert (out[5:] == BACKGROUND).all()


def test_nothing_found_is_background_and_empty_masks_paint_nothing():
    for instances in ([], [box(VEHICLE, 0.9, (0, 0), (0, 0))]):
        out = paint(instances, SIZE)
        assert out.shape == SIZE
        assert out.dtype == np.uint8
        assert not out.any()


def test_a_mask_of_another_size_or_class_is_a_fault():
    with pytest.raises(ValueError, match="not"):
        paint([box(VEHICLE, 0.9, (0, 1), (0, 1))], (8, 11))
    with pytest.raises(ValueError, match="class id 0"):
        paint([box(BACKGROUND, 0.9, (0, 1), (0, 1))], SIZE)
