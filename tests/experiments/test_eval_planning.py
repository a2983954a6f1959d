"""The evaluation on a benchmark of a few frames."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments.configs.pruner import TINY
from experiments.eval_planning import EvalPlanningArgs, eval_planning
from experiments.planned import Part, Setting, read_planned
from experiments.planning_benchmark import CONTROLS, BenchmarkConfig
from fastdrive_jax.errors import UserError
from fastdrive_jax.training.run_config import claim_run_folder

METHODS = ("reconpruner", "random", "ground_truth", "vlapruner")
BENCHMARK = BenchmarkConfig(
    train_scenes=2,
    scenes=3,
    seeds=(0, 3),
    pruner=dataclasses.replace(
        TINY,
        optimizer=dataclasses.replace(TINY.optimizer, total_steps=3, warmup_steps=1),
        recon=dataclasses.replace(
            TINY.recon, decoder=dataclasses.replace(TINY.recon.decoder, num_layers=1)
        ),
    ),
)


def args(out, **settings):
    given = {"methods": METHODS, "ratios": (0.5,), "draws": 2, "scenes": 2, "pictures": 2}
    return EvalPlanningArgs(out, benchmark=BENCHMARK, quiet=True, **(given | settings))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    assert eval_planning(args(folder)) == folder / "report.html"
    return folder


def rows_of(out):
    rows = json.loads((out / "planning.json").read_text())["rows"]
    return {(row["method"], row["keep_ratio"], row["metric"]): row for row in rows}


def test_every_setting_has_every_metric(out):
    rows = rows_of(out)
    settings = [("unpruned", 1.0), *((name, 0.5) for name in METHODS)]
    settings += [(name, None) for name in CONTROLS]
    for setting in settings:
        for metric in ("l2_temavg", "l2_temavg_3s", "l2_noavg", "ade", "collision_impromptu",
                       "collision_omnidrive_2s", "intersection_bevplanner"):  # fmt: skip
            assert rows[*setting, metric]["n"] == 18
            assert rows[*setting, metric]["low"] <= rows[*setting, metric]["high"]
        kinds = [rows.get((*setting, f"l2_temavg/{k}")) for k in ("straight", "turn", "stopped")]
        assert sum(row["n"] for row in kinds if row) == 18
    assert rows["driven", None, "ade"]["value"] == pytest.approx(0, abs=1e-5)
    assert rows["driven", None, "collision_impromptu"]["value"] == 0
    assert rows["reconpruner", 0.5, "rank"]["low"] >= 1
    assert ("reconpruner - random", 0.5, "l2_temavg_p_holm") in rows
    assert ("random - unpruned", 0.5, "l2_temavg_difference") in rows


def test_trainings_and_draws_are_averaged(out):
    rows = rows_of(out)
    for method, seeds in (("reconpruner", (0, 3)), ("random", (0, 1))):
        each = [rows[f"{method}, seed {s}", 0.5, "l2_temavg"]["value"] for s in seeds]
        assert len(set(each)) == 2
        assert rows[method, 0.5, "l2_temavg"]["value"] == pytest.approx(np.mean(each))


def test_rows_agree_with_the_plans_that_were_kept(out):
    tokens = read_tokens(out, Setting("unpruned", 1.0))
    planned = read_planned(out / "plans", Setting("reconpruner", 0.5, 3), Part(), tokens)
    assert planned.waypoints.shape == (18, 6, 2)
    assert planned.kept.shape == (18, 56)
    assert read_planned(out / "plans", Setting("no_image", None), Part(), tokens).kept.shape[1] == 0


def read_tokens(out, setting):
    with np.load(Part().path(out / "plans", setting)) as file:
        return file["tokens"].tolist()


def test_tables_and_page(out):
    text = (out / "planning.md").read_text()
    assert "| 100% | unpruned |" in text
    line = next(line for line in text.splitlines() if line.startswith("| 100% | unpruned |"))
    assert "| 100.0 |" in line  # relative to itself
    assert "18 of 18 frames have a whole future" in text
    assert "over 3 scenes" in text
    assert "too narrow" in text
    meta = json.loads((out / "planning.json").read_text())["meta"]
    assert (meta["frames"], meta["scenes"]) == (18, 3)
    with (out / "planning.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(json.loads((out / "planning.json").read_text())["rows"])
    page = (out / "report.html").read_text()
    for name in ("frame_0_above", "frame_1_kept", "cost_50"):
        assert (out / "pictures" / f"{name}.png").exists()
    assert "Paired differences of L2" in page


def test_a_second_start_plans_what_is_missing_and_finds_the_same(out):
    before = rows_of(out)
    kept, lost = (
        Part().path(out / "plans", Setting(n, 0.5)) for n in ("ground_truth", "vlapruner")
    )
    time, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    eval_planning(args(out))
    assert kept.stat().st_mtime_ns == time
    assert lost.read_bytes() == content
    assert rows_of(out) == before


def test_other_trainings_may_be_asked_for(out, tmp_path):
    """What is there is not planned again, nor trained."""
    for path in out.iterdir():
        (tmp_path / path.name).symlink_to(path)
    benchmark = dataclasses.replace(BENCHMARK, seeds=(3,))
    some = dataclasses.replace(args(tmp_path, methods=("reconpruner",)), benchmark=benchmark)
    time = (out / "plans").stat().st_mtime_ns
    eval_planning(some)
    assert (out / "plans").stat().st_mtime_ns == time
    found, before = rows_of(tmp_path), rows_of(out)
    assert found["reconpruner", 0.5, "ade"]["value"] == pytest.approx(
        before["reconpruner, seed 3", 0.5, "ade"]["value"]
    )
    assert json.loads((tmp_path / "ready.json").read_text())["seeds"] == [3]
    assert json.loads((out / "ready.json").read_text())["seeds"] == [0, 3]


@pytest.mark.slow
def test_parts_find_what_one_process_finds(out, tmp_path):
    for path in out.iterdir():
        if path.name != "plans":
            (tmp_path / path.name).symlink_to(path)
    some = {"methods": ("reconpruner", "random"), "parts": 2}
    both = [args(tmp_path, part=part, **some) for part in (1, 0)]
    for name in ("planning.json", "planning.csv", "planning.md", "report.html", "pictures"):
        (tmp_path / name).unlink(missing_ok=True)
    assert eval_planning(both[0]) is None  # ready.json is there, so it does not wait
    assert not (tmp_path / "planning.json").exists()
    assert eval_planning(both[1]) == tmp_path / "report.html"
    mine, theirs = rows_of(tmp_path), rows_of(out)
    assert ("random - unpruned", 0.5, "l2_temavg_difference") in mine
    for key, row in mine.items():  # but draws, whose keys follow the scenes of a batch, and ranks
        if "random" not in key[0] and not key[2].endswith(("rank", "holm")):
            assert row["value"] == pytest.approx(theirs[key]["value"], abs=1e-5), key


def test_bad_arguments_are_refused(tmp_path):
    for settings, text in (
        ({"protocols": ("uniad",)}, "protocols .*uniad.*unknown"),
        ({"ratios": (0.0,)}, "0"),
        ({"parts": 2, "part": 2}, "part=2 must be"),
        ({"methods": ("nobody",)}, "nobody"),
    ):
        with pytest.raises(UserError, match=text):
            args(tmp_path, **settings)
    with pytest.raises(UserError, match="did not prepare"):
        eval_planning(args(tmp_path, parts=2, part=1, wait_minutes=0.001))


def test_damaged_plans_and_those_of_other_samples_are_named(out, tmp_path):
    setting, tokens = Setting("unpruned", 1.0), read_tokens(out, Setting("unpruned", 1.0))
    with pytest.raises(UserError, match="plans of other samples"):
        read_planned(out / "plans", setting, Part(), tokens[1:])
    path = Part().path(tmp_path, setting)
    path.parent.mkdir(parents=True)
    whole = Part().path(out / "plans", setting).read_bytes()
    for damaged in (b"PK broken", whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            read_planned(tmp_path, setting, Part(), tokens)
    path.write_bytes(whole)
    with pytest.raises(UserError, match="holds places of the car's origin, not of its lidar"):
        read_planned(tmp_path, setting, Part(), tokens, "lidar")


def test_plans_belong_to_weights_and_to_the_file_of_a_method(out, tmp_path):
    kept = out / "plans" / "weights"
    names = ["shards", "training-0", "training-3", "vla"]
    assert sorted(path.name for path in kept.iterdir()) == names
    assert len(json.loads((kept / "vla" / "config.json").read_text())["digest"]) == 64
    for name in ("training-3", "shards"):
        with pytest.raises(UserError, match=f"{name} holds a run of another config"):
            claim_run_folder(kept / name, {"digest": "0" * 64})
    file = tmp_path / "mine.py"
    file.write_text("a = 1")
    setting = Setting("best", 0.5, 2, f"{file}:best")
    first = setting.slug
    assert first.startswith("best-0.5-s2-")
    file.write_text("a = 2")
    assert setting.slug != first
