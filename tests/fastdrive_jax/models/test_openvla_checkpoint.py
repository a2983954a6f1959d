"""Checkpoints with the published names, spelled out here, and what is wrong with others."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_openvla import SLOTS, TOKENS

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.openvla import hf_config
from fastdrive_jax.models.openvla.checkpoint import load
from fastdrive_jax.models.openvla.config import OPENVLA_7B
from fastdrive_jax.models.openvla.hf_config import config_from_hf, read_config
from fastdrive_jax.parallel.mesh import make_mesh

PUBLISHED = {
    "model_type": "openvla",
    "architectures": ["OpenVLAForActionPrediction"],
    "arch_specifier": "no-align+fused-gelu-mlp",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "llama2-7b-pure",
    "image_resize_strategy": "resize-naive",
    "use_fused_vision_backbone": True,
    "image_sizes": [224, 224],
    "timm_override_act_layers": [None, None],
    "n_action_bins": 256,
    "pad_to_multiple_of": 64,
    "pad_token_id": 32_000,
    "text_config": {"model_type": "llama", "pad_token_id": 32_000, "vocab_size": 32_064},
}
TINY = PUBLISHED | {
    "vision_backbone_id": "tiny",
    "image_sizes": [24, 24],
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 352,
    },
    "norm_stats": {"here": {"action": {"q01": [-1, -1, 0], "q99": [1, 1, 1]}}},
}


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setitem(hf_config.BACKBONES, "tiny", TOKENS.encoders)


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of `TOKENS`, those that are not read too."""
    out = {}

    def layer(name, outputs, inputs, bias=True):
        out[f"{name}.weight"] = (outputs, inputs)
        if bias:
            out[f"{name}.bias"] = (outputs,)

    def norm(name, size):
        out[f"{name}.weight"] = out[f"{name}.bias"] = (size,)

    for name, size, inner, blocks in (("featurizer", 32, 64, 3), ("fused_featurizer", 24, 48, 2)):
        vit = f"vision_backbone.{name}"
        out[f"{vit}.pos_embed"] = (1, 9, size)
        out[f"{vit}.patch_embed.proj.weight"] = (size, 3, 8, 8)
        out[f"{vit}.patch_embed.proj.bias"] = (size,)
        for number in range(blocks):
            block = f"{vit}.blocks.{number}"
            norm(f"{block}.norm1", size)
            layer(f"{block}.attn.qkv", 3 * size, size)
            layer(f"{block}.attn.proj", size, size)
            norm(f"{block}.norm2", size)
            layer(f"{block}.mlp.fc1", inner, size)
            layer(f"{block}.mlp.fc2", size, inner)
            if name == "featurizer":
                out[f"{block}.ls1.scale_factor"] = out[f"{block}.ls2.scale_factor"] = (size,)
        norm(f"{vit}.norm", size)
    out["vision_backbone.featurizer.cls_token"] = (1, 1, 32)
    out["vision_backbone.featurizer.reg_token"] = (1, 2, 32)
    out["vision_backbone.fused_featurizer.attn_pool.latent"] = (1, 1, 24)
    layer("vision_backbone.fused_featurizer.attn_pool.kv", 48, 24)
    layer("projector.fc1", 4 * 56, 56)
    layer("projector.fc2", 32, 4 * 56)
    layer("projector.fc3", 32, 32)
    llama = "language_model.model"
    out[f"{llama}.embed_tokens.weight"] = out["language_model.lm_head.weight"] = (352, 32)
    out[f"{llama}.norm.weight"] = (32,)
    for number in range(2):
        block = f"{llama}.layers.{number}"
        out[f"{block}.input_layernorm.weight"] = (32,)
        out[f"{block}.post_attention_layernorm.weight"] = (32,)
        for part in "qkvo":
            layer(f"{block}.self_attn.{part}_proj", 32, 32, bias=False)
        for part in ("gate", "up"):
            layer(f"{block}.mlp.{part}_proj", 48, 32, bias=False)
        layer(f"{block}.mlp.down_proj", 32, 48, bias=False)
    return out


