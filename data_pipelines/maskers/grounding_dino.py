"""Boxes of what prompts name, by GroundingDINO.

The model scores every word of one text that holds all prompts ("car. traffic light. ..."), for
each of its queries (possible boxes). Its own labels are the words above a threshold, which may be
half a prompt or words of several. So words are told here by where they stand: each prompt has its
token positions, a class has those of its prompts, and each query is of one class at most.
"""

from __future__ import annotations

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
from data_pipelines.maskers.prompts import ClassPrompt
from data_pipelines.maskers.rgb import in_threads
from fastdrive_jax.errors import UserError

Spans = tuple[tuple[tuple[int, ...], ...], ...]  # class, prompt, token positions


@dataclass(frozen=True)
class Detections:
    """What was found in one picture.

    Attributes:
        boxes: float32 [n, 4] left, top, right, bottom in pixels, inside the picture.
        scores: float32 [n].
        prompts: int [n], index of the class among the detector's prompts.
    """

    boxes: np.ndarray
    scores: np.ndarray
    prompts: np.ndarray


@dataclass(frozen=True, eq=False)
class GroundingDino:
    """The detector; make it by `load_grounding_dino`."""

    model: Any
    processor: Any
    prompts: tuple[ClassPrompt, ...]
    text: dict[str, Any]  # of one picture, [1, L]
    spans: Spans
    nms_iou: float

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Detections of each picture; RGB uint8 [H, W, 3], all of one size.

        Pictures of several sizes would be padded, and the padding changes what is found.
        """
        torch, _ = require_torch()
        prepared = in_threads(
            lambda p: self.processor.image_processor(p, return_tensors="pt"), pictures
        )
        images = {key: torch.cat([one[key] for one in prepared]) for key in prepared[0]}
        images["pixel_values"] = images["pixel_values"].to(self.model.dtype)
        inputs = images | {k: v.expand(len(pictures), -1) for k, v in self.text.items()}
        with torch.inference_mode():
            outputs = self.model(**{k: v.to(self.model.device) for k, v in inputs.items()})
            return self.decode(outputs, [p.shape[:2] for p in pictures])

    def decode(self, outputs: Any, sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections from the model's answer.

        Args:
            outputs: With logits [B, queries, tokens] and pred_boxes [B, queries, 4] (centre,
                width and height in shares of the picture).
            sizes: Height and width of each picture.
        """
        torch, _ = require_torch()
        logits = outputs.logits.float()
        best = class_of_queries(logits, self.spans, self.prompts)
        found: list[list[Detections]] = [[] for _ in sizes]
        for index, (prompt, spans) in enumerate(zip(self.prompts, self.spans, strict=True)):
            mine = torch.full_like(logits, -torch.inf)
            places = sorted({place for span in spans for place in span})
            mine[..., places] = logits[..., places]
            mine = mine.masked_fill((best != index)[..., None], -torch.inf)
            results = self.processor.post_process_grounded_object_detection(
                type(outputs)(logits=mine, pred_boxes=outputs.pred_boxes.float()),
                self.text["input_ids"].expand(len(sizes), -1),
                threshold=prompt.box_threshold,
                text_threshold=prompt.text_threshold,
                target_sizes=[tuple(size) for size in sizes],
            )
            for out, result, size in zip(found, results, sizes, strict=True):
                boxes, scores = result["boxes"].cpu().numpy(), result["scores"].cpu().numpy()
                out.append(_clean(boxes, scores, index, size, self.nms_iou))
        return [
            Detections(
                *(np.concatenate([getattr(d, k) for d in out]) for k in ("boxes", "scores")),
                np.concatenate([d.prompts for d in out]),
            )
            for out in found
        ]


