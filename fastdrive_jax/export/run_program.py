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
from safetensors.flax import load_file

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
        ValueError: A file is damaged, or there is no such program.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config, platform = manifest["config"], PLATFORMS[jax.default_backend()]
    found = [
        bucket["programs"][platform]
        for bucket in config["buckets"]
        if keep_ratio in (None, bucket["keep_ratio"])
        and batch in (None, bucket["batch"])
        and platform in bucket["programs"]
    ]
    if not found:
        raise ValueError(
            f"{folder} has no program for {platform}, keep_ratio={keep_ratio}, batch={batch}; it "
            f"has {config['buckets']}"
        )
    check_sums(folder, manifest, (found[0], WEIGHTS))
    program = export.deserialize(bytearray((folder / found[0]).read_bytes()))
    weights = load_file(folder / WEIGHTS)
    run = jax.jit(program.call)
    return lambda *inputs: run(weights, *inputs)


def read_manifest(folder: Path) -> dict:
    """What `config.json` says.

    Raises:
        ValueError: It was changed after it was written.
    """
    manifest = json.loads((folder / "config.json").read_text())
    own = manifest.pop("sha256", None)
    if own != hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest():
        raise ValueError(f"{folder / 'config.json'} was changed after it was written")
    return manifest


def check_sums(folder: Path, manifest: dict, names: Iterable[str]) -> None:
    """Compares files with the sums in the manifest."""
    for name in names:
        with (folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest["files"][name]["sha256"]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")


if __name__ == "__main__":
    frames, here = np.load(sys.argv[1]), Path(__file__).parent
    inputs = [frames[name] for name in read_manifest(here)["config"]["inputs"]]
    for name, value in load_program(here, batch=len(inputs[0]))(*inputs).items():
        print(name, value, sep="\n")
