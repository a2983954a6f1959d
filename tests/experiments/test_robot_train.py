"""From demonstrations to a policy file that acts, at a tiny size."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_openvla import small_openvla

from data_pipelines.robot import rendering
from data_pipelines.robot.demonstrations import record_demonstrations
from data_pipelines.robot.recording import DemoConfig
from data_pipelines.robot.tabletop import SEGMENTS
from experiments.cli import main
from experiments.robot_demos import RobotDemosArgs, robot_demos
from experiments.robot_eval import RobotEvalArgs, robot_eval
from experiments.robot_train import RobotTrainConfig, robot_train
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.models.openvla.policy_file import load_policy
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.robot import RobotLossConfig
from fastdrive_jax.training.robot_heads import HeadConfig

pytestmark = pytest.mark.skipif(rendering.absent() is not None, reason=str(rendering.absent()))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("robot")
    record_demonstrations(
        folder / "demos", DemoConfig(episodes=1, val_episodes=1, image_size=(24, 24)), 1, False
    )
    model = small_openvla()[0].config
    return RobotTrainConfig(
        demos=(folder / "demos",),
        out=folder / "run",
        model=replace(model, text=replace(model.text, num_layers=2)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, total_steps=3),
        loss=RobotLossConfig(
            HeadConfig(point_layer=0, locate_layer=1),
            keep_choices=(1.0, 0.5),  # each share is compiled
        ),
        batch_size=8,  # other tests may have made eight devices of this process
        quiet=True,
    )


def test_a_trained_policy_acts_on_the_tabletop(config, tmp_path):
    path = robot_train(config)
    model, params, spec = load_policy(path)
    assert model.config == config.model
    assert spec.views == ("front", "wrist")
    assert spec.statistics.action.unused == (False, False, False, True, True, False, False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    kept = path.read_bytes()
    assert robot_train(config).read_bytes() == kept  # the run is whole: nothing is trained again
    args = RobotEvalArgs(
        out=tmp_path / "eval", policies=("openvla",), weights=path, methods=("vlapruner",),
        ratios=(0.25,), trials=1, tasks=(0,), image_size=(24, 24), workers=1, films=1, quiet=True,
    )  # fmt: skip
    rows, _ = read_rows(robot_eval(args))
    methods = {row.method for row in rows}
    assert methods == {"openvla unpruned", "openvla vlapruner"}
    assert len(list((tmp_path / "eval" / "films").glob("*.gif"))) == 2


@pytest.mark.slow
def test_a_policy_is_corrected_where_it_got_to(config, tmp_path):
    path = robot_train(config)
    _, params, _ = load_policy(path)
    demos = RobotDemosArgs(
        out=tmp_path / "corrections", episodes=1, val_episodes=1, image_size=(24, 24), policy=path,
        policy_share=1.0, quiet=True,
    )  # fmt: skip
    robot_demos(demos)
    both = (*config.demos, demos.out)
    start = replace(config, demos=both, start=config.out, out=tmp_path / "corrected")
    still = replace(start, optimizer=replace(config.optimizer, learning_rate=1e-12))
    _, started, _ = load_policy(robot_train(still))
    jax.tree.map(np.testing.assert_array_equal, started, params)


def test_the_heads_know_what_pictures_show():
    heads = RobotTrainConfig(demos=()).loss.heads
    assert heads.kinds == len(SEGMENTS)
    assert [SEGMENTS[k] for k in heads.located] == ["gripper", "tray"]


def test_what_does_not_fit_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"3 views of 24 x 24 pixels.*2 of 24 x 24"):
        robot_train(replace(config, model=replace(config.model, views=3)))
    with pytest.raises(UserError, match="must be 'tokens'"):
        robot_train(replace(config, model=replace(config.model, head="regression")))
    with pytest.raises(UserError, match="name each once"):
        robot_train(replace(config, demos=config.demos * 2))
    with pytest.raises(UserError, match="No demonstrations are given"):
        robot_train(replace(config, demos=()))
    with pytest.raises(UserError, match="has no checkpoint"):
        robot_train(replace(config, start=tmp_path, out=tmp_path / "z"))
    with pytest.raises(UserError, match="can't be read"):
        robot_demos(RobotDemosArgs(out=tmp_path / "y", policy=tmp_path / "none", quiet=True))
    bad = tmp_path / "policy.safetensors"
    bad.write_bytes(b"no safetensors")
    for weights, said in ((bad, "can't be read"), (tmp_path / "none", "no policy file or")):
        with pytest.raises(UserError, match=said):
            robot_eval(
                RobotEvalArgs(
                    out=tmp_path / "x", policies=("openvla",), weights=weights, trials=1, workers=1
                )
            )


def test_the_command_names_what_it_refuses(tmp_path, capsys):
    assert main(["robot", "train", "--demos", str(tmp_path / "none")]) == 2
    assert "holds no whole demonstrations" in capsys.readouterr().err
    given = ["robot", "eval", "--policies", "openvla", "--out", str(tmp_path / "out")]
    assert main([*given, "--suites", "libero_goal"]) == 2
    assert "give the folder of a checkpoint" in capsys.readouterr().err
    small = tmp_path / "policy.safetensors"
    small.touch()
    assert main([*given, "--suites", "libero_goal", "--weights", str(small)]) == 2
    assert "give the folder of a checkpoint" in capsys.readouterr().err
    assert main(["robot", "eval", "--methods", "reconpruner", "--out", str(tmp_path / "o")]) == 2
    assert "training-free" in capsys.readouterr().err
