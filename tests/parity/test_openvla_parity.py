"""OpenVLA and OFT against transformers' encoders and Llama, put together here in plain PyTorch."""

import importlib.util
import json
from itertools import pairwise

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_openvla import DINO, SIGLIP, SLOTS, TOKENS, random_inputs

from fastdrive_jax.models.openvla import hf_config
from fastdrive_jax.models.openvla.checkpoint import load
from fastdrive_jax.models.openvla.model import OpenVLA
from fastdrive_jax.models.vit import ViT, normalise_pictures

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)
TOLERANCE = 3e-5
CONFIG = {
    "model_type": "openvla",
    "vision_backbone_id": "tiny",
    "image_sizes": [24, 24],
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 352,
    },
    "norm_stats": {"here": {"action": {"q01": [0, 0, 0]}}},
}


def dinov2():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=DINO.hidden_size,
            num_hidden_layers=DINO.depth,
            num_attention_heads=DINO.num_heads,
            mlp_ratio=DINO.intermediate_size // DINO.hidden_size,
            patch_size=DINO.patch_size,
            image_size=DINO.image_size,
            num_register_tokens=DINO.registers,
        )
    )


def siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=SIGLIP.hidden_size,
            intermediate_size=SIGLIP.intermediate_size,
            num_hidden_layers=SIGLIP.depth,
            num_attention_heads=SIGLIP.num_heads,
            patch_size=SIGLIP.patch_size,
            image_size=SIGLIP.image_size,
            hidden_act="gelu",  # timm's is exact, unlike the one of the original
        )
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**CONFIG["text_config"], attn_implementation="eager"))


def mlp(*sizes):
    """Linear layers with GELUs between them, as the projectors."""
    from torch import nn

    layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def action_head():
    """fc1, two residual blocks and fc2, by their published names."""
    from torch import nn

    block = nn.ModuleList([nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)) for _ in range(2)])
    return nn.ModuleDict(
        {
            "layer_norm1": nn.LayerNorm(96),
            "fc1": nn.Linear(96, 32),
            "mlp_resnet_blocks": block,
            "layer_norm2": nn.LayerNorm(32),
            "fc2": nn.Linear(32, 3),
        }
    )


