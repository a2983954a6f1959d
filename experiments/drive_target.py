"""A latency target in the closed loop: the keep ratio that each method is driven at.

Buckets are timed for one car, as in the middle of a drive, and the largest that meets the target is
driven; its plans arrive when the target has passed, or later if no bucket meets it. The loop plans
many cars at once and knows no other load, so the choice is made once and not per frame as in
`fastdrive serve`. It is kept in OUT/target.json, so that a run that goes on drives the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from experiments.drives import label, own_file_sum
from experiments.driving_policies import driving_policy, frame_planner
from experiments.quickstart import WorldRun
from fastdrive_jax.errors import UserError
from fastdrive_jax.files import write_text
from fastdrive_jax.inference.latency import choose_bucket, measure_buckets, miss_sentence
from fastdrive_jax.pruning.select import num_keep

FILE = "target.json"


def ratio_within(
    out: Path, world: WorldRun, name: str, ratios: Sequence[float], target_ms: float, seed: int
) -> tuple[float, float]:
    """The ratio of a method, and the seconds until its plans arrive.

    Args:
        out: Folder that keeps what was found.
        world: The VLA and what training gave the methods.
        name: Of the method.
        ratios: Buckets.
        target_ms: Of a frame.
        seed: Of methods that draw.

    Raises:
        UserError: What was kept is damaged.
    """
    known, slug = _read(out / FILE), "-".join([label(name), *own_file_sum(name)])
    if slug not in known:
        tokens = world.model.config.visual_tokens
        runs = {
            ratio: frame_planner(
                driving_policy(world, name, ratio, seed), world.model.config.image_size, tokens
            )
            for ratio in ratios
        }
        measured = measure_buckets(runs, {ratio: num_keep(tokens, ratio) for ratio in ratios})
        choice = choose_bucket(measured.buckets, target_ms, measured.load)
        if not choice.meets:
            print(f"{label(name)}: {miss_sentence(choice, target_ms)}", flush=True)
        late = target_ms if choice.meets else choice.expected_ms
        known[slug] = {"keep_ratio": choice.bucket.keep_ratio, "latency": late / 1e3}
        write_text(out / FILE, json.dumps(known, indent=1) + "\n")
    return known[slug]["keep_ratio"], known[slug]["latency"]


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return {
            slug: {name: float(found[name]) for name in ("keep_ratio", "latency")}
            for slug, found in known.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it to measure again.") from error
