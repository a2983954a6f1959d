"""Train ReconPruner from pictures by the frozen encoder of a Qwen2.5-VL checkpoint.

    fastdrive train-pictures --shards SHARDS --checkpoint DIR --out runs/fastdrivevla_3b

SHARDS holds nuScenes-FG (`fastdrive data build`), DIR a checkpoint in the Hugging Face layout. On
several hosts call `jax.distributed.initialize` before `train_pictures`, on each of them. A run that
was stopped goes on, with other devices and hosts too. Writes OUT/checkpoints, OUT/metrics.jsonl
and, in the end, OUT/export.
"""

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from data_pipelines.loader import make_loader
from data_pipelines.shards import open_shards
from experiments.configs.pictures import FASTDRIVEVLA_3B, PictureRun
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export.bundle import write_bundle
from fastdrive_jax.models.attention import attention_kernel
from fastdrive_jax.models.qwen2_5_vl.checkpoint import load
from fastdrive_jax.parallel.mesh import batch_parts, make_mesh
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.loop import FitResult, fit
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.picture_loss import picture_loss
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import init_train_state, make_train_step
from fastdrive_jax.training.watch import WatchConfig

# What may change when a run goes on: it does not change what is trained on.
MAY_CHANGE = (
    "data",
    "fsdp",
    "tensor",
    "checkpoint_every",
    "log_every",
    "loader.num_workers",
    "loader.read_threads",
)


@dataclass(frozen=True)
class TrainPicturesConfig:
    """Train ReconPruner on pictures and masks.

    Attributes:
        shards: Folder of the shards; its split train is read.
        checkpoint: Folder of a Qwen2.5-VL whose vision encoder makes the tokens.
        out: Run folder; a run found there is resumed.
        run: The training.
        watch: What is measured and kept beside the metrics.
        skip_bad: How many damaged samples of the shards are left out, each named.
        quiet: No progress bars.
    """

    shards: Path
    checkpoint: Path
    out: Path
    run: PictureRun = FASTDRIVEVLA_3B
    watch: WatchConfig = field(default_factory=WatchConfig)
    skip_bad: int = 0
    quiet: bool = False


def train_pictures(config: TrainPicturesConfig) -> FitResult:
    """Trains, or goes on, and exports.

    Raises:
        UserError: Shards, checkpoint, sizes or devices do not fit each other.
    """
    run = config.run
    mesh = make_mesh(run.data, run.fsdp, run.tensor)
    parts, hosts = batch_parts(mesh), jax.process_count()
    if run.batch_size % (parts * run.accumulate) or run.batch_size % hosts:
        raise UserError(
            f"batch_size={run.batch_size} must be a multiple of {parts} parts of the mesh times "
            f"accumulate={run.accumulate}, and of {hosts} hosts."
        )
    shards = open_shards(config.shards, skip_bad=config.skip_bad)
    if "train" not in shards.samples:
        raise UserError(f"{config.shards} has no split train; write shards that have one.")
    dtype = jnp.dtype(run.dtype)
    model, params = load(config.checkpoint, mesh, dtype, not config.quiet, parts=("visual",))
    if model.vision != run.encoder:
        raise UserError(
            f"The encoder of {config.checkpoint} has other sizes than run.encoder: {model.vision}; "
            "choose the run of that model."
        )
    loader = replace(run.loader, batch_size=run.batch_size // hosts, seed=run.seed)
    batches = iter(make_loader(shards, "train", loader, jax.process_index(), hosts))
    optimizer = make_optimizer(run.optimizer)
    init = functools.partial(
        init_train_state, functools.partial(init_params, run.recon), optimizer, run.seed
    )
    loss = functools.partial(picture_loss, config=run.recon, encoder=run.encoder, dtype=dtype)
    kernel = attention_kernel(dtype, run.recon.decoder.head_dim)
    print(f"attention: {kernel}; {run.dtype}; mesh {dict(mesh.shape)}; {hosts} hosts", flush=True)
    with jax.set_mesh(mesh):
        result = fit(
            config.out,
            run,
            init,
            make_train_step(loss, optimizer, accumulate=run.accumulate),
            batches,
            run.optimizer.total_steps,
            frozen={"encoder": params["visual"]},
            mesh=mesh,
            state_shardings=tree_shardings(jax.eval_shape(init), mesh),
            checkpoint_every=run.checkpoint_every,
            log_every=run.log_every,
            watch=config.watch,
            ignore=MAY_CHANGE,
            name="pruner",
            quiet=config.quiet,
        )
    described = {"kind": "pruner", "pruner": to_plain(run.recon.pruner)}
    write_bundle(config.out / "export", {"pruner": result.state.params["pruner"]}, described)
    return result
