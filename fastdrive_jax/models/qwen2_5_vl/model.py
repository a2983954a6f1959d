"""Qwen2.5-VL as a whole: pictures and text in, logits out."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from fastdrive_jax.models.decoder import Decoder, LayerCache
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.patches import PictureLayout
from fastdrive_jax.models.qwen2_5_vl.sequence import Batch
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder

Caches = tuple[LayerCache, ...]


class QwenVL(nn.Module):
    """Vision encoder and language decoder; a pruner stands between `encode` and `embed`.

    Attributes:
        config: Sizes.
        dtype: Type that it computes in; give parameters of the same.
    """

    config: QwenVLConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Names follow the published checkpoint's."""
        self.visual = VisionEncoder(self.config.vision, self.dtype)
        self.language_model = Decoder(self.config.text)

    def encode(
        self, rows: UInt8[Array, "M P pixels"], layout: PictureLayout
    ) -> Float[Array, "M N D"]:
        """Visual tokens of each picture; see `VisionEncoder.encode_rows`."""
        return self.visual.encode_rows(rows, layout)

    def embed(
        self,
        ids: Int[Array, "B L"],
        visual: Int[Array, "B L"],
        tokens: Float[Array, "M N D"] | None,
    ) -> Float[Array, "B L D"]:
        """Embeddings of the text with the visual tokens in their places.

        Args:
            ids: See `Batch`.
            visual: See `Batch`.
            tokens: Of `encode`; None without a picture.
        """
        text = self.language_model.embed(ids)
        if tokens is None:
            return text
        flat = tokens.reshape(-1, tokens.shape[-1]).astype(text.dtype)
        return jnp.where(visual[..., None] >= 0, flat[jnp.maximum(visual, 0)], text)

    def prefill(
        self,
        embeddings: Float[Array, "B L D"],
        positions: Int[Array, "3 B L"],
        lengths: Int[Array, " B"],
        room: int,
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Logits behind each sample's last token, and caches with `room` free slots.

        Args:
            embeddings: Of `embed`.
            positions: See `Batch`.
            lengths: Real tokens of each sample.
            room: Tokens that will be decoded.
        """
        hidden, caches = self.language_model(embeddings, positions, room=room)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        caches = tuple(dataclasses.replace(cache, length=lengths) for cache in caches)
        return self.language_model.logits(last), caches

    def decode(
        self, ids: Int[Array, " B"], position: Int[Array, " B"], caches: Caches
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Logits after one more token of each sample.

        Args:
            ids: The tokens.
            position: Their M-RoPE ids, alike in all three.
            caches: What came before.
        """
        where = jnp.broadcast_to(position[None, :, None], (3, len(ids), 1))
        hidden, caches = self.language_model(self.language_model.embed(ids[:, None]), where, caches)
        return self.language_model.logits(hidden[:, 0]), caches

    def __call__(self, batch: Batch) -> Float[Array, "B L V"]:
        """Logits of every place; those behind a sample's length mean nothing."""
        tokens = None if batch.rows is None else self.encode(batch.rows, batch.layout)
        hidden, _ = self.language_model(
            self.embed(batch.ids, batch.visual, tokens), batch.positions
        )
        return self.language_model.logits(hidden)
