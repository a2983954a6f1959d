"""Qwen2.5-VL of `transformers` with random weights, its stages called as its generation calls them.

Needs the extra "parity". Attention is sdpa, the best that it has without further packages.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.hf_config import config_to_hf
from fastdrive_jax.models.qwen2_5_vl.weights import params_from_tensors


def has_torch() -> bool:
    """Whether the extra "parity" is there."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def torch_device() -> str | None:
    """PyTorch's name of the device that JAX computes on; None where PyTorch cannot."""
    import torch

    backend = jax.default_backend()
    if backend == "gpu":
        return "cuda" if torch.cuda.is_available() else None
    return "cpu" if backend == "cpu" else None


def random_peer(
    config: QwenVLConfig, dtype: jnp.dtype = jnp.float32, device: str = "cpu", seed: int = 0
) -> Any:
    """The model; on a CPU with as many threads as there are cores.

    Args:
        config: Its sizes.
        dtype: Of its weights.
        device: See `torch_device`.
        seed: Of its weights.

    Raises:
        UserError: transformers is not there.
    """
    if not has_torch():
        raise UserError("The comparison needs transformers: pip install -e '.[parity]'.")
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(seed)
    marks = {"video_token_id": config.image_token_id + 3}
    hf = transformers.Qwen2_5_VLConfig(**config_to_hf(config), **marks)
    kind = getattr(torch, jnp.dtype(dtype).name)
    with torch.device(device):
        return transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            hf, attn_implementation="sdpa", dtype=kind
        ).eval()


def whole_config(vision: VisionConfig, text: DecoderConfig) -> QwenVLConfig:
    """A Qwen2.5-VL of these parts; its marks are the last ids."""
    last = text.vocab_size
    return QwenVLConfig(
        vision=vision,
        text=text,
        image_token_id=last - 10,
        vision_start_token_id=last - 9,
        vision_end_token_id=last - 8,
        eos_token_ids=(last - 1,),
        pad_token_id=0,
    )


def peer_params(peer: Any, config: QwenVLConfig) -> dict:
    """Its weights as this library's parameters, NumPy, in float32."""
    tensors = {name: value.float().cpu().numpy() for name, value in peer.state_dict().items()}
    return params_from_tensors(tensors, config.vision, config.text)


def peer_prefill(peer: Any, embeddings: Any, positions: Any) -> Any:
    """Logits of the last row and caches, of tensors [B, n, D] and [3, B, n]."""
    import torch

    with torch.inference_mode():
        state = peer(
            inputs_embeds=embeddings, position_ids=positions, use_cache=True, logits_to_keep=1
        )
    if embeddings.is_cuda:
        torch.cuda.synchronize()  # a call returns before its kernels have run
    return state


def peer_decode(
    peer: Any,
    state: Any,
    position: int,
    tokens: int,
    choose: Callable[[Any], Any] = lambda logits: logits.argmax(dim=-1),
) -> Int[np.ndarray, "B T"]:
    """Greedy tokens behind a prefill, one after the other; its caches grow.

    Args:
        peer: The model.
        state: Of `peer_prefill`.
        position: M-RoPE id of the first token.
        tokens: How many; the first is the prefill's.
        choose: Logits [B, V] to ids [B].
    """
    import torch

    with torch.inference_mode():
        out, past = [choose(state.logits[:, -1])], state.past_key_values
        for step in range(tokens - 1):
            following = peer(
                input_ids=out[-1][:, None],
                position_ids=torch.full_like(out[-1], position + step).expand(3, -1)[..., None],
                past_key_values=past,
                use_cache=True,
            )
            out.append(choose(following.logits[:, -1]))
    return torch.stack(out, dim=1).cpu().numpy()


def to_torch(x: Float[np.ndarray, "..."], peer: Any = None) -> Any:
    """A tensor of an array's numbers; integers become the 64 bits that torch indexes by.

    Args:
        x: The array.
        peer: Whose type, of what is no integer, and device it gets; by default float32 on the CPU.
    """
    import torch

    x = np.asarray(x)
    whole = np.issubdtype(x.dtype, np.integer)
    found = torch.from_numpy(np.array(x, np.int64 if whole else np.float32))
    if peer is None:
        return found
    return found.to(peer.device, None if whole else peer.dtype)
