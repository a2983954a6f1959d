"""ReconPruner's training step in plain PyTorch: the same modules, losses and optimizer.

What `experiments.bench_train` times ours beside, and what `tests/parity` compares ours with. Each
function is the counterpart of one in `fastdrive_jax.training`, written as one would in PyTorch:
fused attention, separable depthwise convolutions in SSIM, fused AdamW. Modules carry the names of
our params, so weights go over by name.
"""

import math
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.losses import SsimConfig
from fastdrive_jax.training.optimizer import OptimizerConfig
from fastdrive_jax.training.reconstruction import TOKEN, ReconConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Full grouped-query attention."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * size)
        self.k_proj = nn.Linear(width, config.num_kv_heads * size)
        self.v_proj = nn.Linear(width, config.num_kv_heads * size)
        self.o_proj = nn.Linear(config.num_heads * size, width, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, N, D] to the same."""
        batch, count, _ = x.shape
        query, key, value = (
            project(x).view(batch, count, -1, self.config.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            query, key = _rotate(query, *angles), _rotate(key, *angles)
        # Repeated as transformers does: on a CPU `enable_gqa` leaves the fused kernel.
        share = self.config.num_heads // self.config.num_kv_heads
        key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.o_proj(out.transpose(1, 2).reshape(batch, count, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """transformers' Qwen2_5_VLDecoderLayer without its causal mask."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, N, D] to the same."""
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Pruner(nn.Module):
    """Scores [B, N] of tokens [B, N, D]."""

    def __init__(self, config: ReconPrunerConfig):
        super().__init__()
        self.config = config
        width = config.layer.hidden_size
        self.query = nn.Parameter(torch.zeros(width))
        self.layer = DecoderLayer(config.layer)
        self.scorer = nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """S."""
        config = self.config
        if config.input_norm:
            square = tokens.square().mean(-1, keepdim=True)
            tokens = tokens / torch.sqrt(square + config.layer.rms_norm_eps)
        angles = None
        if config.rope:
            ids = F.pad(_grid_ids(grid), (1, 0))
            angles = _angles(config.layer, ids)
        query = self.query.expand(len(tokens), 1, -1)
        mixed = self.layer(torch.cat([query, tokens], 1), angles)
        return self.scorer(mixed[:, 1:] * mixed[:, :1])[..., 0]


