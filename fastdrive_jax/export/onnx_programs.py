"""The pruner and the whole pruned policy as ONNX, by jax2onnx (extra and install: docs/export.md).

    OUT/config.json    inputs and outputs, the SHA-256 of every file
    OUT/pruner.onnx    tokens [1, n, D] of a picture (with rope, position_ids [3, 1, n]) to scores
    OUT/policy.onnx    images, speed and command of one frame to waypoints and kept tokens
    OUT/policy_b4.onnx the same of four frames a call

Weights are inside, shapes are static, and attention is in plain operations. Where the converter
fails it fails here; where it is wrong the check of `fastdrive export` says so.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fastdrive_jax.configs import to_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest as manifests
from fastdrive_jax.export.folder import write_folder
from fastdrive_jax.inference.policy import DrivingPolicy, plan
from fastdrive_jax.models.attention import kernels_of
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig

KIND = "onnx"
PRUNER, POLICY = "pruner.onnx", "policy.onnx"
OPSET = 23


def write_onnx(
    folder: Path,
    pruner: ReconPrunerConfig,
    params: dict,
    tokens: int,
    policy: DrivingPolicy | None = None,
    batches: Sequence[int] = (1,),
) -> Path:
    """Converts the pruner, for one picture a call, and the policy, if there is one.

    Args:
        folder: To make; see `write_folder`.
        pruner: Sizes.
        params: {"pruner": ...}, and "vla" for a policy.
        tokens: n, of a picture.
        policy: Whose keep ratio the programs have.
        batches: Frames of a call; each makes a file.

    Raises:
        UserError: jax2onnx is not installed, or the folder cannot be written.
    """
    _need("jax2onnx")
    files = 1 + len(batches) * (policy is not None)
    size = files * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    fill = functools.partial(
        _fill, pruner=pruner, params=params, tokens=tokens, policy=policy, batches=batches
    )
    return write_folder(folder, size, fill)


def policy_file(batch: int) -> str:
    """Name of the policy's file for so many frames a call."""
    return POLICY if batch == 1 else POLICY.replace(".", f"_b{batch}.")


def need_converter() -> None:
    """Refuses to begin without what converts and runs.

    Raises:
        UserError: It is not installed.
    """
    _need("jax2onnx", "onnxruntime")


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX needs {' and '.join(missing)}, which this environment lacks; docs/export.md "
            "says how to install it."
        )


def _fill(folder, pruner, params, tokens, policy, batches):
    inputs = {"tokens": jax.ShapeDtypeStruct((1, tokens, pruner.layer.hidden_size), "float32")}
    if pruner.rope:
        inputs["position_ids"] = jax.ShapeDtypeStruct((3, 1, tokens), "int32")
    module = ReconPruner(pruner)

    def score(*inputs):
        return module.apply({"params": params["pruner"]}, *inputs)

    _convert(folder / PRUNER, score, inputs, ("scores",))
    described = {PRUNER: _shapes(inputs)}

    def run(*inputs):
        planned = plan(policy, params, *inputs)
        return planned.waypoints, planned.keep_indices

    for batch in batches if policy is not None else ():
        inputs, name = _frames(policy, batch), policy_file(batch)
        _convert(folder / name, run, inputs, ("waypoints", "keep_indices"))
        described[name] = _shapes(inputs)
    config = {"kind": KIND, "opset": OPSET, "inputs": described, "pruner": to_plain(pruner)}
    packages = ("fastdrive-jax", "jax", "jax2onnx", "onnx")
    manifests.seal(folder, config, {}, packages)


def _frames(policy: DrivingPolicy, batch: int) -> dict[str, Any]:
    config = policy.model.config
    pictures = batch, len(config.cameras), *config.image_size, 3
    return {
        "images": jax.ShapeDtypeStruct(pictures, "uint8"),
        "speed": jax.ShapeDtypeStruct((batch,), "float32"),
        "command": jax.ShapeDtypeStruct((batch,), "int32"),
    }


def _convert(path: Path, function: Callable, inputs: dict[str, Any], outputs: tuple) -> None:
    import jax2onnx

    log = logging.getLogger("onnx_ir")  # a line for each scalar that has no name
    level, log.level = log.level, logging.ERROR
    try:
        with kernels_of("any"):
            model = jax2onnx.to_onnx(
                function,
                list(inputs.values()),
                model_name=path.stem,
                opset=OPSET,
                input_names=list(inputs),
                output_names=outputs,
            )
    finally:
        log.level = level
    path.write_bytes(model.SerializeToString())


def _shapes(inputs: dict) -> dict:
    return {name: [value.dtype.name, list(value.shape)] for name, value in inputs.items()}


def read_onnx(folder: Path, name: str) -> Callable[..., list[np.ndarray]]:
    """One of the programs in onnxruntime, on the CPU; takes its inputs in their order.

    Args:
        folder: Of `write_onnx`.
        name: `PRUNER` or a `policy_file`.

    Raises:
        UserError: The folder is no such export, or the file is missing or damaged.
    """
    _need("onnxruntime")
    import onnxruntime

    manifest = manifests.load(folder)
    if manifest.config.get("kind") != KIND:
        raise UserError(f"{folder} holds a {manifest.config.get('kind')!r}, not {KIND}.")
    manifests.check_files(folder, manifest, name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings of constants that it leaves out
    # Threads that wait for the next call would take the cores from everyone else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(folder / name), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs):
        return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))

    return run
