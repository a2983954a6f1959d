"""`fastdrive robot eval` on a robot without a simulator, and on the tabletop where MuJoCo is."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from robot_fakes import counting_suite

from data_pipelines.robot import rendering
from data_pipelines.robot.environment import make_suite
from data_pipelines.robot.workers import Film
from experiments import robot_eval
from experiments.cli import main
from experiments.robot_demos import file_policy
from experiments.robot_eval import RobotEvalArgs
from experiments.robot_policies import robot_policy
from experiments.robot_report import Outcome, Setting, film_gif, rows_of
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.bootstrap import paired_difference
from fastdrive_jax.evaluation.proportions import wilson
from fastdrive_jax.evaluation.results import read_rows

simulated = pytest.mark.skipif(rendering.absent() is not None, reason=str(rendering.absent()))
OWN = """
from robot_fakes import remembering_policy

def model(suite, method, ratio, seed):
    assert suite.name == "counting"
    return remembering_policy(chunk=1 if method == "unpruned" else 3)
"""


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(robot_eval, "make_suite", lambda *given: counting_suite())
    (tmp_path / "own.py").write_text(OWN)
    return RobotEvalArgs(
        out=tmp_path / "run",
        suites=("counting",),
        policies=("random", f"{tmp_path}/own.py:model"),
        methods=("fastv",),
        ratios=(0.5,),
        trials=2,
        workers=2,
        batch=1,
        films=1,
        quiet=True,
    )


def cells_of(path):
    rows, meta = read_rows(path)
    return {(row.method, row.keep_ratio, row.metric): row for row in rows}, meta


def test_runs_compares_and_goes_on_where_it_stopped(args, monkeypatch):
    cells, meta = cells_of(robot_eval.robot_eval(args))
    for method, ratio in (("random", None), ("model unpruned", 1.0), ("model fastv", 0.5)):
        success = cells[method, ratio, "counting_success"]
        assert success.n == 8
        assert success.low <= success.value <= success.high
        assert cells[method, ratio, "counting_policy_hz"].value > 0
        assert cells[method, ratio, "counting_environment_ms"].value > 0
    assert cells["model unpruned", 1.0, "counting_success"].value == 0.75  # 3 of 4 tasks
    assert cells["model fastv", 0.5, "counting_success_task3"].value == 0
    assert cells["model unpruned", 1.0, "counting_prefill_ms"].value == pytest.approx(500)
    difference = cells["model fastv - model unpruned", 0.5, "counting_success_difference"]
    assert difference.value == 0
    assert (meta["workers"], meta["batch"], meta["trials"]) == (2, 1, 2)
    table = (args.out / "robot.md").read_text()
    assert "| model fastv | 50% | 75.0 [" in table
    assert "| count to 5 |" in table
    films = sorted((args.out / "films").glob("*.gif"))
    assert len(films) == 3
    assert Image.open(next(f for f in films if "fastv" in f.name)).n_frames == 4

    # A line that a kill cut short, and one that is missing: these are run again, and no other.
    kept = next((args.out / "episodes").glob("*fastv*.jsonl"))
    lines = kept.read_text().splitlines()
    lost = {tuple(json.loads(line)[k] for k in ("task", "trial")) for line in lines[-2:]}
    kept.write_text("\n".join([*lines[:-2], lines[-2][:20]]))
    run, jobs = robot_eval.run_episodes, []

    def counted(suite, given, *rest):
        jobs.extend((job.task, job.trial) for job in given)
        return run(suite, given, *rest)

    monkeypatch.setattr(robot_eval, "run_episodes", counted)
    again, _ = cells_of(robot_eval.robot_eval(args))
    assert set(jobs) == lost
    assert again.keys() == cells.keys()

    # A film that is missing is made of an episode that is run again; what became of it stays.
    jobs.clear()
    films[0].unlink()
    before = {path: path.read_bytes() for path in args.out.glob("episodes/*.jsonl")}
    robot_eval.robot_eval(args)
    assert len(jobs) == 1
    assert films[0].exists()
    assert before == {path: path.read_bytes() for path in args.out.glob("episodes/*.jsonl")}

    kept.write_text("{}\n" + kept.read_text())
    with pytest.raises(UserError, match=r"Line 1 of .*fastv"):
        robot_eval.robot_eval(args)


def outcomes_of(setting, wins):
    one = {"steps": 4, "decisions": 2, "seconds": {"policy": 0.2, "environment": 0.1}}
    return {(0, k): Outcome(0, k, bool(win), **one) for k, win in enumerate(wins)}


def test_rows_pair_by_initial_state_and_pool_seeds():
    suite = counting_suite()
    found = {}
    for seed, base, pruned in ((0, [1, 1, 1, 0], [1, 0, 0, 0]), (1, [1, 1, 0, 1], [1, 1, 0, 0])):
        found[Setting("counting", "m", "unpruned", 1.0, seed)] = outcomes_of(None, base)
        found[Setting("counting", "m", "fastv", 0.5, seed)] = outcomes_of(None, pruned)
    rows = rows_of(found, {"counting": suite})
    cells = {(row.method, row.metric, row.seed): row for row in rows}
    alone = cells["m fastv", "counting_success", 0]
    expected = wilson(1, 4)
    assert (alone.value, alone.low, alone.high) == (0.25, expected.low, expected.high)
    assert cells["m fastv", "counting_success", None].value == 3 / 8
    difference = cells["m fastv - m unpruned", "counting_success_difference", None]
    assert difference.value == pytest.approx(-3 / 8)
    assert difference.n == 8
    assert cells["m fastv", "counting_policy_hz", 0].value == pytest.approx(4 / 0.2)
    assert cells["m fastv", "counting_loop_hz", 0].value == pytest.approx(4 / 0.3)
    assert cells["m fastv", "counting_environment_ms", 0].value == pytest.approx(25)
    assert cells["m fastv", "counting_policy_ms", 0].value == pytest.approx(100)


@pytest.mark.parametrize(
    ("base", "pruned", "drawn", "low", "high"),
    [
        # z^2 / (n + z^2) of n = 8 pairs and of 4 initial states that two seeds share.
        ([[1, 0, 1, 1]] * 2, [[1, 0, 1, 1]] * 2, True, -0.324408, 0.324408),
        ([[1, 0, 1, 1]] * 2, [[1, 0, 1, 1]] * 2, False, -0.489891, 0.489891),
        ([[1] * 4] * 2, [[0] * 4] * 2, True, -1, 2 * 0.324408 - 1),
        ([[1] * 4] * 2, [[0] * 4, [1] * 4], False, -0.5 - 0.5 * 0.489891, -0.5 + 1.5 * 0.489891),
    ],
)
def test_a_difference_that_all_states_share_has_a_width(base, pruned, drawn, low, high):
    suite = replace(counting_suite(), seed=5 if drawn else None)
    found = {}
    for seed in (0, 1):
        found[Setting("counting", "m", "unpruned", 1.0, seed)] = outcomes_of(None, base[seed])
        found[Setting("counting", "m", "fastv", 0.5, seed)] = outcomes_of(None, pruned[seed])
    rows = rows_of(found, {"counting": suite})
    (difference,) = [row for row in rows if row.metric == "counting_success_difference"]
    assert difference.n == 8
    assert (difference.low, difference.high) == pytest.approx((low, high), abs=1e-6)


def test_where_states_differ_they_are_resampled():
    wins = [1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 0, 1]
    settings = [Setting("counting", "m", name, 1.0, 0) for name in ("unpruned", "fastv")]
    found = {one: outcomes_of(one, some) for one, some in zip(settings, wins, strict=True)}
    rows = rows_of(found, {"counting": counting_suite()})
    (difference,) = [row for row in rows if row.metric == "counting_success_difference"]
    expected = paired_difference(wins[1], wins[0])
    assert (difference.low, difference.high) == (expected.low, expected.high)


@pytest.mark.parametrize("wins", [0, 1])
def test_a_success_that_all_states_share_over_seeds_has_a_width(wins):
    """LIBERO's initial states are the same for every seed, so 4 of them count as 4."""
    suite = replace(counting_suite(), seed=None)
    settings = [Setting("counting", "m", "unpruned", 1.0, seed) for seed in (0, 1)]
    rows = rows_of({one: outcomes_of(one, [wins] * 4) for one in settings}, {"counting": suite})
    (pooled,) = [row for row in rows if (row.metric, row.seed) == ("counting_success", None)]
    expected = wilson(4 * wins, 4)
    assert (pooled.value, pooled.n) == (wins, 8)
    assert (pooled.low, pooled.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("wins", [0, 1])
def test_seeds_that_draw_states_of_their_own_are_pooled_with_wilsons_interval(wins):
    """Never, or always, in eight episodes is no certainty."""
    suite = replace(counting_suite(), seed=5)
    settings = [Setting("counting", "m", "unpruned", 1.0, seed) for seed in (0, 1)]
    found = {one: outcomes_of(one, [wins] * 4) for one in settings}
    (pooled,) = [
        row
        for row in rows_of(found, {"counting": suite})
        if (row.metric, row.seed) == ("counting_success", None)
    ]
    expected = wilson(8 * wins, 8)
    assert (pooled.value, pooled.low, pooled.high) == (wins, expected.low, expected.high)
    assert pooled.high - pooled.low > 0.3


@pytest.fixture
def film():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (3, 2, 32, 32, 3), np.uint8)
    return Film(frames, (0, 2), (np.array([0, 5]), np.array([1, 2])))


