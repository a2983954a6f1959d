"""pi0 against transformers' PaliGemma and Gemma with joint attention: same weights, noise, inputs.

The reference runs prefix, state and actions through one sequence in every step, with the mask of
the paper's three blocks; ours reads the prefix and the state once. What a method cuts is masked
out there, from its layer on.
"""

import dataclasses
import functools
import importlib.util
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fastdrive_jax.inference import pi0
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.pi0.config import TINY_PI0, Pi0Config
from fastdrive_jax.models.pi0.model import Pi0, action_expert
from fastdrive_jax.models.pi0.weights import load
from fastdrive_jax.pruning import make_pruner

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None,
    reason="torch and transformers are not installed (extra: parity)",
)

PREFIX = dataclasses.replace(
    TINY_PI0.prefix,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    vocab_size=96,
    mrope_section=(8, 0, 0),
    head_size=16,
)
CONFIG = Pi0Config(
    dataclasses.replace(
        TINY_PI0.vision,
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        patch_size=14,
        image_size=56,
    ),
    PREFIX,
    dataclasses.replace(PREFIX, hidden_size=32, intermediate_size=64),
    action_dim=6,
    horizon=5,
)
MODEL, N, WORDS, BATCH = Pi0(CONFIG), CONFIG.visual_tokens, 7, 2
TOLERANCE = 1e-4


def gemma_fields(config) -> dict:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


