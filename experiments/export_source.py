"""What `fastdrive export` is made from: a bundle, or the folder of a run.

A run folder is one of `train-pruner` or of the quick start; its exported bundle is taken if there
is one, and else its best or newest checkpoint. What the folder says of the training goes along for
the model card.
"""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from data_pipelines.shards import shards_digest
from experiments.configs.pruner import PrunerRun
from experiments.encoders import frozen_vla, qwen_digest
from fastdrive_jax.configs import from_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.evaluation.results import Row, read_rows
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export.bundle import read_bundle_safetensors
from fastdrive_jax.export.driving import KIND as POLICY
from fastdrive_jax.export.pruner import read_pruner
from fastdrive_jax.files import read_json
from fastdrive_jax.inference.pruned_qwen import PrunedQwen
from fastdrive_jax.models.qwen2_5_vl.bundled import FRONT, load_vla, saved_cameras
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.parallel.mesh import make_mesh, replicated_sharding
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.training.best import Best
from fastdrive_jax.training.checkpoints import RunCheckpoints
from fastdrive_jax.training.optimizer import make_optimizer
from fastdrive_jax.training.reconstruction import init_params
from fastdrive_jax.training.state import abstract_state, evaluation_params, init_train_state

EXPORT = "export"  # where a run keeps its bundle
NESTED = "pruner"  # where the quick start keeps its training