def test_films_show_kept_tokens_of_each_view(film):
    data = film_gif(film, (2, 2), 5)
    picture = Image.open(io.BytesIO(data))
    assert picture.n_frames == 3
    assert picture.info["duration"] == 200
    assert picture.size == (56, 28)
    # Token 0 of the first view and token 5, which is 1 of the second, keep their colours.
    np.testing.assert_array_equal(colourful(picture), [[True, False, False, True], [False] * 4])
    assert Image.open(io.BytesIO(film_gif(film, None, 5))).size == (64, 32)


def colourful(picture):
    """Which of 2 x 4 tokens are not washed out."""
    shown = np.asarray(picture.convert("RGB")).astype(int)
    return np.ptp(shown, axis=-1).reshape(2, 14, 4, 14).mean((1, 3)) > 30


def test_films_keep_their_size_while_a_method_warms_up(film):
    film = replace(film, kept=(None, film.kept[0]))
    picture = Image.open(io.BytesIO(film_gif(film, (2, 2), 5)))
    assert picture.size == (56, 28)
    np.testing.assert_array_equal(colourful(picture), [[True] * 4] * 2)
    picture.seek(2)
    np.testing.assert_array_equal(colourful(picture), [[True, False, False, True], [False] * 4])


@pytest.mark.parametrize(
    ("views", "left", "right"),
    [
        ((1, 0), [[False, True], [False] * 2], [[True, False], [False] * 2]),
        ((0,), [[True, False], [False] * 2], [[True] * 2] * 2),  # the other one is not seen at all
        ((1,), [[True] * 2] * 2, [[True, False], [False] * 2]),
    ],
)
def test_films_show_tokens_on_the_pictures_that_the_model_saw(film, views, left, right):
    picture = Image.open(io.BytesIO(film_gif(film, (2, 2), 5, views)))
    np.testing.assert_array_equal(colourful(picture), np.hstack([left, right]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policies": ("experd",)}, "did you mean 'expert'"),
        ({"policies": ("expert",), "suites": ("libero_goal",)}, "tabletop only"),
        ({"ratios": (1.5,)}, "1.5"),
        ({"trials": 0}, "trials=0"),
        ({"seeds": (1, 1)}, "each once"),
        ({"policies": ("a.py:model", "b.py:model")}, "a.py:model, b.py:model would all be called"),
        ({"methods": ("fastv", "fastv")}, "'fastv' in tables"),
        ({"asset_id": "kitchen"}, "asset_id='kitchen'.*folder as --weights"),
    ],
)
def test_refusals(change, named):
    with pytest.raises(UserError, match=named):
        RobotEvalArgs(**change)


