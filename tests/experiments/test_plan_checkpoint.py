"""A checkpoint of random weights asked for plans of a few frames."""

import io
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import CONFIG, random_pruner, write_checkpoint

from data_pipelines.build import build_shards
from data_pipelines.nuscenes.source import read_nuscenes
from data_pipelines.schema import CAN_FIELDS
from data_pipelines.shards import open_shards, record_source
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.generate import generate
from experiments import plan_checkpoint
from experiments.answer import AnswerArgs, answer
from experiments.driven import Sequences, ego_to_lidar, past_of
from experiments.eval_planning import EvalPlanningArgs, eval_planning
from experiments.plan_checkpoint import CheckpointConfig, checkpoint_case
from experiments.planned import Setting
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.truth import LidarWays
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.models.qwen2_5_vl.impromptu import planning_answer
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    world = WorldConfig(
        train_scenes=1, val_scenes=2, keyframes_per_scene=8, height=112, width=196, workers=1
    )
    root = generate(folder / "world", world, progress=False)
    shards = build_shards(read_nuscenes(root), folder / "shards", progress=False).path
    layer = ReconPrunerConfig(layer=CONFIG.text)
    described = {"kind": "pruner", "pruner": to_plain(layer)}
    return CheckpointConfig(
        checkpoint=write_checkpoint(folder / "model"),
        shards=shards,
        root=root,
        pruners=(write_bundle(folder / "recon", {"pruner": random_pruner(layer)}, described),),
        samples=9,
        batch_size=4,
        max_new_tokens=5,
        max_pixels=28 * 28 * 8,
        dtype="float32",
    )


def test_the_unpruned_setting_answers_as_the_command_answer(config, tmp_path, monkeypatch):
    """The same prompts and pictures through another command, one by one."""
    case = checkpoint_case(config, ("uniform",), (0.5,), 1, quiet=True)
    texts = []
    parse = plan_checkpoint.parse_answer
    monkeypatch.setattr(plan_checkpoint, "parse_answer", lambda t: texts.append(t) or parse(t))
    prompts = []
    prompt = plan_checkpoint.planning_prompt

    def noted(*args):
        prompts.append(prompt(*args))
        return prompts[-1]

    monkeypatch.setattr(plan_checkpoint, "planning_prompt", noted)
    monkeypatch.setattr(plan_checkpoint, "ThreadPoolExecutor", InOrder)
    rows = np.arange(2)
    found = case.plan(Setting("unpruned", 1.0, None, "unpruned"), rows)
    assert found.kept.shape[1] == case.meta["visual_tokens"]
    assert not found.read.any()  # random weights say nothing that is a plan
    assert not found.waypoints.any()
    for row in rows:
        names = []
        for k, picture in enumerate(case.view(row)):
            names.append(tmp_path / f"{row}-{k}.png")
            cv2.imwrite(str(names[-1]), picture[..., ::-1])
        asked = AnswerArgs(
            config.checkpoint,
            prompts[row],
            tuple(names),
            max_new_tokens=5,
            dtype="float32",
            temperature=0.0,
            repetition_penalty=1.0,
        )
        assert answer(asked)[0]["answer"] == texts[row]


