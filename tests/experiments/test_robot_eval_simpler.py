"""`fastdrive robot eval` of an OpenVLA checkpoint on SIMPLER, with a stand-in for the simulator."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_simpler import write_simulator
from small_openvla import small_openvla, write_tokenizer

from data_pipelines.robot.environment import make_suite
from experiments import robot_openvla
from experiments.cli import main
from experiments.robot_policies import check_policy, robot_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows

SUITE = "simpler_bridge"
LOW, HIGH = [-0.03] * 6 + [0.0], [0.05] * 6 + [1.0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint's folder, whose weights are a small random model's."""
    model, params = small_openvla(views=1)
    monkeypatch.setattr(robot_openvla, "load", lambda *given: (model.config, params))
    monkeypatch.setenv("SIMPLER_PYTHON", str(write_simulator(tmp_path / "simulator")))
    monkeypatch.setenv("FAKE_SIMPLER_LOG", str(tmp_path / "log"))
    folder = tmp_path / "openvla-7b"
    folder.mkdir()
    write_tokenizer(folder)
    action = {"q01": LOW, "q99": HIGH, "mask": [True] * 6 + [False]}
    statistics = {"bridge_orig": {"action": action}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    return folder


def test_the_command_runs_a_checkpoint(folder, tmp_path):
    words = f"--suites {SUITE} --policies openvla --methods vlapruner_released --ratios 0.5 "
    words += "--tasks 1 --trials 2 --workers 2 --films 1 --quiet"
    out = ["--weights", str(folder), "--out", str(tmp_path / "run")]
    assert main(["robot", "eval", *words.split(), *out]) == 0
    rows, _ = read_rows(tmp_path / "run" / "robot.json")
    found = {(row.method, row.metric): row for row in rows}
    for method in ("openvla unpruned", "openvla vlapruner_released"):
        assert found[method, f"{SUITE}_success"].n == 2
    assert "put carrot on plate" in (tmp_path / "run" / "robot.md").read_text()
    assert len(list((tmp_path / "run" / "films").glob("*.gif"))) == 2


def test_actions_are_those_of_the_real_robots_data(folder):
    suite = make_suite(SUITE)
    env = suite.open()
    policy = robot_policy("openvla", suite, "unpruned", 1.0, 0, folder)
    acted = policy.act([env.reset(0, 0)], policy.start(1), np.ones(1, bool))
    env.close()
    actions = acted.actions[0]
    assert actions.shape == (1, 7)
    assert (actions[:, :6] >= np.float32(-0.03)).all()
    assert (actions[:, :6] <= np.float32(0.05)).all()


def test_what_does_not_fit_is_refused(folder, monkeypatch):
    with pytest.raises(UserError, match="pi0 knows LIBERO's suites; leave it out for simpler"):
        check_policy("pi0", SUITE, folder)
    with pytest.raises(UserError, match=r"fractal20220817_data.*bridge_orig"):
        robot_policy("openvla", make_suite("simpler_drawer"), "unpruned", 1.0, 0, folder)
    model, params = small_openvla(views=2)
    monkeypatch.setattr(
        robot_openvla, "load", lambda *given: (replace(model.config, views=2), params)
    )
    with pytest.raises(UserError, match="takes 2 pictures; simpler_bridge has one camera"):
        robot_policy("openvla", make_suite(SUITE), "unpruned", 1.0, 0, folder)
