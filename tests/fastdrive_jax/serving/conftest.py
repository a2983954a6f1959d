"""A tiny random policy with memory, compiled once, and a service of it."""

import jax.numpy as jnp
import pytest
from tiny_policy import random_vla, small_config
from tiny_service import RATIOS, SIZES, Direct, running, service_of

from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import Pruner
from fastdrive_jax.pruning.interface import Temporal
from fastdrive_jax.serving.programs import compile_programs, time_programs
from fastdrive_jax.serving.worker import Ready


def looks_elsewhere() -> Pruner:
    """A method that looks at what it has not kept lately."""

    def score(params, inputs, key):
        return inputs.tokens.mean(axis=-1) - 10 * inputs.state

    def observe(state, seen):
        return 0.5 * state + seen.kept

    start = Temporal(lambda inputs: jnp.zeros(inputs.tokens.shape[:2]), observe)
    return Pruner("elsewhere", score, frozenset({"tokens", "state"}), temporal=start)


@pytest.fixture(scope="session")
def policy() -> tuple[DrivingPolicy, dict]:
    config = small_config()
    params = {"vla": random_vla(config), "pruner": None}
    return DrivingPolicy(DrivingVLA(config), looks_elsewhere(), 1.0), params


@pytest.fixture(scope="session")
def ready(policy) -> Ready:
    programs = compile_programs(*policy, RATIOS, SIZES)
    return Ready(programs, time_programs(programs, rounds=3))


@pytest.fixture(scope="session")
def address(ready):
    with running(service_of(ready)) as found:
        yield found


@pytest.fixture(scope="session")
def direct(policy) -> Direct:
    return Direct(*policy)