@dataclass(frozen=True)
class Facts:
    """What a run folder says of itself; None and () where it does not.

    Attributes:
        training: Setting of the pruner's training, as `config.json` has it.
        encoder: Digest of the frozen encoder whose tokens were trained on.
        data_digest: Of the shards that were trained on.
        data: Manifest of those shards, with "path".
        results: File that the figures are from.
        rows: The figures.
        step: Of the exported parameters.
    """

    training: dict[str, Any] | None = None
    encoder: str | None = None
    data_digest: str | None = None
    data: dict[str, Any] | None = None
    results: Path | None = None
    rows: tuple[Row, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        path: As it was given.
        read: What the parameters were read from.
        pruner: Sizes of the pruner.
        params: {"pruner": ...}, and "vla" if the whole policy is known.
        vla: Of the driving VLA; None if it is not known, or a Qwen2.5-VL.
        why: Why no VLA is known, a sentence.
        keep_ratio: Of the bundle; None of a pruner alone.
        facts: Of the run.
        checkpoint: Folder of the Qwen2.5-VL whose tokens are pruned, if it is known.
        qwen: The same with the pruner in front, once `export_qwen.with_qwen` has read it.
    """

    path: Path
    read: Path
    pruner: ReconPrunerConfig
    params: dict
    vla: DrivingConfig | None
    why: str
    keep_ratio: float | None
    facts: Facts
    checkpoint: Path | None = None
    qwen: PrunedQwen | None = None

    @property
    def whole(self) -> bool:
        """Whether there is a VLA to export."""
        return self.vla is not None or self.checkpoint is not None


def read_source(
    path: Path, weights: Path | None = None, cameras: tuple[str, ...] | None = None
) -> Source:
    """Reads a bundle or a run folder.

    Args:
        path: Of either.
        weights: Of the VLA whose tokens the pruner was trained on, a file of a tiny one or the
            folder of a Qwen2.5-VL checkpoint; None takes the packaged one, if the run says that it
            was that.
        cameras: That the tiny VLA looks through, where its file does not say so; the package's are
            of the front camera, or with all six named of these.

    Raises:
        UserError: It is neither, it is damaged, the weights are of another VLA, or their cameras
            are not known or others.
    """
    bundle = next((at for at in (path, path / EXPORT) if manifests.is_bundle(at)), None)
    run = path.parent if bundle == path and path.name == EXPORT else path
    facts = _facts(run)
    if bundle is None:
        folder = next((at for at in (path, path / NESTED) if _has_checkpoints(at)), None)
        if folder is None:
            raise UserError(
                f"{path} is neither a bundle nor the folder of a run: give what `fastdrive "
                "train-pruner` or `fastdrive quickstart` wrote, or a bundle of theirs."
            )
        pruner, params, step = _checkpoint(folder, facts)
        read, facts = folder / "checkpoints" / str(step), replace(facts, step=step)
        return _with_vla(path, read, pruner, params, facts, weights, cameras=cameras)
    config = manifests.load(bundle).config
    if config.get("kind") != POLICY:
        pruner, params = read_pruner(bundle)
        encoder = config.get("encoder")
        return _with_vla(path, bundle, pruner, params, facts, weights, encoder, cameras)
    for option, given in (("--vla", weights), ("--cameras", cameras)):
        if given is not None:
            raise UserError(f"{bundle} holds its VLA; leave {option} out.")
    params, config = read_bundle_safetensors(bundle)
    pruner = from_plain(ReconPrunerConfig, config["pruner"])
    vla, ratio = from_plain(DrivingConfig, config["vla"]), config["keep_ratio"]
    return Source(path, bundle, pruner, params, vla, "", ratio, facts)


def _with_vla(
    path, read, pruner, params, facts: Facts, weights, encoder=None, cameras=None
) -> Source:
    """Adds the VLA whose tokens a pruner was trained on, if it is at hand."""
    params, encoder = {"pruner": params}, (facts.training or {}).get("encoder", encoder)
    alone = functools.partial(Source, path, read, pruner, params, None, keep_ratio=None)
    if encoder != "tiny_vla" and cameras is not None:
        raise UserError(f"{path} prunes tokens of no tiny VLA; leave --cameras out.")
    if encoder == "qwen2_5_vl":
        if weights is None:
            why = (
                "The pruner is one for tokens of qwen2_5_vl; --vla names the folder of its "
                "checkpoint."
            )
            return alone(why=why, facts=facts)
        dtype = (facts.training or {}).get("dtype", "bfloat16")
        if facts.encoder not in (None, qwen_digest(weights, dtype)):
            raise UserError(f"{weights} is not the VLA whose tokens {path} was trained on.")
        return alone(why="", facts=facts, checkpoint=weights)
    if encoder != "tiny_vla":
        name = encoder or "an encoder that the bundle does not name"
        if weights is not None:
            raise UserError(f"{path} prunes tokens of {name}, not of a tiny VLA; leave --vla out.")
        return alone(why=f"The pruner is one for tokens of {name}.", facts=facts)
    model, vla = _tiny_vla(weights, cameras)
    if facts.encoder is None:
        if weights is None:
            why = "The run does not say which tiny VLA it prunes tokens of; --vla names it."
            return alone(why=why, facts=facts)
    elif not _is_encoder(facts.encoder, model.config, vla):
        if weights is not None:
            raise UserError(f"{weights} is not the VLA whose tokens {path} was trained on.")
        why = "The run prunes tokens of another VLA than the packaged one; --vla names it."
        return alone(why=why, facts=facts)
    return Source(path, read, pruner, params | {"vla": vla}, model.config, "", None, facts)


def _tiny_vla(weights: Path | None, cameras: tuple[str, ...] | None) -> tuple[DrivingVLA, dict]:
    """The VLA of a file, or the packaged one of these cameras.

    The wrong cameras would be exported without a word: shapes and the encoder, over which the
    digest is made, are the same for any.
    """
    if weights is not None:
        named = saved_cameras(weights)
        if named is None and cameras is None:
            raise UserError(
                f"{weights} does not say which cameras its VLA looks through; name them with "
                "--cameras."
            )
        if named is not None and cameras not in (None, named):
            raise UserError(
                f"{weights} looks through {', '.join(named)}, not {', '.join(cameras)}; leave "
                "--cameras out."
            )
        cameras = named or cameras
    return load_vla(weights, DrivingConfig(cameras=cameras or FRONT))


def _is_encoder(digest: str, config: DrivingConfig, params: dict) -> bool:
    """Whether a training's encoder was this VLA's, or one of the front camera that shares it."""
    cameras = {config.cameras, FRONT}
    models = (DrivingVLA(replace(config, cameras=one)) for one in cameras)
    return any(frozen_vla(model, params).digest == digest for model in models)


def _checkpoint(path: Path, facts: Facts) -> tuple[ReconPrunerConfig, dict, int]:
    """The pruner of the best checkpoint of a run that knows one, or of the newest."""
    run = from_plain(PrunerRun, facts.training)
    init = functools.partial(
        init_train_state,
        functools.partial(init_params, run.recon),
        make_optimizer(run.optimizer),
        run.seed,
        ema=run.ema_decay is not None,
    )
    mesh = make_mesh(1, devices=jax.local_devices()[:1])
    best = run.best and Best(run.best, "min" if run.best == "loss" else "max")
    with RunCheckpoints(path, run, best=best or None, read_only=True) as checkpoints:
        step = checkpoints.best_step() if best else None
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{path} has no checkpoint yet: train on, then export it.")
        abstract = abstract_state(init, replicated_sharding(mesh))
        state = checkpoints.restore(abstract, step=step)
    return run.recon.pruner, evaluation_params(state)["pruner"], step


def _facts(run: Path) -> Facts:
    """Whatever there is of config.json, results and shards; `run` may be no run at all."""
    config = next((at / "config.json" for at in (run, run / NESTED) if _is_run(at)), None)
    found: dict[str, Any] = {}
    if config is not None:
        stored = read_json(config)
        found["training"] = stored.get("run", stored)
        found["encoder"], found["data_digest"] = stored.get("encoder"), stored.get("data")
        if stored is found["training"]:
            found["encoder"] = None  # there it is the name alone
            found["data_digest"] = None
    shards = run / "shards"  # the quick start's, before it has results
    for name in ("results.json", "report.json"):
        if (run / name).is_file():
            rows, meta = read_rows(run / name)
            found |= {"results": run / name, "rows": rows, "step": meta.get("step")}
            shards = Path(meta.get("shards", shards))
            break
    if (shards / "manifest.json").is_file():
        data, known = read_json(shards / "manifest.json"), found.get("data_digest")
        if known == shards_digest(data["shards"]) or (known is None and "results" in found):
            found["data"] = {**data, "path": str(shards)}
    return Facts(**found)


def _has_checkpoints(folder: Path) -> bool:
    return _is_run(folder) and (folder / "checkpoints").is_dir()


def _is_run(folder: Path) -> bool:
    if not (folder / "config.json").is_file() or manifests.is_bundle(folder):
        return False
    try:
        content = json.loads((folder / "config.json").read_text())
    except ValueError:
        return True  # a damaged one, of which reading says so
    return isinstance(content, dict) and ("recon" in content or "recon" in content.get("run", {}))
