"""A prompt and its pictures to a sample, by a checkpoint's own files."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.chat import IMAGE_MARK, Chat, Message, read_chat, user_message
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.models.qwen2_5_vl.hf_config import read_config
from fastdrive_jax.models.qwen2_5_vl.image_processor import (
    ImageProcessorConfig,
    process_pictures,
    read_image_processor,
)
from fastdrive_jax.models.qwen2_5_vl.sequence import Sample


@dataclass(frozen=True)
class Processor:
    """What turns messages and pictures into token ids and patch rows.

    Attributes:
        config: Of the model.
        chat: Tokenizer and template.
        pictures: What a picture is resized to.
    """

    config: QwenVLConfig
    chat: Chat
    pictures: ImageProcessorConfig

    def sample(
        self,
        prompt: str | Sequence[Message],
        pictures: Sequence[np.ndarray | Image.Image] = (),
    ) -> Sample:
        """One sample that ends where the assistant begins.

        Args:
            prompt: The user's turn, with a mark `<image>` for each picture, or without any, where
                they come first; or the messages of a longer talk.
            pictures: In the order of their marks; see `resize_picture`.

        Raises:
            UserError: Marks and pictures differ in number, or a picture is none.
        """
        if isinstance(prompt, str):
            if IMAGE_MARK not in prompt:
                prompt = IMAGE_MARK * len(pictures) + prompt
            prompt = [user_message(prompt)]
        ids = self.chat.encode(prompt)
        marks = ids.count(self.config.image_token_id)
        if marks != len(pictures):
            raise UserError(
                f"The prompt has {marks} marks {IMAGE_MARK} but there are {len(pictures)} pictures;"
                " give one for each."
            )
        rows, grids = process_pictures(pictures, self.pictures) if pictures else ([], [])
        return Sample(ids, rows, grids)


def read_processor(
    checkpoint_dir: Path, min_pixels: int | None = None, max_pixels: int | None = None
) -> Processor:
    """The processor in a checkpoint's folder.

    Args:
        checkpoint_dir: Holds config.json, tokenizer.json, a chat template and
            preprocessor_config.json.
        min_pixels: Instead of the file's.
        max_pixels: Instead of the file's.

    Raises:
        UserError: A file is missing or damaged, or of another model.
    """
    folder = Path(checkpoint_dir)
    bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in bounds.items() if value is not None}
    pictures = dataclasses.replace(read_image_processor(folder), **given)
    return Processor(read_config(folder), read_chat(folder), pictures)
