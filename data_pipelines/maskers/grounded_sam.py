"""Class maps from text prompts: GroundingDINO finds boxes, SAM 2 or SAM cuts them out.

masker = load_grounded_sam("IDEA-Research/grounding-dino-base", "facebook/sam2.1-hiera-large")
make_masks(frames, masker, out_dir)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.maskers.checkpoints import (
    check_dtype,
    find_checkpoint,
    pick_device,
    require_torch,
)
from data_pipelines.maskers.grounding_dino import Detections, GroundingDino, load_grounding_dino
from data_pipelines.maskers.interface import Frame
from data_pipelines.maskers.prompts import (
    DEFAULT_PROMPTS,
    ClassPrompt,
    Instance,
    check_prompts,
    paint,
    prompt_settings,
)
from data_pipelines.maskers.rgb import read_frames
from data_pipelines.maskers.segment_anything import SegmentAnything, load_segment_anything
from fastdrive_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class GroundedSam:
    """The masker; make it by `load_grounded_sam`."""

    detector: GroundingDino
    segmenter: SegmentAnything
    settings: Mapping[str, Any]
    name = "grounded_sam"

    def __call__(self, frames: Sequence[Frame]) -> list[np.ndarray]:
        """Class ids uint8 [H, W] of each frame's size, background where nothing was found.

        Raises:
            UserError: A picture is missing or damaged.
        """
        pictures = read_frames(frames)
        found = self.detect(pictures)
        prompts = self.detector.prompts
        masks = self.segmenter(
            pictures,
            [own.boxes for own in found],
            [np.array([prompts[i].mask_threshold for i in own.prompts]) for own in found],
        )
        return [
            paint(
                [
                    Instance(prompts[i].class_id, float(score), mask)
                    for i, score, mask in zip(own.prompts, own.scores, cut, strict=True)
                ],
                picture.shape[:2],
            )
            for picture, own, cut in zip(pictures, found, masks, strict=True)
        ]

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of pictures RGB uint8 [H, W, 3] of any sizes; equal sizes are one batch."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, picture in enumerate(pictures):
            by_size.setdefault(picture.shape, []).append(i)
        found: dict[int, Detections] = {}
        for members in by_size.values():
            answers = self.detector([pictures[i] for i in members])
            found |= dict(zip(members, answers, strict=True))
        return [found[i] for i in range(len(pictures))]


def load_grounded_sam(
    detector: str | Path,
    segmenter: str | Path,
    prompts: Sequence[ClassPrompt] = DEFAULT_PROMPTS,
    *,
    nms_iou: float = 0.8,
    box_batch: int = 32,
    dtype: str = "float32",
    device: str | None = None,
) -> GroundedSam:
    """Loads both models.

    Args:
        detector: Folder or hub repository of a GroundingDINO checkpoint.
        segmenter: Folder or hub repository of a SAM 2 or SAM checkpoint.
        prompts: What is searched, with thresholds.
        nms_iou: Of two boxes of one class that overlap this much, the surer one is kept.
        box_batch: Boxes that the segmenter cuts out at once.
        dtype: "float32", "bfloat16" or "float16", of both models.
        device: As torch names it; the first CUDA device by default, else the CPU.

    Raises:
        UserError: torch or transformers is missing, a checkpoint is missing, damaged, incomplete
            or of another kind, or a setting is wrong.
    """
    prompts = check_prompts(prompts)
    if not 0 < nms_iou <= 1:
        raise UserError(f"nms_iou is {nms_iou}; give a number above 0, at most 1.")
    if box_batch < 1:
        raise UserError(f"box_batch is {box_batch}; give at least 1.")
    check_dtype(dtype)
    _, transformers = require_torch()
    device = pick_device(device)
    boxes, cuts = find_checkpoint(detector), find_checkpoint(segmenter)
    settings = {
        "detector": boxes.identity,
        "segmenter": cuts.identity,
        "prompts": prompt_settings(prompts),
        "nms_iou": nms_iou,
        "dtype": dtype,
        "transformers": transformers.__version__,
    }
    return GroundedSam(
        load_grounding_dino(boxes, prompts, nms_iou, dtype, device),
        load_segment_anything(cuts, dtype, device, box_batch),
        settings,
    )
