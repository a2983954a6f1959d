"""What a model's frame costs by count: live tokens, FLOPs of products, bytes; for any pruner.

One function for all methods, so that nobody's figures rest on a formula of their own. A method
enters it through its cuts alone (`interface.cut_plan`), and with what it computes itself.

A causal layer is counted as the whole square of its scores: so XLA counts a program that holds
them, and so do published figures. What a causal kernel may leave out of it is told beside.
Published "FLOPs" of pruned models are often multiply-adds, half of what is counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import VisionConfig

LAYER_FORMULA = "layer(n) = 2 n (2 D^2 + 2 D G d + 3 D F) + 4 n^2 D"
FORMULA = (
    "prefill: sum over layers of layer(n_l + L) + 2 D V a sample, n_l visual tokens live in layer "
    f"l; {LAYER_FORMULA}, causal or not; decode: sum over layers of "
    "2 (2 D^2 + 2 D G d + 3 D F) + 4 (n_l + L + T) D + 2 D V a token, T slots for decoded tokens; "
    "norms, softmax and rotary angles are not counted"
)


@dataclass(frozen=True)
class Cost:
    """Counts of one frame, of all samples of the batch together where nothing else is said.

    Attributes:
        live: Visual tokens of a sample that each layer computes.
        equivalent_tokens: Their mean: an unpruned model of so many visual tokens has the same
            products with weights.
        prefill_flops: Of the prompt, with logits of its last row.
        masked_flops: Those of them above the diagonal, which a causal kernel may leave out.
        decode_flops: Of one decode step, which gives each sample a token.
        method_flops: What the method itself computes.
        weight_bytes: Read by each pass through the decoder: its layers, final norm and head. Of
            the embedding table a pass reads single rows only, unless it is the head as well.
        kv_bytes: Of all caches, with the slots of tokens yet to be decoded.
    """

    live: tuple[int, ...]
    equivalent_tokens: float
    prefill_flops: float
    masked_flops: float
    decode_flops: float
    method_flops: float
    weight_bytes: int
    kv_bytes: int

    @property
    def decode_bytes(self) -> int:
        """Least memory traffic of a decode step, which bounds its time at small batches."""
        return self.weight_bytes + self.kv_bytes


def frame_cost(
    config: DecoderConfig,
    n: int,
    text: int,
    plan: Sequence[tuple[int, int]] = (),
    *,
    decode_steps: int,
    batch: int = 1,
    parameter_bytes: int = 2,
    activation_bytes: int = 2,
    method_flops: float = 0.0,
    reuse: bool = False,
) -> Cost:
    """Counts of one frame, see `FORMULA`.

    Args:
        config: Of the language model.
        n: N, visual tokens of a sample before all cuts.
        text: Text tokens of a sample; no method drops any.
        plan: (layer, K) of each cut, of `interface.cut_plan`; () prunes nothing.
        decode_steps: Tokens that the caches have room for behind the prompt.
        batch: Samples.
        parameter_bytes: Of one parameter.
        activation_bytes: Of one number in a cache.
        method_flops: What the method itself computes for a sample, such as `recon_pruner_flops`.
        reuse: The method is one with `Pruner.reuse`, in a frame that has one before: all layers see
            and hold N visual tokens. What is masked is then told for rows spread evenly.
    """
    width, layers = config.hidden_size, config.num_layers
    live = live_tokens(plan, n, layers)
    prompts = [tokens + text for tokens in live]
    seen = [n + text] * layers if reuse else prompts
    slots = [keys + decode_steps for keys in seen]
    head = width * config.vocab_size
    pairs = list(zip(prompts, seen, strict=True))
    prefill = sum(layer_flops(config, *pair) for pair in pairs) + 2 * head
    queries = config.num_heads * config.head_dim
    masked = sum(2 * prompt * (keys - 1) * queries for prompt, keys in pairs)
    keys = config.num_kv_heads * config.head_dim
    decode = 2 * (layers * layer_products(config) + head) + 4 * sum(slots) * queries
    biases = queries + 2 * keys if config.attention_bias else 0
    one_layer = layer_products(config) + biases + 2 * width  # two norms
    return Cost(
        live=live,
        equivalent_tokens=sum(live) / layers,
        prefill_flops=batch * prefill,
        masked_flops=batch * masked,
        decode_flops=batch * decode,
        method_flops=batch * method_flops,
        weight_bytes=parameter_bytes * (layers * one_layer + width + head),
        kv_bytes=activation_bytes * batch * 2 * keys * sum(slots),
    )


def live_tokens(plan: Sequence[tuple[int, int]], n: int, num_layers: int) -> tuple[int, ...]:
    """Visual tokens of each layer under (layer, K) cuts."""
    return tuple(
        min([n, *(k for start, k in plan if start <= layer)]) for layer in range(num_layers)
    )


def layer_products(config: DecoderConfig) -> int:
    """Weights of a decoder layer's products, biases and norms left out."""
    width = config.hidden_size
    queries, keys = (heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads))
    return 2 * width * (queries + keys) + 3 * width * config.intermediate_size


def layer_flops(config: DecoderConfig, count: int, keys: int | None = None) -> int:
    """Forward FLOPs of one decoder layer over `count` tokens that see `keys`; None: each other."""
    keys = count if keys is None else keys
    queries = config.num_heads * config.head_dim
    return 2 * count * layer_products(config) + 4 * count * keys * queries


def recon_pruner_flops(layer: DecoderConfig, n: int) -> int:
    """FLOPs of ReconPruner for one sample: its layer over query and tokens, and the scorer."""
    return layer_flops(layer, n + 1) + 2 * n * layer.hidden_size


def encoder_flops(config: VisionConfig, size: tuple[int, int]) -> float:
    """Forward FLOPs of the vision encoder for one picture."""
    patches = size[0] * size[1] // config.patch_size**2
    tokens = patches // config.spatial_merge_size**2
    width = config.hidden_size
    pixels = 3 * config.temporal_patch_size * config.patch_size**2
    weights = pixels * width + config.depth * width * (4 * width + 3 * config.intermediate_size)
    whole = len(config.fullatt_block_indexes)
    window = (config.window_size // config.patch_size) ** 2
    spans = whole * patches + (config.depth - whole) * min(window, patches)
    merged = width * config.spatial_merge_size**2
    merger = 2 * tokens * merged * (merged + config.out_hidden_size)
    return 2 * patches * weights + 4 * patches * spans * width + merger
