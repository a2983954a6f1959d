"""A pruned Qwen2.5-VL read back from the disk, in every form, answers as it did in memory."""

import importlib.util
import math
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_checkpoint import write_checkpoint
from tiny_qwen import ASKED, PROMPTS, pictures, pruned_params

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import read_bundle_orbax, write_bundle
from fastdrive_jax.export.eight_bits import EightBits, round_params
from fastdrive_jax.export.programs import Bucket, lower, read_program, write_programs
from fastdrive_jax.export.pruned_qwen import (
    PROCESSOR,
    PROGRAMS,
    parts,
    processor_files,
    quantized_answer,
    qwen_program,
    read_pruned_qwen,
    read_quantized_qwen,
    write_pruned_qwen,
    write_quantized_qwen,
)
from fastdrive_jax.export.trees import flatten, unflatten
from fastdrive_jax.inference.pruned_qwen import (
    PrunedQwen,
    answer_pictures,
    cast_params,
    prompt_batch,
)
from fastdrive_jax.inference.sampling import SamplingConfig
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from fastdrive_jax.models.qwen2_5_vl.processor import read_processor
from fastdrive_jax.models.qwen2_5_vl.weights import abstract_params
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

needs_qwix = pytest.mark.skipif(
    importlib.util.find_spec("qwix") is None, reason="qwix is not installed (extra: export)"
)
needs_flatbuffers = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="flatbuffers is not installed (extra: export)",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, pruned_params())


@pytest.fixture(scope="module")
def given():
    return pictures(len(PROMPTS)), *prompt_batch(ASKED, PROMPTS)


@pytest.fixture(scope="module")
def want(params, given):
    return jax.jit(partial(answer_pictures, ASKED))(params, *given)


@pytest.fixture(scope="module")
def bundle(params, checkpoint, tmp_path_factory):
    return write_pruned_qwen(tmp_path_factory.mktemp("b") / "policy", ASKED, params, checkpoint)


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_both_forms_hold_the_model(bundle, params, form):
    asked, have = read_pruned_qwen(bundle, form)
    assert asked == ASKED
    jax.tree.map(np.testing.assert_array_equal, have, params)


def test_the_folder_needs_no_checkpoint_beside_it(bundle, checkpoint):
    """Tokenizer, template and picture sizes go along; the weights do not go twice."""
    ours, theirs = (read_processor(folder) for folder in (bundle / PROCESSOR, checkpoint))
    samples = [one.sample("What is ahead?", [pictures(1)[0, 0]] * 2) for one in (ours, theirs)]
    assert samples[0].ids == samples[1].ids
    assert samples[0].grids == [(4, 8)] * 2
    assert not list((bundle / PROCESSOR).glob("*.safetensors*"))


def test_the_terms_of_the_weights_go_along(tmp_path):
    for name in ("LICENSE", "NOTICE.md", "config.json", "model.safetensors", "README.md"):
        (tmp_path / name).touch()
    found = [path.name for path in processor_files(tmp_path)]
    assert found == ["LICENSE", "NOTICE.md", "config.json"]


def test_it_restores_onto_a_mesh_of_any_shape(bundle):
    mesh = jax.make_mesh((1,), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, config = read_bundle_orbax(bundle, place)
    assert config["kind"] == "pruned qwen2_5_vl"
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {place}


@needs_flatbuffers
def test_a_program_answers_the_same(params, given, want, tmp_path):
    buckets = (Bucket(0.4, 2), Bucket(1.0, 2))
    folder = write_programs(tmp_path / "p", qwen_program(ASKED), params, buckets, ("cpu",))
    have = read_program(folder, PROGRAMS, buckets[0])(*given)
    for name in ("ids", "lengths", "keep_indices"):
        np.testing.assert_array_equal(have[name], getattr(want, name), err_msg=name)
    every = read_program(folder, PROGRAMS, buckets[1])(*given)
    np.testing.assert_array_equal(every["keep_indices"], np.tile(np.arange(16), (2, 1)))
    assert (np.asarray(every["ids"]) != np.asarray(want.ids)).any()


@needs_flatbuffers
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_are_lowered_in_bfloat16(params, platform):
    asked = replace(ASKED, dtype="bfloat16")
    tensors = flatten(cast_params(params, "bfloat16"))
    with jax.default_matmul_precision("default"):
        program = lower(qwen_program(asked), tensors, Bucket(0.4), platform)
    assert "HIGHEST" not in program.mlir_module()  # a TPU's kernels refuse it of half precision
    assert program.platforms == (platform,)
    assert [array.dtype.name for array in program.out_avals] == ["int32"] * 3
    assert program.serialize()


@needs_flatbuffers
def test_flash_attention_in_a_program(params):
    """Where cuDNN is installed, which needs no GPU; elsewhere it is refused."""
    asked = replace(ASKED, dtype="bfloat16")
    tensors = flatten(cast_params(params, "bfloat16"))
    given = qwen_program(asked), tensors, Bucket(0.4), "cuda"
    with jax.default_matmul_precision("default"):
        assert "cudnn" not in lower(*given).mlir_module()
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            with pytest.raises(UserError, match="where it is installed"):
                lower(*given, cudnn=True)
            return
        program = lower(*given, cudnn=True)
    assert "__cudnn$fmhaSoftmax" in program.mlir_module()
    assert jax.export.deserialize(program.serialize()).platforms == ("cuda",)


@needs_flatbuffers
def test_the_3b_is_lowered_from_shapes_alone():
    """3,249 tokens of one picture to 812, for a GPU, without a weight in memory."""
    size = (1596, 1596)
    asked = PrunedQwen(QWEN2_5_VL_3B, ReconPrunerConfig(), 0.25, 1, size, 512, SamplingConfig(256))
    tokens = jax.ShapeDtypeStruct((1, 4, 2048), jnp.bfloat16)
    shapes = {
        "vla": abstract_params(asked.vla.vision, asked.vla.text),
        "pruner": jax.eval_shape(ReconPruner(asked.pruner).init, jax.random.key(0), tokens)[
            "params"
        ],
    }
    weights = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
        for name, leaf in flatten_dict(shapes, sep="/").items()
    }
    program = lower(qwen_program(asked), weights, Bucket(0.25), "cuda")
    shapes = [(array.shape, array.dtype.name) for array in program.out_avals]
    assert shapes == [((1, 256), "int32"), ((1, 812), "int32"), ((1,), "int32")]
    parameters = sum(math.prod(array.shape) for array in weights.values())
    assert parameters == 3_754_622_976 + 77_081_088


