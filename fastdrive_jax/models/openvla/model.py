"""OpenVLA as a whole: pictures and an instruction in, actions out.

Sequence: BOS, visual tokens of all views, the robot's state where the model has it, the prompt, and
the answer right behind it. Prompts of a batch may differ in length; padding stands behind the
answer. The token before each of the answer's gives it, whether it is decoded or read off a slot.
"""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.openvla.config import OpenVLAConfig
from fastdrive_jax.models.openvla.oft import ActionHead, ProprioProjector
from fastdrive_jax.models.vit import ViT, normalise_pictures


class Sequence(flax.struct.PyTreeNode):
    """A batch that is ready for the decoder.

    Attributes:
        embeddings: [B, n, D].
        position_ids: [3, B, n], the same in all three: Llama has one position.
        is_visual: Which are visual tokens [B, n].
        lengths: Real tokens of each sample [B].
        answer: Place of the token that gives the first of the answer's [B].
    """

    embeddings: Float[Array, "B n D"]
    position_ids: Int[Array, "3 B n"]
    is_visual: Bool[Array, "B n"]
    lengths: Int[Array, " B"]
    answer: Int[Array, " B"]


class Projector(nn.Module):
    """Patches to visual tokens.

    Attributes:
        size: D.
        fused: Whether the patches are of several encoders, which takes one more layer.
    """

    size: int
    fused: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B N W"]) -> Float[Array, "B N D"]:
        """Maps patches [B, N, W] to tokens [B, N, D]."""
        sizes = (4 * x.shape[-1], self.size, self.size) if self.fused else (self.size, self.size)
        for number, size in enumerate(sizes, 1):
            x = nn.Dense(size, name=f"fc{number}")(x)
            if number < len(sizes):
                x = nn.gelu(x, approximate=False)
        return x


