"""A Qwen2.5-VL with a ReconPruner in front as one value of static shapes, to compile and export."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.answering import PrunedAnswer, answer_pruned
from fastdrive_jax.inference.sampling import SamplingConfig
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.device_batch import device_batch
from fastdrive_jax.models.qwen2_5_vl.model import QwenVL
from fastdrive_jax.models.qwen2_5_vl.patches import patch_grid
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig, recon_pruner
from fastdrive_jax.pruning.select import num_keep


@dataclass(frozen=True)
class PrunedQwen:
    """What is compiled once.

    Attributes:
        vla: Sizes of the model.
        pruner: Sizes of the ReconPruner, which takes the model's tokens.
        keep_ratio: In (0, 1], of the tokens of all pictures of a prompt together.
        pictures: C, pictures of a prompt.
        image_size: Their height and width in pixels, of whole tokens.
        prompt_ids: T, ids of a prompt at most, with one mark for each picture.
        sampling: How answer tokens are chosen; the most likely ones, for a program has no key.
        dtype: Of parameters and arithmetic.

    Raises:
        UserError: A value is out of range, or two do not fit each other.
    """

    vla: QwenVLConfig
    pruner: ReconPrunerConfig
    keep_ratio: float
    pictures: int
    image_size: tuple[int, int]
    prompt_ids: int
    sampling: SamplingConfig
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.pictures < 1 or self.prompt_ids <= self.pictures:
            raise UserError(
                f"pictures={self.pictures} must be at least 1, and prompt_ids={self.prompt_ids} "
                "more than that: each picture has a mark."
            )
        num_keep(self.visual_tokens, self.keep_ratio)
        if self.sampling.temperature > 0:
            raise UserError(
                f"temperature={self.sampling.temperature} draws tokens, which needs a key; a "
                "program takes the most likely ones (temperature 0)."
            )
        if self.pruner.layer.hidden_size != self.vla.text.hidden_size:
            raise UserError(
                f"The pruner takes tokens of {self.pruner.layer.hidden_size} numbers, but the "
                f"model's have {self.vla.text.hidden_size}; give the one it was trained for."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a picture."""
        merge = self.vla.vision.spatial_merge_size
        rows, columns = patch_grid(*self.image_size, self.vla.vision)
        return rows // merge, columns // merge

    @property
    def visual_tokens(self) -> int:
        """N, of a prompt, before pruning."""
        return self.pictures * self.grid[0] * self.grid[1]


def answer_pictures(
    asked: PrunedQwen,
    params: dict,
    images: UInt8[Array, "B C H W 3"],
    ids: Int[Array, "B T"],
    lengths: Int[Array, " B"],
) -> PrunedAnswer:
    """Pictures and prompts to answers: pure, to be jitted with `asked` static.

    Args:
        asked: Sizes.
        params: {"vla": of the model, "pruner": of the ReconPruner}.
        images: Resized already.
        ids: See `prompt_batch`.
        lengths: See `prompt_batch`.
    """
    batch = device_batch(images, ids, lengths, asked.vla)
    model = QwenVL(asked.vla, jnp.dtype(asked.dtype))
    pruner = recon_pruner(asked.pruner)
    key = jax.random.key(0)  # nothing is drawn
    static = model, pruner, asked.keep_ratio, asked.grid, asked.sampling
    return answer_pruned(*static, params, batch, key)


def prompt_batch(
    asked: PrunedQwen, prompts: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts of different lengths, filled up, and their lengths.

    Args:
        asked: Sizes.
        prompts: Ids of each as its tokenizer gives them, with one mark for each picture.

    Raises:
        UserError: One is too long or has another number of marks.
    """
    mark, shape = asked.vla.image_token_id, (len(prompts), asked.prompt_ids)
    ids = np.full(shape, asked.vla.pad_token_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        if len(prompt) > asked.prompt_ids:
            raise UserError(
                f"A prompt of {len(prompt)} ids does not fit into prompt_ids={asked.prompt_ids}; "
                "shorten it or take more."
            )
        if (marks := list(prompt).count(mark)) != asked.pictures:
            raise UserError(
                f"A prompt has {marks} picture marks (id {mark}) instead of {asked.pictures}, one "
                "for each picture."
            )
        row[: len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def cast_params(params: dict, dtype: str) -> dict:
    """The parameters in the type that the model computes in."""
    return jax.tree.map(partial(jnp.asarray, dtype=jnp.dtype(dtype)), params)
