"""What the study of ReconPruner's objective varies: one thing at a time, from two settings.

A variant is named after its base: "faithful" is the published objective, "tuned" the setting that
stands as the default for the data set. `bases` makes both at the study's size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.configs.pruner import FAITHFUL, SMALL_DECODER, PrunerRun
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.training.reconstruction import ReconConfig
from fastdrive_jax.training.run_config import differences

# Smaller than a real training, so that all of them fit an hour or so on one core.
DECODER = replace(
    SMALL_DECODER, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=2, num_kv_heads=1
)
TARGET_PIXELS = 7
STEPS = 200
BATCH_SIZE = 4


@dataclass(frozen=True)
class Variant:
    """A setting that differs from its base in one respect.

    Attributes:
        name: Its base, and behind a plus or minus what is added or taken away.
        reason: What it shows, in a line.
        recon: Fields of `ReconConfig`.
        pruner: Fields of `ReconPrunerConfig`.
    """

    name: str
    reason: str
    recon: Mapping[str, Any] = field(default_factory=dict)
    pruner: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """Either faithful or tuned."""
        return self.name.replace("-", "+").split("+")[0]

    def recon_of(self, base: ReconConfig) -> ReconConfig:
        """The base with this variant's fields."""
        return replace(base, pruner=replace(base.pruner, **self.pruner), **self.recon)


TOP_K = {"mask_mode": "top_k", "surrogate": "identity"}
TOP_K_SIGMOID = {"mask_mode": "top_k", "surrogate": "sigmoid"}
SIGN = {"mask_mode": "sign", "surrogate": "identity"}
BUDGET = {"budget_weight": 1.0, "budget": 0.5}

VARIANTS = (
    Variant("faithful", "the published objective"),
    Variant("faithful+foreground_only", "no background pass to compete with", {"alpha": 1.0}),
    Variant("faithful+mse_only", "MSE alone, no SSIM", {"ssim_weight": 0.0}),
    Variant("faithful+ssim_only", "SSIM alone, no MSE", {"ssim_weight": 1.0}),
    Variant(
        "faithful+mask_only",
        "predicts the mask, no reconstruction",
        {"pixel_weight": 0.0, "mask_weight": 1.0},
    ),
    Variant(
        "faithful+mask_3", "a direct mask term in addition to the pixels", {"mask_weight": 3.0}
    ),
    Variant("faithful+budget", "a term for the share of tokens kept", BUDGET),
    Variant("faithful+top_k", "the best tokens of a randomly drawn budget", TOP_K),
    Variant(
        "faithful+top_k_sigmoid", "a drawn budget with a sigmoid surrogate slope", TOP_K_SIGMOID
    ),
    Variant("faithful+fill_mean", "targets filled with the image's mean", {"fill": "mean"}),
    Variant("faithful+window_7", "a smaller SSIM window", {"ssim_window": 7}),
    Variant("faithful+window_15", "a larger SSIM window", {"ssim_window": 15}),
    Variant("faithful+norm", "tokens normalized to unit size", pruner={"input_norm": True}),
    Variant("faithful+rope", "positions in the pruner", pruner={"rope": True}),
    Variant("faithful+scorer_zero", "all scores start at 0", {"scorer_init": "zero"}),
    Variant("faithful+query_1", "a query as large as a token", pruner={"query_std": 1.0}),
    Variant("tuned", "the default of this data set"),
    Variant("tuned-pixels", "the mask term alone, no reconstruction", {"pixel_weight": 0.0}),
    Variant("tuned-mask", "without the mask term", {"mask_weight": 0.0}),
    Variant("tuned+mask_1", "another weight of the mask term", {"mask_weight": 1.0}),
    Variant("tuned+mask_3", "another weight of the mask term", {"mask_weight": 3.0}),
    Variant("tuned-surprise", "the same target for all foreground", {"mask_surprise": 0.0}),
    Variant("tuned+surprise_4", "a stronger surprise", {"mask_surprise": 0.4}),
    Variant("tuned+sign", "the sign mask", SIGN),
    Variant("tuned+sign_budget", "the sign mask and a term for its share", SIGN | BUDGET),
    Variant("tuned+top_k", "the best tokens of a randomly drawn budget", TOP_K),
    Variant("tuned+top_k_sigmoid", "a drawn budget with a sigmoid surrogate slope", TOP_K_SIGMOID),
    Variant("tuned+fill_zero", "targets filled with black", {"fill": "zero"}),
    Variant("tuned-norm", "tokens not normalized", pruner={"input_norm": False}),
    Variant("tuned+rope", "positions in the pruner", pruner={"rope": True}),
)


def bases(tuned: PrunerRun, steps: int | None = None) -> dict[str, PrunerRun]:
    """Both settings at the study's size: a shallow decoder, coarse targets, a short training.

    Args:
        tuned: The default of the data set; the published objective takes its pruner's sizes.
        steps: Length of each training; None takes `STEPS`.
    """
    steps = steps or STEPS
    size = {"decoder": DECODER, "target_pixels": TARGET_PIXELS}
    published = replace(FAITHFUL.recon.pruner, layer=tuned.recon.pruner.layer)
    recons = {
        "faithful": replace(FAITHFUL.recon, pruner=published, **size),
        "tuned": replace(tuned.recon, **size),
    }
    optimizer = replace(tuned.optimizer, total_steps=steps, warmup_steps=min(20, steps // 2))
    loader = replace(tuned.loader, batch_size=BATCH_SIZE)
    return {
        name: replace(
            tuned, recon=recon, optimizer=optimizer, loader=loader, checkpoint_every=steps
        )
        for name, recon in recons.items()
    }


def chosen(names: Sequence[str] | None) -> tuple[Variant, ...]:
    """The variants of these names, in the study's order; None takes all.

    Raises:
        UserError: There is no variant of a name.
    """
    known = [variant.name for variant in VARIANTS]
    if names is None:
        return VARIANTS
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"There is no variant {unknown[0]!r}; choose from {', '.join(known)}.")
    return tuple(variant for variant in VARIANTS if variant.name in names)


def runs_of(
    variants: Sequence[Variant], settings: Mapping[str, PrunerRun]
) -> tuple[tuple[Variant, PrunerRun], ...]:
    """Each variant with its training, without those that change nothing on this data set."""
    runs = []
    for variant in variants:
        base = settings[variant.base]
        recon = variant.recon_of(base.recon)
        if variant.name == variant.base or recon != base.recon:
            runs.append((variant, replace(base, recon=recon)))
    return tuple(runs)


def changes(run: PrunerRun, base: PrunerRun) -> str:
    """The fields in which a variant differs from its base, as `name=value`."""
    old, new = to_plain(base.recon), to_plain(run.recon)
    names = [phrase.split(" ")[0] for phrase in differences(old, new)]

    def value(name: str) -> Any:
        found = new
        for part in name.split("."):
            found = found[part]
        return found

    return ", ".join(f"{name}={value(name)}" for name in names)