def load_grounding_dino(
    checkpoint: Checkpoint,
    prompts: tuple[ClassPrompt, ...],
    nms_iou: float,
    dtype: str,
    device: str,
) -> GroundingDino:
    """The detector with its prompts.

    Raises:
        UserError: It's not a whole GroundingDINO checkpoint, or the prompts are too long for it.
    """
    _, tf = require_torch()
    if checkpoint.model_type != "grounding-dino":
        raise UserError(
            f"{checkpoint.folder} is a {checkpoint.model_type} model; the detector must be "
            "GroundingDINO, such as IDEA-Research/grounding-dino-base."
        )
    model = load_whole(tf.GroundingDinoForObjectDetection, checkpoint, dtype, device)
    with checkpoint_errors(checkpoint.folder):
        # Always Pillow's variant, so that masks don't depend on whether torchvision is installed.
        pictures = tf.GroundingDinoImageProcessorPil.from_pretrained(checkpoint.folder)
        tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint.folder)
        processor = tf.GroundingDinoProcessor(pictures, tokenizer)
    phrases = [" ".join(p.split()).lower() for prompt in prompts for p in prompt.prompts]
    text = dict(processor(text=[phrases], return_tensors="pt"))
    limit = model.config.max_text_len
    if text["input_ids"].shape[1] > limit:
        raise UserError(
            f"The prompts are {text['input_ids'].shape[1]} tokens long and the detector takes "
            f"{limit}; leave some out."
        )
    spans = prompt_spans(text["input_ids"][0].tolist(), tokenizer, prompts)
    return GroundingDino(model, processor, prompts, text, spans, nms_iou)


def prompt_spans(ids: Sequence[int], tokenizer: Any, prompts: Sequence[ClassPrompt]) -> Spans:
    """Token positions of each class's prompts in the text of all of them.

    Raises:
        UserError: The tokenizer takes the text apart in another way, or knows no word of a prompt.
    """
    ends = {tokenizer.convert_tokens_to_ids("."), *tokenizer.all_special_ids}
    ends.discard(tokenizer.unk_token_id)
    runs: list[list[int]] = [[]]
    for place, token in enumerate(ids):
        if token in ends:
            runs.append([])
        else:
            runs[-1].append(place)
    runs = [run for run in runs if run]
    phrases = [phrase for prompt in prompts for phrase in prompt.prompts]
    if len(runs) != len(phrases):
        raise UserError(
            f"The tokenizer finds {len(runs)} phrases in {len(phrases)} prompts; use plain words."
        )
    for phrase, run in zip(phrases, runs, strict=True):
        if all(ids[place] == tokenizer.unk_token_id for place in run):
            raise UserError(f'The detector knows no word of the prompt "{phrase}"; use another.')
    rest = iter(runs)
    return tuple(tuple(tuple(next(rest)) for _ in prompt.prompts) for prompt in prompts)


def class_of_queries(logits: Any, spans: Spans, prompts: Sequence[ClassPrompt]) -> Any:
    """Index of the class that each query shows, -1 for none: a tensor int64 [B, queries].

    A prompt is meant as much as its words are on average: with the best word alone, the shared
    word would make every "traffic light" a "traffic sign" too. Of the classes whose best word is
    above the box threshold and whose best prompt is above the text threshold, the class of the
    prompt that is meant most is taken, the first of equals.

    Args:
        logits: float32 [B, queries, tokens].
        spans: See `prompt_spans`.
        prompts: With the thresholds.
    """
    torch, _ = require_torch()
    chances = logits.sigmoid()
    meant = []
    for prompt, own in zip(prompts, spans, strict=True):
        text = torch.stack([chances[..., list(span)].mean(-1) for span in own]).amax(0)
        word = chances[..., sorted({place for span in own for place in span})].amax(-1)
        enough = (word > prompt.box_threshold) & (text > prompt.text_threshold)
        meant.append(torch.where(enough, text, -1.0))
    score, index = torch.stack(meant).max(0)
    return torch.where(score > 0, index, -1)


def _clean(
    boxes: np.ndarray, scores: np.ndarray, index: int, size: tuple[int, int], nms_iou: float
) -> Detections:
    """Boxes of one class cut at the picture's edge, without empty ones and near copies."""
    height, width = size
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    boxes = boxes.astype(np.float32)
    wide = (boxes[:, 2] - boxes[:, 0] >= 1) & (boxes[:, 3] - boxes[:, 1] >= 1)
    boxes, scores = boxes[wide], scores[wide].astype(np.float32)
    keep = without_copies(boxes, scores, nms_iou)
    return Detections(boxes[keep], scores[keep], np.full(len(keep), index))


def without_copies(boxes: np.ndarray, scores: np.ndarray, iou: float) -> np.ndarray:
    """Indices of boxes [n, 4], surest first, whose overlap with each surer kept one is below `iou`.

    Non-maximum suppression, which torchvision would have.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        others = boxes[kept]
        low = np.maximum(others[:, :2], boxes[i, :2])
        high = np.minimum(others[:, 2:], boxes[i, 2:])
        shared = np.prod(np.clip(high - low, 0, None), axis=1)
        if not (shared >= iou * (area[kept] + area[i] - shared)).any():
            kept.append(int(i))
    return np.array(kept, int)