@functools.cache
def pair():
    """The reference's modules under lerobot's names, all parameters random, and our parameters."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM, PaliGemmaConfig
    from transformers import PaliGemmaForConditionalGeneration as PaliGemma

    vision, width, dim = CONFIG.vision, CONFIG.expert.hidden_size, CONFIG.action_dim
    paligemma = PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "image_size": vision.image_size,
            "vision_use_head": False,
        },
        text_config={"model_type": "gemma", **gemma_fields(CONFIG.prefix)},
        projection_dim=CONFIG.prefix.hidden_size,
        image_token_id=95,
    )
    decoders = torch.nn.ModuleDict(
        {
            "paligemma": PaliGemma(paligemma),
            "gemma_expert": GemmaForCausalLM(GemmaConfig(**gemma_fields(CONFIG.expert))),
        }
    )
    model = torch.nn.ModuleDict(
        {
            "paligemma_with_expert": decoders,
            "state_proj": torch.nn.Linear(dim, width),
            "action_in_proj": torch.nn.Linear(dim, width),
            "action_time_mlp_in": torch.nn.Linear(2 * width, width),
            "action_time_mlp_out": torch.nn.Linear(width, width),
            "action_out_proj": torch.nn.Linear(width, dim),
        }
    ).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            drawn = rng.normal(0, 0.2, value.shape).astype(np.float32)
            value.copy_(torch.from_numpy(drawn + ("layer_norm" in name)))
    tensors = {f"model.{name}": value.numpy() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        return model, load(folder, CONFIG)


@functools.cache
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "images": rng.integers(0, 256, (BATCH, 3, 56, 56, 3)).astype(np.uint8),
        "views": np.array([[True, True, True], [True, False, True]]),
        "ids": rng.integers(1, 95, (BATCH, WORDS)),
        "lengths": np.array([WORDS, 4]),
        "state": rng.normal(size=(BATCH, 6)).astype(np.float32),
        "noise": rng.normal(size=(BATCH, 5, 6)).astype(np.float32),
        "time": np.array([0.3, 0.85], np.float32),
    }


@functools.cache
def reference_prefix():
    """Embeddings [B, n, D] and which of them are real."""
    import torch

    model, given = pair()[0]["paligemma_with_expert"]["paligemma"].model, inputs()
    pixels = torch.from_numpy(given["images"].astype(np.float32) / 127.5 - 1)
    pixels = pixels.flatten(0, 1).permute(0, 3, 1, 2)
    pictures = model.multi_modal_projector(model.vision_tower(pixels).last_hidden_state)
    words = model.language_model.embed_tokens(torch.from_numpy(given["ids"]))
    real = np.concatenate(
        [
            np.repeat(given["views"], N // 3, axis=1),
            np.arange(WORDS) < given["lengths"][:, None],
        ],
        axis=1,
    )
    return torch.cat([pictures.reshape(BATCH, N, -1), words], 1), torch.from_numpy(real)


def reference(noisy, time, kept=None):
    """Normalised hidden states of the prefix, and velocities, all in one sequence.

    Args:
        noisy: [B, H, A], a tensor.
        time: [B], a tensor.
        kept: Of each layer, which tokens of the prefix it still sees [B, n].
    """
    import torch
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    model, given = pair()[0], inputs()
    prefix, real = reference_prefix()
    parts = (
        model["paligemma_with_expert"]["paligemma"].model.language_model,
        model["paligemma_with_expert"]["gemma_expert"].model,
    )
    width = CONFIG.expert.hidden_size
    periods = 4e-3 * (4.0 / 4e-3) ** torch.linspace(0, 1, width // 2, dtype=torch.float64)
    angles = 2 * torch.pi * time[:, None].double() / periods
    moment = torch.cat([angles.sin(), angles.cos()], -1).float()[:, None].expand(-1, 5, -1)
    actions = torch.cat([model["action_in_proj"](noisy), moment], -1)
    actions = torch.nn.functional.silu(model["action_time_mlp_in"](actions))
    actions = model["action_time_mlp_out"](actions)
    state = model["state_proj"](torch.from_numpy(given["state"]))[:, None]
    streams = [prefix, torch.cat([state, actions], 1)]
    n, whole = prefix.shape[1], prefix.shape[1] + 6
    block = torch.tensor([0] * n + [1] + [2] * 5)
    valid = torch.cat([real, torch.ones(BATCH, 6, dtype=bool)], 1)
    where = valid.cumsum(1) - 1
    for number in range(CONFIG.prefix.num_layers):
        layers = [part.layers[number] for part in parts]
        normed = [layer.input_layernorm(x) for layer, x in zip(layers, streams, strict=True)]

        def heads(name, layers=layers, normed=normed):
            found = [
                getattr(layer.self_attn, name)(x) for layer, x in zip(layers, normed, strict=True)
            ]
            return torch.cat(found, 1).view(BATCH, whole, -1, 16).transpose(1, 2)

        cos, sin = parts[0].rotary_emb(prefix, where)
        query, key = apply_rotary_pos_emb(heads("q_proj"), heads("k_proj"), cos, sin)
        sight = (block[None] <= block[:, None]) & valid[:, None]
        if kept is not None:
            sight[:, :, :n] &= torch.from_numpy(kept[number])[:, None]
        scores = (query @ key.transpose(2, 3)) / 4
        weights = scores.masked_fill(~sight[:, None], -1e30).softmax(-1)
        mixed = (weights @ heads("v_proj")).transpose(1, 2).reshape(BATCH, whole, -1)
        after = []
        for layer, x, y in zip(layers, streams, mixed.split([n, 6], 1), strict=True):
            x = x + layer.self_attn.o_proj(y)
            after.append(x + layer.mlp(layer.post_attention_layernorm(x)))
        streams = after
    hidden, last = (part.norm(x) for part, x in zip(parts, streams, strict=True))
    return hidden, model["action_out_proj"](last[:, 1:])


def reference_actions(kept=None, steps=10):
    import torch

    x = torch.from_numpy(inputs()["noise"])
    for step in range(steps):
        x = x - reference(x, torch.full((BATCH,), 1 - step / steps), kept)[1] / steps
    return x


@functools.cache
def our_tokens():
    run = jax.jit(lambda params, images: MODEL.apply({"params": params}, images, method="encode"))
    return run(pair()[1], inputs()["images"])


def read(params, tokens, **method):
    given = inputs()
    return pi0.read_prompt(
        MODEL, params, tokens, given["ids"], given["lengths"], given["views"], **method
    )


def assert_near(ours, theirs, what: str):
    theirs = np.asarray(theirs)
    error = np.abs(np.asarray(ours) - theirs).max()
    print(f"{what}: max abs error {error:.2e} of values up to {np.abs(theirs).max():.2f}")
    assert error <= TOLERANCE


def test_visual_tokens_and_prompt():
    import torch

    with torch.no_grad():
        theirs, _ = reference_prefix()
    assert_near(our_tokens(), theirs[:, :N], "visual tokens")
    words = MODEL.apply({"params": pair()[1]}, inputs()["ids"], method="embed")
    assert_near(words, theirs[:, N:], "prompt")


def sample(params, prefilled):
    numbers = jnp.asarray(inputs()["state"]), jnp.asarray(inputs()["noise"])
    expert = action_expert(CONFIG)
    return pi0.sample_actions(expert, params["expert"], prefilled, *numbers, 10).actions


def test_prefix_velocity_and_ten_steps():
    import torch

    given = inputs()

    @jax.jit
    def run(params, tokens):
        live = pi0.live_prompt(
            MODEL, params, tokens, given["ids"], given["lengths"], given["views"]
        )[2]
        hidden = Decoder(CONFIG.prefix, causal=False).apply(
            {"params": params["language_model"]},
            live.hidden,
            live.position_ids,
            lengths=live.length,
        )[0]
        variables, expert = {"params": params["expert"]}, action_expert(CONFIG)
        prefilled = read(params, tokens)
        prefix = expert.apply(variables, given["state"], prefilled.segments, method="read_state")
        noise, time = given["noise"], given["time"]
        velocity, _ = expert.apply(variables, noise, time, prefix, method="velocity")
        return hidden, velocity, sample(params, prefilled)

    hidden, velocity, actions = run(pair()[1], our_tokens())
    with torch.no_grad():
        real = reference_prefix()[1]
        noise, time = torch.from_numpy(given["noise"]), torch.from_numpy(given["time"])
        theirs, their_velocity = reference(noise, time)
        their_actions = reference_actions()
    for row in range(BATCH):
        own = theirs[row][real[row]]
        assert_near(hidden[row, : len(own)], own, f"hidden states of the prefix, {row}")
    assert_near(velocity, their_velocity, "velocity")
    assert_near(actions, their_actions, "ten steps")


def test_ten_steps_over_a_pruned_prefix():
    import torch

    @jax.jit
    def run(params, tokens):
        prefilled = read(params, tokens, pruner=make_pruner("fastv"), keep_ratio=0.3)
        return sample(params, prefilled), prefilled.segments

    ours, segments = run(pair()[1], our_tokens())
    kept = np.ones((CONFIG.prefix.num_layers, BATCH, N + WORDS), bool)
    order = np.argsort(~np.repeat(inputs()["views"], N // 3, axis=1), axis=1, kind="stable")
    for segment in segments:
        for row in range(BATCH):
            ids = np.asarray(segment.ids[row, : int(segment.count[row])])
            kept[slice(*segment.layers), row, :N] = np.isin(np.arange(N), order[row, ids])
    assert kept[-1, 0].sum() == int(0.3 * N) + WORDS
    with torch.no_grad():
        theirs = reference_actions(kept)
    assert_near(ours, theirs, "ten steps over a pruned prefix")