def numpy_of(module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def fused(tensors, block, separate):
    """Queries, keys and values side by side, as timm has them."""
    return {
        f"{block}.attn.qkv.{kind}": np.concatenate(
            [tensors[f"{separate.format(part)}.{kind}"] for part in "qkv"]
        )
        for kind in ("weight", "bias")
    }


def copied(tensors, pairs):
    return {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"]
        for ours, theirs in pairs.items()
        for kind in ("weight", "bias")
    }


def timm_dinov2(module) -> dict[str, np.ndarray]:
    """Under timm's names; there the class token holds its position."""
    tensors = numpy_of(module)
    positions = tensors["embeddings.position_embeddings"]
    out = {
        "cls_token": tensors["embeddings.cls_token"] + positions[:, :1],
        "reg_token": tensors["embeddings.register_tokens"],
        "pos_embed": positions[:, 1:],
    }
    out |= copied(tensors, {"patch_embed.proj": "embeddings.patch_embeddings.projection"})
    out |= copied(tensors, {"norm": "layernorm"})
    for number in range(DINO.depth):
        block, theirs = f"blocks.{number}", f"encoder.layer.{number}"
        out |= fused(tensors, block, theirs + ".attention.{}_proj")
        same = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
        same |= {"attn.proj": "attention.o_proj"}
        out |= copied(tensors, {f"{block}.{a}": f"{theirs}.{b}" for a, b in same.items()})
        for part in (1, 2):
            scale = tensors[f"{theirs}.layer_scale{part}.lambda1"]
            out[f"{block}.ls{part}.scale_factor"] = scale
    return out


def timm_siglip(module) -> dict[str, np.ndarray]:
    tensors = {name.removeprefix("vision_model."): v for name, v in numpy_of(module).items()}
    out = {"pos_embed": tensors["embeddings.position_embedding.weight"][None]}
    out |= copied(tensors, {"patch_embed.proj": "embeddings.patch_embedding"})
    out |= copied(tensors, {"norm": "post_layernorm"})
    for number in range(SIGLIP.depth):
        block, theirs = f"blocks.{number}", f"encoder.layers.{number}"
        out |= fused(tensors, block, theirs + ".self_attn.{}_proj")
        same = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
        same |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        out |= copied(tensors, {f"{block}.{a}": f"{theirs}.{b}" for a, b in same.items()})
    return out


@pytest.fixture(scope="module")
def parts():
    """All modules, with weights of which none is 0 or 1."""
    import torch

    torch.manual_seed(0)
    made = {
        "dinov2": dinov2(),
        "siglip": siglip(),
        "projector": mlp(56, 224, 32, 32),
        "llama": llama(),
        "proprio": mlp(4, 32, 32),
        "head": action_head(),
    }
    for module in made.values():
        module.eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A checkpoint of them with the published names."""
    folder = tmp_path_factory.mktemp("openvla")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    linear = {"0": "fc1", "2": "fc2", "4": "fc3"}

    def renamed(module, prefix):
        return {
            f"{prefix}{linear[name.split('.')[0]]}.{name.split('.')[1]}": value
            for name, value in numpy_of(module).items()
        }

    groups = {
        "vision_backbone.featurizer.": timm_dinov2(parts["dinov2"]),
        "vision_backbone.fused_featurizer.": timm_siglip(parts["siglip"]),
        "language_model.": numpy_of(parts["llama"]),
    }
    tensors = {prefix + name: v for prefix, group in groups.items() for name, v in group.items()}
    tensors |= renamed(parts["projector"], "projector.")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def oft_folder(parts, folder):
    """The same with OFT's components beside it."""
    import shutil

    out = shutil.copytree(folder, folder.parent / "oft")
    linear = {"0": "fc1", "2": "fc2"}
    proprio = {
        f"{linear[name[0]]}{name[1:]}": value for name, value in numpy_of(parts["proprio"]).items()
    }
    blocks = {
        f"model.{name}".replace("blocks.0.", "blocks.0.ffn.").replace(
            "blocks.1.", "blocks.1.ffn."
        ): v
        for name, v in numpy_of(parts["head"]).items()
    }
    save_file(proprio, out / "proprio_projector--1_checkpoint.safetensors")
    save_file(blocks, out / "action_head--1_checkpoint.safetensors")
    return out


@pytest.fixture(autouse=True)
def tiny_backbone(monkeypatch):
    monkeypatch.setitem(hf_config.BACKBONES, "tiny", TOKENS.encoders)


def assert_near(ours, theirs, what):
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max()
    print(f"{what}: {error:.2e} of {np.abs(theirs).max():.1f}")
    assert error <= TOLERANCE * max(1, np.abs(theirs).max())


def torch_patches(parts, picture):
    """Patches of one view [1, 9, 56] from the second-to-last blocks."""
    import torch

    found = []
    for name, config in (("dinov2", DINO), ("siglip", SIGLIP)):
        pixels = (picture / 255 - np.array(config.mean)) / np.array(config.std)
        pixels = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        states = parts[name](pixels, output_hidden_states=True).hidden_states
        assert len(states) == config.depth + 1
        found.append(states[-2][:, config.prefix :])
    return torch.cat(found, dim=2)


@pytest.mark.parametrize("number", [0, 1])
def test_encoders(parts, folder, number):
    import torch

    config, name = ((DINO, "dinov2"), (SIGLIP, "siglip"))[number]
    params = load(folder)[1][f"encoders_{number}"]
    images = random_inputs(TOKENS, (3, 3))["images"][:, 0]
    pixels = normalise_pictures(images, config)
    ours = jax.jit(ViT(config, whole=False).apply)({"params": params}, pixels)
    with torch.no_grad():
        inputs = torch.from_numpy(np.array(pixels).transpose(0, 3, 1, 2).copy())
        theirs = parts[name](inputs, output_hidden_states=True).hidden_states[-2]
    assert_near(ours, theirs.numpy(), f"{name}, second-to-last block")


def test_llama(parts, folder):
    import torch

    from fastdrive_jax.models.decoder import Decoder

    config, params = load(folder)
    ids = np.random.default_rng(0).integers(0, 352, (2, 11))
    decoder, variables = Decoder(config.text), {"params": params["language_model"]}
    places = np.broadcast_to(np.arange(11), (3, 2, 11))

    @jax.jit
    def logits(variables, ids, places):
        embeddings = decoder.apply(variables, ids, method="embed")
        hidden, _ = decoder.apply(variables, embeddings, places)
        return decoder.apply(variables, hidden, method="logits")

    with torch.no_grad():
        theirs = parts["llama"](torch.from_numpy(ids)).logits.numpy()
    assert_near(logits(variables, ids, places), theirs, "Llama's logits")


def test_the_whole_model(parts, folder):
    """Each prompt alone in PyTorch, both in one padded batch here."""
    import torch

    config, params = load(folder)
    assert config == TOKENS
    inputs = random_inputs(TOKENS, (7, 4))
    ours = jax.jit(OpenVLA(config).apply)({"params": params}, **inputs)
    embed = parts["llama"].get_input_embeddings()
    for number, length in enumerate(inputs["lengths"]):
        with torch.no_grad():
            visual = parts["projector"](torch_patches(parts, inputs["images"][number, 0]))
            ids = [*inputs["ids"][number, :length], *inputs["actions"][number]]
            text = embed(torch.tensor([ids]))
            whole = torch.cat([text[:, :1], visual, text[:, 1:]], dim=1)
            logits = parts["llama"](inputs_embeds=whole).logits[0, -4:-1].numpy()
        assert_near(ours[number], logits, f"action logits of a prompt of {length}")


def torch_head(head, x):
    x = head["fc1"](head["layer_norm1"](x)).relu()
    for block in head["mlp_resnet_blocks"]:
        x = x + block(x).relu()
    return head["fc2"](head["layer_norm2"](x))


def test_oft(parts, oft_folder):
    import torch

    config, params = load(oft_folder, oft_chunk=2)
    assert config == SLOTS
    inputs = random_inputs(SLOTS, (7, 4))
    ours = jax.jit(OpenVLA(config).apply)({"params": params}, **inputs)
    embed = parts["llama"].get_input_embeddings()
    for number, length in enumerate(inputs["lengths"]):
        with torch.no_grad():
            views = [torch_patches(parts, view) for view in inputs["images"][number]]
            visual = [parts["projector"](view) for view in views]
            state = parts["proprio"](torch.from_numpy(inputs["proprio"][number])[None, None])
            text = embed(torch.tensor([[*inputs["ids"][number, :length], 2]]))
            slots = torch.zeros(1, 6, 32)
            middle = [*visual, state, text[:, 1:-1], slots, text[:, -1:]]
            whole = torch.cat([text[:, :1], *middle], dim=1)
            everything = torch.zeros(1, 1, whole.shape[1], whole.shape[1])
            hidden = parts["llama"].model(inputs_embeds=whole, attention_mask=everything)
            # As for tokens, what stands one place before gives a slot's action.
            rows = hidden.last_hidden_state[:, -8:-2].reshape(1, 2, 96)
            theirs = torch_head(parts["head"], rows)[0].numpy()
        assert_near(ours[number], theirs, f"actions of a prompt of {length}")
