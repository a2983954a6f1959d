"""A run small enough to be killed often: a linear model on noise from a Grain dataset.

Also a program: `python tiny_run.py FOLDER STEPS [SLEEP]`.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import OptimizerConfig, make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step

# By default Grain reads 500 batches, of which a run here uses a few.
AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    seed: int = 3
    features: int = 16
    batch: int = 8
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(learning_rate=0.05, warmup_steps=2, total_steps=40)
    )


def example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = np.random.default_rng(index).standard_normal(16, np.float32)
    # The random part makes the drawn batches depend on Grain's own seeds and position.
    y = x[:3] + 0.1 * rng.standard_normal(3, np.float32)
    return {"x": x, "y": y.astype(np.float32)}


def make_batches(config: TinyConfig) -> grain.DatasetIterator:
    data = grain.MapDataset.range(64).seed(config.seed).shuffle().repeat().random_map(example)
    return iter(data.batch(config.batch).to_iter_dataset(AHEAD))


def loss_fn(params, batch, key):
    keep = jax.random.bernoulli(key, 0.9, batch["x"].shape)
    error = (batch["x"] * keep) @ params["kernel"] + params["bias"] - batch["y"]
    return jnp.square(error).mean(), {"largest": jnp.abs(error).max()}


def init_params(config: TinyConfig, key):
    kernel = jax.random.normal(key, (config.features, 3))
    return {"kernel": kernel, "bias": jnp.zeros(3)}


@functools.cache  # the same functions again, so that JAX compiles once in a process of many runs
def functions(config: TinyConfig, loss):
    optimizer = make_optimizer(config.optimizer)

    def init():
        return init_train_state(lambda key: init_params(config, key), optimizer, config.seed)

    return init, make_train_step(loss, optimizer)


def run(folder: Path, steps: int, config: TinyConfig | None = None, loss=loss_fn, **options):
    config = config or TinyConfig()
    init, train_step = functions(config, loss)
    options = {"checkpoint_every": 3, "log_every": 2, "quiet": True} | options
    batches = options.pop("batches", None) or make_batches(config)
    return fit(folder, config, init, train_step, batches, steps, **options)


if __name__ == "__main__":
    sleep = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0

    def pace(record):
        print("log", record["step"], flush=True)
        time.sleep(sleep)

    print("start", flush=True)
    run(Path(sys.argv[1]), int(sys.argv[2]), on_log=pace, log_every=1, checkpoint_every=2)
    print("done", flush=True)
