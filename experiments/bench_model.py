"""Vision encoder, prefill and decode of a Qwen2.5-VL beside transformers, in one run.

    fastdrive bench-model --out runs/bench_model

Same machine, same random weights, same type (float32), threads as many as cores; needs the extra
"parity". About 105M parameters, 812 and 3,249 visual tokens. Takes about 5 minutes on 2 cores.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frame_stages import clock
from experiments.torch_qwen import peer_decode, peer_params, peer_prefill, random_peer, to_torch
from fastdrive_jax.configs import check_least
from fastdrive_jax.evaluation.results import point, write_rows
from fastdrive_jax.inference.sampling import SamplingConfig, decode_text
from fastdrive_jax.models.attention import attention_kernel
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QwenVLConfig,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.image_processor import process_pictures
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import normalise
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample, collate

CONFIG = QwenVLConfig(
    vision=VisionConfig(
        depth=8,
        hidden_size=512,
        intermediate_size=1408,
        num_heads=8,
        out_hidden_size=768,
        fullatt_block_indexes=(3, 7),
    ),
    text=DecoderConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_layers=8,
        num_heads=12,
        num_kv_heads=2,
        vocab_size=32_000,
        mrope_section=(8, 12, 12),
    ),
    image_token_id=31_990,
    vision_start_token_id=31_991,
    vision_end_token_id=31_992,
    eos_token_ids=(31_999,),
    pad_token_id=0,
)
PICTURES = {812: (28 * 28, 29 * 28), 3249: (57 * 28, 57 * 28)}  # visual tokens: height, width
STAGES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class BenchModelArgs:
    """Compare the speed of a Qwen2.5-VL of about 105M parameters with transformers.

    Attributes:
        out: Folder for model.json.
        new_tokens: Tokens to decode greedily.
        text_tokens: Prompt tokens in addition to the image.
        repeats: Timed rounds after a warm-up round; the two take turns.
    """

    out: Path = Path("runs/bench_model")
    new_tokens: int = 16
    text_tokens: int = 64
    repeats: int = 5

    def __post_init__(self):
        check_least(self, new_tokens=2, text_tokens=2, repeats=2)


def bench_model(args: BenchModelArgs) -> Path:
    """Measures, prints and writes the figures; returns their path."""
    theirs = random_peer(CONFIG)
    import torch
    import transformers

    params = jax.device_put(peer_params(theirs, CONFIG))
    kernel = attention_kernel(jnp.float32, CONFIG.text.head_dim)
    print(f"attention: {kernel}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    for tokens, size in PICTURES.items():
        sides = {
            "fastdrive": our_stages(params, size, args),
            "transformers": their_stages(theirs, size, args),
        }
        spent: dict = {side: {stage: [] for stage in STAGES} for side in sides}
        answers = {}
        for number in range(args.repeats + 1):
            for side, run in sides.items():
                times, answers[side] = run()
                if number:
                    for stage in STAGES:
                        spent[side][stage].append(times[stage])
        for stage in STAGES:
            ours, other = (float(np.median(spent[side][stage])) for side in sides)
            print(
                f"{tokens} visual tokens, {stage}: {ours:.1f} ms, transformers {other:.1f} ms, "
                f"{other / ours:.2f} times as fast",
                flush=True,
            )
            name = f"{stage}_{tokens}_ms"
            for side, value in (("fastdrive", ours), ("transformers", other)):
                rows.append(point(side, None, name, value, n=args.repeats, seed=0, unit="ms"))
        if answers["fastdrive"] != answers["transformers"]:
            raise RuntimeError(f"the two decode different tokens: {answers}")
    meta = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "device": str(jax.devices()[0]),
        "cores": os.cpu_count(),
        "dtype": "float32",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return write_rows(args.out / "model.json", rows, meta)


def sample_of(size: tuple[int, int], text_tokens: int) -> Sample:
    """A random picture and prompt."""
    rng = np.random.default_rng(0)
    rows, grids = process_pictures([rng.integers(0, 256, (*size, 3), np.uint8)])
    text = rng.integers(10, 30_000, text_tokens - 2).tolist()
    ids = [CONFIG.vision_start_token_id, CONFIG.image_token_id, CONFIG.vision_end_token_id, *text]
    return Sample(ids, rows, grids)


def our_stages(params, size, args: BenchModelArgs) -> Callable[[], tuple[dict, list[int]]]:
    """A round of this library."""
    model, variables = QwenVL(CONFIG), {"params": params}
    batch = collate([sample_of(size, args.text_tokens)], CONFIG)
    device = jax.device_put(batch)
    sampling = SamplingConfig(max_new_tokens=args.new_tokens)
    encode = jax.jit(
        lambda variables, rows: model.apply(variables, rows, batch.layout, method="encode")
    )

    @jax.jit
    def prefill(variables, tokens, batch):
        embeddings = model.apply(variables, batch.ids, batch.visual, tokens, method="embed")
        inputs = embeddings, batch.positions, batch.lengths
        return model.apply(variables, *inputs, room=args.new_tokens, method="prefill")

    def run():
        times = {}
        tokens = clock(times, "vision", lambda: encode(variables, device.rows))
        logits, caches = clock(times, "prefill", lambda: prefill(variables, tokens, device))
        rest = logits, caches, device.next_position, jax.random.key(0), sampling
        answer = clock(times, "decode", lambda: decode_text(model, variables, *rest))
        return times, np.asarray(answer.ids)[0].tolist()

    return run


def their_stages(theirs, size, args: BenchModelArgs) -> Callable[[], tuple[dict, list[int]]]:
    """A round of transformers: the same stages, each called as its own generation does."""
    import torch

    sample = sample_of(size, args.text_tokens)
    batch = collate([sample], CONFIG)
    patches = to_torch(normalise(sample.rows[0], CONFIG.vision))
    grid, ids, where = map(to_torch, ([[1, *sample.grids[0]]], batch.ids, batch.positions))

    @torch.inference_mode()
    def run():
        times = {}
        tokens = clock(
            times,
            "vision",
            lambda: theirs.model.visual(patches, grid_thw=grid).pooler_output,
        )

        def prefill():
            embeddings = theirs.get_input_embeddings()(ids)
            embeddings[ids == CONFIG.image_token_id] = tokens
            return peer_prefill(theirs, embeddings, where)

        state = clock(times, "prefill", prefill)
        rest = theirs, state, int(batch.next_position[0]), args.new_tokens
        return times, clock(times, "decode", lambda: peer_decode(*rest))[0].tolist()

    return run
