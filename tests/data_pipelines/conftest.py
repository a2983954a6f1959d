"""A small nuScenes and shards of it."""

from pathlib import Path

import pytest
from nuscenes_fixture import write_nuscenes

from data_pipelines.build import build_shards
from data_pipelines.nuscenes.source import read_nuscenes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return read_nuscenes(write_nuscenes(tmp_path_factory.mktemp("nu")))


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "set"
    build_shards(source, path, progress=False, records_per_shard=8)
    return path
