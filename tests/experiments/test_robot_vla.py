"""A pruned VLA as a robot's policy: what it remembers, and when it begins to prune."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import robot_fakes
from small_openvla import small_openvla, unit_body

from data_pipelines.robot.policies import Observation, RobotPolicy
from data_pipelines.robot.worker import Job
from data_pipelines.robot.workers import run_episodes
from experiments.bench_train import compilations
from experiments.robot_openvla import openvla_body
from experiments.robot_vla import vla_policy
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.robot import RobotVLA
from fastdrive_jax.models.openvla.actions import ActionStatistics, Bounds
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding
from fastdrive_jax.pruning import Pruner, make_pruner

BATCH, TOKENS, KEPT = 2, 18, 4
INSTRUCTIONS = ("pick up the red cube", "put the ball in the tray")


@pytest.fixture(scope="module")
def parts():
    model, params = small_openvla()
    return model, {"vla": params, "pruner": None}, unit_body(INSTRUCTIONS, model)


def observations(seed):
    rng = np.random.default_rng(seed)
    return [
        Observation(
            rng.integers(0, 256, (2, 24, 24, 3), np.uint8),
            rng.random(8).astype(np.float32),
            INSTRUCTIONS[sample],
            seed,
        )
        for sample in range(BATCH)
    ]


def policy(parts, name, ratio, **settings):
    model, params, body = parts
    return vla_policy(RobotVLA(model, make_pruner(name, **settings), ratio), params, body)


def test_a_policy_says_which_pictures_its_tokens_are_of(parts):
    model, params, body = parts
    vla = RobotVLA(model, make_pruner("fastv"), 1.0)
    assert vla_policy(vla, params, replace(body, views=(1, 0))).views == (1, 0)


def test_an_episode_is_pruned_once_the_method_is_warm(parts):
    pruned, whole = policy(parts, "vlapruner", 0.25, window=1), policy(parts, "fastv", 1.0)
    memory = pruned.start(BATCH)
    anew = {0: (True, True), 1: (False, False), 2: (True, False)}
    for moment, first in anew.items():
        acted = pruned.act(observations(moment), memory, np.array(first))
        memory = acted.memory
        unpruned = whole.act(observations(moment), whole.start(BATCH), np.array(first))
        assert acted.actions.shape == (BATCH, 1, 7)
        assert set(acted.seconds) == {"vision", "prefill", "decode", "policy"}
        for sample, began in enumerate(first):
            if began:
                assert acted.kept[sample] is None
                np.testing.assert_array_equal(acted.actions[sample], unpruned.actions[sample])
            else:
                assert len(acted.kept[sample]) == KEPT
    np.testing.assert_array_equal(memory["decisions"], [1, 3])
    # One sample was pruned and one was not: each is told the seconds of its own programs.
    own = sum(acted.seconds[stage] for stage in ("vision", "prefill", "decode"))
    assert own.shape == acted.seconds["policy"].shape == (BATCH,)
    assert (acted.seconds["policy"] > own).all()
    np.testing.assert_allclose(*(acted.seconds["policy"] - own))  # what both programs share
    # Nothing was pruned of the sample that began, so all its tokens got some attention.
    rows = np.asarray(memory["state"]["rows"])[:, 0]
    np.testing.assert_array_equal((rows > 0).sum(axis=1), [TOKENS, KEPT])
    assert unpruned.kept[0].shape == (TOKENS,)


@pytest.mark.parametrize("placed", [False, True], ids=["anywhere", "on a mesh"])
def test_no_call_but_the_first_compiles(parts, placed):
    """Parameters of a checkpoint are on a mesh, where what a method remembers is at first not."""
    model, params, _ = parts
    params = jax.device_put(params, replicated_sharding(make_mesh())) if placed else params
    body = unit_body(
        robot_fakes.INSTRUCTIONS,
        model,
        finish=np.ones_like,  # so that episodes end one after the other
        picture=lambda image: np.pad(image, ((4, 4), (4, 4), (0, 0))),
    )
    policy = vla_policy(RobotVLA(model, make_pruner("vlapruner", window=2), 0.25), params, body)
    compiled, ages = [], set()

    def act(*given):
        with compilations() as found:
            acted = policy.act(*given)
        compiled.append(len(found))
        ages.add(tuple(sorted(acted.memory["decisions"])))
        return acted

    jobs = [Job(task, 0) for task in (0, 2, 1)]
    counted = RobotPolicy(policy.start, act)
    episodes = list(run_episodes(robot_fakes.counting_suite(), jobs, counted, workers=2, batch=2))
    assert [one.steps for one in episodes] == [3, 7, 5]
    assert {(1, 4), (2, 5), (3, 6)} <= ages  # one was pruned, and then one that warmed up was not
    assert compiled[0] > 0
    assert not any(compiled[1:]), compiled


def test_what_is_drawn_does_not_depend_on_what_shares_the_batch(parts):
    """Nor do two episodes draw the same at the same step."""
    drawing, began = policy(parts, "random", 0.25), np.ones(BATCH, bool)
    (first, second), (late, _) = observations(0), observations(5)

    def kept(*seen):
        return [set(np.asarray(row)) for row in drawing.act(seen, drawing.start(2), began).kept]

    alone = kept(first, second)
    assert kept(late, second)[1] == alone[1]
    assert kept(second, first) == alone[::-1]
    assert alone[0] != alone[1]


def test_actions_come_in_the_units_of_the_robot(parts):
    model, params, body = parts
    low, high = np.arange(7.0), np.arange(7.0) + 2
    bounds = Bounds(tuple(low), tuple(high), (True,) * 7, (False,) * 7)
    given = body.prompts, ActionStatistics(bounds), lambda actions: -actions
    own = openvla_body(*given, views=body.views)
    vla, first = RobotVLA(model, make_pruner("fastv"), 1.0), np.ones(BATCH, bool)
    unit = vla_policy(vla, params, body)
    scaled = vla_policy(vla, params, own)
    found = [one.act(observations(0), one.start(BATCH), first).actions for one in (unit, scaled)]
    np.testing.assert_allclose(found[1], -(0.5 * (found[0] + 1) * 2 + low), atol=1e-5)


def test_a_choice_that_is_none_is_refused(parts):
    def choose(params, inputs, key, k):
        return jnp.zeros((len(inputs.tokens), k), int)

    model, params, body = parts
    stuck = vla_policy(RobotVLA(model, Pruner("stuck", choose=choose), 0.25), params, body)
    with pytest.raises(UserError, match=r"'stuck' at a keep ratio of 0\.25 keeps a token twice"):
        stuck.act(observations(0), stuck.start(BATCH), np.ones(BATCH, bool))
