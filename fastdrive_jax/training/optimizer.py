"""AdamW with warm-up and cosine decay, from one frozen config."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from fastdrive_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated.

    Attributes:
        learning_rate: the peak, reached after the warm-up.
        warmup_steps: steps of linear rise to the peak.
        total_steps: length of the schedule, warm-up included.
        weight_decay: decoupled decay of matrices; biases, norms and vectors are not decayed.
        clip_norm: largest global norm of the gradients; 0 turns clipping off.
        beta1: decay of the gradient's running mean.
        beta2: decay of the squared gradient's running mean.
        schedule: what follows the warm-up.
        end_factor: the cosine ends at this fraction of the peak.
    """

    learning_rate: float = 1e-3
    warmup_steps: int = 0
    total_steps: int = 1000
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    schedule: Literal["cosine", "constant"] = "cosine"
    end_factor: float = 0.0

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, not {self.learning_rate}.")
        if self.total_steps < 1:
            raise UserError(f"total_steps must be at least 1, not {self.total_steps}.")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise UserError(
                f"warmup_steps must be at least 0 and below total_steps ({self.total_steps}), "
                f"not {self.warmup_steps}."
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), not {getattr(self, name)}.")
        for name in ("weight_decay", "clip_norm"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if not 0 <= self.end_factor <= 1:
            raise UserError(f"end_factor must be in [0, 1], not {self.end_factor}.")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"schedule must be cosine or constant, not {self.schedule!r}.")


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the number of updates already made."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay_steps = config.total_steps - warmup
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.end_factor)
    if not warmup:
        return after
    # Not from 0: the first update would be lost.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: matrices that are no bias or norm.

    Names are looked at as well as the number of axes, since layers that are stacked for a scan
    give vectors a second axis.
    """

    def decays(path, leaf) -> bool:
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        is_vector = bool(names) and names[-1] in ("bias", "scale")
        return leaf.ndim >= 2 and not is_vector and not any("norm" in n.lower() for n in names)

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, with the config's schedule."""
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
