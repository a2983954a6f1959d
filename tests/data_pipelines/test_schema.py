import json

import pytest

from data_pipelines.schema import CAMERAS, Classes, read_classes, write_classes
from fastdrive_jax.errors import UserError


def test_cameras_go_round_the_car_from_the_front():
    assert CAMERAS[0] == "CAM_FRONT"
    assert len(set(CAMERAS)) == 6
    assert CAMERAS[3] == "CAM_BACK"


def test_classes_survive_the_file(tmp_path):
    classes = Classes(("sky", "road", "car", "void"), (1, 2), (2,), (3,))
    write_classes(tmp_path / "classes.json", classes)
    assert read_classes(tmp_path / "classes.json") == classes
    assert [p.name for p in tmp_path.iterdir()] == ["classes.json"]


def test_only_foreground_is_needed(tmp_path):
    (tmp_path / "classes.json").write_text('{"foreground": [7]}')
    assert read_classes(tmp_path / "classes.json") == Classes(foreground=(7,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSON"),
        ("[]", "foreground"),
        ('{"names": ["a"]}', "foreground"),
        ('{"foreground": [1], "colour": []}', "colour"),
        ('{"foreground": ["road"]}', "int"),
        ('{"foreground": [true]}', "int"),
        ('{"foreground": [0], "names": [0]}', "str"),
        ('{"foreground": [2], "names": ["a", "b"]}', "2"),
        ('{"foreground": [255]}', "255"),
        ('{"foreground": [-1]}', "-1"),
        ('{"foreground": [1], "objects": [2]}', "2"),
        ('{"foreground": [1], "ignore": [1]}', "1"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, content, said):
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read_classes(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value).replace(str(path), "")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"classes\.json is missing"):
        read_classes(tmp_path / "classes.json")


def test_unreadable_bytes_are_no_traceback(tmp_path):
    path = tmp_path / "classes.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="JSON"):
        read_classes(path)


def test_fields_are_those_of_the_file(tmp_path):
    write_classes(tmp_path / "c.json", Classes(foreground=(1,)))
    assert set(json.loads((tmp_path / "c.json").read_text())) == {
        "names",
        "foreground",
        "objects",
        "ignore",
    }
