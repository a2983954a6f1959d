"""Sizes of OpenVLA (arXiv 2406.09246) and OpenVLA-OFT (2502.19645), published and tiny."""

from dataclasses import dataclass, replace
from typing import Literal

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.vit_config import ViTConfig

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class OpenVLAConfig:
    """A VLA of fused encoders, a projector and a Llama; defaults are of one picture and action.

    Attributes:
        encoders: One, or two whose patches are put side by side along the channels. What is used
            is the output of the second-to-last block, so the last is not built.
        text: Language decoder.
        views: Pictures of a sample: the third person's, then those of the wrists.
        head: "tokens" decodes an action as one token for each number, one after the other;
            "regression" (OFT) reads a chunk of actions off one pass without a causal mask.
        bins: Edges of the intervals that a number of an action is rounded to.
        action_dim: A, numbers of an action.
        chunk: T, actions of an answer.
        proprio_dim: Numbers of the robot's own state, which makes one more token; 0 for none.
        padding_ids: Ids at the end of the vocabulary that only fill it up to a round number.
        bos_id: First token of a prompt; pictures stand behind it.
        stop_id: Last token of an answer.
    """

    encoders: tuple[ViTConfig, ...]
    text: DecoderConfig
    views: int = 1
    head: Literal["tokens", "regression"] = "tokens"
    bins: int = 256
    action_dim: int = 7
    chunk: int = 1
    proprio_dim: int = 0
    padding_ids: int = 64
    bos_id: int = 1
    stop_id: int = 2

    def __post_init__(self):
        grids = [encoder.grid for encoder in self.encoders]
        if len(grids) not in (1, 2) or grids[0] != grids[-1]:
            raise UserError(f"There must be one or two encoders, with one patch grid, not {grids}.")
        if min(self.views, self.action_dim, self.chunk) < 1 or self.proprio_dim < 0:
            raise UserError(
                f"views={self.views}, action_dim={self.action_dim} and chunk={self.chunk} must be "
                f"at least 1, and proprio_dim={self.proprio_dim} at least 0."
            )
        if self.bins < 2 or self.bins > self.action_vocab_size:
            raise UserError(
                f"bins={self.bins} must be 2 to {self.action_vocab_size}, the ids in use."
            )

    @property
    def token_grid(self) -> tuple[int, int]:
        """Token rows and columns of one view."""
        return self.encoders[0].grid

    @property
    def visual_tokens(self) -> int:
        """N, visual tokens of a sample."""
        rows, columns = self.token_grid
        return self.views * rows * columns

    @property
    def image_size(self) -> int:
        """Pixels along a picture."""
        return self.encoders[0].image_size

    @property
    def vision_size(self) -> int:
        """Channels of all encoders together."""
        return sum(encoder.hidden_size for encoder in self.encoders)

    @property
    def parallel(self) -> bool:
        """Whether all actions come from one pass without a causal mask."""
        return self.head == "regression"

    @property
    def action_tokens(self) -> int:
        """Tokens of an answer, T * A."""
        return self.chunk * self.action_dim

    @property
    def action_vocab_size(self) -> int:
        """Ids in use; actions have the last of them."""
        return self.text.vocab_size - self.padding_ids


DINOV2_LARGE_REGISTERS = ViTConfig(
    depth=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    image_size=224,
    registers=4,
)
SIGLIP_SO400M = ViTConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    image_size=224,
    class_token=False,
    layer_scale=False,
    mean=_HALF,
    std=_HALF,
)
LLAMA_2_7B = DecoderConfig(
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    vocab_size=32_064,
    rope_theta=10_000.0,
    mrope_section=(64, 0, 0),
    rms_norm_eps=1e-6,  # so the published config.json; Llama-2 itself was trained with 1e-5
    tie_word_embeddings=False,
    attention_bias=False,
)

OPENVLA_7B = OpenVLAConfig((DINOV2_LARGE_REGISTERS, SIGLIP_SO400M), LLAMA_2_7B)
OPENVLA_OFT_7B = replace(OPENVLA_7B, views=2, head="regression", chunk=8, proprio_dim=8)

# Small enough to train on two CPU cores.
_TINY_DINO = ViTConfig(
    depth=4,
    hidden_size=64,
    intermediate_size=256,
    num_heads=4,
    patch_size=8,
    image_size=96,
    registers=2,
)
_TINY_SIGLIP = replace(
    _TINY_DINO, class_token=False, registers=0, layer_scale=False, mean=_HALF, std=_HALF
)
TINY_OPENVLA = OpenVLAConfig(
    (_TINY_DINO, _TINY_SIGLIP),
    DecoderConfig(
        hidden_size=128,
        intermediate_size=384,
        num_layers=5,
        num_heads=4,
        num_kv_heads=4,
        vocab_size=512,
        rope_theta=10_000.0,
        mrope_section=(16, 0, 0),
        tie_word_embeddings=False,
        attention_bias=False,
    ),
    padding_ids=0,
)
