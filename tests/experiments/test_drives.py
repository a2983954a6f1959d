"""Drives of a small VLA with methods of one's own: what is drawn, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import small_config, small_params

from experiments import compare_pruners
from experiments.camera_budgets import EACH, SHARED
from experiments.compare_pruners import ComparePrunersArgs, cost_rows
from experiments.drives import UNPRUNED, Drives, drive, is_drawn, label, method_of
from experiments.driving_policies import vla_policy
from experiments.efficiency_counts import added_flops
from experiments.planned import Setting
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.planning import planning_errors, planning_rows
from fastdrive_jax.evaluation.results import point
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import PRUNERS, make_pruner
from fastdrive_jax.pruning.accounting import recon_pruner_flops
from fastdrive_jax.pruning.mistakes import MethodError
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

MINE = """
import jax
import jax.numpy as jnp
from fastdrive_jax.pruning import Pruner
from fastdrive_jax.pruning.draws import gumbel
from fastdrive_jax.pruning.interface import Cuts

def chosen(places):
    return lambda params, inputs, key, k: jnp.tile(places(k), (len(inputs.tokens), 1))

def drawn():
    def score(params, inputs, key):
        return gumbel(key, inputs.tokens.shape[:2])
    return Pruner(name="drawn", score=score, needs=frozenset({"tokens", "key"}))

def trained(config):
    return Pruner(name="trained", score=lambda params, inputs, key: inputs.tokens[..., 0])

