"""Training of ReconPruner from pictures by a frozen Qwen2.5-VL encoder, at the published sizes."""

from dataclasses import dataclass, replace
from typing import Literal

from data_pipelines.loader import LoaderConfig
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B, QWEN2_5_VL_7B, VisionConfig
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import ReconConfig

NUSCENES_FG = 240_942  # pictures of 40,157 key frames, six cameras each
EPOCHS = 10  # published, as the learning rate, the cosine, 1596 x 1596 and the losses' weights


@dataclass(frozen=True)
class PictureRun:
    """A run that trains a ReconPruner on pictures and masks.

    Attributes:
        recon: The modules and the loss.
        encoder: Sizes of the frozen encoder, which must be those of the checkpoint.
        optimizer: Its `total_steps` is the length of the run.
        batch_size: Pictures of an update, of all devices together.
        accumulate: Parts that a batch is computed in, one after the other.
        loader: How pictures are read; its batch size is set from `batch_size`.
        dtype: Of the encoder and of all arithmetic but losses and updates.
        data: Groups of devices, each with all parameters; -1 takes all devices that are left.
        fsdp: Devices of a group that share its parameters.
        tensor: Devices that share a layer.
        seed: Of the parameters, of the order and of the drawn budgets.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between records.
    """

    recon: ReconConfig
    encoder: VisionConfig
    optimizer: OptimizerConfig
    batch_size: int = 64
    accumulate: int = 1
    loader: LoaderConfig = LoaderConfig(1, (1596, 1596), fields=("image", "mask"), flip=True)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10

    def __post_init__(self):
        if self.batch_size < 1 or self.accumulate < 1 or self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} must be a positive multiple of "
                f"accumulate={self.accumulate}."
            )
        width = self.recon.pruner.layer.hidden_size
        if self.encoder.out_hidden_size != width:
            raise UserError(
                f"The pruner's layer has hidden_size={width}, but the encoder's tokens have "
                f"{self.encoder.out_hidden_size}; make them equal."
            )
        if self.recon.needs_prior:
            raise UserError("mask_surprise needs cached features; set it to 0 for pictures.")


def _published(text, vision) -> PictureRun:
    """The paper's recipe; batch, optimizer, warm-up and what it does not say are ours."""
    batch = 64
    return PictureRun(
        recon=ReconConfig(
            pruner=ReconPrunerConfig(layer=replace(text, num_layers=1)),
            decoder=replace(text, num_layers=6),
            remat="layer",
        ),
        encoder=vision,
        optimizer=OptimizerConfig(
            learning_rate=2e-5,
            warmup_steps=500,
            total_steps=EPOCHS * NUSCENES_FG // batch,
            weight_decay=0.01,
        ),
        batch_size=batch,
    )


FASTDRIVEVLA_3B = _published(QWEN2_5_VL_3B.text, QWEN2_5_VL_3B.vision)
FASTDRIVEVLA_7B = _published(QWEN2_5_VL_7B.text, QWEN2_5_VL_7B.vision)
PICTURE_RUNS = {"fastdrivevla_3b": FASTDRIVEVLA_3B, "fastdrivevla_7b": FASTDRIVEVLA_7B}
