"""Training of ReconPruner by reconstruction (FastDriveVLA, section 3.3).

The scores split the tokens in two by a straight-through mask; one shared decoder must paint the
foreground of the picture from the kept tokens and the background from the others. Both passes run
as one batch. What the paper leaves open is a field of `ReconConfig`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.decoder import DecoderLayer, mrope_angles
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.layers import RMSNorm
from fastdrive_jax.parallel.rules import constrain
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig
from fastdrive_jax.training.losses import SsimConfig, reconstruction_loss

TOKEN = 28  # pixels a side of a visual token
_POLICIES = {"layer": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@dataclass(frozen=True)
class ReconConfig:
    """How a ReconPruner is trained; the defaults are the paper's where it says.

    Attributes:
        pruner: The module that is trained.
        scorer_init: Of the scorer's weights: "lecun", normal with a variance of 1 / D, or "zero":
            all scores start at 0, and a sign mask, which keeps what is above 0, with nothing.
        decoder: Of the shared reconstruction decoder, 6 layers in the paper; a hidden size other
            than the tokens' gets a projection in front.
        decoder_rope: Turn the decoder's queries and keys by M-RoPE ids. It must know where a
            token is once the token is zero, so this is on.
        alpha: Weight of the foreground loss; the background's is 1 - alpha.
        ssim_weight: lambda, share of 1 - SSIM in each loss; the rest is the mean squared error.
        ssim_window: Side of the SSIM window in pixels of the target.
        fill: Value of the pixels that a target leaves out: "zero", or "mean", the picture's mean
            colour.
        target_pixels: Edge of a token in the reconstructed picture; below 28 the targets are
            averaged over areas, which is faster on a laptop.
        mask_mode: "sign" keeps what scores above 0 (the paper); "top_k" keeps the best tokens of
            a budget that is drawn for each picture, so that all or nothing is impossible and every
            budget is trained.
        keep_range: Lowest and highest keep ratio that "top_k" draws.
        surrogate: Whose slope the mask has: "identity" (the paper: 1 everywhere) or "sigmoid" of
            the distance to the threshold, in units of `temperature` times the scores' spread.
        temperature: See `surrogate`.
        pixel_weight: Weight of the reconstruction, 1 in the paper. At 0 nothing is painted and the
            decoder is not trained: the terms below must then teach the scores.
        budget_weight: Weight of the squared distance between the share of tokens that a batch's
            masks keep and `budget`, with the masks' gradient. The published objective has no such
            term, so that a sign mask may drift to all or nothing; 0 in the paper.
        budget: That share.
        mask_weight: Weight of a direct term beside the reconstruction: cross-entropy between the
            scores and whether a token holds foreground at all. To a decoder that does not yet
            paint what it is given, a token and its absence say the same, so which side is the
            foreground is settled by chance, and short trainings end with either sign; this term
            settles it. 0 in the paper.
        mask_share: Share of its area from which a token counts as foreground in that term.
        mask_surprise: The term asks 1 - mask_surprise * prior of a foreground token, prior being
            the mean training mask at its place: foreground that is always there (road below)
            ranks behind foreground that is not (a car). Blind to classes. 0 asks 1 of all.
        remat: What the backward pass computes again: "none", "layer" all within a layer, "dots"
            all but its products with parameters.
    """

    pruner: ReconPrunerConfig = ReconPrunerConfig()
    scorer_init: Literal["lecun", "zero"] = "lecun"
    decoder: DecoderConfig = field(default_factory=lambda: DecoderConfig(num_layers=6))
    decoder_rope: bool = True
    alpha: float = 0.5
    ssim_weight: float = 0.2
    ssim_window: int = 11
    fill: Literal["zero", "mean"] = "zero"
    target_pixels: int = TOKEN
    mask_mode: Literal["sign", "top_k"] = "sign"
    keep_range: tuple[float, float] = (0.05, 0.75)
    surrogate: Literal["identity", "sigmoid"] = "identity"
    temperature: float = 0.5
    pixel_weight: float = 1.0
    budget_weight: float = 0.0
    budget: float = 0.5
    mask_weight: float = 0.0
    mask_share: float = 0.05
    mask_surprise: float = 0.0
    remat: Literal["none", "dots", "layer"] = "none"

    def __post_init__(self):
        if self.target_pixels < 1 or TOKEN % self.target_pixels:
            raise UserError(f"target_pixels={self.target_pixels} must divide {TOKEN}.")
        low, high = self.keep_range
        if not 0 < low <= high < 1:
            raise UserError(f"keep_range={self.keep_range} must rise within 0 and 1.")
        for name in ("alpha", "ssim_weight", "budget"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be in [0, 1].")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature} must be positive.")
        choices = {
            "scorer_init": ("lecun", "zero"),
            "fill": ("zero", "mean"),
            "mask_mode": ("sign", "top_k"),
            "surrogate": ("identity", "sigmoid"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} must be {' or '.join(known)}.")
        if self.ssim_weight and (self.ssim_window < 1 or self.ssim_window % 2 == 0):
            raise UserError(f"ssim_window={self.ssim_window} must be odd and positive.")
        if self.scorer_init == "zero" and self.mask_mode == "top_k":
            raise UserError(
                "scorer_init='zero' gives all tokens one score, of which mask_mode='top_k' can "
                "draw no order; take 'sign' or 'lecun'."
            )
        if self.remat not in ("none", *_POLICIES):
            raise UserError(f"remat={self.remat!r} must be one of none, {', '.join(_POLICIES)}.")
        for name in ("pixel_weight", "budget_weight", "mask_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative.")
        if not (self.pixel_weight or self.mask_weight):
            raise UserError(
                "pixel_weight=0 leaves nothing to learn from; give mask_weight as well."
            )
        for name in ("mask_share", "mask_surprise"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be in [0, 1).")

    @property
    def needs_prior(self) -> bool:
        """Whether the loss reads the mean training mask."""
        return bool(self.mask_weight and self.mask_surprise)


class ReconDecoder(nn.Module):
    """Pictures from masked tokens; see `ReconConfig` for the fields.

    Attributes:
        config: Of the layers.
        rope: See `ReconConfig.decoder_rope`.
        target_pixels: Edge of a token in the result.
        remat: See `ReconConfig`.
    """

    config: DecoderConfig
    rope: bool
    target_pixels: int
    remat: str = "none"

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B N D"], grid: tuple[int, int]
    ) -> Float[Array, "B H W 3"]:
        """Reconstructs [B, H, W, 3] in about [0, 1] from tokens [B, N, D], N = rows * columns."""
        config, edge = self.config, self.target_pixels
        x = tokens
        if x.shape[-1] != config.hidden_size:
            x = nn.Dense(config.hidden_size, name="in_proj")(x)
        # Masked tokens are zero, and at zero RMSNorm multiplies gradients by 1 / sqrt(eps) in every
        # layer: where a mask keeps all or nothing they overflowed. From here no place is zero.
        x = x + self.param("start", nn.initializers.normal(1.0), (config.hidden_size,))
        # Left as `in_proj` gives it, split over its hidden units, XLA's partitioner made wrong
        # gradients of it on meshes of three axes (jax 0.10.2, on CPUs; right losses all the same).
        x = constrain(x, "batch", "token", "embed")
        angles = None
        if self.rope:
            angles = mrope_angles(config, grid_position_ids(x.shape[0], grid))
        layer = DecoderLayer
        if self.remat != "none":
            layer = nn.remat(DecoderLayer, policy=_POLICIES[self.remat])
        for number in range(config.num_layers):
            x, _ = layer(config, causal=False, name=f"layer_{number}")(x, angles)
        x = RMSNorm(config.rms_norm_eps, name="norm")(x)
        x = nn.Dense(edge * edge * 3, name="head")(x)
        return unpatchify(x.reshape(*x.shape[:2], edge, edge, 3), grid)


def grid_position_ids(batch: int, grid: tuple[int, int]) -> Int[Array, "3 B N"]:
    """M-RoPE ids of one picture's tokens by themselves: time 0, row, column."""
    rows, columns = jnp.indices(grid)
    ids = jnp.stack([jnp.zeros_like(rows), rows, columns]).reshape(3, 1, -1)
    return jnp.broadcast_to(ids, (3, batch, ids.shape[-1]))


