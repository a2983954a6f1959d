"""What text-prompted maskers look for, and how their instance masks become one class map."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipelines.maskers.interface import BACKGROUND, CLASSES, ROAD
from fastdrive_jax.errors import UserError

# Two masks of at least this intersection over union show the same thing.
SAME_THING = 0.8


@dataclass(frozen=True)
class ClassPrompt:
    """What is searched for one class.

    Attributes:
        name: One of `CLASSES.names`, not "background".
        prompts: Phrases that mean the class, without full stop or question mark.
        box_threshold: Least confidence of a detection, in [0, 1].
        text_threshold: Least confidence that a phrase as a whole is meant, in [0, 1]; only for
            detectors that score the words of a phrase one by one.
        mask_threshold: Least probability of a pixel to be in the mask, in [0, 1].
    """

    name: str
    prompts: tuple[str, ...]
    box_threshold: float = 0.3
    text_threshold: float = 0.25
    mask_threshold: float = 0.5

    def __post_init__(self):
        if self.name not in CLASSES.names[1:]:
            raise UserError(
                f'"{self.name}" is no foreground class; choose from {list(CLASSES.names[1:])}.'
            )
        if isinstance(self.prompts, str) or not self.prompts:
            raise UserError(f"The class {self.name} needs a list of at least one prompt; add one.")
        for prompt in self.prompts:
            # Full stops and question marks end a phrase for GroundingDINO.
            if not isinstance(prompt, str) or not prompt.strip() or re.search(r"[.?]", prompt):
                raise UserError(
                    f"The prompt {prompt!r} of class {self.name} must be words without full stop "
                    "or question mark; correct it."
                )
        for key in ("box_threshold", "text_threshold", "mask_threshold"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UserError(
                    f"{key} of class {self.name} is {value!r}; give a number from 0 to 1."
                )

    @property
    def class_id(self) -> int:
        """Index in `CLASSES.names`."""
        return CLASSES.names.index(self.name)


# Boxes of GroundingDINO score lower for small things far away, so signs and lights, which are
# small in nuScenes, may be less sure; a road is either plain or not there.
DEFAULT_PROMPTS = (
    ClassPrompt("road", ("road", "street"), box_threshold=0.3),
    ClassPrompt(
        "vehicle",
        ("car", "truck", "bus", "van", "trailer", "construction vehicle", "motorcycle", "bicycle"),
        box_threshold=0.3,
    ),
    ClassPrompt("person", ("person", "pedestrian", "cyclist"), box_threshold=0.3),
    ClassPrompt(
        "traffic_sign",
        ("traffic sign", "road sign", "stop sign"),
        box_threshold=0.27,
        text_threshold=0.22,
    ),
    ClassPrompt("traffic_light", ("traffic light",), box_threshold=0.27, text_threshold=0.22),
    ClassPrompt(
        "barrier", ("traffic barrier", "traffic cone", "concrete barrier"), box_threshold=0.3
    ),
)


def check_prompts(prompts: Sequence[ClassPrompt]) -> tuple[ClassPrompt, ...]:
    """The prompts, if every class and every phrase stands there once.

    Raises:
        UserError: None at all, a class twice, or a phrase twice (compared in lower case).
    """
    if not prompts:
        raise UserError("No class has a prompt; give at least one.")
    names = [prompt.name for prompt in prompts]
    phrases = [phrase.strip().lower() for prompt in prompts for phrase in prompt.prompts]
    for what, values in (("class", names), ("prompt", phrases)):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UserError(f'The {what} "{twice[0]}" is given twice; leave one of them out.')
    return tuple(prompts)


def prompt_settings(prompts: Sequence[ClassPrompt]) -> list[dict[str, Any]]:
    """JSON values of the prompts, for `Masker.settings`."""
    return [asdict(prompt) | {"prompts": list(prompt.prompts)} for prompt in prompts]


@dataclass(frozen=True)
class Instance:
    """One thing that was found.

    Attributes:
        class_id: Of `CLASSES`.
        score: Confidence; higher is surer.
        mask: bool [H, W].
    """

    class_id: int
    score: float
    mask: np.ndarray


def paint(instances: Sequence[Instance], size: tuple[int, int]) -> np.ndarray:
    """One class map of many instances.

    Road lies below everything: what stands on it is painted later. Of two masks of different
    object classes that show the same thing (`SAME_THING`) the surer one is kept. Then smaller
    masks lie on larger ones, since a small thing before a large one (a person before a bus) hides
    little of it, but would be lost beneath it. Of equal sizes the surer lies on top, then the
    higher class id; the order of `instances` never matters.

    Args:
        instances: With masks of `size`.
        size: Height and width of the picture.

    Returns:
        Class ids uint8 [H, W].

    Raises:
        ValueError: A mask is not boolean or of another size, or a class id is not a foreground id.
    """
    for instance in instances:
        if instance.mask.shape != tuple(size) or instance.mask.dtype != bool:
            raise ValueError(f"a mask is {instance.mask.dtype} {instance.mask.shape}, not {size}")
        if instance.class_id not in CLASSES.foreground:
            raise ValueError(f"class id {instance.class_id} is not foreground")
    out = np.full(size, BACKGROUND, np.uint8)
    for instance in instances:
        if instance.class_id == ROAD:
            out[instance.mask] = ROAD
    objects = [(np.count_nonzero(i.mask), i) for i in instances if i.class_id != ROAD]
    kept = _without_rivals([pair for pair in objects if pair[0]])
    for _, instance in sorted(kept, key=lambda p: (-p[0], p[1].score, p[1].class_id)):
        out[instance.mask] = instance.class_id
    return out


def _without_rivals(objects: list[tuple[int, Instance]]) -> list[tuple[int, Instance]]:
    """Drops what a surer instance of another class shows too; pairs of area and instance."""
    kept: list[tuple[int, Instance]] = []
    for area, one in sorted(objects, key=lambda p: (-p[1].score, -p[1].class_id, p[0])):
        if not any(
            other.class_id != one.class_id and _same(area, one.mask, other_area, other.mask)
            for other_area, other in kept
        ):
            kept.append((area, one))
    return kept


def _same(area_a: int, a: np.ndarray, area_b: int, b: np.ndarray) -> bool:
    # The areas alone bound the ratio, which spares nearly all pairs the look at the pixels.
    if min(area_a, area_b) < SAME_THING * max(area_a, area_b):
        return False
    shared = np.count_nonzero(a & b)
    return shared >= SAME_THING * (area_a + area_b - shared)
