"""The tiny run on two processes of two virtual devices each, or on one process.

`python hosts_run.py FOLDER STEPS --host PORT INDEX --watch`; without `--host` one process with one
device, without `--watch` neither TensorBoard nor pictures.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
from tiny_run import TinyConfig, init_params, make_batches

from fastdrive_jax.parallel.hosts import HostsConfig, connect
from fastdrive_jax.parallel.mesh import make_mesh
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.loop import fit
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.state import init_train_state, make_train_step
from fastdrive_jax.training.watch import WatchConfig


@dataclasses.dataclass
class Part:
    """This process's rows of each batch."""

    batches: object

    def __next__(self):
        rows = slice(jax.process_index(), None, jax.process_count())
        return jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[rows]), next(self.batches))

    def __iter__(self):
        return self

    def get_state(self):
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


def place(mesh, init):
    """Matrices split over the fsdp axis."""

    def split(leaf):
        axes = ("fsdp",) if leaf.ndim == 2 else ()
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    return jax.tree.map(split, jax.eval_shape(init))


def main(folder, steps, watched):
    config = TinyConfig()
    optimizer = make_optimizer(config.optimizer)
    several = jax.process_count() > 1
    mesh = make_mesh(2, 2) if several else make_mesh(1, devices=jax.devices()[:1])

    def init():
        return init_train_state(lambda key: init_params(config, key), optimizer, 3, ema=True)

    def pace(record):
        print("log", record["step"], flush=True)
        if several:  # the end must not come before what it is told meanwhile
            time.sleep(0.05 if record["step"] < 20 else 0.2)

    def loss(params, batch, key):  # draws nothing: processes lay the samples out in another order
        error = batch["x"] @ params["kernel"] + params["bias"] - batch["y"]
        return jax.numpy.square(error).mean(), {}

    seen = {
        "watch": WatchConfig(tensorboard=True, images_every=2, on_recompile="raise"),
        "images": lambda state, batch: {"a": np.zeros((2, 2, 3), np.uint8)},
    }
    result = fit(
        folder,
        config,
        init,
        make_train_step(loss, optimizer, ema_decay=0.9, accumulate=2),
        Part(make_batches(config)),
        steps,
        mesh=mesh,
        state_shardings=place(mesh, init),
        checkpoint_every=10,
        log_every=1,
        evaluate=lambda state: {"l2": abs(float(state.step) - 2)},
        evaluate_every=2,
        best=Best("l2"),
        on_log=pace,
        quiet=True,
        **(seen if watched else {}),
    )
    print("done", int(result.state.step), result.best_step, flush=True)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--host", type=int, nargs=2)
    parser.add_argument("--watch", action="store_true")
    args = parser.parse_args()
    if args.host:
        port, index = args.host
        jax.config.update("jax_num_cpu_devices", 2)
        connect(HostsConfig(f"localhost:{port}", 2, index, heartbeat_seconds=6))
    main(args.folder, args.steps, args.watch)
