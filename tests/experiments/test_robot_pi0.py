"""A published pi0's folder as a policy: beside the model as openpi runs it, written out."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from robot_fakes import counting_suite
from tiny_pi0 import (
    ACTIONS,
    BOS,
    LETTERS,
    LINE,
    SIZES,
    STATE,
    write_json,
    write_lerobot,
    write_openpi,
    write_weights,
)

from data_pipelines.robot.policies import Observation
from experiments import robot_eval, robot_policies
from experiments.robot_eval import RobotEvalArgs
from experiments.robot_pi0 import (
    THIRD_PERSON,
    WRIST,
    from_libero,
    libero_statistics,
    pi0_parts,
    relative_to_state,
    to_libero,
    views_of,
)
from experiments.robot_policies import check_policy, file_name
from experiments.robot_vla import CheckpointOptions, moment_of, vla_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.inference import pi0
from fastdrive_jax.inference.robot import RobotVLA
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.pi0.scaling import RobotStatistics, by_deviation, unscaled
from fastdrive_jax.models.pi0.weights import load
from fastdrive_jax.pruning import make_pruner

BATCH, KEPT = 2, 16
INSTRUCTIONS = ("open_the box", "put C on B")
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_openpi(tmp_path_factory.mktemp("pi0"))


@pytest.fixture(scope="module")
def parts(folder):
    options = CheckpointOptions(replan_steps=4)
    model, params, body = pi0_parts(folder, options, SIZES, jnp.float32)
    return model, {"vla": params, "pruner": None}, body


@pytest.fixture(scope="module")
def whole(parts):
    return policy(parts, "fastv", 1.0)


def policy(parts, name, ratio, **settings):
    model, params, body = parts
    return vla_policy(RobotVLA(model, make_pruner(name, **settings), ratio), params, body, SEED)


def observations(seed):
    rng = np.random.default_rng(seed)
    return [
        Observation(
            rng.integers(0, 256, (2, 40, 30, 3), np.uint8),
            rng.normal(size=8).astype(np.float32),
            INSTRUCTIONS[sample],
            seed,
        )
        for sample in range(BATCH)
    ]


def as_openpi(folder, seen, noise):
    """Actions of one chunk from three views, of which the last is masked, by hand at both ends."""
    config = replace(SIZES, views=3)
    params, model = load(folder, config), Pi0(config)
    images = np.zeros((BATCH, 3, 32, 32, 3), np.uint8)
    ids = np.zeros((BATCH, 48), np.int32)
    for sample, one in enumerate(seen):
        for view, picture in enumerate(one.images):
            small = Image.fromarray(picture).resize((24, 32), Image.Resampling.BILINEAR)
            images[sample, view, :, 4:28] = np.asarray(small)
        text = one.instruction.replace("_", "▁").replace(" ", "▁")
        own = [BOS, *(LETTERS[letter] for letter in text), LINE]
        ids[sample, : len(own)] = own
    felt = np.stack([one.proprio for one in seen])
    state = np.zeros((BATCH, 12), np.float32)
    state[:, :8] = (felt - STATE["mean"]) / (np.array(STATE["std"]) + 1e-6)
    views = jnp.asarray([[True, True, False]] * BATCH)
    given = ids, (ids > 0).sum(axis=1), views

    @jax.jit
    def run(params, images, state, noise):
        tokens = model.apply({"params": params}, images, method="encode")
        read = pi0.read_prompt(model, params, tokens, *given)
        inputs = read, state, noise, config.flow_steps
        return pi0.sample_actions(action_expert(config), params["expert"], *inputs).actions

    chunk = np.asarray(run(params, images, state, noise))[..., :7]
    return chunk * (np.array(ACTIONS["std"]) + 1e-6) + ACTIONS["mean"]


def test_it_acts_as_openpi_does(folder, parts, whole):
    model, _, body = parts
    seen = observations(0)
    key = jax.random.key(SEED)
    moment = moment_of(seen, RobotVLA(model, make_pruner("fastv"), 1.0), body, key)
    assert moment.noise.shape == (BATCH, 7, 12)
    acted = whole.act(seen, whole.start(BATCH), np.ones(BATCH, bool))
    assert acted.actions.shape == (BATCH, 4, 7)
    assert acted.kept[0].shape == (32,)
    expected = as_openpi(folder, seen, moment.noise)
    np.testing.assert_allclose(acted.actions, expected[:, :4], atol=2e-4)
    assert np.abs(expected).max() > 0.5


def test_noise_is_of_what_a_robot_sees_whoever_is_beside_it(whole):
    seen, first = observations(1), np.ones(BATCH, bool)
    found = [
        whole.act(given, whole.start(BATCH), first).actions
        for given in (seen, [seen[1], replace(seen[0], step=7)], [seen[1], seen[1]])
    ]
    np.testing.assert_allclose(found[0], found[1][::-1], atol=1e-5)
    np.testing.assert_allclose(found[2], found[1][[0, 0]], atol=1e-5)


def test_a_temporal_method_over_decisions(parts, whole):
    pruned = policy(parts, "vlapruner", 0.5, window=1)
    memory, first = pruned.start(BATCH), np.ones(BATCH, bool)
    for moment in range(3):
        acted = pruned.act(observations(moment), memory, first & (moment == 0))
        memory = acted.memory
        unpruned = whole.act(observations(moment), whole.start(BATCH), first).actions
        assert acted.actions.shape == unpruned.shape
        same = np.allclose(acted.actions, unpruned, atol=1e-5)
        assert same == (moment == 0)
        assert [kept is None for kept in acted.kept] == [moment == 0] * BATCH
    assert [len(kept) for kept in acted.kept] == [KEPT] * BATCH
    np.testing.assert_array_equal(memory["decisions"], [3, 3])


def test_what_is_reused_is_kept_in_the_models_type(parts):
    """Else the next decision would mix two types in one attention."""
    model, _, body = parts
    deep = replace(model.config.prefix, num_layers=6)
    expert = replace(model.config.expert, num_layers=6)
    model = Pi0(replace(model.config, prefix=deep, expert=expert), jnp.bfloat16)
    memory = vla_policy(RobotVLA(model, make_pruner("vlacache"), 0.5), {}, body).start(1)
    cache = memory["state"].caches[0]
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16


def test_the_command_runs_it(folder, tmp_path, monkeypatch):
    """On a robot that adds numbers up."""
    made = partial(pi0_parts, published=SIZES)
    monkeypatch.setattr(robot_policies, "pi0_parts", made)
    monkeypatch.setattr(robot_eval, "make_suite", lambda *given: counting_suite())
    args = RobotEvalArgs(
        out=tmp_path / "run",
        suites=("counting",),
        policies=("pi0",),
        weights=folder,
        replan_steps=3,
        trials=1,
        tasks=(3,),
        workers=1,
        films=1,
        quiet=True,
    )
    monkeypatch.setattr("robot_fakes.INSTRUCTIONS", ("open it",) * 4)
    rows, _ = read_rows(robot_eval.robot_eval(args))
    assert {row.method for row in rows} == {"pi0 unpruned"}
    (line,) = (tmp_path / "run" / "episodes").glob("*pi0*.jsonl")
    assert '"steps": 9, "decisions": 3' in line.read_text()
    assert len(list((tmp_path / "run" / "films").glob("*pi0*.gif"))) == 1


def test_a_folder_of_lerobots_is_the_same_policy(folder, parts, tmp_path):
    write_lerobot(tmp_path)
    write_weights(tmp_path)
    model, params, body = pi0_parts(tmp_path, CheckpointOptions(), SIZES, jnp.float32)
    assert model.config == parts[0].config
    jax.tree.map(np.testing.assert_array_equal, params, parts[1]["vla"])
    assert (body.views, body.executed, body.prompt_tokens) == ((0, 1), 5, 48)
    chunk = np.random.default_rng(0).normal(size=(1, 7, 12)).astype(np.float32)
    states = np.ones((1, 8), np.float32)
    np.testing.assert_allclose(
        body.to_robot(chunk, states), parts[2].to_robot(chunk, states), atol=1e-5
    )


def published(relative):
    """Means of openpi's LIBERO, rounded: of its pi0, whose actions lack the state, or of pi0.5."""
    state = [-0.0465, 0.0344, 0.7646, 2.9722, -0.2205, -0.1256, 0.0269, -0.0272]
    action = [0.0063, 0.0087, -0.009, 0.0001, 0.0006, -0.0005, -0.005]
    if relative:
        action = [0.0667, 0.064, -0.805, -2.9716, 0.2274, 0.1192, -0.0349]
    scalings = (by_deviation(one, [1.0] * len(one), 0.0, 0.0) for one in (state, action))
    return RobotStatistics(*scalings)


