"""Runs an exported model; needs jax, flatbuffers and safetensors, and not what made it.

    python run.py FRAMES.npz                   # the inputs by name; prints what it answers
    from run import load_program               # or from another program

The folder holds one compiled-ahead program for each platform and bucket, a bucket being a batch
size and a number of kept tokens, and the weights that all of them take. `config.json` lists them,
and names inputs and outputs with their shapes.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file

WEIGHTS = "model.safetensors"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # JAX's name of a backend to the program's


def load_program(
    folder: str | Path = Path(__file__).parent,
    keep_ratio: float | None = None,
    batch: int | None = None,
) -> Callable[..., dict[str, jax.Array]]:
    """The program for the devices at hand: its inputs in their order to its outputs by name.

    Args:
        folder: Of the export.
        keep_ratio: Of the bucket; None takes the first.
        batch: Of the bucket; None takes the first.

    Raises:
        OSError: A file is missing.
        ValueError: A file is damaged, or there is no such program; when it is called, that inputs
            are not those that it takes.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config, backend = manifest["config"], jax.default_backend()
    platform = PLATFORMS.get(backend, backend)
    found = [
        bucket["programs"][platform]
        for bucket in config.get("buckets", ())
        if keep_ratio in (None, bucket["keep_ratio"])
        and batch in (None, bucket["batch"])
        and platform in bucket["programs"]
    ]
    if not found:
        raise ValueError(
            f"{folder} has no program for {platform}, keep_ratio={keep_ratio}, batch={batch}; it "
            f"holds {config['kind']!r}, {config.get('buckets', [])}"
        )
    check_sums(folder, manifest, (found[0], WEIGHTS))
    program = export.deserialize(bytearray((folder / found[0]).read_bytes()))
    weights = jax.device_put(load_file(folder / WEIGHTS))
    run, names = jax.jit(program.call), list(config["inputs"])
    shapes = program.in_avals[-len(names) :]  # the weights stand before them
    takes = ", ".join(map("{} {}".format, names, shapes))

    def call(*inputs):
        try:
            return run(weights, *inputs)
        except ValueError as error:
            raise ValueError(f"{found[0]} takes {takes}, as arrays: {error}") from error

    return call


def read_manifest(folder: Path) -> dict:
    """What `config.json` says.

    Raises:
        OSError: It is missing.
        ValueError: It is truncated, or was changed after it was written.
    """
    path = folder / "config.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON ({error})") from error
    own = manifest.pop("sha256", None)
    if own != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise ValueError(f"{path} was changed after it was written")
    return manifest


def check_sums(folder: Path, manifest: dict, names: Iterable[str]) -> None:
    """Compares files with the sums in the manifest."""
    for name in names:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest["files"][name]["sha256"]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    here = Path(__file__).parent
    try:
        frames = np.load(sys.argv[1])
        inputs = [frames[name] for name in read_manifest(here)["config"]["inputs"]]
        answer = load_program(here, batch=len(inputs[0]))(*inputs)
    except (LookupError, OSError, ValueError) as error:
        sys.exit(f"run.py: {error}")
    for name, value in answer.items():
        print(name, value, sep="\n")
