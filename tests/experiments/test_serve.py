"""What the command serves."""

import itertools
import sys
from dataclasses import replace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import serve as serve_module
from experiments.cli import main
from experiments.configs.pruner import TINY
from experiments.serve import ServeArgs, served_policy
from experiments.serve_demo import PERIOD, demo_drives
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.driving import write_policy
from fastdrive_jax.models.qwen2_5_vl.bundled import load_vla, save_vla
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.pruning.recon_pruner import ReconPruner


@pytest.fixture(scope="module")
def vla():
    return load_vla()


@pytest.fixture(scope="module")
def bundle(vla, tmp_path_factory) -> str:
    """The packaged VLA with an untrained ReconPruner."""
    model, params = vla
    config = TINY.recon.pruner
    tokens = jnp.zeros((1, 4, model.config.text.hidden_size))
    pruner = jax.jit(ReconPruner(config).init)(jax.random.key(0), tokens)["params"]
    folder = tmp_path_factory.mktemp("serve") / "bundle"
    return str(write_policy(folder, {"vla": params, "pruner": pruner}, model.config, config, 0.5))


def test_the_packaged_model_is_served_with_a_method_that_needs_no_training():
    policy, params = served_policy("bundled", None)
    assert policy.pruner.name == "divprune"
    assert params["pruner"] is None
    assert policy.model.config.cameras == ("CAM_FRONT",)
    assert served_policy("bundled", "vlacache")[0].pruner.name == "vlacache"


def test_a_bundle_is_served_with_its_own_pruner_or_one_that_builds_on_it(bundle):
    policy, params = served_policy(bundle, None)
    assert policy.pruner.name == "reconpruner"
    joint, same = served_policy(bundle, "jointpruner")
    assert joint.pruner.name == "jointpruner"
    jax.tree.map(np.testing.assert_array_equal, params["pruner"], same["pruner"])
    other, bare = served_policy(bundle, "vlapruner")
    assert other.pruner.name == "vlapruner"
    assert bare["pruner"] is None


def test_six_cameras_are_served_from_the_package_and_from_the_weights_of_widen_vla(vla, tmp_path):
    path = tmp_path / "vla.safetensors"
    save_vla(path, vla[1])
    for bundle in (str(path), "bundled-six"):
        policy, _ = served_policy(bundle, None)
        assert len(policy.model.config.cameras) == 6
        assert policy.model.config.visual_tokens == 6 * 112


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("reconpruner", "needs a trained ReconPruner"),
        ("jointpruner", "needs a trained ReconPruner"),
        ("prior", "mean training mask"),
        ("ground_truth", "true foreground"),
        ("divprunes", "did you mean 'divprune'"),
    ],
)
def test_what_cannot_be_served_is_said(method, named, capsys):
    with pytest.raises(UserError, match=named):
        served_policy("bundled", method)
    assert main(["serve", "--method", method, "--port", "0"]) == 2
    assert named in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_said(tmp_path):
    with pytest.raises(UserError, match="no bundle"):
        served_policy(str(tmp_path / "absent"), None)


def test_without_the_extra_one_is_told_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdrive_jax.serving.server", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[serve\]'"):
        serve_module.serve(ServeArgs())


def test_a_demo_drive_is_seen_through_the_models_cameras(monkeypatch):
    monkeypatch.setattr("experiments.serve_demo.SECONDS", 2.0)
    model = replace(DrivingConfig(), image_size=(56, 112), cameras=("CAM_FRONT", "CAM_BACK"))
    (drive,) = demo_drives(model, 1)
    assert drive.frames == round(2 / PERIOD)
    first, last = drive.draw(0), drive.draw(drive.frames - 1)
    assert list(first.pictures) == ["CAM_FRONT", "CAM_BACK"]
    decoded = [
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        for frame in (first, last)
        for data in frame.pictures.values()
    ]
    assert all(picture.shape == (56, 112, 3) for picture in decoded)
    assert all(np.abs(a.astype(int) - b).mean() > 2 for a, b in itertools.pairwise(decoded))
    assert len(first.driven) == 6
    assert first.driven[-1][0] > first.driven[0][0] >= 0  # it goes forward
    assert first.command in (0, 1, 2)
    assert first.speed >= 0
