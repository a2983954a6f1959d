"""Settings of ReconPruner's training: the paper's, and those that worked on the data at hand."""

from dataclasses import dataclass, replace
from typing import Literal

from data_pipelines.loader import LoaderConfig
from experiments.encoders import EncoderName
from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    TINY_DECODER,
)
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.ema import check_decay
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import ReconConfig

NUSCENES_FG = 240_942  # pictures of 40,157 key frames, six cameras each
EPOCHS = 10  # published, as the learning rate, the cosine, 1596 x 1596 and the losses' weights


@dataclass(frozen=True)
class PrunerRun:
    """A run that trains a ReconPruner.

    Attributes:
        recon: The modules and the loss.
        optimizer: AdamW and its schedule; `total_steps` is the length of the run.
        encoder: Encoder whose tokens are pruned, see `encoders.load_encoder`.
        loader: How images are read; its batch size is the global one, over all devices.
        accumulate: Parts that a batch is split into and computed one after the other.
        dtype: Dtype of a Qwen2.5-VL's encoder and of all arithmetic except losses and updates.
        data: Groups of devices, each with all parameters; -1 uses all remaining devices.
        fsdp: Devices of a group that shard its parameters.
        tensor: Devices that share each layer.
        ema_decay: Decay of a moving average of the parameters, which is evaluated and exported
            instead of them.
        best: Evaluation metric that selects the checkpoint to export: the lowest loss or the
            highest recall of foreground area; None exports the last.
        evaluate_every: Steps between evaluations; 0 evaluates only at the beginning and the end.
        eval_pictures: Images of an evaluation, in whole batches.
        seed: Seed of the parameters and of the drawn budgets.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between records.
    """

    recon: ReconConfig
    optimizer: OptimizerConfig
    encoder: EncoderName = "dinov2"
    loader: LoaderConfig = LoaderConfig(8, resize="area")
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    ema_decay: float | None = None
    best: Literal["loss", "recall_75", "recall_50", "recall_25"] | None = None
    evaluate_every: int = 0
    eval_pictures: int = 256
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10

    def __post_init__(self):
        batch = self.loader.batch_size
        if self.accumulate < 1 or batch % self.accumulate:
            raise UserError(
                f"loader.batch_size={batch} must be a multiple of accumulate={self.accumulate}, "
                "which is at least 1."
            )
        if self.loader.group != "picture" or self.loader.num_epochs is not None:
            raise UserError(
                "A pruner is trained on single pictures without end: loader.group must be picture "
                "and loader.num_epochs none; optimizer.total_steps is the length of the run."
            )
        if self.recon.needs_prior and self.loader.flip:
            raise UserError(
                "recon.mask_surprise reads the mean mask of pictures as they are; set loader.flip "
                "to False, or mask_surprise to 0."
            )
        if self.evaluate_every < 0 or self.eval_pictures < 1:
            raise UserError(
                f"evaluate_every={self.evaluate_every} must not be negative, and eval_pictures="
                f"{self.eval_pictures} be at least 1."
            )
        if self.ema_decay is not None:
            check_decay(self.ema_decay)


_MAY_CHANGE = (
    "data",
    "fsdp",
    "tensor",
    "evaluate_every",
    "checkpoint_every",
    "log_every",
    "loader.num_workers",
    "loader.read_threads",
    "recon.remat",
)


def may_change(run: PrunerRun) -> tuple[str, ...]:
    """Fields that may change when a run goes on, since they do not change what is trained."""
    more: tuple[str, ...] = ()
    if run.best is None:  # else the best would be of other pictures than those before
        more += ("eval_pictures",)
    if run.recon.mask_mode == "sign":  # it draws nothing, which parts would draw differently
        more += ("accumulate",)
    return _MAY_CHANGE + more


# A layer as wide as the tokens of DINOv2 ViT-S, of the same proportions as the 3B model's.
DINO_LAYER = DecoderConfig(
    hidden_size=384,
    intermediate_size=1024,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    vocab_size=256,
    mrope_section=(8, 12, 12),
)
SMALL_DECODER = DecoderConfig(
    hidden_size=128,
    intermediate_size=384,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=256,
    rope_theta=10_000.0,
    mrope_section=(4, 6, 6),
)

FAITHFUL = PrunerRun(
    recon=ReconConfig(
        pruner=ReconPrunerConfig(layer=DINO_LAYER), decoder=SMALL_DECODER, target_pixels=14
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, total_steps=500),
    loader=LoaderConfig(8, (364, 476), resize="area"),
)
CAMVID = replace(
    FAITHFUL,
    recon=replace(
        FAITHFUL.recon,
        pruner=ReconPrunerConfig(layer=DINO_LAYER, input_norm=True),
        fill="mean",
        mask_weight=3.0,
        mask_share=0.02,
        mask_surprise=0.2,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, total_steps=300),
)
TINY = PrunerRun(
    recon=replace(
        CAMVID.recon,
        pruner=ReconPrunerConfig(layer=replace(TINY_DECODER, num_layers=1), input_norm=True),
        decoder=SMALL_DECODER,
        mask_mode="top_k",
        surrogate="sigmoid",
        mask_weight=1.0,
        mask_share=0.05,
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, total_steps=400),
    encoder="tiny_vla",
    loader=LoaderConfig(8, (224, 392), resize="area"),
)


def _published(text: DecoderConfig) -> PrunerRun:
    """The paper's recipe and nothing beside it, but that what it does not say must be something.

    Ours are the batch, AdamW with its weight decay and clipping, and the warm-up.
    """
    batch = 64
    return PrunerRun(
        recon=ReconConfig(
            pruner=ReconPrunerConfig(layer=replace(text, num_layers=1)),
            decoder=replace(text, num_layers=6),
            remat="layer",
        ),
        encoder="qwen2_5_vl",
        optimizer=OptimizerConfig(
            learning_rate=2e-5,
            warmup_steps=500,
            total_steps=EPOCHS * NUSCENES_FG // batch,
            weight_decay=0.01,
        ),
        loader=LoaderConfig(batch, (1596, 1596)),
        dtype="bfloat16",
        data=-1,
        evaluate_every=2000,
        eval_pictures=1024,
        checkpoint_every=500,
    )


FASTDRIVEVLA_3B = _published(QWEN2_5_VL_3B.text)
FASTDRIVEVLA_7B = _published(QWEN2_5_VL_7B.text)

PRUNER_RUNS = {
    "tiny": TINY,
    "camvid": CAMVID,
    "faithful": FAITHFUL,
    "fastdrivevla_3b": FASTDRIVEVLA_3B,
    "fastdrivevla_7b": FASTDRIVEVLA_7B,
}
