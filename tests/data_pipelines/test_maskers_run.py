import errno
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.maskers import run
from data_pipelines.maskers.interface import BACKGROUND, CLASSES, ROAD, VEHICLE, Frame
from data_pipelines.maskers.provenance import KEY, check_stamp, read_provenance, stamp_of
from data_pipelines.maskers.rgb import read_rgb
from data_pipelines.maskers.run import MaskReport, folder_frames, make_masks
from data_pipelines.pictures import check_picture, decode_map, labels_png, mask_png
from data_pipelines.schema import read_classes
from fastdrive_jax.errors import UserError

SIZE = (40, 56)


@dataclass(frozen=True)
class Bright:
    """Marks bright pixels as vehicle and the lowest rows as road; counts what it is asked."""

    threshold: int = 128
    looks: bool = True
    calls: list = field(default_factory=list)
    name = "bright"

    @property
    def settings(self):
        return {"threshold": self.threshold, "words": ["naïve", "a\nb"]}

    def __call__(self, frames):
        self.calls.append([frame.name for frame in frames])
        return [self.one(frame) for frame in frames]

    def one(self, frame):
        if not self.looks:
            return np.zeros(SIZE, np.uint8)
        try:
            grey = np.asarray(Image.open(frame.picture).convert("L"))
        except OSError as error:
            raise UserError(f"{frame.picture} is damaged ({error}).") from error
        out = np.where(grey > self.threshold, VEHICLE, BACKGROUND).astype(np.uint8)
        out[-8:] = ROAD
        return out

    @property
    def asked(self):
        return sum(map(len, self.calls))


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (*SIZE, 3), np.uint8)).save(path)


@pytest.fixture
def images(tmp_path) -> Path:
    for seed in range(7):
        picture(tmp_path / "images" / f"CAM_{'AB'[seed % 2]}" / f"{seed:03d}.jpg", seed)
    return tmp_path / "images"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def files(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.png")}


def test_masks_and_labels_are_what_the_masker_said(images, out):
    frames = folder_frames(images)
    told = []
    report = make_masks(frames, Bright(), out, 3, progress=lambda *args: told.append(args))
    assert report == MaskReport(made=7, remade=0, kept=0, bad=())
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert [f.name for f in frames][:2] == ["CAM_A/000", "CAM_A/002"]
    for frame in frames:
        expected = Bright().one(frame)
        mask = out / "masks" / f"{frame.name}.png"
        labels = out / "labels" / f"{frame.name}.png"
        # Both readers hand the bytes on unchanged: they are in the form that shards hold.
        assert mask_png(mask.read_bytes(), mask, SIZE) == mask.read_bytes()
        same, ids = labels_png(labels.read_bytes(), labels, SIZE, CLASSES)
        assert same == labels.read_bytes()
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(
            decode_map(mask.read_bytes(), mask, SIZE), expected != BACKGROUND
        )
    assert read_classes(out / "classes.json") == CLASSES
    assert not [p for p in out.rglob("*") if p.is_file() and p.suffix not in (".png", ".json")]
    assert sorted(p.name for p in out.iterdir()) == [
        "classes.json",
        "labels",
        "masker.json",
        "masks",
    ]


def test_links_to_folders_are_followed_but_not_in_circles(images, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "CAM_A").symlink_to(images / "CAM_A")
    (links / "self").symlink_to(links)
    names = [frame.name for frame in folder_frames(images)]
    assert [frame.name for frame in folder_frames(links)] == [n for n in names if "CAM_A" in n]


def test_provenance_is_read_back_from_both_files(images, out):
    make_masks(folder_frames(images), Bright(77), out)
    expected = {"name": "bright", "settings": Bright(77).settings}
    for kind in ("masks", "labels"):
        path = out / kind / "CAM_B" / "001.png"
        assert read_provenance(path) == expected
        assert KEY in Image.open(path).info
    assert json.loads((out / "masker.json").read_text()) == expected
    assert read_provenance(images / "CAM_A" / "000.jpg") is None
    assert read_provenance(out / "nothing.png") is None


def test_a_second_run_asks_for_nothing_and_a_lost_file_is_made_again(images, out):
    frames = folder_frames(images)
    make_masks(frames, Bright(), out)
    before = files(out)
    masker = Bright()
    assert make_masks(frames, masker, out) == MaskReport(0, 0, 7, ())
    assert masker.asked == 0
    (out / "masks" / "CAM_A" / "002.png").unlink()
    (out / "labels" / "CAM_A" / "004.png").unlink()
    report = make_masks(frames, masker, out)
    assert report == MaskReport(made=2, remade=0, kept=5, bad=())
    assert masker.calls == [["CAM_A/002", "CAM_A/004"]]
    assert files(out) == before


def test_other_settings_make_the_masks_again(images, out):
    frames = folder_frames(images)
    make_masks(frames[:4], Bright(128), out)
    before = files(out)
    report = make_masks(frames, Bright(60), out, 2)
    assert report == MaskReport(made=7, remade=4, kept=0, bad=())
    after = files(out)
    assert all(after[name] != before[name] for name in before)
    assert json.loads(stamp_of(out / "masks" / "CAM_A" / "000.png"))["settings"]["threshold"] == 60


KILLED = """
    import os, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_maskers_run import Bright
    from data_pipelines.maskers.run import folder_frames, make_masks

    class Dies(Bright):
        def __call__(self, frames):
            if self.asked == 4:
                os._exit(9)
            return super().__call__(frames)

    make_masks(folder_frames(Path({images!r})), Dies(), Path({out!r}), 2)
"""


def test_a_killed_run_goes_on_behind_its_last_whole_batch(images, out):
    script = KILLED.format(tests=str(Path(__file__).parent), images=str(images), out=str(out))
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, check=False)
    assert killed.returncode == 9
    whole = len(list((out / "masks").rglob("*.png")))
    assert 2 <= whole <= 4  # the first batch is settled before the third, the second may be
    masker = Bright()
    report = make_masks(folder_frames(images), masker, out, 2)
    assert (report.made, report.kept) == (7 - whole, whole)
    assert masker.asked == 7 - whole
    assert len(files(out)) == 14


