"""Class maps from text prompts by one model, SAM 3.

    masker = load_sam3("facebook/sam3")
    make_masks(frames, masker, out_dir)

SAM 3 takes one phrase at a time. What it sees in a picture is computed once for all phrases, and
what the phrases mean once for all pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.maskers.checkpoints import (
    check_dtype,
    checkpoint_errors,
    find_checkpoint,
    load_whole,
    pick_device,
    require_torch,
)
from data_pipelines.maskers.interface import Frame
from data_pipelines.maskers.prompts import (
    ClassPrompt,
    Instance,
    check_prompts,
    paint,
    prompt_settings,
)
from data_pipelines.maskers.rgb import in_threads, read_frames
from fastdrive_jax.errors import UserError

# The hub's checkpoint is stored as the video model, which holds the picture model.
_SAM3_TYPES = ("sam3", "sam3_video")
_LONGEST_PROMPT = 32  # tokens, start and end included: what the text encoder was trained on

# Each phrase costs a pass of the decoder, and SAM 3 knows synonyms, so there are few. Its scores
# are calibrated about one half. `text_threshold` has no meaning here.
SAM3_PROMPTS = (
    ClassPrompt("road", ("road",), box_threshold=0.5),
    ClassPrompt("vehicle", ("vehicle", "motorcycle", "bicycle"), box_threshold=0.5),
    ClassPrompt("person", ("person",), box_threshold=0.5),
    ClassPrompt("traffic_sign", ("traffic sign",), box_threshold=0.5),
    ClassPrompt("traffic_light", ("traffic light",), box_threshold=0.5),
    ClassPrompt("barrier", ("traffic barrier", "traffic cone"), box_threshold=0.5),
)


@dataclass(frozen=True, eq=False)
class Sam3:
    """The masker; make it by `load_sam3`.

    Attributes:
        model: `Sam3Model`.
        pictures: Prepares pictures.
        prompts: What is searched.
        meanings: [phrases, tokens, size] of the text encoder, in the order of the prompts.
        attention: int [phrases, tokens], 0 where a phrase is padded.
        prompts_per_pass: Phrases decoded at once for every picture of a batch.
        settings: JSON values.
    """

    model: Any
    pictures: Any
    prompts: tuple[ClassPrompt, ...]
    meanings: Any
    attention: Any
    prompts_per_pass: int
    settings: Mapping[str, Any]
    name = "sam3"

    def __call__(self, frames: Sequence[Frame]) -> list[np.ndarray]:
        """Class ids uint8 [H, W] of each frame's size, background where nothing was found.

        Raises:
            UserError: A picture is missing or damaged.
        """
        torch, _ = require_torch()
        pictures = read_frames(frames)
        sizes = [picture.shape[:2] for picture in pictures]
        prepared = in_threads(lambda p: self.pictures([p], return_tensors="pt"), pictures)
        pixels = torch.cat([one["pixel_values"] for one in prepared])
        found: list[list[Instance]] = [[] for _ in pictures]
        owners = [prompt for prompt in self.prompts for _ in prompt.prompts]
        with torch.inference_mode():
            seen = self.model.get_vision_features(pixels.to(self.model.device, self.model.dtype))
            for start in range(0, len(owners), self.prompts_per_pass):
                part = owners[start : start + self.prompts_per_pass]
                outputs = self._pass(seen, len(pictures), start, len(part))
                for row in range(len(part) * len(pictures)):
                    prompt, i = part[row // len(pictures)], row % len(pictures)
                    found[i] += instances(outputs, row, prompt, sizes[i])
        return [paint(own, size) for own, size in zip(found, sizes, strict=True)]

    def _pass(self, seen: Any, count: int, start: int, phrases: int) -> Any:
        """The model's answer for some phrases; row `phrase * count + picture` is of both."""
        rows = slice(start, start + phrases)
        levels = {
            key: tuple(level.repeat(phrases, 1, 1, 1) for level in getattr(seen, key))
            for key in ("fpn_hidden_states", "fpn_position_encoding")
        }
        _, transformers = require_torch()
        text = transformers.modeling_outputs.BaseModelOutputWithPooling(
            pooler_output=self.meanings[rows].repeat_interleave(count, 0)
        )
        return self.model(
            vision_embeds=type(seen)(**levels),
            text_embeds=text,
            attention_mask=self.attention[rows].repeat_interleave(count, 0),
        )


