from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from fastdrive_jax.errors import UserError
from fastdrive_jax.parallel.mesh import (
    batch_sharding,
    data_share,
    make_mesh,
    mesh_devices,
    replicated_sharding,
    shard_batch,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What runs on one and on all of eight virtual devices give."""
    folder = tmp_path_factory.mktemp("mesh")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "training")
        from tiny_run import run

    found = {"devices": len(jax.devices())}
    for devices in (1, 8):
        result = run(folder / str(devices), 6, mesh=make_mesh(devices), log_every=1)
        kernel = result.state.params["kernel"]
        found[f"losses{devices}"] = [record["loss"] for record in result.history]
        found[f"kernel{devices}"] = np.asarray(kernel)
        found[f"on{devices}"] = len(kernel.sharding.device_set)
    resumed = run(folder / "1", 8, mesh=make_mesh(8), log_every=1)
    found["resumed_on"] = len(resumed.state.params["kernel"].sharding.device_set)
    found["resumed_steps"] = [record["step"] for record in resumed.history]
    return found


def test_eight_devices_train_like_one(report):
    assert report["devices"] == 8
    assert (report["on1"], report["on8"]) == (1, 8)
    np.testing.assert_allclose(report["losses8"], report["losses1"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(report["kernel8"], report["kernel1"], rtol=1e-5, atol=1e-5)


def test_batches_are_split_and_must_divide():
    batch = shard_batch({"x": np.zeros((16, 3))}, make_mesh(8))
    assert batch["x"].addressable_shards[0].data.shape == (2, 3)
    with pytest.raises(UserError, match=r"\(12, 3\) does not divide among 8 devices"):
        shard_batch({"x": np.zeros((12, 3))}, make_mesh(8))


def test_a_run_goes_on_with_another_number_of_devices(report):
    assert report["resumed_on"] == 8
    assert report["resumed_steps"] == list(range(1, 9))


def test_axes_are_auto_and_shardings_name_them():
    mesh = make_mesh(1)
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert replicated_sharding(mesh).spec == PartitionSpec()
    array = shard_batch(np.arange(6).reshape(3, 2), mesh)
    assert isinstance(array, jax.Array)
    assert array.sharding == batch_sharding(mesh)


@pytest.mark.parametrize("data", [0, 10_000, -2])
def test_impossible_meshes_are_refused(data):
    with pytest.raises(UserError, match=f"mesh of {data} x 1 x 1 devices"):
        make_mesh(data)


@pytest.mark.parametrize("share", [0, -1, 10_000])
def test_impossible_shares_of_a_layer_are_refused(share):
    with pytest.raises(UserError, match=f"x {share} devices"):
        make_mesh(tensor=share)
    with pytest.raises(UserError, match=f"x {share} x 1 devices"):
        make_mesh(fsdp=share)


def test_a_mesh_without_a_part_for_every_host_is_refused(monkeypatch):
    mesh = make_mesh(1, devices=jax.local_devices()[:1])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="does not divide among 2 hosts"):
        shard_batch({"x": np.zeros((2, 3))}, mesh)


class Hosts:
    """What `data_share` reads of a mesh: whose device each is."""

    def __init__(self, devices):
        self.devices = np.vectorize(lambda host: SimpleNamespace(process_index=host))(devices)
        self.shape = dict(zip(("data", "fsdp", "tensor"), self.devices.shape, strict=True))


@pytest.mark.parametrize(
    ("devices", "shares"),
    [
        ([[[0], [0]], [[1], [1]]], [(0, 2), (1, 2)]),
        ([[[1], [0]], [[1], [0]]], [(1, 2), (0, 2)]),  # parts that are not next to each other
        ([[[0, 1]], [[0, 1]]], [(0, 1), (0, 1)]),  # a layer over two hosts: the same pictures
        ([[[0, 1]], [[2, 3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_hosts_that_hold_the_same_parts_read_the_same_share(devices, shares, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: len(shares))
    for host, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        assert data_share(Hosts(devices)) == share


def test_parts_that_overlap_between_hosts_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="hold overlapping parts"):
        data_share(Hosts([[[0, 0]], [[0, 1]]]))


class Chip:
    """A TPU that is not there."""

    def __init__(self, number, side, slice_index=0):
        self.coords = number % side, number // side % side, 0
        self.id, self.core_on_chip, self.slice_index = number, 0, slice_index
        self.process_index, self.platform = number // 4, "tpu"
        self.device_kind = "TPU v6 lite"


def test_a_network_of_chips_is_cut_through_its_axes():
    """fsdp 8 of a network of 16 x 16 takes half of one of its axes."""
    chips = [Chip(number, 16) for number in range(256)]
    laid = mesh_devices((32, 8, 1), chips)
    assert laid.shape == (32, 8, 1)
    assert len({chip.id for chip in laid.flat}) == 256
    with pytest.raises(UserError, match=r"cannot be cut into 3 x 8 x 1|must be a multiple"):
        mesh_devices((3, 8, 1), chips[:24])


def test_only_batches_are_split_between_slices():
    chips = [Chip(number % 16, 4, number // 16) for number in range(32)]
    laid = mesh_devices((4, 8, 1), chips)
    assert [len({chip.slice_index for chip in group.flat}) for group in laid] == [1] * 4
    with pytest.raises(UserError, match=r"data=1 must be a multiple of the 2 slices"):
        mesh_devices((1, 32, 1), chips)


def test_all_devices_means_all():
    with pytest.raises(UserError, match=r"2 x 1 devices \(fsdp x tensor\) do not divide the 3"):
        make_mesh(fsdp=2, devices=jax.devices()[:1] * 3)