def test_a_fault_of_the_masker_keeps_what_is_whole(images, out):
    class Fails(Bright):
        def __call__(self, frames):
            if self.asked == 4:
                raise RuntimeError("out of memory")
            return super().__call__(frames)

    with pytest.raises(RuntimeError, match="out of memory"):
        make_masks(folder_frames(images), Fails(), out, 2)
    assert make_masks(folder_frames(images), Bright(), out, 2) == MaskReport(3, 0, 4, ())


@pytest.mark.parametrize("looks", [True, False], ids=["masker reads it", "masker does not"])
def test_a_damaged_picture_is_left_out_by_name_and_the_others_stay(images, out, looks):
    bad = images / "CAM_A" / "002.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    frames = folder_frames(images)
    with pytest.raises(UserError) as caught:
        make_masks(frames, Bright(looks=looks), out, 7)
    assert "002.jpg" in str(caught.value)
    assert "skip_bad" in str(caught.value)
    report = make_masks(frames, Bright(looks=looks), out, 4, skip_bad=1)
    assert [name for name, _ in report.bad] == ["CAM_A/002"]
    assert "002.jpg" in report.bad[0][1]
    assert report.made + report.kept == 6
    assert len(files(out)) == 12
    lost = [*frames[:-1], Frame(images / "CAM_B" / "gone.jpg", "CAM_B/gone")]
    with pytest.raises(UserError, match="2 of the pictures"):
        make_masks(lost, Bright(5, looks=looks), out, 7, skip_bad=1)


def test_parts_share_the_work_and_the_folder(images, out, tmp_path):
    frames = folder_frames(images)
    reports = [make_masks(frames, Bright(), out, 2, part=(k, 3)) for k in range(3)]
    assert [report.made for report in reports] == [3, 2, 2]
    make_masks(frames, Bright(), tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_a_full_disk_is_one_sentence(images, out, monkeypatch):
    write_bytes = Path.write_bytes

    def full(self, data):
        if "labels/CAM_A/004" in self.as_posix():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"disk is full while writing .*004\.png"):
        make_masks(folder_frames(images), Bright(), out)
    monkeypatch.undo()
    report = make_masks(folder_frames(images), Bright(), out)
    assert report.made >= 1
    assert report.made + report.kept == 7


