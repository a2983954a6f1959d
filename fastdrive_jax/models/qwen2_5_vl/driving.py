"""The driving VLA: camera pictures, speed and command in, trajectory tokens out.

Sequence: BOS, VISION_START, visual tokens of all cameras, VISION_END, command, speed, PLAN, then
the trajectory. Positions are given out before pruning, so kept tokens keep theirs.
"""

from dataclasses import dataclass, field

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    TINY_DECODER,
    TINY_VISION,
    VisionConfig,
)
from fastdrive_jax.models.qwen2_5_vl.vision import VisionEncoder
from fastdrive_jax.models.trajectory_tokens import (
    BOS,
    VISION_END,
    VISION_START,
    DrivingVocabulary,
)

PROMPT_TOKENS = 3  # of `DrivingVocabulary.prompt`


@dataclass(frozen=True)
class DrivingConfig:
    """The VLA, defaults at tiny size.

    Attributes:
        vision: Vision encoder.
        text: Language decoder.
        vocabulary: Trajectory tokens.
        image_size: H, W of each camera picture.
        cameras: Cameras that the model looks through, in this order.
    """

    vision: VisionConfig = TINY_VISION
    text: DecoderConfig = TINY_DECODER
    vocabulary: DrivingVocabulary = field(default_factory=DrivingVocabulary)
    image_size: tuple[int, int] = (224, 392)
    cameras: tuple[str, ...] = ("CAM_FRONT",)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Token rows and columns of one camera."""
        edge = self.vision.token_pixels
        return self.image_size[0] // edge, self.image_size[1] // edge

    @property
    def visual_tokens(self) -> int:
        """N, visual tokens of a sample."""
        rows, columns = self.token_grid
        return rows * columns * len(self.cameras)


@dataclass(frozen=True)
class Positions:
    """M-RoPE ids of one unpruned sample; NumPy, known when tracing.

    Attributes:
        before: [3, 2] of BOS and VISION_START.
        visual: [3, N].
        after: [3, 1 + L + 2 T] of VISION_END, the prompt and the trajectory.
    """

    before: np.ndarray
    visual: np.ndarray
    after: np.ndarray


def positions(config: DrivingConfig, prompt_tokens: int = PROMPT_TOKENS) -> Positions:
    """Text counts on by one; a picture starts after all before it and adds its row and column.

    Args:
        config: Of the model.
        prompt_tokens: L, of a prompt that says more than the vocabulary's.
    """
    rows, columns = config.token_grid
    row, column = np.mgrid[:rows, :columns].reshape(2, -1)
    grid = np.stack([np.zeros_like(row), row, column])
    edge = max(rows, columns)
    visual = [2 + camera * edge + grid for camera in range(len(config.cameras))]
    start = 2 + len(config.cameras) * edge
    after = start + np.arange(1 + prompt_tokens + config.vocabulary.plan_length)
    return Positions(
        before=np.broadcast_to(np.arange(2), (3, 2)),
        visual=np.concatenate(visual, axis=1),
        after=np.broadcast_to(after, (3, len(after))),
    )


class DrivingVLA(nn.Module):
    """Vision encoder and language decoder.

    Attributes:
        config: Sizes.
        dtype: Type that it computes in; give parameters of the same.
    """

    config: DrivingConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Names follow the published checkpoint's."""
        self.visual = VisionEncoder(self.config.vision, self.dtype)
        self.language_model = Decoder(self.config.text)

    def encode(self, images: Shaped[Array, "B C H W 3"]) -> Float[Array, "B N D"]:
        """Visual tokens [B, N, D] of uint8 pictures [B, C, H, W, 3], camera after camera.

        Raises:
            UserError: Their size is not the model's.
        """
        batch, cameras, *picture = images.shape
        if tuple(picture) != (*self.config.image_size, 3):
            raise UserError(
                f"A picture must be RGB of {' x '.join(map(str, self.config.image_size))} pixels, "
                f"not {' x '.join(map(str, picture))}."
            )
        tokens = self.visual(images.reshape(batch * cameras, *images.shape[2:]))
        return tokens.reshape(batch, -1, tokens.shape[-1])

    def sequence(
        self,
        tokens: Float[Array, "B K D"],
        visual_ids: Int[Array, "3 B K"],
        ids: Int[Array, "B L"],
    ) -> tuple[Float[Array, "B n D"], Int[Array, "3 B n"]]:
        """Embeddings and M-RoPE ids of a whole sequence, n = K + 3 + L.

        Args:
            tokens: Kept visual tokens; K = 0 leaves the picture out.
            visual_ids: Their positions.
            ids: Prompt and as much of the trajectory as is known.
        """
        batch, length = ids.shape
        where = positions(self.config, length)
        marks = jnp.broadcast_to(jnp.array([BOS, VISION_START]), (batch, 2))
        ids = jnp.concatenate([jnp.full((batch, 1), VISION_END), ids], axis=1)

        def spread(x):
            return jnp.broadcast_to(x[:, None], (3, batch, x.shape[1]))

        embeddings = [self.language_model.embed(marks), tokens, self.language_model.embed(ids)]
        places = [spread(where.before), visual_ids, spread(where.after[:, : length + 1])]
        return jnp.concatenate(embeddings, axis=1), jnp.concatenate(places, axis=2)

    def plan_logits(
        self,
        tokens: Float[Array, "B K D"],
        visual_ids: Int[Array, "3 B K"],
        prompt: Int[Array, "B 3"],
        plan: Int[Array, "B 2T"],
    ) -> Float[Array, "B 2T V"]:
        """Logits of every trajectory token given those before it (teacher forcing)."""
        ids = jnp.concatenate([prompt, plan[:, :-1]], axis=1)
        hidden, _ = self.language_model(*self.sequence(tokens, visual_ids, ids))
        return self.language_model.logits(hidden[:, -plan.shape[1] :])

    def __call__(
        self,
        images: Shaped[Array, "B C H W 3"],
        prompt: Int[Array, "B 3"],
        plan: Int[Array, "B 2T"],
    ) -> Float[Array, "B 2T V"]:
        """Teacher-forced logits with all tokens kept; touches every parameter."""
        tokens = self.encode(images)
        return self.plan_logits(tokens, visual_positions(self.config, len(prompt)), prompt, plan)


def visual_positions(config: DrivingConfig, batch: int) -> Int[Array, "3 B N"]:
    """M-RoPE ids [3, B, N] of all visual tokens."""
    visual = positions(config).visual
    return jnp.broadcast_to(jnp.asarray(visual)[:, None], (3, batch, visual.shape[1]))
