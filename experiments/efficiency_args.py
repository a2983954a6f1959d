"""What `bench-efficiency` is asked for, and the settings that follow."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from experiments.bench_pruners import method, random_pruner_params
from experiments.configs.models import ModelName, driving_config
from experiments.drives import check_methods
from experiments.efficiency_counts import MARKS
from experiments.frame_stages import Setting, unpruned
from experiments.roofline import ACCELERATORS
from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.driving import PROMPT_TOKENS, DrivingConfig, DrivingVLA
from fastdrive_jax.pruning import PRUNERS, builds_on_recon

UNPRUNED = "unpruned"
At = tuple[str, float]  # a method's name and a ratio
MOST_BATCH = 64


@dataclass(frozen=True)
class BenchEfficiencyArgs:
    """Measure time and FLOPs of frames of a driving VLA under pruning methods.

    Attributes:
        out: Folder for efficiency.json, efficiency.md and the plot.
        config: Size of the model.
        methods: Names, or FILE.py:FUNCTION; by default all methods of the library.
        ratios: Keep ratios.
        batch: Batch sizes.
        height: Height of each image in pixels.
        width: Width of each image in pixels.
        cameras: Images per sample.
        text: Text tokens per sample; more than 6 are an instruction before the driving prompt.
        repeats: Timed rounds after a warm-up round.
        encoder_repeats: Number of those rounds in which the vision encoder runs; 0 means all.
        image: A JPEG to decode; None generates one of 1600 x 900.
        peer: Also time transformers.
        memory: Measure each setting's peak in a separate process, which compiles it again.
        errors: JSON of `compare-pruners` or `eval-planning`, for the plot.
        predict: Only count and predict, without measuring.
        accelerators: Accelerators to predict for.
    """

    out: Path = Path("runs/bench_efficiency")
    config: ModelName = "100m"
    methods: tuple[str, ...] = tuple(PRUNERS)
    ratios: tuple[float, ...] = (0.25,)
    batch: tuple[int, ...] = (1,)
    height: int = 1596
    width: int = 1596
    cameras: int = 1
    text: int = MARKS + PROMPT_TOKENS
    repeats: int = 5
    encoder_repeats: int = 0
    image: Path | None = None
    peer: bool = True
    memory: bool = False
    errors: Path | None = None
    predict: bool = False
    accelerators: tuple[str, ...] = tuple(ACCELERATORS)

    def __post_init__(self):
        check_methods(self.methods, self.ratios)
        if not self.methods or not self.ratios or 1 in self.ratios:
            raise UserError("Give methods, and ratios below 1; the unpruned model is always timed.")
        if not self.batch or not 1 <= min(self.batch) <= max(self.batch) <= MOST_BATCH:
            raise UserError(f"batch={self.batch} must be 1 to {MOST_BATCH}.")
        if self.repeats < 1 or self.encoder_repeats < 0:
            raise UserError(
                f"repeats={self.repeats} must be at least 1, "
                f"encoder_repeats={self.encoder_repeats} at least 0."
            )
        least = MARKS + PROMPT_TOKENS
        if self.text < least:
            raise UserError(f"text={self.text} must be at least {least}, of the driving prompt.")
        unknown = sorted(set(self.accelerators) - set(ACCELERATORS))
        if unknown or not self.accelerators:
            raise UserError(
                f"Unknown accelerators {unknown}; choose from {', '.join(ACCELERATORS)}."
            )
        driving_config(self.config, (self.height, self.width), self.cameras)  # refuses sizes

    @property
    def driving(self) -> DrivingConfig:
        """The model's sizes."""
        return driving_config(self.config, (self.height, self.width), self.cameras)


def settings_of(args: BenchEfficiencyArgs, dtype: jnp.dtype, abstract: bool) -> dict[At, Setting]:
    """The unpruned model, then every method at every ratio.

    Args:
        args: What to measure.
        dtype: Of the model.
        abstract: Whether shapes stand for the methods' parameters.
    """
    model = DrivingVLA(args.driving, dtype)
    text = args.driving.text
    tokens = args.cameras, args.driving.visual_tokens // args.cameras
    found = {(UNPRUNED, 1.0): unpruned(model)}
    for name in args.methods:
        pruner = method(name, text)

        def draw(pruner=pruner, name=name):
            return random_pruner_params(pruner, builds_on_recon(name), text, tokens, dtype)

        params = jax.eval_shape(draw) if abstract else draw()
        for ratio in args.ratios:
            found[name, ratio] = Setting(DrivingPolicy(model, pruner, ratio), params)
    return found