class InOrder:
    """A pool that works in the caller's thread, so that prompts come in order."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, values):
        return map(function, values)


def test_the_whole_evaluation_and_what_is_left_out(config, tmp_path):
    methods = ("reconpruner", "prior", "vlapruner")
    args = EvalPlanningArgs(tmp_path, methods, (0.5,), qwen=config, pictures=1, quiet=True)
    assert eval_planning(args) == tmp_path / "report.html"
    content = json.loads((tmp_path / "planning.json").read_text())
    rows = {(r["method"], r["keep_ratio"], r["metric"]): r for r in content["rows"]}
    for method in methods[:-1]:
        assert rows[method, 0.5, "answers_unread"]["value"] == 1
        # Standing still, as the published evaluation scores what it cannot read.
        still = rows["no_image", None, "l2_temavg"]
        assert rows[method, 0.5, "l2_temavg"]["value"] == pytest.approx(still["value"])
    assert rows["unpruned", 1.0, "l2_temavg"]["n"] == 2 + 1  # two of 8 frames have 3 s to come
    assert ("vlapruner", 0.5, "l2_temavg") not in rows
    assert "no past: vlapruner" in (tmp_path / "planning.md").read_text()
    other = CheckpointConfig(config.checkpoint, config.shards, samples=3)
    with pytest.raises(UserError, match="another config"):
        eval_planning(EvalPlanningArgs(tmp_path, methods, (0.5,), qwen=other, quiet=True))


def test_a_plan_that_can_be_read_counts_in_the_ego_frame(config, monkeypatch):
    case = checkpoint_case(config, (), (0.5,), 1, quiet=True)
    way = np.stack([np.arange(1, 7) * 3.0, np.zeros(6)], 1)
    chat = plan_checkpoint.read_processor(config.checkpoint).chat
    monkeypatch.setattr(type(chat), "decode", lambda self, ids: planning_answer(way))
    found = case.plan(Setting("no_image", None, None, "no_image"), np.arange(3))
    assert found.read.all()
    np.testing.assert_allclose(found.waypoints, np.stack([way] * 3), atol=1e-6)  # straight: alike


def test_pictures_are_shrunk_as_in_training_and_then_resized(config):
    """112 x 196 pixels to 59 x 104 of 6,272, by the nearest, and then to whole tokens."""
    case = checkpoint_case(config, (), (0.5,), 1, quiet=True)
    source = record_source(open_shards(config.shards), "val")
    stored = Image.open(io.BytesIO(source[0]["image"]))
    small = stored.resize((104, 59), Image.Resampling.NEAREST)
    across = small.resize((112, 59), Image.Resampling.BICUBIC)  # Pillow 13 may go down first
    want = np.asarray(across.resize((112, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(case.view(0)[0], want)
    large = replace(config, image_size=(112, 196))
    case = checkpoint_case(large, (), (0.5,), 1, quiet=True)
    np.testing.assert_array_equal(case.view(0)[0], np.asarray(stored))
    assert case.grid == (4, 7)
    with pytest.raises(UserError, match=r"image_size=\(100, 196\) is not what .* \(112, 196\)"):
        checkpoint_case(replace(config, image_size=(100, 196)), (), (0.5,), 1, quiet=True)


def test_the_lidars_places_are_those_of_its_poses_or_said_to_be_guessed(config):
    """The world has no lidar, so the note is there."""
    case = checkpoint_case(config, (), (0.5,), 1, quiet=True)
    assert any("lidar's places are guessed" in note for note in case.notes)
    ego = checkpoint_case(replace(config, frame="ego"), (), (0.5,), 1, quiet=True)
    assert (case.point, ego.point, ego.notes) == ("lidar", "origin", ())
    history = np.zeros((3, 6, 2))
    history[2, 4:] = [[-3, 1], [-1, 0.5]]
    driven = driven_of(3)
    past, _ = past_of(driven, 2, "lidar", LidarWays(history, history))
    np.testing.assert_allclose(past, [[-3, 1], [-1, 0.5], [0, 0]])


def driven_of(count):
    """Of two steps with a known past at sample 2."""
    known = np.zeros((count, 6), bool)
    known[2, 4:] = True
    places = np.zeros((count, 6, 2))
    places[2, 4:, 0] = [-4, -2]
    bus = np.full((count, len(CAN_FIELDS)), np.nan)
    return Sequences(np.zeros(count), places, known, bus, np.zeros(count), *([None] * 5))


def test_past_places_of_the_lidar_on_a_circle():
    """The lidar, 0.94 m ahead, is known in closed form."""
    radius, ahead = 20.0, 0.943713
    angle = np.arange(1, 7) * 0.1
    ego = np.stack([radius * np.sin(angle), radius * (1 - np.cos(angle))], 1)
    past = np.concatenate([(ego * [-1, 1])[::-1], np.zeros((1, 2))])
    back = np.append(-angle[::-1], 0)
    want = past + ahead * (np.stack([np.cos(back), np.sin(back)], 1) - [1, 0])
    np.testing.assert_allclose(ego_to_lidar(past), want, atol=0.06)
    np.testing.assert_allclose(ego_to_lidar(np.zeros((3, 2))), np.zeros((3, 2)))


def test_the_past_and_its_motion_come_from_the_frames_before():
    count = 4
    bus = np.arange(count * len(CAN_FIELDS), dtype=float).reshape(count, -1)
    history = np.zeros((count, 6, 2))
    history[2, 4:, 0] = [-4, -2]
    valid = np.zeros((count, 6), bool)
    valid[2, 4:] = True
    driven = Sequences(
        *(np.zeros(count),), history, valid, bus, np.array([0, 0, 0, 1]), *([None] * 5)
    )
    past, status = past_of(driven, 2, "ego")
    np.testing.assert_allclose(past, [[-4, 0], [-2, 0], [0, 0]])
    assert [one.velocity for one in status] == [0.0, 8.0, 16.0]
    assert status[1].acceleration == (9.0, 10.0)
    assert status[1].steering == 15.0
    bus[0, CAN_FIELDS.index("ax")] = np.nan
    assert past_of(driven, 2, "ego")[1] is None
    assert past_of(driven, 3, "ego")[1] is not None  # another drive, with no past at all


def test_bad_input_is_refused(config, tmp_path):
    with pytest.raises(UserError, match=r"needs --qwen\.shards"):
        CheckpointConfig(checkpoint=tmp_path)
    with pytest.raises(UserError, match="batch_size=3"):
        CheckpointConfig(batch_size=3, fsdp=2)


OWN = """
import jax.numpy as jnp
from fastdrive_jax.pruning import Pruner
from fastdrive_jax.pruning.draws import normal

def drawn():
    def score(params, inputs, key):
        return 1e4 * normal(key, inputs.tokens.shape[:2]) + jnp.var(inputs.pixels, axis=-1)
    return Pruner("drawn", score, frozenset({"pixels", "key"}))

def stuck():
    def choose(params, inputs, key, k):
        return jnp.zeros((len(inputs.tokens), k), int)
    return Pruner("stuck", choose=choose)
"""


def test_methods_of_ones_own_are_drawn_as_often_and_checked(config, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    names = [f"{tmp_path}/own.py:{name}" for name in ("drawn", "stuck")]
    case = checkpoint_case(config, ("random", *names), (0.5,), 2, quiet=True)
    found = [(one.method, one.seed) for one in case.settings if one.ratio == 0.5]
    expected = [("random", 0), ("random", 1), ("drawn", 0), ("drawn", 1), ("stuck", None)]
    assert found == expected
    rows = np.arange(2)
    kept = [case.plan(Setting("drawn", 0.5, seed, names[0]), rows).kept for seed in (0, 1)]
    assert (kept[0] != kept[1]).any()
    with pytest.raises(UserError, match=r"'stuck' at a keep ratio of 0\.5 keeps a token twice"):
        case.plan(Setting("stuck", 0.5, None, names[1]), rows)
