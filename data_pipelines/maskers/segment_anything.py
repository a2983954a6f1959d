"""Masks of boxes, by SAM 2 or the first SAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.maskers.checkpoints import (
    Checkpoint,
    checkpoint_errors,
    load_whole,
    require_torch,
)
from data_pipelines.maskers.rgb import in_threads
from fastdrive_jax.errors import UserError

# The hub's SAM 2 checkpoints are stored as the video model, which holds the picture model.
_SAM2_TYPES = ("sam2", "sam2_video")


@dataclass(frozen=True, eq=False)
class SegmentAnything:
    """The segmenter; make it by `load_segment_anything`.

    Attributes:
        model: `Sam2Model` or `SamModel`.
        processor: Its processor.
        second: Whether it is SAM 2.
        box_batch: Boxes of one call of the mask decoder. A box takes 4 bytes of each pixel of the
            picture, for all boxes of a call at once.
    """

    model: Any
    processor: Any
    second: bool
    box_batch: int = 32

    def __call__(
        self,
        pictures: Sequence[np.ndarray],
        boxes: Sequence[np.ndarray],
        thresholds: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        """Masks bool [n, H, W] of each picture's boxes; without boxes, the model isn't asked.

        Args:
            pictures: RGB uint8 [H, W, 3], of any sizes.
            boxes: float32 [n, 4] left, top, right, bottom in pixels of each picture.
            thresholds: [n] least probability of a pixel, of each picture.
        """
        torch, _ = require_torch()
        out = [np.zeros((0, *picture.shape[:2]), bool) for picture in pictures]
        asked = [i for i, own in enumerate(boxes) if len(own)]
        if not asked:
            return out
        prepared = in_threads(lambda i: self._prepare(pictures[i], boxes[i]), asked)
        pixels = torch.cat([one["pixel_values"] for one in prepared])
        with torch.inference_mode():
            seen = self.model.get_image_embeddings(pixels.to(self.model.device, self.model.dtype))
            # SAM 2 gives a list of three resolutions, SAM one tensor.
            levels = seen if self.second else [seen]
            for k, i in enumerate(asked):
                own = [level[k : k + 1] for level in levels]
                own = own if self.second else own[0]
                out[i] = self._decode(own, prepared[k], thresholds[i])
        return out

    def _prepare(self, picture: np.ndarray, boxes: np.ndarray) -> dict[str, Any]:
        listed = [boxes.astype(float).tolist()]
        if not self.second:
            return dict(self.processor(images=picture, input_boxes=listed, return_tensors="pt"))
        images = self.processor.image_processor([picture], return_tensors="pt")
        size = [list(picture.shape[:2])]
        return images | self.processor(original_sizes=size, input_boxes=listed, return_tensors="pt")

    def _decode(self, seen: Any, inputs: dict[str, Any], thresholds: np.ndarray) -> np.ndarray:
        torch, _ = require_torch()
        boxes = inputs["input_boxes"].to(self.model.device, torch.float32)
        masks = []
        for start in range(0, boxes.shape[1], self.box_batch):
            part = slice(start, start + self.box_batch)
            answer = self.model(
                image_embeddings=seen, input_boxes=boxes[:, part], multimask_output=False
            )
            logits = self._full_size(answer.pred_masks.float(), inputs)
            edge = torch.tensor([_logit(t) for t in thresholds[part]], device=logits.device)
            masks.append((logits > edge[:, None, None]).cpu().numpy())
        return np.concatenate(masks)

    def _full_size(self, masks: Any, inputs: dict[str, Any]) -> Any:
        """Logits [n, H, W] of the picture's size from [1, n, 1, h, w]."""
        if not self.second:
            return self.processor.post_process_masks(
                masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
            )[0][:, 0]
        # `Sam2ImageProcessor.post_process_masks`, which needs torchvision to be imported.
        torch, _ = require_torch()
        size = inputs["original_sizes"][0].tolist()
        return torch.nn.functional.interpolate(
            masks[0], size, mode="bilinear", align_corners=False
        )[:, 0]


def load_segment_anything(
    checkpoint: Checkpoint, dtype: str, device: str, box_batch: int = 32
) -> SegmentAnything:
    """SAM 2 or SAM, by the checkpoint's model type.

    Raises:
        UserError: It's neither, or not whole.
    """
    _, tf = require_torch()
    second = checkpoint.model_type in _SAM2_TYPES
    if not second and checkpoint.model_type != "sam":
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.model_type} model; the segmenter must be SAM 2 "
            "or SAM, such as facebook/sam2.1-hiera-large or facebook/sam-vit-huge."
        )
    model = load_whole(tf.Sam2Model if second else tf.SamModel, checkpoint, dtype, device)
    with checkpoint_errors(checkpoint.folder):
        if second:
            from data_pipelines.maskers.square_pictures import Sam2PicturesPil

            pictures = Sam2PicturesPil.from_pretrained(checkpoint.folder)
            processor = tf.Sam2Processor(pictures)
        else:
            pictures = tf.SamImageProcessorPil.from_pretrained(checkpoint.folder)
            processor = tf.SamProcessor(pictures)
    return SegmentAnything(model, processor, second, box_batch)


def _logit(probability: float) -> float:
    if probability <= 0:
        return -math.inf
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))