def test_tasks_that_there_are_not_and_files_that_are_missing_are_refused(args):
    with pytest.raises(UserError, match="no task 7"):
        robot_eval.check_jobs(RobotEvalArgs(tasks=(7,)), counting_suite())
    with pytest.raises(UserError, match=r"There is no file nowhere\.py"):
        robot_policy("nowhere.py:model", counting_suite(), "unpruned", 1.0, 0)


@pytest.mark.parametrize(
    "give", [lambda run: RobotEvalArgs(policies=("openvla",), weights=run), file_policy]
)
def test_a_trainings_folder_is_told_from_the_policy_in_it(tmp_path, give):
    (tmp_path / "train" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"not ended; run it to its end for .*policy\.safetensors"):
        give(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"give the policy in it, .*/policy\.safetensors"):
        give(tmp_path)


@simulated
def test_the_packaged_policy_puts_things_in_the_tray(tmp_path):
    words = "--policies openvla --tasks 4 5 --trials 3 --workers 2 --films 0 --quiet"
    assert main(["robot", "eval", "--out", str(tmp_path), *words.split()]) == 0
    cells, _ = cells_of(tmp_path / "robot.json")
    assert cells["openvla unpruned", 1.0, "tabletop_success"].value >= 0.5


@simulated
def test_the_commands_on_the_tabletop(tmp_path, capsys):
    demos = ["robot", "demos", "--out", str(tmp_path / "demos"), "--episodes", "1"]
    assert main([*demos, "--val-episodes", "1", "--image-size", "32", "32", "--quiet"]) == 0
    assert "train: 6 episodes" in capsys.readouterr().out
    words = "--tasks 0 4 --trials 1 --workers 2 --films 1 --image-size 64 64 --quiet"
    assert main(["robot", "eval", "--out", str(tmp_path / "run"), *words.split()]) == 0
    cells, _ = cells_of(tmp_path / "run" / "robot.json")
    assert cells["expert", None, "tabletop_success"].value == 1
    assert cells["random", None, "tabletop_success"].value == 0
    assert len(list((tmp_path / "run" / "films").glob("*.gif"))) == 2
    assert main(["robot", "eval", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "image_size" in capsys.readouterr().err
    assert make_suite("tabletop", (64, 64)).seed == 0
