"""The page "robots": its policy is written as it stands there, and run."""

from pages import ROOT, write_files
from robot_fakes import counting_suite

from experiments import robot_eval
from experiments.robot_eval import RobotEvalArgs
from fastdrive_jax.evaluation.results import read_rows


def test_the_policy_of_the_page_is_run(tmp_path, monkeypatch):
    write_files(ROOT / "docs" / "robot.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(robot_eval, "make_suite", lambda *given: counting_suite())
    args = RobotEvalArgs(
        out=tmp_path / "run",
        suites=("counting",),
        policies=("blind.py:blind",),
        methods=("fastv",),
        ratios=(0.5,),
        trials=1,
        tasks=(0, 3),
        workers=2,
        quiet=True,
    )
    rows, _ = read_rows(robot_eval.robot_eval(args))
    cells = {(row.method, row.metric): row for row in rows}
    assert cells["blind fastv", "counting_success"].value == 0
    assert cells["blind fastv", "counting_policy_hz"].value > 0
    assert len(list((tmp_path / "run" / "films").glob("*.gif"))) == 4
