"""Programs here run once or twice on few numbers: compiling them well costs more than it gives."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