class OpenVLA(nn.Module):
    """Encoders, projector and language decoder, and OFT's parts where the config has them.

    Attributes:
        config: Sizes.
        dtype: Type that it computes in; give parameters of the same.
    """

    config: OpenVLAConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Names follow the published checkpoint's where it has one for the part."""
        config = self.config
        size = config.text.hidden_size
        self.encoders = [ViT(encoder, whole=False) for encoder in config.encoders]
        self.projector = Projector(size, fused=len(config.encoders) > 1)
        self.language_model = Decoder(config.text, causal=not config.parallel)
        if config.proprio_dim:
            self.proprio_projector = ProprioProjector(size)
        if config.parallel:
            self.action_head = ActionHead(size, config.action_dim)

    def encode(self, images: UInt8[Array, "B V H W 3"]) -> Float[Array, "B N D"]:
        """Visual tokens [B, N, D] of RGB pictures, view after view, each in raster order.

        Raises:
            UserError: Their number or size is not the model's.
        """
        batch, views, *picture = images.shape
        size = self.config.encoders[0].image_size
        if (views, *picture) != (self.config.views, size, size, 3):
            raise UserError(
                f"A sample must be {self.config.views} RGB pictures of {size} x {size} pixels, not "
                f"{' x '.join(map(str, images.shape[1:]))}."
            )
        images = images.reshape(batch * views, *picture)
        patches = [
            encoder(normalise_pictures(images, sizes).astype(self.dtype))[:, sizes.prefix :]
            for encoder, sizes in zip(self.encoders, self.config.encoders, strict=True)
        ]
        tokens = self.projector(jnp.concatenate(patches, axis=-1))
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def sequence(
        self,
        tokens: Float[Array, "B K D"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        *,
        actions: Int[Array, "B M"] | None = None,
        proprio: Float[Array, "B P"] | None = None,
        kept: Int[Array, "B K"] | None = None,
    ) -> Sequence:
        """Embeddings and position ids of a whole sequence.

        A model with slots for the answer has them here: zeros, and the stop token behind.

        Args:
            tokens: Visual tokens, of `encode` or some of them.
            ids: Prompts, padded on the right; each begins with BOS.
            lengths: Real ids of each, with BOS.
            actions: Ids of the answer as far as they are known; not for a model with slots.
            proprio: The robot's normalised state, for a model that has it.
            kept: Which of the N visual tokens these are, ascending; None means all.
        """
        config, (batch, count, _) = self.config, tokens.shape
        if (proprio is not None) != bool(config.proprio_dim):
            raise ValueError(f"a model of proprio_dim={config.proprio_dim} was given {proprio=}")
        slots = config.action_tokens if config.parallel else 0
        if config.parallel:
            actions = jnp.full((batch, slots + 1), config.stop_id, ids.dtype)
        known = 0 if actions is None else actions.shape[1]
        ids, behind = _append(ids, lengths, actions)
        text = self.language_model.embed(ids)
        text = jnp.where(((behind >= 0) & (behind < slots))[..., None], 0, text)
        parts = [text[:, :1], tokens.astype(text.dtype)]
        if config.proprio_dim:
            parts.append(self.proprio_projector(proprio.astype(text.dtype))[:, None])
        embeddings = jnp.concatenate([*parts, text[:, 1:]], axis=1)
        total = embeddings.shape[1]
        positions = _positions(config, batch, total, jnp.arange(count) if kept is None else kept)
        place, inserted = jnp.arange(total), total - ids.shape[1]
        return Sequence(
            embeddings=embeddings,
            position_ids=jnp.broadcast_to(positions, (3, *positions.shape)),
            is_visual=jnp.broadcast_to((place > 0) & (place <= count), positions.shape),
            lengths=lengths + inserted + known,
            answer=lengths + inserted - 1,
        )

    def hidden(self, sequence: Sequence, count: int) -> Float[Array, "B M D"]:
        """Normalised hidden states that give the first `count` tokens of the answer."""
        hidden, _ = self.language_model(
            sequence.embeddings, sequence.position_ids, lengths=sequence.lengths
        )
        places = sequence.answer[:, None] + jnp.arange(count)
        return jnp.take_along_axis(hidden, places[..., None], axis=1)

    def action_logits(
        self,
        tokens: Float[Array, "B K D"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        actions: Int[Array, "B M"],
        *,
        proprio: Float[Array, "B P"] | None = None,
        kept: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B M V"]:
        """Logits of every action token given those before it (teacher forcing).

        Args:
            tokens: See `sequence`.
            ids: See `sequence`.
            lengths: See `sequence`.
            actions: All ids of the answer.
            proprio: See `sequence`.
            kept: See `sequence`.
        """
        known = actions[:, :-1]
        sequence = self.sequence(tokens, ids, lengths, actions=known, proprio=proprio, kept=kept)
        return self.language_model.logits(self.hidden(sequence, actions.shape[1]))

    def regress(
        self,
        tokens: Float[Array, "B K D"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        *,
        proprio: Float[Array, "B P"] | None = None,
        kept: Int[Array, "B K"] | None = None,
    ) -> Float[Array, "B T A"]:
        """Normalised actions of a chunk, in one pass (OFT); see `sequence`."""
        sequence = self.sequence(tokens, ids, lengths, proprio=proprio, kept=kept)
        return self.act(self.hidden(sequence, self.config.action_tokens))

    def act(self, hidden: Float[Array, "B M D"]) -> Float[Array, "B T A"]:
        """Normalised actions of the hidden states that give them (OFT)."""
        return self.action_head(hidden.reshape(len(hidden), self.config.chunk, -1))

    def __call__(
        self,
        images: UInt8[Array, "B V H W 3"],
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        actions: Int[Array, "B M"] | None = None,
        proprio: Float[Array, "B P"] | None = None,
    ) -> Float[Array, "B M V"] | Float[Array, "B T A"]:
        """`action_logits` or, of a model with slots, `regress`; touches every parameter."""
        tokens = self.encode(images)
        if self.config.parallel:
            if self.is_initializing():  # the decoder's head, which reads tokens, is there as well
                self.language_model.logits(tokens[:, :1])
            return self.regress(tokens, ids, lengths, proprio=proprio)
        return self.action_logits(tokens, ids, lengths, actions, proprio=proprio)


def _append(ids, lengths, answer):
    """Ids with the answer right behind each prompt, and how far behind its end each place is."""
    more = 0 if answer is None else answer.shape[1]
    behind = jnp.arange(ids.shape[1] + more) - lengths[:, None]
    if more:
        ids = jnp.pad(ids, ((0, 0), (0, more)))
        own = jnp.take_along_axis(answer, jnp.clip(behind, 0, more - 1), axis=1)
        ids = jnp.where(behind < 0, ids, own)
    return ids, behind


def _positions(config, batch, total, kept):
    """Position of each token: visual tokens keep theirs, and what follows stands behind all N."""
    behind = 1 + config.visual_tokens + jnp.arange(total - 1 - kept.shape[-1])
    parts = (jnp.zeros(1, jnp.int32), 1 + kept, behind)
    rows = [jnp.broadcast_to(part, (batch, part.shape[-1])) for part in parts]
    return jnp.concatenate(rows, axis=1).astype(jnp.int32)