def test_what_was_subtracted_from_actions_shows():
    assert relative_to_state(published(relative=False), "x") == (False,) * 7
    relative = relative_to_state(published(relative=True), "x")
    assert relative == (*[True] * 6, False)
    statistics = RobotStatistics(unscaled(8), by_deviation([-1.0] * 7, [2.0] * 7, 0.0, 0.0))
    states = np.arange(8, dtype=np.float32)[None]
    found = to_libero(statistics, relative, np.full((1, 2, 12), 0.25, np.float32), states)
    np.testing.assert_allclose(found, [[[-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, -0.5]] * 2])
    np.testing.assert_array_equal(from_libero(statistics, states), states)
    other = RobotStatistics(unscaled(8), by_deviation([3.0] * 7, [1.0] * 7, 0.0, 0.0))
    with pytest.raises(UserError, match=r"around \[3\.0, .*LIBERO's lie in \[-1, 1\]"):
        relative_to_state(other, "x")


def test_padding_of_older_statistics_is_cut_off():
    padding = by_deviation([0.5] * 8 + [0.0] * 24, [1.0] * 8 + [0.0] * 24, 1e-6, 1e-6)
    cut = libero_statistics(RobotStatistics(padding, padding.first(7)), "x")
    assert (len(cut.state.offset), len(cut.action.offset)) == (8, 7)
    for state, action in ((14, 7), (7, 7), (8, 6), (8, 14)):
        given = (by_deviation([1.0] * n, [1.0] * n, 0.0, 0.0) for n in (state, action))
        with pytest.raises(UserError, match="Choose the asset id of LIBERO's"):
            libero_statistics(RobotStatistics(*given), "x")


