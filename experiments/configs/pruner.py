"""Settings of ReconPruner's training: the paper's, and those that worked on the data at hand."""

from dataclasses import dataclass, replace

from data_pipelines.feature_loader import FeatureLoaderConfig
from fastdrive_jax.models.qwen2_5_vl.config import TINY_DECODER, DecoderConfig
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import ReconConfig


@dataclass(frozen=True)
class PrunerRun:
    """A run that trains a ReconPruner on token features.

    Attributes:
        recon: The modules and the loss.
        optimizer: Its `total_steps` is the length of the run.
        loader: Order and size of batches.
        seed: Of the parameters and of the drawn budgets.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between records.
    """

    recon: ReconConfig
    optimizer: OptimizerConfig
    loader: FeatureLoaderConfig = FeatureLoaderConfig()
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 10


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
)

PRUNER_RUNS = {"faithful": FAITHFUL, "camvid": CAMVID, "tiny": TINY}
