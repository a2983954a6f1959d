"""Two processes that train together; one dies by SIGKILL, and the job is started again."""

import contextlib
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_hosts import STEPS, free_port, start

from fastdrive_jax.training.metrics_log import read_log

LATEST_END = 30  # seconds; the heartbeat of hosts_run.py is 6


@contextlib.contextmanager
def pair(folder, port):
    both = [start(folder, "--host", port, number) for number in range(2)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()


def finish(processes):
    outs = [process.communicate(timeout=120) for process in processes]
    for process, (out, err) in zip(processes, outs, strict=True):
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == f"done {STEPS} 2"


def kill_one(folder, port, victim, after):
    """SIGKILL when checkpoint `after` is there: the other must end by itself, with an error."""
    with pair(folder, port) as both:
        for _ in both[victim].stdout:
            if (folder / "checkpoints" / str(after)).exists():
                break
        both[victim].kill()
        killed = time.monotonic()
        _, err = both[1 - victim].communicate(timeout=60)
        assert time.monotonic() - killed < LATEST_END
        assert both[1 - victim].returncode != 0, err


def final_arrays(folder) -> dict[str, np.ndarray]:
    """The arrays of the last checkpoint by name."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = folder / "checkpoints" / str(STEPS) / "state"
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        tree = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            checkpointer.metadata(saved).item_metadata.tree,
        )
        state = checkpointer.restore(saved, args=ocp.args.StandardRestore(tree))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(folder) -> list[float]:
    return [r["loss"] for r in read_log(folder / "metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.slow
def test_the_job_ends_and_goes_on_bit_for_bit_whoever_is_killed(tmp_path):
    whole, killed, port = tmp_path / "whole", tmp_path / "killed", free_port()
    with pair(whole, port) as both:
        finish(both)
    kill_one(killed, port, victim=1, after=10)
    kill_one(killed, port, victim=0, after=20)
    assert not (killed / "checkpoints" / str(STEPS)).exists()
    with pair(killed, port) as both:
        finish(both)
    there, here = final_arrays(whole), final_arrays(killed)
    assert there.keys() == here.keys()
    assert "['params']['kernel']" in there
    for name, array in there.items():
        np.testing.assert_array_equal(here[name], array, err_msg=name)
    assert losses(killed) == losses(whole)
