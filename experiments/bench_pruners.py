"""What each pruner costs itself, as a share of the prefill that it makes shorter, in one run.

    fastdrive bench-pruners --out runs/bench_pruners

Sizes are those of Qwen2.5-VL-3B at 3,249 visual tokens, 812 kept; weights and tokens are random.
The prefill is that of an unpruned prompt with 256 text tokens: one decoder layer is timed and
multiplied by 36, embedding and head are left out; `--whole` times all layers, which takes an
accelerator. float32 on a CPU, bfloat16 elsewhere.

A method's overhead is one compiled program: the evidence that it declares, made of given queries
and keys of the language model or the vision encoder, the choice of tokens at each of its cuts, and
what it remembers of a frame. Left out are the projections to queries and keys, which the model
computes anyway (but twice, where a method reads the rows of the layer that it stands before), and
a temporal method's rows of decoded tokens. What it saves is told beside, by count.

On 2 cores `--batch 1 --repeats 2` takes a few minutes; the default is for an accelerator.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.drives import check_labels
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import point, write_rows
from fastdrive_jax.models.attention_rows import attention_received, attention_rows
from fastdrive_jax.models.decoder import Decoder
from fastdrive_jax.models.decoder_config import DecoderConfig
from fastdrive_jax.models.qwen2_5_vl.config import QWEN2_5_VL_3B
from fastdrive_jax.models.qwen2_5_vl.vision_evidence import token_evidence
from fastdrive_jax.pruning import PRUNERS, Pruner, PrunerInputs, builds_on_recon, make_pruner
from fastdrive_jax.pruning.accounting import FORMULA, frame_cost
from fastdrive_jax.pruning.interface import ATTENTION, VISION, Seen, cut_plan, keep_tokens
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

TOWER = QWEN2_5_VL_3B.vision
TEXT = 256  # tokens of the prompt beside the picture
PIXELS = 3 * 14**2  # of a token, for methods that compare frames
UNIT = 256  # the width is a whole number of these, so that M-RoPE's sections are whole too


@dataclass(frozen=True)
class BenchPrunersArgs:
    """Time each pruner and compare it with the prefill of a 3B model.

    Attributes:
        out: Folder for pruners.json.
        methods: Names, or FILE.py:FUNCTION; by default all methods of the library.
        batch: Batch sizes.
        n: Visual tokens N per sample.
        dim: Token width D; values other than 2,048 scale the widths of the whole decoder.
        k: Tokens kept.
        repeats: Timed rounds after a warm-up round; prefill and methods take turns.
        whole: Time all decoder layers instead of one.
    """

    out: Path = Path("runs/bench_pruners")
    methods: tuple[str, ...] = tuple(PRUNERS)
    batch: tuple[int, ...] = (1, 8)
    n: int = 3249
    dim: int = QWEN2_5_VL_3B.text.hidden_size
    k: int = 812
    repeats: int = 5
    whole: bool = False

    def __post_init__(self):
        check_labels(self.methods)
        for name in self.methods:
            builds_on_recon(name)  # says what there is
        if not self.batch or min(*self.batch, self.repeats) < 1:
            raise UserError(f"batch={self.batch} and repeats={self.repeats} must be at least 1.")
        if not 1 <= self.k < self.n:
            raise UserError(f"k={self.k} must be at least 1 and below n={self.n}.")
        if self.dim < UNIT or self.dim % UNIT:
            raise UserError(f"dim={self.dim} must be a multiple of {UNIT}.")

    @property
    def keep_ratio(self) -> float:
        """A ratio of which K follows for methods that round down as for those that round."""
        return math.nextafter(self.k / self.n, 1)


class Rows(flax.struct.PyTreeNode):
    """Queries and keys of one layer, from which evidence is made."""

    query: Float[Array, "B S Q d"]
    key: Float[Array, "B S G d"]


class Cut(flax.struct.PyTreeNode):
    """What a method finds at one of its cuts.

    Attributes:
        inputs: With all that it declares; evidence is made anew.
        model: Visual tokens, then text.
        vision: Patches, those of a token together.
    """

    inputs: PrunerInputs
    model: Rows | None = None
    vision: Rows | None = None


def bench_pruners(args: BenchPrunersArgs) -> Path:
    """Measures, prints and writes the figures; returns their path."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config = scaled_config(args.dim)
    layers = config.num_layers if args.whole else 1
    methods = {name: method(name, config) for name in args.methods}
    plans = {
        name: cut_plan(pruner, args.n, args.keep_ratio, config.num_layers)
        for name, pruner in methods.items()
    }
    rows = []

    def add(name, ratio, metric, value, unit="", n=args.repeats):
        rows.append(point(name, ratio, metric, value, n=n, seed=0, unit=unit))

    for name, plan in plans.items():
        left, whole = (
            frame_cost(
                config, args.n, TEXT, cuts, decode_steps=0, reuse=methods[name].reuse
            ).prefill_flops
            for cuts in (plan, ())
        )
        add(name, args.k / args.n, "prefill_flops_share", left / whole, n=1)
    for batch in args.batch:
        programs = {"prefill": prefill_program(config, layers, batch, args.n, dtype)}
        for name, pruner in methods.items():
            programs[name] = method_program(
                pruner, plans[name], builds_on_recon(name), config, batch, args.n, dtype
            )
        spent = interleaved(programs, args.repeats)
        prefill = spent.pop("prefill") * config.num_layers / layers
        add("unpruned", 1.0, f"prefill_batch_{batch}_ms", prefill, "ms")
        print(f"batch {batch}: prefill {prefill:.1f} ms", flush=True)
        for name, value in spent.items():
            ratio, share = args.k / args.n, value / prefill
            add(name, ratio, f"overhead_batch_{batch}_ms", value, "ms")
            add(name, ratio, f"overhead_batch_{batch}_share", share)
            print(f"batch {batch}, {name}: {value:.2f} ms, {share:.2%} of it", flush=True)
    meta = {
        "device": str(jax.devices()[0]),
        "dtype": jnp.dtype(dtype).name,
        "decoder": asdict(config),
        "visual_tokens": args.n,
        "text_tokens": TEXT,
        "kept": args.k,
        "layers_timed": layers,
        "prefill_flops": FORMULA,
    }
    return write_rows(args.out / "pruners.json", rows, meta)


