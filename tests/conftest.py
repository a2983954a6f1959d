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
# It compares bits with processes of its own, which compile as ever.
COMPILED_WELL = ("/test_interruptions.py",)


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request):
    """Turns most of the compiler's optimizations off, in some folders."""
    path = request.path.as_posix()
    quickly = any(part in path for part in COMPILED_QUICKLY) and not path.endswith(COMPILED_WELL)
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