def component_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Those of OFT's parts of `SLOTS`."""
    head = {"model.layer_norm1": (96,), "model.fc1": (32, 96), "model.layer_norm2": (32,)}
    for block in ("model.mlp_resnet_blocks.0.ffn", "model.mlp_resnet_blocks.1.ffn"):
        head |= {f"{block}.0": (32,), f"{block}.1": (32, 32)}
    head["model.fc2"] = (3, 32)
    proprio = {"fc1": (32, 4), "fc2": (32, 32)}
    return {
        name: {f"{layer}.weight": shape for layer, shape in part.items()}
        | {f"{layer}.bias": shape[:1] for layer, shape in part.items()}
        for name, part in (("action_head", head), ("proprio_projector", proprio))
    }


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, content=TINY, tensors=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    tensors = draw(shapes()) if tensors is None else tensors
    save_file(tensors, folder / "model.safetensors")
    return tensors


def write_components(folder, prefix=""):
    parts = {name: draw(part, 1) for name, part in component_shapes().items()}
    for name, part in parts.items():
        named = {prefix + tensor: value for tensor, value in part.items()}
        save_file(named, folder / f"{name}--50_checkpoint.safetensors")
    return parts


def test_every_tensor_goes_where_it_belongs(tmp_path):
    tensors = write(tmp_path)
    config, params = load(tmp_path)
    assert config == TOKENS
    name = "vision_backbone.featurizer"
    encoder = params["encoders_0"]
    np.testing.assert_array_equal(
        encoder["blocks_1"]["attn"]["qkv"]["kernel"], tensors[f"{name}.blocks.1.attn.qkv.weight"].T
    )
    patch = tensors[f"{name}.patch_embed.proj.weight"]
    kernel = encoder["patch_embed"]["kernel"].reshape(3, 8, 8, 32)
    np.testing.assert_array_equal(kernel[2, 1, 5], patch[:, 2, 1, 5])
    np.testing.assert_array_equal(
        encoder["blocks_0"]["ls2"], tensors[f"{name}.blocks.0.ls2.scale_factor"]
    )
    assert set(encoder) & {"blocks_2", "norm"} == set()
    np.testing.assert_array_equal(
        params["language_model"]["lm_head"]["kernel"], tensors["language_model.lm_head.weight"].T
    )


def test_components_make_an_oft(tmp_path):
    write(tmp_path)
    parts = write_components(tmp_path, prefix="module.")
    config, params = load(tmp_path, dtype=jnp.bfloat16, oft_chunk=2)
    assert config == SLOTS
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    _, params = load(tmp_path, oft_chunk=2)
    head = parts["action_head"]
    np.testing.assert_array_equal(
        params["action_head"]["blocks_1_dense"]["kernel"],
        head["model.mlp_resnet_blocks.1.ffn.1.weight"].T,
    )
    np.testing.assert_array_equal(
        params["proprio_projector"]["fc1"]["kernel"], parts["proprio_projector"]["fc1.weight"].T
    )