def scaled_config(dim: int) -> DecoderConfig:
    """The 3B model's decoder with all widths scaled to D."""
    full = QWEN2_5_VL_3B.text
    temporal, row, column = (size * dim // full.hidden_size for size in full.mrope_section)
    return replace(
        full,
        hidden_size=dim,
        intermediate_size=full.intermediate_size * dim // full.hidden_size,
        mrope_section=(temporal, row, column),
    )


def interleaved(programs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds over rounds in which all take turns in any order; the first warms up."""
    spent: dict[str, list[float]] = {name: [] for name in programs}
    rng, names = np.random.default_rng(0), list(programs)
    for number in range(repeats + 1):
        rng.shuffle(names)  # what ran before leaves caches and threads behind
        for name in names:
            begin = time.perf_counter()
            jax.block_until_ready(programs[name]())
            if number:
                spent[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(times)) for name, times in spent.items()}


def prefill_program(
    config: DecoderConfig, layers: int, batch: int, n: int, dtype: jnp.dtype
) -> Callable[[], Array]:
    """The first `layers` decoder layers over an unpruned prompt."""
    model = Decoder(replace(config, num_layers=layers))
    x = jax.random.normal(jax.random.key(0), (batch, n + TEXT, config.hidden_size), dtype)
    positions = jnp.broadcast_to(jnp.arange(n + TEXT), (3, batch, n + TEXT))
    variables = _initialised(model, dtype, x[:, :1], positions[..., :1])

    @jax.jit
    def run(variables, x):
        return model.apply(variables, x, positions, (0, layers), method="span")[0]

    return lambda: run(variables, x)


def method(name: str, config: DecoderConfig) -> Pruner:
    """The method called `name`; ReconPruner's layer is one of the decoder's size."""
    settings = {"config": ReconPrunerConfig(config)} if builds_on_recon(name) else {}
    return make_pruner(name, **settings)


def random_pruner_params(
    pruner: Pruner,
    on_recon: bool,
    config: DecoderConfig,
    tokens: tuple[int, int],
    dtype: jnp.dtype,
) -> Any:
    """What training would have given a method; None where it gives nothing.

    Args:
        pruner: Of `method`.
        on_recon: Whether its params are a ReconPruner's.
        config: Of the language model.
        tokens: Cameras, and visual tokens of each.
        dtype: Of the params.
    """
    if on_recon:
        tokens = jnp.zeros((1, 1, config.hidden_size), dtype)
        return _initialised(ReconPruner(ReconPrunerConfig(config)), dtype, tokens)["params"]
    if pruner.name == "prior":
        return jax.random.uniform(jax.random.key(0), tokens)
    return None


def method_program(
    pruner: Pruner,
    plan: tuple[tuple[int, int], ...],
    on_recon: bool,
    config: DecoderConfig,
    batch: int,
    n: int,
    dtype: jnp.dtype,
) -> Callable[[], Any]:
    """All that a method adds to a frame; `on_recon`: its params are a ReconPruner's."""
    found = [n, *(k for _, k in plan[:-1])]
    cuts = [example_cut(pruner, config, batch, found[: i + 1], dtype) for i in range(len(found))]
    params = random_pruner_params(pruner, on_recon, config, (1, n), dtype)
    seen = Seen(
        action=jax.random.uniform(jax.random.key(0), (batch, n)),
        kept=jnp.arange(n) < jnp.full((batch, 1), plan[-1][1]),
        pixels=jnp.zeros((batch, n, PIXELS)),
        text=jax.random.uniform(jax.random.key(0), (batch, n)),
    )

    @jax.jit
    def run(params, cuts, seen, key):
        kept = [
            keep_tokens(pruner, params, with_evidence(pruner, cut), k, key)
            for cut, (_, k) in zip(cuts, plan, strict=True)
        ]
        if pruner.temporal is None:
            return kept
        return kept, pruner.temporal.observe(cuts[0].inputs.state, seen)

    return lambda: run(params, cuts, seen, jax.random.key(0))


def example_cut(
    pruner: Pruner, config: DecoderConfig, batch: int, found: list[int], dtype: jnp.dtype
) -> Cut:
    """A method's cut, with queries and keys if it reads evidence made of them."""
    inputs = example_inputs(pruner, config, batch, found, dtype)
    model = vision = None
    if pruner.needs & ATTENTION:
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        model = _rows(batch, found[-1] + TEXT, *heads, dtype)
    if pruner.needs & VISION:
        heads = TOWER.num_heads, TOWER.num_heads, TOWER.hidden_size // TOWER.num_heads
        vision = _rows(batch, TOWER.spatial_merge_size**2 * found[-1], *heads, dtype)
    return Cut(inputs, model, vision)


def example_inputs(
    pruner: Pruner, config: DecoderConfig, batch: int, found: list[int], dtype: jnp.dtype
) -> PrunerInputs:
    """Random inputs with every field that `pruner` declares.

    Args:
        pruner: A method.
        config: Of the language model.
        batch: B.
        found: Visual tokens that each of its cuts finds, up to this one.
        dtype: Of what is no share.
    """
    whole, n = found[0], found[-1]
    rng = np.random.default_rng(len(found))

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((batch, *shape), np.float32), dtype)

    def share(*shape):
        return jnp.asarray(rng.random((batch, *shape), np.float32))

    dim, heads = config.hidden_size, config.num_heads
    draw = {
        "tokens": lambda: normal(n, dim),
        "position_ids": lambda: jnp.broadcast_to(jnp.arange(n), (3, batch, n)),
        "text": lambda: normal(TEXT, dim),
        "text_valid": lambda: jnp.ones((batch, TEXT), bool),
        "foreground": lambda: share(n),
        "relevance": lambda: normal(n),
        "camera": lambda: jnp.zeros((batch, 1), jnp.int32),
        "grid": lambda: _grid(whole),
        "embeddings": lambda: normal(n, dim),
        "last_row": lambda: share(heads, n),
        "text_rows": lambda: share(heads, TEXT, n),
        "received": lambda: share(n),
        "vision_received": lambda: share(n),
        "vision_keys": lambda: normal(n, TOWER.hidden_size // TOWER.num_heads),
        "pixels": lambda: share(n, PIXELS),
    }
    asked = {"tokens", *pruner.needs} - {"state", "key"}
    if asked & {"text", "text_rows"}:
        asked |= {"text_valid"}  # policies always say which text is instruction
    fields = {need: draw[need]() for need in asked}
    if n < whole:
        order = np.argsort(rng.random((batch, whole)), axis=1)[:, :n]
        fields["ids"] = jnp.asarray(np.sort(order, axis=1), jnp.int32)
    inputs = PrunerInputs(**fields, cut=len(found) - 1)
    if pruner.temporal is None:
        return inputs
    first = inputs if n == whole else example_inputs(pruner, config, batch, [whole], dtype)
    return inputs.replace(state=pruner.temporal.init(first))


def with_evidence(pruner: Pruner, cut: Cut) -> PrunerInputs:
    """The inputs with what the method reads of attention made of queries and keys."""
    inputs, n = cut.inputs, cut.inputs.tokens.shape[1]
    batch = len(inputs.tokens)

    def last_row():
        return attention_rows(cut.model.query[:, -1:], cut.model.key)[:, :, 0, :n]

    def text_rows():
        seen = jnp.broadcast_to(n + 1 + jnp.arange(TEXT), (batch, TEXT))
        return attention_rows(cut.model.query[:, n:], cut.model.key, seen)[..., :n]

    def received():
        return attention_received(cut.model.query, cut.model.key, causal=True)[:, :n]

    def vision():
        return token_evidence(cut.vision.query, cut.vision.key, TOWER.spatial_merge_size**2)

    make = {
        "last_row": last_row,
        "text_rows": text_rows,
        "received": received,
        "vision_received": lambda: vision().received,
        "vision_keys": lambda: vision().keys,
    }
    return inputs.replace(**{need: make[need]() for need in pruner.needs & set(make)})


def _rows(batch, count, heads, groups, size, dtype) -> Rows:
    keys = jax.random.split(jax.random.key(0))
    return Rows(
        jax.random.normal(keys[0], (batch, count, heads, size), dtype),
        jax.random.normal(keys[1], (batch, count, groups, size), dtype),
    )


def _initialised(module, dtype, *inputs):
    """Random variables; cast where they are made, so that a large model exists once."""

    @jax.jit
    def init(key, *inputs):
        return jax.tree.map(lambda leaf: leaf.astype(dtype), module.init(key, *inputs))

    return init(jax.random.key(0), *inputs)


def _grid(n: int) -> tuple[int, int]:
    """The squarest grid of N tokens."""
    rows = next(rows for rows in range(math.isqrt(n), 0, -1) if n % rows == 0)
    return rows, n // rows