@pytest.mark.parametrize(
    ("cameras", "views"),
    [
        ((), (THIRD_PERSON, WRIST)),
        (("observation.images.image", "observation.images.image2"), (THIRD_PERSON, WRIST)),
        (("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), (THIRD_PERSON, WRIST)),
        (("observation.images.wrist_image", "observation.images.image"), (WRIST, THIRD_PERSON)),
        (("observation.images.front",), (THIRD_PERSON,)),
    ],
)
def test_cameras_by_their_names(cameras, views):
    assert views_of(cameras) == views


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="replan_steps=8 must be at most 7"):
        pi0_parts(folder, CheckpointOptions(8), SIZES)
    with pytest.raises(UserError, match="asset id 'droid': choose the asset id from physical-"):
        pi0_parts(folder, CheckpointOptions(asset_id="droid"), SIZES)
    write_lerobot(tmp_path, max_state_dim=6, max_action_dim=6)
    with pytest.raises(UserError, match=r"takes 6 numbers of the robot's state; LIBERO has 8"):
        pi0_parts(tmp_path, published=SIZES)
    shape = {"action": {"type": "ACTION", "shape": [6]}}
    write_lerobot(tmp_path, use_relative_actions=True, output_features=shape)
    with pytest.raises(UserError, match="actions of 6 numbers; LIBERO's have 7"):
        pi0_parts(tmp_path, published=SIZES)
    write_lerobot(tmp_path)
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        pi0_parts(tmp_path, published=SIZES)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="google/paligemma-3b-pt-224"):
        pi0_parts(tmp_path, published=SIZES)
    write_json(tmp_path / "config.json", {"type": "smolvla"})
    with pytest.raises(UserError, match="of type 'smolvla'"):
        pi0_parts(tmp_path, published=SIZES)


def test_the_name_asks_for_a_folder_and_for_libero(folder, tmp_path):
    check_policy("pi0", "libero_goal", folder)
    for weights, named in ((None, "none was given"), (tmp_path / "no", "no is none")):
        with pytest.raises(UserError, match=rf"folder of a checkpoint as --weights; .*{named}"):
            check_policy("pi0", "libero_goal", weights)
    with pytest.raises(UserError, match="leave it out for tabletop"):
        check_policy("pi0", "tabletop", folder)
    both = {"policies": ("openvla", "pi0"), "suites": ("libero_goal",), "weights": folder}
    with pytest.raises(UserError, match="run one at a time"):
        RobotEvalArgs(**both)
    alone = RobotEvalArgs(policies=("pi0",), suites=("libero_goal",), weights=folder)
    assert alone.libero_seed == 7  # openpi's; OpenVLA's evaluations take 0
    assert RobotEvalArgs(policies=("random",)).libero_seed == 0
    assert replace(alone, simulator_seed=3).libero_seed == 3
    with pytest.raises(UserError, match="replan_steps=0"):
        RobotEvalArgs(replan_steps=0)
    names = {
        file_name("pi0", weights, CheckpointOptions(*options))
        for weights in (folder, tmp_path)
        for options in ((), (6,), (5, "libero"))
    }
    assert len(names) == 6
