"""The page "add a method": its files are written as they stand there, and run."""

import dataclasses
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_policy import random_vla, small_config

from experiments.bench_pruners import BenchPrunersArgs, bench_pruners
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import read_rows
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import PrunerInputs, make_pruner

PAGE = Path(__file__).parents[2] / "docs" / "add_a_method.md"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files, in which the reader sits."""
    blocks = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["contrast.py", "every.py", "test_contrast.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_test_passes(files):
    runpy.run_path("test_contrast.py")["test_contrast_keeps_the_largest_variance"]()


@pytest.mark.parametrize("name", ["contrast", "every"])
def test_its_methods_drive(files, name):
    small = small_config()
    config = dataclasses.replace(small, text=dataclasses.replace(small.text, num_layers=2))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 1, *config.image_size, 3), np.uint8)
    vla = random_vla(config)
    policy = DrivingPolicy(DrivingVLA(config), make_pruner(f"{name}.py:{name}"), 0.5)
    speed, command = np.array([3.0, 5.0], np.float32), np.array([0, 1], np.int32)
    run = jax.jit(plan, static_argnums=0)
    planned = run(policy, {"vla": vla, "pruner": None}, images, speed, command)
    assert planned.keep_indices.shape == (2, 5)
    assert np.isfinite(planned.waypoints).all()


def test_its_commands_know_the_files(files):
    args = BenchPrunersArgs(
        out=Path("bench"),
        methods=("contrast.py:contrast",),
        batch=(1,),
        n=24,
        dim=256,
        k=6,
        repeats=1,
    )
    rows, _ = read_rows(bench_pruners(args))
    assert any("contrast" in row.method for row in rows)


def test_every_field_of_its_table_is_one_that_a_method_may_ask_for():
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), re.MULTILINE)
    named = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
    assert named - {"key"} <= {field.name for field in dataclasses.fields(PrunerInputs)}


@pytest.mark.parametrize(("name", "said"), [("no.py:x", "no file no.py"), ("every.py:x", "'x'")])
def test_files_and_functions_that_are_not_there_are_named(files, name, said):
    with pytest.raises(UserError, match=said):
        make_pruner(name)