def twice():
    return Pruner(name="twice", choose=chosen(lambda k: jnp.arange(k) // 2))

def beyond():
    return Pruner(name="beyond", choose=chosen(lambda k: 7 + jnp.arange(k)))

def within():
    cuts = Cuts(lambda layers: (1,))
    return Pruner(name="within", choose=chosen(lambda k: jnp.arange(k) // 2), cuts=cuts)

def products():
    def score(params, inputs, key):
        return jnp.einsum("bnd,bmd->bn", inputs.tokens, inputs.tokens)
    return Pruner(name="products", score=score)

def rows():
    def score(params, inputs, key):
        return inputs.last_row.mean(axis=1)
    return Pruner(
        name="rows", score=score, needs=frozenset({"last_row"}), cuts=Cuts(lambda layers: (1,))
    )
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return lambda name: f"{file}:{name}"


@pytest.fixture(scope="module")
def vla():
    config = small_config()
    config = replace(config, text=replace(config.text, num_layers=2))
    return DrivingVLA(config), small_params(config)["vla"]


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    data = SimpleNamespace(
        images=rng.integers(0, 256, (4, 1, 56, 140, 3), np.uint8),
        speed=rng.uniform(0, 15, 4).astype(np.float32),
        command=np.ones(4, np.int32),
    )
    areas = SimpleNamespace(foreground=np.ones((4, 10)))
    return Drives(data, areas, np.array([[0, 1], [2, 3]]))


def test_methods_that_draw_are_those_that_take_a_key(mine):
    assert {name for name in PRUNERS if is_drawn(name)} == {"random", "prune2drive"}
    assert is_drawn(mine("drawn"))
    assert not is_drawn(mine("trained"))
    assert not is_drawn(UNPRUNED)


@pytest.mark.parametrize(
    ("name", "message"),
    [("twice", "a token twice"), ("beyond", "not: N is 10"), ("within", "a token twice")],
)
def test_a_choice_that_is_none_is_refused(mine, vla, scenes, name, message):
    model, params = vla
    policy = DrivingPolicy(model, make_pruner(mine(name)), 0.5)
    given = {"vla": params, "pruner": None}
    with pytest.raises(UserError, match=rf"'{name}' at a keep ratio of 0\.5 .*{message}"):
        drive(policy, given, scenes, 2)
    view = SimpleNamespace(
        images=scenes.data.images[:2, 0],
        foreground=np.ones((2, 10), np.float32),
        speed=scenes.data.speed[:2],
        command=scenes.data.command[:2],
        frame=0,
    )
    with pytest.raises(UserError, match=rf"'{name}' at a keep ratio of 0\.5 .*{message}"):
        vla_policy(policy, given).plan(None, view)


def gflop(policy, weights, name):
    found = cost_rows(policy, weights, name)
    return {row.metric: row.value for row in found}["prefill_gflop"]


def test_what_a_method_of_ones_own_computes_is_counted(mine, vla):
    model, _ = vla
    text, n = model.config.text, model.config.visual_tokens
    made = {name: make_pruner(mine(name)) for name in ("products", "rows", "twice", "within")}
    own = {
        name: gflop(DrivingPolicy(model, pruner, 0.5), None, mine(name))
        for name, pruner in made.items()
    }
    plain = gflop(DrivingPolicy(model, make_pruner("uniform"), 0.5), None, "uniform")
    assert own["twice"] == pytest.approx(plain, rel=1e-12)
    products = 2 * n * n * text.hidden_size / 1e9
    assert own["products"] == pytest.approx(plain + products, rel=0.05)
    row = 2 * text.num_heads * (n + 6) * text.head_dim / 1e9
    assert own["rows"] == pytest.approx(own["within"] + row, abs=0.1 * row)


def test_what_the_librarys_methods_compute_is_counted(vla):
    model, _ = vla
    text, n = model.config.text, model.config.visual_tokens
    unpruned, weights = method_of(UNPRUNED, None)
    whole = gflop(DrivingPolicy(model, unpruned, 1.0), weights, UNPRUNED)
    assert gflop(DrivingPolicy(model, make_pruner("random"), 1.0), None, "random") == whole
    config = ReconPrunerConfig(text)
    tokens = jnp.zeros((1, 1, text.hidden_size))
    weights = jax.eval_shape(ReconPruner(config).init, jax.random.key(0), tokens)["params"]
    policy = DrivingPolicy(model, make_pruner("reconpruner", config=config), 1.0)
    own = recon_pruner_flops(text, n) / 1e9
    assert gflop(policy, weights, "reconpruner") == pytest.approx(whole + own)
    distances = 2 * n * n * text.hidden_size / 1e9
    policy = DrivingPolicy(model, make_pruner("divprune"), 1.0)
    assert gflop(policy, None, "divprune") == pytest.approx(whole + distances)
    # One that reuses reads the rows of six text tokens over all slots of a layer's cache.
    reusing = DrivingPolicy(model, make_pruner("vlacache", layers=(17,)), 0.5)
    slots = n + 6 + model.config.vocabulary.plan_length
    rows = 2 * 6 * text.num_heads * text.head_dim * slots
    assert added_flops(reusing, None, 6, jnp.float32) == pytest.approx(rows)


def test_one_methods_mistake_leaves_the_others_figures(mine, monkeypatch):
    scene, future = np.arange(4), np.zeros((4, 6, 2))

    def driven(policy, params, name, drives, args):
        if name == mine("twice"):
            raise MethodError("twice is wrong")
        errors = planning_errors(future + 1, future, np.ones((4, 6), bool))
        return errors, planning_rows(label(name), policy.keep_ratio, errors, scene)

    monkeypatch.setattr(compare_pruners, "_driven", driven)
    monkeypatch.setattr(compare_pruners, "timing_rows", lambda *given: [])
    run = SimpleNamespace(recon=SimpleNamespace(pruner=ReconPrunerConfig()))
    world = SimpleNamespace(
        model=None, params=None, run=run, trained={"pruner": None}, prior=np.zeros((1, 4))
    )
    drives = SimpleNamespace(data=SimpleNamespace(scene=scene))
    args = ComparePrunersArgs(methods=(mine("twice"), "prior", "reconpruner"), ratios=(0.5,))
    rows, failed = compare_pruners.measure(world, drives, args)
    assert failed == ["twice is wrong"]
    assert {row.method for row in rows} == {UNPRUNED, "prior", "reconpruner", "reconpruner - prior"}
    rows += [
        point(f"{name}, {kind}", 0.5, f"{what}_recall", 1.0)
        for name in ("prior", "reconpruner")
        for kind in (SHARED, EACH)
        for what in ("foreground", "object")
    ]
    lines = compare_pruners.markdown(rows, args, 4).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:6]] == [
        UNPRUNED,
        "prior",
        "reconpruner",
        "twice",
    ]
    assert lines[5].split(" | ")[4] == "failed"


def test_a_comparison_that_goes_on_plans_nothing_twice(monkeypatch, tmp_path):
    seeds = []

    def driven(policy, params, drives, scenes, seed):
        seeds.append(seed)
        return np.full((4, 6, 2), seed, np.float32), np.tile(np.arange(3), (4, 1))

    monkeypatch.setattr(compare_pruners, "drive", driven)
    args = ComparePrunersArgs(out=tmp_path)
    drives = SimpleNamespace(data=SimpleNamespace(scene=np.arange(4)))
    for _ in range(2):
        for seed in (0, 1):
            setting = Setting("random", 0.5, seed, "random")
            found = compare_pruners._planned(None, {}, setting, drives, args)
            np.testing.assert_array_equal(found.waypoints, np.full((4, 6, 2), seed))
            np.testing.assert_array_equal(found.kept, np.tile(np.arange(3), (4, 1)))
    assert seeds == [0, 1]
    shards = SimpleNamespace(digest="of the shards")
    vla, trained = {"kernel": np.ones(2)}, {"pruner": {"query": np.ones(2)}}
    world = SimpleNamespace(params=vla, trained=trained, shards=shards, planned=shards)
    for _ in range(2):
        compare_pruners.claim(args, world)
    other = SimpleNamespace(**vars(world) | {"params": {"kernel": np.zeros(2)}})
    with pytest.raises(UserError, match="another config"):
        compare_pruners.claim(args, other)