def instances(outputs: Any, row: int, prompt: ClassPrompt, size: tuple[int, int]) -> list[Instance]:
    """What one phrase found in one picture.

    As `Sam3ImageProcessor.post_process_instance_segmentation`, which only torchvision lets import.

    Args:
        outputs: With pred_logits [R, queries], presence_logits [R, 1] and pred_masks
            [R, queries, h, w].
        row: Which of the R rows.
        prompt: Gives class and thresholds.
        size: Height and width of the picture.
    """
    torch, _ = require_torch()
    scores = outputs.pred_logits[row].float().sigmoid()
    scores = scores * outputs.presence_logits[row].float().sigmoid()
    keep = scores > prompt.box_threshold
    if not keep.any():
        return []
    chances = outputs.pred_masks[row][keep].float().sigmoid()[None]
    chances = torch.nn.functional.interpolate(
        chances, size=size, mode="bilinear", align_corners=False
    )[0]
    masks = (chances > prompt.mask_threshold).cpu().numpy()
    return [
        Instance(prompt.class_id, score, mask)
        for score, mask in zip(scores[keep].tolist(), masks, strict=True)
    ]


def load_sam3(
    checkpoint: str | Path,
    prompts: Sequence[ClassPrompt] = SAM3_PROMPTS,
    *,
    prompts_per_pass: int = 4,
    dtype: str = "float32",
    device: str | None = None,
) -> Sam3:
    """Loads the model and reads the prompts once.

    Args:
        checkpoint: Folder or hub repository of a SAM 3 checkpoint.
        prompts: What is searched; `text_threshold` is not used.
        prompts_per_pass: Phrases decoded at once for every picture of a batch; more of them need
            more memory (at full size about 0.1 GB in float32 for each phrase and picture).
        dtype: "float32", "bfloat16" or "float16".
        device: As torch names it; the first CUDA device by default, else the CPU.

    Raises:
        UserError: torch or transformers is missing, the checkpoint is missing, damaged, incomplete
            or of another kind, a prompt is too long, or a setting is wrong.
    """
    prompts = check_prompts(prompts)
    if prompts_per_pass < 1:
        raise UserError(f"prompts_per_pass is {prompts_per_pass}; give at least 1.")
    check_dtype(dtype)
    torch, tf = require_torch()
    device = pick_device(device)
    found = find_checkpoint(checkpoint)
    if found.model_type not in _SAM3_TYPES:
        raise UserError(
            f"{found.folder} is a {found.model_type} model; give SAM 3, such as facebook/sam3."
        )
    model = load_whole(tf.Sam3Model, found, dtype, device)
    from data_pipelines.maskers.square_pictures import Sam3PicturesPil

    with checkpoint_errors(found.folder):
        pictures = Sam3PicturesPil.from_pretrained(found.folder)
        tokenizer = tf.AutoTokenizer.from_pretrained(found.folder)
        processor = tf.Sam3Processor(pictures, tokenizer)
    phrases = [" ".join(phrase.split()) for prompt in prompts for phrase in prompt.prompts]
    text = processor(text=phrases, return_tensors="pt").to(device)
    if text["input_ids"].shape[1] > _LONGEST_PROMPT:
        longest = max(phrases, key=len)
        raise UserError(f'The prompt "{longest}" is too long for SAM 3; shorten it.')
    with torch.inference_mode():
        meanings = model.get_text_features(text["input_ids"], text["attention_mask"]).pooler_output
    settings = {
        "model": found.identity,
        "prompts": prompt_settings(prompts),
        "dtype": dtype,
        "transformers": tf.__version__,
    }
    return Sam3(
        model, pictures, prompts, meanings, text["attention_mask"], prompts_per_pass, settings
    )
