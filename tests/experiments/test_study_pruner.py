from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.features import TokenEncoder
from data_pipelines.synthetic.config import WorldConfig
from experiments import study_pruner as study
from experiments import study_variants
from experiments.configs.pruner import CAMVID, FAITHFUL, PRUNER_RUNS, TINY
from experiments.study_pruner import StudyPrunerArgs, study_table
from experiments.study_variants import DECODER, VARIANTS, Variant, bases, changes, runs_of
from experiments.train_pruner import train_pruner
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, read_rows, select
from fastdrive_jax.training.reconstruction import ReconConfig

WORLD = WorldConfig(
    train_scenes=1,
    val_scenes=1,
    keyframes_per_scene=4,
    height=56,
    width=84,
    cameras=("CAM_FRONT",),
    workers=1,
)
NAMES = ("faithful", "faithful+mask_only")


def squares(images):
    """The first numbers of each token's pixels as its token."""
    parts = images.reshape(len(images), 2, 28, 3, 28, 3).transpose(0, 1, 3, 2, 4, 5)
    return parts.reshape(len(images), 6, -1)[..., :128].astype(np.float32) / 255


class TrainOnce:
    """One real training stands for all, whose trees are alike: compiling takes most of its time."""

    params = None

    def __call__(self, train, run, workdir, quiet):
        if self.params is None:
            self.params, _ = train_pruner(train, run, workdir, quiet)
        return self.params, []


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train_pruner", TrainOnce())
        patch.setattr(study, "vla_tokens", lambda: TokenEncoder("squares", 128, squares))
        patch.setattr(study_variants, "DECODER", replace(DECODER, num_layers=1))
        yield


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return StudyPrunerArgs(
        tmp_path_factory.mktemp("study"),
        data=("synthetic",),
        world=WORLD,
        variants=NAMES,
        seeds=(0, 1),
        steps=2,
        quiet=True,
    )


@pytest.fixture(scope="module")
def table(arguments):
    return study.study_pruner(arguments)[0]


def test_each_variant_and_seed_has_its_rows_beside_the_controls(table):
    rows, meta = read_rows(table.with_name("results.json"))
    assert set(meta["runs"]) == set(NAMES)
    for name in NAMES:
        for seed in (0, 1):
            own = select(rows, method=name, seed=seed)
            recalls = {(row.metric, row.keep_ratio) for row in own if row.keep_ratio}
            assert ("foreground_recall", 0.25) in recalls
            assert ("object_recall", 0.75) in recalls
            alone = {row.metric for row in own if row.keep_ratio is None}
            painted = set(study.RECONSTRUCTION) if name == "faithful" else set()
            assert alone == {"kept", "collapsed", *painted}
            assert all(0 <= row.value <= 1 for row in own if row.keep_ratio)
    assert {row.method for row in rows} == {*NAMES, *study.CONTROLS}


def test_what_is_measured_is_not_trained_again(table, arguments, monkeypatch):
    before = table.read_bytes()
    monkeypatch.setattr(study, "train_pruner", None)
    assert study.study_pruner(arguments)[0].read_bytes() == before
    with pytest.raises(UserError, match="another config"):
        study.study_pruner(replace(arguments, steps=3))


def test_the_table_has_a_line_a_variant_with_what_it_changes(table):
    lines = table.read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("| faithful+mask_only"))
    assert "`mask_weight=1.0, pixel_weight=0.0`" in line
    assert [line.count("|") for line in lines if line.startswith("|")] == [13] * 7
    assert "4 pictures to train and 4 to measure, 2 x 3 tokens, 2 steps of 4" in lines[0]


def test_a_cell_is_the_mean_of_the_seeds_with_their_range():
    def row(metric, value, seed, ratio=None):
        return Row("faithful", ratio, metric, value, None, None, 9, seed)

    rows = [row("foreground_recall", 0.5 + 0.1 * seed, seed, 0.5) for seed in range(3)]
    rows += [row("collapsed", float(seed == 1), seed) for seed in range(3)]
    text = study_table("caption", [(Variant("faithful", "as published"), "")], rows)
    assert "| 60.0 [50.0, 70.0] |" in text
    assert "| 1 of 3 |" in text
    assert "- faithful: as published." in text


