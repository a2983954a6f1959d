"""Settings of every test."""

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What one test has compiled others need not, and compiling well costs more than it gives. Workers
# and the processes that tests start inherit this. It is set before JAX reads it, and the compiled
# programs are gone with the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="fastdrive_jax_tests_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most programs run once or twice
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # 5% of the time, and nobody reads them
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # small ones are the most
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # XLA's newer way to compile fused loops takes twice the time for programs that run once, and
    # its own exponentials a tenth more. A flag that it does not know ends a process, and some
    # releases do not know these.
    lean = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
        "--xla_cpu_enable_platform_dependent_math=false"
    )
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    asked = os.environ | {"XLA_FLAGS": lean, "JAX_PLATFORMS": "cpu"}
    if "XLA_FLAGS" not in os.environ:
        known = subprocess.run(ask, env=asked, capture_output=True, check=False).returncode == 0
        os.environ |= {"XLA_FLAGS": lean} if known else {}

import jax
import pytest

# On GPUs float32 products are rounded to TF32 unless this is asked for; CPUs know no difference.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes, whichever file is run
jax.devices()  # made now: a command that is tested in this process would ask for fewer

# Each compiled program is mapped into memory in several pieces, and Linux ends a process that asks
# for more than 65,530 of them: a whole run of the tests compiles that much.
MAPS = Path("/proc/self/maps")
MANY_MAPS = 20_000


def pytest_collection_finish():
    """Tracing makes many small objects: looking for cycles among them takes 7% of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """Forgets compiled programs between files, when there are many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
