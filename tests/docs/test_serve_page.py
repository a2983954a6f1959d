"""The page "serve": its client and its curl line are run as they stand there."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import cv2
import pytest
from tiny_policy import random_vla, small_config
from tiny_service import picture, running, service_of

from experiments.cli import parse
from experiments.serve import ServeArgs
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.serving.config import ServeConfig
from fastdrive_jax.serving.programs import compile_programs, time_programs
from fastdrive_jax.serving.worker import Ready

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
CONFIG = ServeConfig(ratios=(0.5,), max_batch=1)


@pytest.fixture(scope="module")
def address():
    config = small_config()
    policy = DrivingPolicy(DrivingVLA(config), make_pruner("uniform"), 0.5)
    params = {"vla": random_vla(config), "pruner": None}
    programs = compile_programs(policy, params, CONFIG.ratios, CONFIG.batch_sizes)
    with running(service_of(Ready(programs, time_programs(programs, 3)), CONFIG)) as found:
        yield found


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where the reader sits, with a picture."""
    jpeg = cv2.imencode(".jpg", picture(0))[1].tobytes()
    (tmp_path / "front.jpg").write_bytes(jpeg)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_client_plans(folder, address, capsys):
    ((name, text),) = re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, re.DOTALL)
    assert "http://127.0.0.1:8000" in text
    (folder / name).write_text(text.replace("http://127.0.0.1:8000", address))
    runpy.run_path(name, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["0", "0.5"], ["1", "0.5"], ["2", "0.5"]]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_its_curl_line_plans(folder, address):
    (line,) = re.findall(r"```bash\n(curl .*?)```", PAGE, re.DOTALL)
    line = line.replace("http://127.0.0.1:8000", address)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=30)
    found = json.loads(done.stdout)
    assert found["kept_tokens"] == 5
    assert len(found["waypoints"]) == 6


def test_its_commands_are_understood():
    lines = re.findall(r"^fastdrive (.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        args, _ = parse(shlex.split(line, comments=True))
        assert isinstance(args, ServeArgs)