class Decoder(nn.Module):
    """Pictures [B, H, W, 3] of masked tokens [B, N, D]."""

    def __init__(self, config: ReconConfig):
        super().__init__()
        self.config = config
        layer, width = config.decoder, config.pruner.layer.hidden_size
        if width != layer.hidden_size:
            self.in_proj = nn.Linear(width, layer.hidden_size)
        self.start = nn.Parameter(torch.zeros(layer.hidden_size))
        for number in range(layer.num_layers):
            self.add_module(f"layer_{number}", DecoderLayer(layer))
        self.norm = RMSNorm(layer.hidden_size, layer.rms_norm_eps)
        self.head = nn.Linear(layer.hidden_size, 3 * config.target_pixels**2)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The picture, in about [0, 1]."""
        layer, edge = self.config.decoder, self.config.target_pixels
        x = tokens
        if hasattr(self, "in_proj"):
            x = self.in_proj(x)
        x = x + self.start
        angles = _angles(layer, _grid_ids(grid)) if self.config.decoder_rope else None
        for number in range(layer.num_layers):
            x = self.get_submodule(f"layer_{number}")(x, angles)
        x = self.head(self.norm(x)).view(-1, *grid, edge, edge, 3)
        return x.transpose(2, 3).reshape(-1, grid[0] * edge, grid[1] * edge, 3)


class TorchRecon(nn.Module):
    """The loss of `recon_loss`, which see."""

    def __init__(self, config: ReconConfig):
        super().__init__()
        self.config = config
        self.pruner, self.decoder = Pruner(config.pruner), Decoder(config)

    def forward(
        self, batch: dict[str, Tensor], ratio: Tensor | None, prior: Tensor | None = None
    ) -> Tensor:
        """The scalar loss.

        Args:
            batch: tokens, image and mask, with `config.needs_prior` also camera.
            ratio: Drawn keep ratios [B, 1] of the mask mode "top_k".
            prior: Mean training mask, if the config needs it.
        """
        config, tokens = self.config, batch["tokens"]
        grid = tuple(side // TOKEN for side in batch["image"].shape[1:3])
        scores = self.pruner(tokens, grid)
        keep = _keep(scores, ratio, config)[..., None]
        halves = torch.cat([tokens * keep, tokens * (1 - keep)])
        pictures = self.decoder(halves, grid).chunk(2)
        losses = [
            _half(picture, target, config)
            for picture, target in zip(
                pictures, _targets(batch["image"], batch["mask"], config), strict=True
            )
        ]
        loss = config.alpha * losses[0] + (1 - config.alpha) * losses[1]
        if config.mask_weight:
            squares = batch["mask"].float().view(-1, grid[0], TOKEN, grid[1], TOKEN)
            inside = squares.mean((2, 4)).view_as(scores) > config.mask_share
            asked = inside.float()
            if config.needs_prior:
                asked = asked * (1 - config.mask_surprise * prior[batch["camera"]])
            entropy = F.binary_cross_entropy_with_logits(scores, asked)
            loss = loss + config.mask_weight * entropy
        return loss


def _keep(scores: Tensor, ratio: Tensor | None, config: ReconConfig) -> Tensor:
    count = scores.shape[1]
    if config.mask_mode == "sign":
        threshold = torch.zeros(len(scores), 1)
    else:
        below = ((1 - ratio) * count).floor().long().clamp(1, count - 1)
        threshold = scores.detach().sort(1).values.gather(1, below - 1)
    mask = (scores > threshold).float()
    if config.surrogate == "sigmoid":
        spread = scores.detach().std(1, correction=0, keepdim=True) + 1e-6
        scores = torch.sigmoid((scores - threshold) / (config.temperature * spread))
    return scores + (mask - scores).detach()


def _targets(image: Tensor, mask: Tensor, config: ReconConfig) -> tuple[Tensor, Tensor]:
    pictures, inside = image.float() / 255, mask.float()[..., None]
    fill = pictures.mean((1, 2), keepdim=True) if config.fill == "mean" else 0.0
    fore = inside * pictures + (1 - inside) * fill
    back = (1 - inside) * pictures + inside * fill
    factor = TOKEN // config.target_pixels
    if factor == 1:
        return fore, back
    batch, height, width, _ = image.shape
    shape = (batch, height // factor, factor, width // factor, factor, 3)
    return fore.view(shape).mean((2, 4)), back.view(shape).mean((2, 4))


def _half(prediction: Tensor, target: Tensor, config: ReconConfig) -> Tensor:
    error = F.mse_loss(prediction, target)
    if not config.ssim_weight:
        return error
    similarity = ssim(prediction, target, SsimConfig(window=config.ssim_window)).mean()
    return config.ssim_weight * (1 - similarity) + (1 - config.ssim_weight) * error


def ssim(prediction: Tensor, target: Tensor, config: SsimConfig) -> Tensor:
    """Structural similarity [B] of pictures [B, H, W, 3]; see `losses.ssim`."""
    offsets = torch.arange(config.window) - config.window // 2
    window = torch.exp(-0.5 * (offsets / config.sigma) ** 2)
    window = (window / window.sum()).expand(3, 1, -1)

    def blur(x):
        return F.conv2d(F.conv2d(x, window[..., None], groups=3), window[:, :, None], groups=3)

    x, y = (picture.permute(0, 3, 1, 2).contiguous() for picture in (prediction, target))
    mean_x, mean_y = blur(x), blur(y)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    variances, covariance = blur(x.square() + y.square()) - squares, blur(x * y) - product
    c1, c2 = (config.k1 * config.data_range) ** 2, (config.k2 * config.data_range) ** 2
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return similarity.flatten(1).mean(1)


def _grid_ids(grid: tuple[int, int]) -> Tensor:
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns]).view(3, -1)


def _angles(config: DecoderConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    half = config.head_dim // 2
    inverse = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    axis = torch.arange(3).repeat_interleave(torch.tensor(config.mrope_section))
    angles = (ids.T[:, axis] * inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class TorchStep:
    """The counterpart of `make_train_step`: loss, backward, clipping, AdamW.

    Attributes:
        model: What is trained.
    """

    def __init__(self, model: TorchRecon, config: OptimizerConfig):
        self.model, self._config, self._step = model, config, 0
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = config.beta1, config.beta2
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=betas, fused=True
        )

    def __call__(
        self, batch: dict[str, Tensor], ratio: Tensor | None, prior: Tensor | None = None
    ) -> Tensor:
        """One update; returns the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = _learning_rate(self._config, self._step)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.model(batch, ratio, prior)
        loss.backward()
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.clip_norm)
        self._optimizer.step()
        self._step += 1
        return loss.detach()


def _learning_rate(config: OptimizerConfig, step: int) -> float:
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak / (warmup + 1) + (peak - peak / (warmup + 1)) * step / warmup
    if config.schedule == "constant":
        return peak
    done = min((step - warmup) / (config.total_steps - warmup), 1.0)
    end = config.end_factor
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * done)))


def load_params(model: TorchRecon, params: Any) -> None:
    """Copies our params into the model.

    Raises:
        RuntimeError: A name of either side is missing on the other.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    tensors = {}
    for path, leaf in flat:
        *names, last = (entry.key for entry in path)
        value = np.array(leaf)
        if last == "kernel":
            value = np.ascontiguousarray(value.T)
        last = "weight" if last in ("kernel", "scale") else last
        tensors[".".join([*names, last])] = torch.from_numpy(value)
    model.load_state_dict(tensors, strict=True)


def to_params(model: TorchRecon, like: Any, gradients: bool = False) -> Any:
    """The model's parameters, or their gradients, as a tree like our params."""
    named = dict(model.named_parameters())

    def take(path, leaf):
        *names, last = (entry.key for entry in path)
        tensor = named[".".join([*names, "weight" if last in ("kernel", "scale") else last])]
        value = (tensor.grad if gradients else tensor.detach()).numpy()
        value = value.T if last == "kernel" else value
        if value.shape != leaf.shape:
            raise ValueError(f"{path} has shape {value.shape}, ours {leaf.shape}")
        return np.array(value)

    return jax.tree_util.tree_map_with_path(take, like)