@pytest.mark.parametrize(("shift", "collapsed"), [(-10.0, 1.0), (0.0, 0.0), (10.0, 1.0)])
def test_a_sign_mask_of_all_or_nothing_has_collapsed(
    arguments, table, monkeypatch, shift, collapsed
):
    data = study.synthetic_data(arguments, table.parent)
    scores = jax.random.normal(jax.random.key(0), (4, 6)) + shift
    monkeypatch.setattr(study, "_apply", lambda *_: (scores, {}))
    run = bases(TINY)["faithful"]
    assert [
        row.value for row in study.measure("x", {}, run, data) if row.metric == "collapsed"
    ] == [collapsed]
    budget = replace(run, recon=replace(run.recon, mask_mode="top_k"))
    assert not select(study.measure("x", {}, budget, data), metric="collapsed")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": ("faithful+luck",)}, "no variant 'faithful\\+luck'"),
        ({"data": ("kitti",)}, "data='kitti'"),
        ({"data": ("camvid",)}, "--camvid DIR"),
        ({"seeds": ()}, "at least one"),
        ({"steps": 1}, "steps=1"),
    ],
)
def test_what_cannot_be_studied_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        StudyPrunerArgs(**{"data": ("synthetic",)} | fields)


@pytest.mark.parametrize("tuned", [CAMVID, TINY])
def test_variants_change_one_thing_each_and_those_that_change_nothing_are_left_out(tuned):
    settings = bases(tuned)
    runs = runs_of(VARIANTS, settings)
    described = {variant.name: changes(run, settings[variant.base]) for variant, run in runs}
    assert [name for name, change in described.items() if not change] == ["faithful", "tuned"]
    assert len(set(described)) == len(runs)
    same = "tuned+sign" if tuned is CAMVID else "tuned+mask_1"
    assert same not in described


def test_the_published_objective_stays_as_a_config():
    assert PRUNER_RUNS["faithful"] is FAITHFUL
    published = ReconConfig(
        pruner=FAITHFUL.recon.pruner, decoder=FAITHFUL.recon.decoder, target_pixels=14
    )
    assert FAITHFUL.recon == published
    for name in ("budget_weight", "mask_weight", "mask_surprise"):
        assert getattr(published, name) == 0
    assert (published.mask_mode, published.surrogate, published.fill) == (
        "sign",
        "identity",
        "zero",
    )
    assert (published.alpha, published.ssim_weight, published.pixel_weight) == (0.5, 0.2, 1.0)


def test_other_pictures_in_the_same_folder_of_results_are_not_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "dino_encoder", lambda weights: TokenEncoder("c", 3, colours))
    monkeypatch.setattr(study, "CAMVID_SIZE", (28, 28))
    for count, name in ((2, "first"), (3, "second")):
        write_camvid(tmp_path / name, count)
        args = StudyPrunerArgs(tmp_path / "out", camvid=tmp_path / name, quiet=True)
        data = study.camvid_data(args, tmp_path / "out" / "camvid")
        assert len(data.features.splits["train"].tokens) == count


def colours(images):
    return images.reshape(len(images), 1, -1, 3).mean(axis=2).astype(np.float32) / 255


def write_camvid(folder, count):
    rng = np.random.default_rng(count)
    for split, pictures in (("train", count), ("val", 1)):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for number in range(pictures):
            picture = rng.integers(0, 256, (28, 28, 3), np.uint8)
            Image.fromarray(picture).save(folder / split / "images" / f"{number}.png")
            labels = np.full((28, 28), 3 + number % 2 * 3, np.uint8)
            Image.fromarray(labels).save(folder / split / "labels" / f"{number}.png")
