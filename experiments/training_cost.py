"""What a training step of ReconPruner costs by count of products, and what a machine can do."""

import re

import jax

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig
from fastdrive_jax.pruning.accounting import (
    LAYER_FORMULA,
    encoder_flops,
    layer_flops,
    recon_pruner_flops,
)
from fastdrive_jax.training.reconstruction import ReconConfig

FORMULA = (
    "3 (pruner layer(N + 1) + 2 (decoder layers x layer(N) + head(N))) a picture; "
    f"{LAYER_FORMULA}, head(n) = 2 n D 3 p^2 (+ 2 n of the projection in front, where sizes "
    "differ); SSIM, norms and the optimizer are not counted"
)
ENCODER_FORMULA = "; + the frozen vision encoder once, forward"

# Dense products of bfloat16 with float32 sums, FLOP/s, by the makers' data sheets. The first name
# that a device's kind contains as a whole word counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def step_flops(
    config: ReconConfig, size: tuple[int, int], encoder: VisionConfig | None = None
) -> float:
    """FLOPs of products of one training step for one picture, see `FORMULA`.

    Args:
        config: Of the training.
        size: Height and width of the picture.
        encoder: Frozen encoder that makes the tokens within the step; None if they are given.
    """
    count = (size[0] // 28) * (size[1] // 28)
    width, decoder = config.pruner.layer.hidden_size, config.decoder
    pruner = recon_pruner_flops(config.pruner.layer, count)
    once = decoder.num_layers * layer_flops(decoder, count)
    once += 2 * count * decoder.hidden_size * 3 * config.target_pixels**2
    if width != decoder.hidden_size:
        once += 2 * count * width * decoder.hidden_size
    return 3 * (pruner + 2 * once) + (encoder_flops(encoder, size) if encoder else 0.0)


def peak_flops(device: jax.Device, given: float | None = None) -> float:
    """FLOP/s of a device, from the table or as given.

    Raises:
        UserError: The device is not in the table and nothing was given.
    """
    if given is not None:
        return given
    for name, rate in PEAKS.items():
        if re.search(rf"\b{name}\b", device.device_kind, re.IGNORECASE):  # an L40 is no L4
            return rate
    raise UserError(
        f"The peak rate of a {device.device_kind!r} is not known here: give it as --peak-flops, in "
        "FLOP/s of dense bfloat16 products by the maker's sheet (989e12 for an H100 SXM)."
    )
