"""Sizes of a language decoder, of any model that shares its code."""

from dataclasses import dataclass
from typing import Literal

from fastdrive_jax.errors import UserError


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions and a gated MLP; defaults are Qwen2.5-VL-3B's.

    Attributes:
        hidden_size: D.
        intermediate_size: F.
        num_layers: Decoder layers.
        num_heads: Query heads Q.
        num_kv_heads: Key/value heads G; divides `num_heads`.
        vocab_size: Token ids.
        rope_theta: Base of the rotary angles.
        mrope_section: Rotary channel pairs that follow the temporal, row and column position. A
            model whose tokens have one position each gives it in all three, whatever this says.
        rms_norm_eps: Of every norm.
        tie_word_embeddings: Whether the output head is the embedding table.
        attention_bias: Whether the projections to q, k and v have biases; Llama's have none.
        activation: Of the MLP's gate; Gemma has "gelu_tanh".
        head_size: d, where it is not D / Q.
    """

    hidden_size: int = 2048
    intermediate_size: int = 11_008
    num_layers: int = 36
    num_heads: int = 16
    num_kv_heads: int = 2
    vocab_size: int = 151_936
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = True
    activation: Literal["silu", "gelu_tanh"] = "silu"
    head_size: int | None = None

    def __post_init__(self):
        if self.activation not in ("silu", "gelu_tanh"):
            raise UserError(f"activation={self.activation!r} must be silu or gelu_tanh.")
        whole = self.head_size is not None or self.hidden_size % self.num_heads == 0
        if not whole or self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size} and be a "
                f"multiple of num_kv_heads={self.num_kv_heads}."
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise UserError(
                f"mrope_section={self.mrope_section} must sum to half the head size "
                f"{self.head_dim}."
            )

    @property
    def head_dim(self) -> int:
        """d, size of a head."""
        return self.head_size or self.hidden_size // self.num_heads
