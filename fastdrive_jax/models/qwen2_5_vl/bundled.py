"""The tiny driving VLAs that the package carries, of `fastdrive train-vla` and `widen-vla`."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig, DrivingVLA
from fastdrive_jax.packaged import packaged

FRONT = ("CAM_FRONT",)
AROUND = (
    *("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT"),
    *("CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT"),
)
_CAMERAS = "cameras"  # in the file's metadata
BUNDLED = {FRONT: "tiny_vla.safetensors", AROUND: "tiny_vla_six.safetensors"}  # by cameras


def save_vla(path: Path, params: dict, cameras: tuple[str, ...] | None = None) -> None:
    """Writes VLA parameters as bfloat16 safetensors, half the bytes of what was trained.

    Args:
        path: To write.
        params: Of the VLA.
        cameras: That it was trained to look through, which no shape tells; the file then says so.

    Raises:
        UserError: The file cannot be written (full disk).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    flat = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in flat.items()}
    metadata = None if cameras is None else {_CAMERAS: json.dumps(cameras)}
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(flat, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"VLA weights {path} can't be written ({error}); check the disk."
        ) from error


def saved_cameras(path: Path) -> tuple[str, ...] | None:
    """The cameras that a file of `save_vla` names; None if it names none, as the package's do.

    Raises:
        UserError: The file is missing or unreadable.
    """
    try:
        with safe_open(path, "numpy") as file:
            named = (file.metadata() or {}).get(_CAMERAS)
        return None if named is None else tuple(json.loads(named))
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"VLA weights {path} can't be read ({error}).") from error


def load_vla(
    path: Path | None = None, config: DrivingConfig | None = None
) -> tuple[DrivingVLA, dict]:
    """The VLA and its float32 parameters.

    Args:
        path: Of `save_vla`; None takes the weights in the package, of the front camera or of all
            six.
        config: Of the weights, whose cameras are taken at their word, since the shapes are the same
            for any; None means the default one, of the cameras that the file names, or else of the
            front camera.

    Raises:
        UserError: The file is missing, unreadable or of another config.
    """
    if config is None:
        named = None if path is None else saved_cameras(path)
        config = DrivingConfig(cameras=named or FRONT)
    model = DrivingVLA(config)
    if path is None:
        cameras = model.config.cameras
        if cameras not in BUNDLED:
            raise UserError(
                f"The package has no VLA that looks through {', '.join(cameras)}; train one with "
                "`fastdrive widen-vla` and give its weights."
            )
        path = packaged(BUNDLED[cameras])
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"VLA weights {path} can't be read ({error}).") from error
    wanted = _shapes(model)
    found = {name: value.shape for name, value in tensors.items()}
    if wanted != found:
        odd = sorted(name for name in wanted | found if wanted.get(name) != found.get(name))
        raise UserError(f"VLA weights {path} are of another config: {', '.join(odd[:8])} differ.")
    # Converted on the host: on the device each shape would be a program to compile.
    params = {name: value.astype(np.float32) for name, value in tensors.items()}
    return model, jax.device_put(traverse_util.unflatten_dict(params, sep="/"))


@functools.cache
def _shapes(model: DrivingVLA) -> dict[str, tuple[int, ...]]:
    """Of the parameters by flat name."""
    config = model.config
    images = jax.ShapeDtypeStruct((1, len(config.cameras), *config.image_size, 3), jnp.uint8)
    ids = jax.ShapeDtypeStruct((1, config.vocabulary.plan_length), jnp.int32)
    prompt = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    found = jax.eval_shape(model.init, jax.random.key(0), images, prompt, ids)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(found, sep="/").items()}