@pytest.mark.parametrize(
    "answer",
    [
        lambda frames: [np.zeros((3, 4), np.uint8)] * len(frames),
        lambda frames: [np.zeros(SIZE, np.int64)] * len(frames),
        lambda frames: [np.full(SIZE, 9, np.uint8)] * len(frames),
        lambda frames: [np.zeros(SIZE, np.uint8)],
    ],
    ids=["size", "dtype", "id", "count"],
)
def test_a_wrong_answer_of_a_masker_is_a_fault(images, out, answer):
    class Wrong(Bright):
        def __call__(self, frames):
            return answer(frames)

    with pytest.raises(ValueError, match="map"):
        make_masks(folder_frames(images), Wrong(), out)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"part": (2, 2)}, "part 2 of 2"),
        ({"part": (-1, 2)}, "part -1"),
        ({"part": (0, 0)}, "part 0 of 0 does not exist; give an index from 0 to below the count"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"skip_bad": -1}, "skip_bad is -1"),
    ],
)
def test_wrong_arguments_are_named(images, out, values, named):
    with pytest.raises(UserError, match=named):
        make_masks(folder_frames(images), Bright(), out, **values)


def test_names_must_differ_and_stay_inside(images, out):
    path = images / "CAM_A" / "000.jpg"
    for names in (("a", "a"), ("../a",), ("/a",), ("",), ("a", "b/../a")):
        with pytest.raises(UserError):
            make_masks([Frame(path, name) for name in names], Bright(), out)
    assert not out.exists()
    picture(images / "CAM_A" / "000.png", 0)
    with pytest.raises(UserError, match=r"000\.jpg and .*000\.png|000\.png and .*000\.jpg"):
        folder_frames(images)


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        folder_frames(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no picture"):
        folder_frames(tmp_path)


def test_batches_have_the_given_size(images, out):
    masker = Bright()
    make_masks(folder_frames(images), masker, out, 3)
    assert [len(call) for call in masker.calls] == [3, 3, 1]
    assert run.MASKER_FILE == "masker.json"


def test_a_picture_that_is_refused_loses_another_maskers_mask(images, out):
    frames = folder_frames(images)
    make_masks(frames, Bright(), out)
    frames[0].picture.write_bytes(b"no picture")
    report = make_masks(frames, Bright(5), out, skip_bad=1)
    assert [name for name, _ in report.bad] == [frames[0].name]
    assert len(files(out)) == 12
    mask = out / "masks" / f"{frames[0].name}.png"
    assert not mask.exists()
    Image.new("1", SIZE[::-1]).save(mask)  # by hand
    make_masks(frames, Bright(5), out, skip_bad=1)
    assert mask.exists()


def test_masks_beside_the_pictures_are_no_pictures(images):
    assert make_masks(folder_frames(images, images), Bright(), images).made == 7
    assert make_masks(folder_frames(images, images), Bright(), images) == MaskReport(0, 0, 7, ())


def test_a_mask_of_other_settings_than_the_folder_says_is_refused(images, out):
    make_masks(folder_frames(images), Bright(), out)
    masker = json.loads((out / "masker.json").read_text())
    path = out / "masks" / "CAM_A" / "000.png"
    check_stamp(path.read_bytes(), path, masker)
    make_masks(folder_frames(images)[:1], Bright(5), out)
    with pytest.raises(UserError, match=r"CAM_A/000\.png was made by another masker"):
        check_stamp(path.read_bytes(), path, masker)
    Image.open(path).save(path)  # corrected by hand
    check_stamp(path.read_bytes(), path, masker)


def test_grey_of_sixteen_bits_is_seen_as_the_model_sees_it(tmp_path):
    grey = np.linspace(0, 65_535, 40 * 56).reshape(SIZE).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    want = decode_image((tmp_path / "deep.png").read_bytes(), SIZE)
    found = read_rgb(tmp_path / "deep.png").astype(int)
    assert np.abs(found - want).max() <= 1


def test_a_picture_of_too_many_pixels_is_one_sentence(tmp_path, monkeypatch):
    Image.new("L", SIZE).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = (tmp_path / "large.png").read_bytes()
    for read in (lambda path: check_picture(data, path), read_rgb):
        with pytest.raises(UserError, match=r"large\.png cannot be decoded.*exceeds limit"):
            read(tmp_path / "large.png")