def test_pickled_components_are_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path)
    parts = write_components(tmp_path)
    _, params = load(tmp_path)
    for name, part in parts.items():
        (tmp_path / f"{name}--50_checkpoint.safetensors").unlink()
        tensors = {f"module.{key}": torch.from_numpy(value) for key, value in part.items()}
        torch.save(tensors, tmp_path / f"{name}--50_checkpoint.pt")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)
    halves = {key: torch.from_numpy(value).bfloat16() for key, value in part.items()}
    torch.save(halves, tmp_path / f"{name}--50_checkpoint.pt")
    found = load(tmp_path)[1]["proprio_projector"]
    assert found["fc1"]["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["fc1"]["bias"], part["fc1.bias"].astype(jnp.bfloat16))


def test_all_misfits_are_named_at_once(tmp_path):
    tensors = draw(shapes())
    del tensors["projector.fc3.bias"]
    tensors["projector.fc4.bias"] = np.zeros(2, np.float32)
    tensors["vision_backbone.featurizer.pos_embed"] = np.zeros((1, 10, 32), np.float32)
    name = "vision_backbone.featurizer.blocks.0.ls1"
    tensors[f"{name}.gamma"] = tensors[f"{name}.scale_factor"]  # timm's name, and ours
    write(tmp_path, tensors=tensors)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    for part in (
        "an OpenVLA of 2 encoders and 2 decoder layers",
        f"given twice: {name}.scale_factor",
        "unmapped: projector.fc4.bias",
        "unfilled: projector.fc3.bias",
        "misshapen: vision_backbone.featurizer.pos_embed (1, 10, 32), not (1, 9, 32)",
    ):
        assert part in str(caught.value)


def test_components_that_do_not_fit(tmp_path):
    write(tmp_path)
    write_components(tmp_path)
    two = tmp_path / "action_head--60_checkpoint.safetensors"
    save_file(draw({"a": (1,)}), two)
    with pytest.raises(UserError, match=r"several action_head files \(action_head--50_"):
        load(tmp_path)
    two.unlink()
    (tmp_path / "vision_backbone--50_checkpoint.pt").write_bytes(b"")
    with pytest.raises(UserError, match="belongs to a variant that is not built here"):
        load(tmp_path)
    (tmp_path / "vision_backbone--50_checkpoint.pt").unlink()
    (tmp_path / "action_head--50_checkpoint.safetensors").unlink()
    with pytest.raises(UserError, match="no L1 action head"):
        load(tmp_path)


def test_a_damaged_pickle_and_a_missing_torch(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    write(tmp_path)
    path = tmp_path / "action_head--50_checkpoint.pt"
    path.write_bytes(b"no pickle")
    with pytest.raises(UserError, match=r"action_head--50_checkpoint\.pt holds no PyTorch tensors"):
        load(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"needs PyTorch; run `pip install -e '\.\[parity"):
        load(tmp_path)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load(tmp_path)
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor"):
        load(tmp_path)


def test_the_published_config_gives_the_published_sizes():
    assert config_from_hf(PUBLISHED) == OPENVLA_7B


def test_what_transformers_5_writes_is_read_too():
    text = PUBLISHED["text_config"] | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    decoder = config_from_hf(PUBLISHED | {"text_config": text}).text
    assert (decoder.rope_theta, decoder.num_kv_heads, decoder.rms_norm_eps) == (5e5, 8, 1e-5)


def test_the_first_release_has_one_encoder():
    content = PUBLISHED | {
        "vision_backbone_id": "siglip-vit-so400m",
        "llm_backbone_id": "vicuna-v15-7b",
        "arch_specifier": "no-align+gelu-mlp",
        "use_fused_vision_backbone": False,
        "image_sizes": [224],
        "timm_override_act_layers": [None],
    }
    assert config_from_hf(content).encoders == OPENVLA_7B.encoders[1:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen2_5_vl"}, "model_type 'qwen2_5_vl'; only 'openvla'"),
        ({"vision_backbone_id": "clip-vit-l"}, "vision_backbone_id 'clip-vit-l'"),
        ({"llm_backbone_id": "phi-2-3b"}, "llm_backbone_id='phi-2-3b'"),
        ({"image_sizes": [384, 384]}, "image_sizes="),
        ({"timm_override_act_layers": [None, "quick_gelu"]}, "timm_override_act_layers="),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "text_config.rope_scaling="),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope_type='yarn'"),
        ({"arch_specifier": "no-align+linear"}, "arch_specifier='no-align+linear'"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config.hidden_act='relu'"),
        ({"norm_stats": {"a": {"action": {}}}}, "norm_stats without action percentiles"),
        (
            {"norm_stats": {name: {"action": {"q01": [0] * int(name)}} for name in "67"}},
            "actions of [6, 7] numbers",
        ),
    ],
)
def test_other_models_are_refused(tmp_path, change, said):
    write(tmp_path, PUBLISHED | change, {"a": np.zeros(1)})
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_tensors_go_straight_to_their_shards(tmp_path):
    write(tmp_path)
    _, params = load(tmp_path, make_mesh(1, 2, 4))
    flat = traverse_util.flatten_dict(params, sep="/")
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in flat.items()}
    assert len(specs) == len(traverse_util.flatten_dict(load(tmp_path)[1]))
    assert specs["encoders_0/blocks_0/attn/qkv/kernel"] == ("fsdp", "tensor")
    assert specs["encoders_1/blocks_0/fc2/kernel"] == ("tensor", "fsdp")
    assert specs["projector/fc1/kernel"] == ("fsdp", "tensor")
    assert specs["language_model/layers_1/mlp/down_proj/kernel"] == ("tensor", "fsdp")


def test_a_fine_tuned_models_actions_go_before_the_base_models(tmp_path):
    seven, two = ({"action": {"q01": [0] * n, "q99": [1] * n}} for n in (7, 2))
    write(tmp_path, TINY | {"norm_stats": {"base": seven}})
    assert read_config(tmp_path).action_dim == 7
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"own": two}))
    assert read_config(tmp_path).action_dim == 2