@needs_qwix
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_answer_as_the_rounded_kernels_do(params, checkpoint, given, tmp_path, dtype):
    asked, cast = replace(ASKED, dtype=dtype), cast_params(params, dtype)
    folder = write_quantized_qwen(tmp_path / "int8", asked, cast, checkpoint, EightBits())
    again, bits, tensors = read_quantized_qwen(folder, "orbax")
    assert (again, bits) == (asked, EightBits())
    have = jax.jit(quantized_answer(again, bits))(tensors, *given)
    tensors = jax.tree.map(np.asarray, tensors)
    flat, rounded = jax.tree.map(np.asarray, flatten_dict(cast, sep="/")), 0
    for name, kernel in flat.items():
        if f"{name}/qvalue" not in tensors:
            np.testing.assert_array_equal(tensors[name], kernel)
            continue
        rounded += 1
        assert tensors[f"{name}/qvalue"].dtype == jnp.int8
        scale = tensors[f"{name}/scale"].astype(np.float32)
        flat[name] = (tensors[f"{name}/qvalue"] * scale).astype(kernel.dtype)
        far = np.abs(flat[name].astype(np.float32) - np.asarray(kernel, np.float32))
        assert far.max() < 0.6 * float(scale.max()) + 0.01 * float(np.abs(kernel).max())
    # Every product with a kernel but the patch embedding's, the head's and the table's.
    kernels = {name for name, leaf in flat.items() if name.endswith("kernel") and leaf.ndim == 2}
    plain = {"vla/visual/patch_embed/kernel", "vla/language_model/lm_head/kernel"}
    assert rounded == len(kernels - plain) > 20
    if dtype == "float32":  # where the products are rounded alike
        want = jax.jit(partial(answer_pictures, asked))(unflatten(flat), *given)
        np.testing.assert_array_equal(have.keep_indices, want.keep_indices)
        np.testing.assert_array_equal(have.ids, want.ids)


@needs_qwix
def test_products_of_eight_bits_are_in_the_program(params, given):
    bits = EightBits("int8", "int8")
    tensors = round_params(parts(ASKED), bits, params)
    lowered = jax.jit(quantized_answer(ASKED, bits)).lower(tensors, *given).as_text()
    assert lowered.count("xi8>, tensor<") > 20


def test_a_changed_processor_is_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    path = copy / PROCESSOR / "preprocessor_config.json"
    path.write_text(path.read_text().replace("50000", "40000"))
    for form in ("safetensors", "orbax"):
        with pytest.raises(UserError, match=r"preprocessor_config\.json does not match"):
            read_pruned_qwen(copy, form)


def test_damaged_and_other_bundles_are_refused(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "copy")
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="truncated"):
        read_pruned_qwen(copy)
    with pytest.raises(UserError, match="'pruned qwen2_5_vl', not a quantized pruned qwen2_5_vl"):
        read_quantized_qwen(bundle)
    other = write_bundle(tmp_path / "b", {"m": {"w": np.ones(2, np.float32)}}, {"kind": "pruner"})
    with pytest.raises(UserError, match="'pruner', not a pruned qwen2_5_vl"):
        read_pruned_qwen(other)


@needs_qwix
def test_fp8_weights_are_not_written_since_they_could_not_be_read(params, checkpoint, tmp_path):
    with pytest.raises(UserError, match="cannot be kept in a bundle"):
        write_quantized_qwen(
            tmp_path / "fp8", ASKED, params, checkpoint, EightBits("float8_e4m3fn")
        )
    assert not list(tmp_path.iterdir())
