"""What two processes agree on before they train together."""

import json
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.hosts import (
    HostsConfig, all_alike, connect, on_first, sees_what_first_wrote,
)
from fastdrive_jax.parallel.mesh import data_share, make_mesh, shard_batch

port, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
connect(HostsConfig(f"localhost:{port}", 2, index))
report = {}

def refused(name, call, *given):
    try:
        call(*given)
        report[name] = None
    except UserError as error:
        report[name] = str(error)

def refuse():
    raise UserError("The folder is another run's.")

refused("nothing to refuse", on_first, lambda: None)
refused("refused by the first", on_first, refuse)
refused("alike", all_alike, "The setting", (1, "a"))
refused("not alike", all_alike, "The setting", index)
(folder / "shared").write_text("")
refused("shared", sees_what_first_wrote, folder / "shared")
mine = folder / str(index)
mine.mkdir()
if index == 0:
    (mine / "own").write_text("")
refused("not shared", sees_what_first_wrote, mine / "own")
for name, shape in (("apart", (1, 4, 1)), ("together", (1, 1, 4))):
    mesh = make_mesh(*shape)
    share, count = data_share(mesh)
    rows = np.arange(8).reshape(count, -1)[share]  # what a loader would give
    batch = shard_batch({"x": rows}, mesh)["x"]
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, jax.P()))(batch)
    report[name] = np.asarray(whole).tolist()
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-c", PROGRAM, str(port)]
    folder = tmp_path_factory.mktemp("hosts")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*words, str(index), str(folder)], **pipes) for index in range(2)]
    try:
        ends = [process.communicate(timeout=200) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], ends
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_what_the_first_refuses_all_refuse(reports):
    for report in reports:
        assert report["nothing to refuse"] is None
        assert report["refused by the first"] == "The folder is another run's."


def test_hosts_that_differ_are_refused(reports):
    for report in reports:
        assert report["alike"] is None
        assert report["not alike"].startswith("The setting of host 1 differs from host 0's")


def test_a_folder_that_is_not_shared_is_refused(reports):
    for report in reports:
        assert report["shared"] is None
        assert "Host 1 does not see" in report["not shared"]


def test_every_row_of_a_batch_is_there_once(reports):
    """Over hosts with parts of their own, and where a layer lies over both of them."""
    for report in reports:
        assert report["apart"] == report["together"] == list(range(8))
