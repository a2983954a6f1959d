"""Settings of every test."""

import jax
import pytest

# On GPUs float32 products are rounded to TF32 unless this is asked for; CPUs know no difference.
jax.config.update("jax_default_matmul_precision", "highest")

# Programs of these run once or twice on few numbers: compiling them well costs more than it gives.
COMPILED_QUICKLY = (
    *("/pruning/", "/inference/", "/docs/", "/models/", "/training/", "/export/", "/parallel/"),
    *("/parity/", "/experiments/"),
)


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request):
    """Turns most of the compiler's optimizations off, in some folders."""
    quickly = any(part in request.path.as_posix() for part in COMPILED_QUICKLY)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
