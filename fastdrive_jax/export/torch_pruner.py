"""ReconPruner in PyTorch: one file to copy into another code base; needs torch 2.4 and safetensors.

    pruner = load_pruner("export/pruner")      # the folder with config.json and model.safetensors
    scores = pruner(tokens)                    # tokens [B, N, D] of B pictures to scores [B, N]
    kept = keep(scores, k)                     # the K best [B, K], in raster order

Each picture is scored by itself. Where several share one budget, their scores go side by side:
`keep(scores.reshape(samples, -1), k)`.

A pruner with `rope` also takes the tokens' row and column ids, `pruner(tokens, ids)` with
ids [3, B, N] (0, row, column of each token in its picture).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"


class TorchPruner(nn.Module):
    """`[Q*, V*] = PrunerLayer([Q, V])`, `S = w^T (V* . Q*)`, with the names of the export."""

    def __init__(self, config: dict):
        """Makes it of `config["pruner"]` of the folder's config.json; weights are still random."""
        super().__init__()
        self.config, self.layer = config, config["layer"]
        size, heads, groups = (self.layer[n] for n in ("hidden_size", "num_heads", "num_kv_heads"))
        self.head = self.layer["head_size"] or size // heads
        bias, inner = self.layer["attention_bias"], self.layer["intermediate_size"]
        self.query = nn.Parameter(torch.zeros(size))
        self.norms = nn.ParameterList(torch.ones(size) for _ in range(2))
        self.q, self.k, self.v = (
            nn.Linear(size, n * self.head, bias=bias) for n in (heads, groups, groups)
        )
        self.o = nn.Linear(heads * self.head, size, bias=False)
        self.gate, self.up = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down, self.scorer = nn.Linear(inner, size, bias=False), nn.Linear(size, 1, bias=False)

    def forward(self, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        """Scores [B, N] of tokens [B, N, D]; more is foreground."""
        eps = self.layer["rms_norm_eps"]
        if self.config["input_norm"]:
            tokens = F.rms_norm(tokens, tokens.shape[-1:], eps=eps)
        x = torch.cat([self.query.expand(tokens.shape[0], 1, -1), tokens], dim=1)
        x = x + self._attend(F.rms_norm(x, x.shape[-1:], self.norms[0], eps), ids)
        y = F.rms_norm(x, x.shape[-1:], self.norms[1], eps)
        tanh = self.layer["activation"] == "gelu_tanh"
        gate = F.gelu(self.gate(y), approximate="tanh") if tanh else F.silu(self.gate(y))
        x = x + self.down(gate * self.up(y))
        return self.scorer(x[:, 1:] * x[:, :1])[..., 0]

    def _attend(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """Full attention of [B, N, D], the query's token first."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        if self.config["rope"]:
            half = self.head // 2
            parts = torch.tensor(self.layer["mrope_section"], device=x.device)
            axis = torch.arange(3, device=x.device).repeat_interleave(parts)
            step = self.layer["rope_theta"] ** (-torch.arange(half, device=x.device) / half)
            angle = F.pad(ids, (1, 0)).movedim(0, -1)[..., axis] * step  # the query stands at 0
            cos, sin = (f(torch.cat([angle, angle], -1))[:, None] for f in (torch.cos, torch.sin))
            q, k = (y * cos + torch.cat([-y[..., half:], y[..., :half]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(self.head))
        return self.o(mixed.transpose(1, 2).flatten(2))


def load_pruner(folder: str | Path) -> TorchPruner:
    """The pruner of an exported folder, in float32; raises if it is damaged or of another kind."""
    folder = Path(folder)
    manifest = json.loads((folder / "config.json").read_text("utf-8"))
    config = manifest["config"]
    if "pruner" not in config or "weights" in config:  # these say what weights were rounded to
        raise ValueError(f"{folder} holds {config['kind']!r}, and no pruner in floating point")
    places = {"layer/input_layernorm": "norms.0", "layer/post_attention_layernorm": "norms.1"}
    places |= {f"layer/self_attn/{n}_proj": n for n in "qkvo"} | {"scorer": "scorer"}
    places |= {f"layer/mlp/{n}_proj": n for n in ("gate", "up", "down")}
    state = {}
    for name, value in load_file(folder / WEIGHTS).items():
        if name == "pruner/query":
            state["query"] = value.float()
        elif name.startswith("pruner/"):
            # Linen's kernels are [in, out], Linear's weights [out, in].
            module, kind = name.removeprefix("pruner/").rsplit("/", 1)
            ending = {"kernel": ".weight", "bias": ".bias", "scale": ""}[kind]
            state[places[module] + ending] = value.float().T if kind == "kernel" else value.float()
    pruner = TorchPruner(config["pruner"])
    pruner.load_state_dict(state)  # raises unless every weight finds its place
    _check_sums(folder, manifest)
    return pruner.eval()


def _check_sums(folder: Path, manifest: dict) -> None:
    own = manifest.pop("sha256", None)
    if own != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise ValueError(f"{folder / 'config.json'} was changed after it was written")
    found = hashlib.sha256()
    with (folder / WEIGHTS).open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    if found.hexdigest() != manifest["files"][WEIGHTS]["sha256"]:
        raise ValueError(f"{folder / WEIGHTS} is damaged: its SHA-256 is not the config's")


def keep(scores: Tensor, k: int) -> Tensor:
    """Indices [B, K] of the K best tokens in raster order.

    Of equal scores the first is kept, and what is no number last. A keep ratio r of N tokens is
    k = max(1, floor(r N)).
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