def unpatchify(
    patches: Float[Array, "B N p p 3"], grid: tuple[int, int]
) -> Float[Array, "B H W 3"]:
    """Lays token squares in raster order out as a picture."""
    batch, _, edge = patches.shape[:3]
    picture = patches.reshape(batch, *grid, edge, edge, 3).transpose(0, 1, 3, 2, 4, 5)
    return picture.reshape(batch, grid[0] * edge, grid[1] * edge, 3)


def straight_through(scores: Float[Array, "B N"], mask: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """`S + sg(M - S)`: the value of the mask, the gradient of the scores."""
    return scores + jax.lax.stop_gradient(mask - scores)


def training_mask(
    scores: Float[Array, "B N"], key: jax.Array, config: ReconConfig
) -> Float[Array, "B N"]:
    """The mask {0, 1} of kept tokens, with a gradient to the scores.

    Args:
        scores: S.
        key: Draws the budgets of "top_k".
        config: Mode and surrogate.
    """
    if config.mask_mode == "sign":
        threshold = jnp.zeros((scores.shape[0], 1), scores.dtype)
    else:
        low, high = config.keep_range
        ratio = jax.random.uniform(key, (scores.shape[0], 1), minval=low, maxval=high)
        below = jnp.floor((1 - ratio) * scores.shape[1]).astype(jnp.int32)  # tokens left out
        below = jnp.clip(below, 1, scores.shape[1] - 1)
        order = jnp.argsort(scores, axis=1, descending=True)  # of equals the first, as `top_k`
        rank = jnp.argsort(order, axis=1)
        last = jnp.take_along_axis(order, scores.shape[1] - below, axis=1)
        threshold = jnp.take_along_axis(scores, last, axis=1)  # the best of those left out
    threshold = jax.lax.stop_gradient(threshold)
    kept = scores > threshold if config.mask_mode == "sign" else rank < scores.shape[1] - below
    mask = kept.astype(scores.dtype)
    if config.surrogate == "sigmoid":
        spread = jax.lax.stop_gradient(scores.std(axis=1, keepdims=True)) + 1e-6
        scores = jax.nn.sigmoid((scores - threshold) / (config.temperature * spread))
    return straight_through(scores, mask)


def masked_targets(
    image: UInt8[Array, "B H W 3"], mask: UInt8[Array, "B H W"], config: ReconConfig
) -> tuple[Float[Array, "B h w 3"], Float[Array, "B h w 3"]]:
    """Foreground and background pictures in [0, 1], with the rest filled, at target resolution."""
    pictures = image.astype(jnp.float32) / 255
    inside = mask.astype(jnp.float32)[..., None]
    fill = pictures.mean((1, 2), keepdims=True) if config.fill == "mean" else 0.0
    # Averaged before they are put together: the two targets share these sums.
    fore, whole, share = (shrink(x, config) for x in (inside * pictures, pictures, inside))
    return fore + (1 - share) * fill, whole - fore + share * fill


def init_params(config: ReconConfig, key: jax.Array, grid: tuple[int, int] = (2, 2)) -> Any:
    """Fresh params {"pruner": ..., "decoder": ...}; they do not depend on the grid."""
    pruner_key, decoder_key = jax.random.split(key)
    tokens = jnp.zeros((1, grid[0] * grid[1], config.pruner.layer.hidden_size))
    pruner = ReconPruner(config.pruner).init(pruner_key, tokens, grid_position_ids(1, grid))
    pruner = pruner["params"]
    if config.scorer_init == "zero":
        pruner["scorer"] = jax.tree.map(jnp.zeros_like, pruner["scorer"])
    decoder = _decoder(config).init(decoder_key, tokens, grid)
    return {"pruner": pruner, "decoder": decoder["params"]}


def reconstruct(
    params: Any,
    tokens: Float[Array, "B N D"],
    keep: Float[Array, "B N"],
    grid: tuple[int, int],
    config: ReconConfig,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W 3"]]:
    """Foreground and background pictures from the tokens that `keep` splits.

    Args:
        params: Of `init_params`.
        tokens: V; these are masked, not the pruner's V* (paper, section 3.3).
        keep: M, 1 for the foreground pass and 0 for the background pass.
        grid: Token rows and columns.
        config: Of the training.
    """
    keep = jnp.stack([keep, 1 - keep], axis=1).astype(tokens.dtype)[..., None]  # [B, 2, N, 1]
    # Both halves of a picture stay neighbours, and so on one device.
    halves = (tokens[:, None] * keep).reshape(-1, *tokens.shape[1:])
    pictures = _decoder(config).apply({"params": params["decoder"]}, halves, grid)
    pictures = pictures.reshape(len(tokens), 2, *pictures.shape[1:])
    return pictures[:, 0], pictures[:, 1]


def recon_loss(
    params: Any,
    batch: dict[str, Array],
    key: jax.Array,
    prior: Float[Array, "cameras N"] | None = None,
    *,
    config: ReconConfig,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """`alpha * L_fore + (1 - alpha) * L_back`, each `lambda (1 - SSIM) + (1 - lambda) MSE`.

    With the weights of a config that has them, the terms for masks and budget are added.

    Args:
        params: Of `init_params`.
        batch: tokens [B, N, D]; image uint8 [B, H, W, 3]; mask uint8 {0, 1} [B, H, W]; with
            `config.needs_prior` also camera int32 [B].
        key: Draws budgets.
        prior: Mean training mask; needed if `config.needs_prior`.
        config: Of the training.

    Returns:
        The loss and the metrics loss_fore, loss_back, ssim_fore, ssim_back, mse_fore, mse_back
        and kept (share of tokens in the foreground pass); without ssim_weight no ssim, without
        pixel_weight only kept; loss_mask with mask_weight, loss_budget with budget_weight.
    """
    # The parameters' type is that of the arithmetic; scores and losses are float32 in any case.
    tokens, grid = batch["tokens"].astype(params["pruner"]["query"].dtype), _grid(batch)
    scores = ReconPruner(config.pruner).apply(
        {"params": params["pruner"]}, tokens, grid_position_ids(tokens.shape[0], grid)
    )
    scores = scores.astype(jnp.float32)
    keep = training_mask(scores, key, config)
    if config.needs_prior and prior is None:
        raise ValueError("this config's loss needs the mean training mask")
    loss, metrics = 0.0, {}
    if config.pixel_weight:
        targets = masked_targets(batch["image"], batch["mask"], config)
        pictures = reconstruct(params, tokens, keep, grid, config)
        weights = config.ssim_weight, SsimConfig(window=config.ssim_window)
        fore = reconstruction_loss(pictures[0], targets[0], *weights)
        back = reconstruction_loss(pictures[1], targets[1], *weights)
        loss = config.alpha * fore["loss"] + (1 - config.alpha) * back["loss"]
        loss = config.pixel_weight * loss
        metrics = {f"{name}_fore": value for name, value in fore.items()}
        metrics |= {f"{name}_back": value for name, value in back.items()}
    if config.budget_weight:
        metrics["loss_budget"] = jnp.square(keep.mean() - config.budget)
        loss = loss + config.budget_weight * metrics["loss_budget"]
    if config.mask_weight:
        expected = prior[batch["camera"]] if config.needs_prior else jnp.zeros_like(scores)
        metrics["loss_mask"] = mask_loss(scores, batch["mask"], expected, config)
        loss = loss + config.mask_weight * metrics["loss_mask"]
    return loss, metrics | {"kept": keep.mean()}


def mask_loss(
    scores: Float[Array, "B N"],
    mask: UInt8[Array, "B H W"],
    prior: Float[Array, "B N"],
    config: ReconConfig,
) -> Float[Array, ""]:
    """Cross-entropy between sigmoid(S) and what each token should reach.

    That is 0 for background and `1 - mask_surprise * prior` for a token with foreground.

    Args:
        scores: S.
        mask: True masks.
        prior: Mean training mask at each token's place.
        config: Gives the share that counts and the surprise.
    """
    inside = mask_shares(mask) > config.mask_share
    target = inside * (1 - config.mask_surprise * prior)
    return optax.losses.sigmoid_binary_cross_entropy(scores, target).mean()


def mask_shares(mask: UInt8[Array, "B H W"]) -> Float[Array, "B N"]:
    """Share of each token's area that is foreground."""
    batch, height, width = mask.shape
    squares = mask.astype(jnp.float32).reshape(batch, height // TOKEN, TOKEN, width // TOKEN, TOKEN)
    return squares.mean((2, 4)).reshape(batch, -1)


def _decoder(config: ReconConfig) -> ReconDecoder:
    return ReconDecoder(config.decoder, config.decoder_rope, config.target_pixels, config.remat)


def _grid(batch: dict[str, Array]) -> tuple[int, int]:
    height, width = batch["image"].shape[1:3]
    grid = height // TOKEN, width // TOKEN
    if height % TOKEN or width % TOKEN or grid[0] * grid[1] != batch["tokens"].shape[1]:
        raise ValueError(
            f"{batch['tokens'].shape[1]} tokens do not fit a picture of {height} x {width}"
        )
    return grid


def shrink(pictures: Float[Array, "B H W C"], config: ReconConfig) -> Float[Array, "B h w C"]:
    """Means over the squares that become a pixel; XLA's reduction takes four times as long."""
    factor = TOKEN // config.target_pixels
    if factor == 1:
        return pictures
    batch, height, width, channels = pictures.shape
    rows = pictures.reshape(batch, height // factor, factor, width * channels)
    rows = sum(rows[:, :, i] for i in range(factor))
    columns = rows.reshape(batch, height // factor, width // factor, factor, channels)
    return sum(columns[:, :, :, i] for i in range(factor)) / factor**2
