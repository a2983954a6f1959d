"""Action tokens and statistics beside NumPy written from their published description."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla.actions import (
    Bounds,
    bin_edges,
    decode_actions,
    encode_actions,
    normalise,
    normalise_proprio,
    read_statistics,
    unnormalise,
)
from fastdrive_jax.models.openvla.config import OPENVLA_7B

EDGES = np.linspace(-1, 1, 256)
VOCABULARY = 32_064 - 64
BOUNDS = Bounds(
    low=(-0.5, -2.0, 0.0, 3.0),
    high=(0.5, 4.0, 1.0, 3.0),
    mask=(True, True, False, True),
    unused=(False, False, False, True),
)
PART = {"q01": [-1, -2], "q99": [1, 2], "min": [-3, 0], "max": [3, 0], "mask": [True, False]}


def test_all_256_ids_are_read_as_published():
    ids = np.arange(VOCABULARY - 256, VOCABULARY)
    centres = (EDGES[:-1] + EDGES[1:]) / 2
    wanted = centres[np.clip(VOCABULARY - ids - 1, 0, 254)]
    np.testing.assert_allclose(decode_actions(jnp.asarray(ids), OPENVLA_7B), wanted, atol=1e-7)


def test_other_ids_are_the_nearest_action():
    ids = jnp.array([5, VOCABULARY, 32_063])
    np.testing.assert_allclose(
        decode_actions(ids, OPENVLA_7B), [1 - 1 / 255, -1 + 1 / 255, -1 + 1 / 255], atol=1e-7
    )


def test_actions_are_binned_as_published():
    """Also on the edges, and on either side of them, where float32 must not decide otherwise."""
    edges = EDGES.astype(np.float32)
    values = np.concatenate(
        [edges, np.nextafter(edges, np.float32(-2)), np.nextafter(edges, np.float32(2))]
    )
    values = np.concatenate([values, np.random.default_rng(0).uniform(-1.2, 1.2, 10_000)])
    values = values.astype(np.float32)
    wanted = VOCABULARY - np.digitize(np.clip(values, -1, 1), EDGES)
    np.testing.assert_array_equal(encode_actions(jnp.asarray(values), OPENVLA_7B), wanted)


def test_no_float32_edge_lies_below_the_exact_one():
    edges = bin_edges(256)
    assert edges.dtype == np.float32
    assert (edges >= EDGES).all()
    assert (np.nextafter(edges, np.float32(-2)) < EDGES).all()


def test_ids_survive_a_round_trip():
    ids = jnp.arange(VOCABULARY - 255, VOCABULARY)
    again = encode_actions(decode_actions(ids, OPENVLA_7B), OPENVLA_7B)
    np.testing.assert_array_equal(again, ids)
    values = jax.random.uniform(jax.random.key(0), (1000, 7), minval=-1)
    error = decode_actions(encode_actions(values, OPENVLA_7B), OPENVLA_7B) - values
    assert np.abs(error).max() <= 1 / 255 + 1e-6


def test_normalising():
    values = jnp.array([[0.25, 1.0, 0.7, 3.0], [9.0, -9.0, -0.2, 5.0]])
    found = normalise(values, BOUNDS)
    np.testing.assert_allclose(found, [[0.5, 0, 0.7, 0], [1, -1, -0.2, 0]], atol=1e-6)
    state = normalise_proprio(values, BOUNDS)
    np.testing.assert_allclose(state, [[0.5, 0, 0.7, -1], [1, -1, -0.2, 1]], atol=1e-6)
    back = unnormalise(found[:1], BOUNDS)
    np.testing.assert_allclose(back, values[:1], atol=1e-6)


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return folder


def test_statistics_of_a_data_set(tmp_path):
    found = {
        "bridge": {"action": PART},
        "libero": {"action": PART, "proprio": {**PART, "q99": [7, 8]}},
    }
    write(tmp_path, "config.json", {"norm_stats": found})
    statistics = read_statistics(tmp_path, "libero")
    assert statistics.action == Bounds((-1, -2), (1, 2), (True, False), (False, True))
    assert statistics.proprio.high == (7, 8)
    assert read_statistics(tmp_path, "bridge").proprio is None


def test_a_file_of_its_own_goes_before_the_config(tmp_path):
    write(tmp_path, "config.json", {"norm_stats": {"old": {"action": PART}}})
    write(tmp_path, "dataset_statistics.json", {"new": {"action": {**PART, "q01": [-9, -9]}}})
    assert read_statistics(tmp_path).action.low == (-9, -9)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ({"a": {"action": PART}, "b": {"action": PART}}, "c", "called 'c'; choose one of a, b"),
        ({"a": {"action": PART}, "b": {"action": PART}}, None, "choose one of a, b"),
        ({"a": {"action": {"mean": [0]}}}, "a", "no percentiles q01 and q99 under a.action"),
        ({"a": {"proprio": PART}}, "a", "no action statistics under a"),
        ({"a": {"action": {**PART, "mask": [True]}}}, "a", "different lengths under a.action"),
        ({}, "a", "no action statistics; it needs dataset_statistics.json"),
    ],
)
def test_what_is_missing_is_said(tmp_path, content, key, said):
    write(tmp_path, "config.json", {"norm_stats": content})
    with pytest.raises(UserError) as caught:
        read_statistics(tmp_path, key)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_files(tmp_path):
    with pytest.raises(UserError, match="holds no action statistics"):
        read_statistics(tmp_path)


def test_extremes_instead_of_percentiles(tmp_path):
    write(tmp_path, "config.json", {"norm_stats": {"aloha": {"action": PART, "proprio": PART}}})
    statistics = read_statistics(tmp_path, ends="extremes")
    assert statistics.action == Bounds((-3, 0), (3, 0), (True, False), (False, True))
    assert statistics.proprio.high == (3, 0)
    part = {name: PART[name] for name in ("q01", "q99")}
    write(tmp_path, "config.json", {"norm_stats": {"aloha": {"action": part}}})
    with pytest.raises(UserError, match=r"no extremes min and max under aloha\.action"):
        read_statistics(tmp_path, ends="extremes")
