"""Files that come with the package."""

from importlib import resources
from pathlib import Path


def packaged(name: str) -> Path:
    """Where `assets/NAME` is."""
    return Path(str(resources.files("fastdrive_jax") / "assets" / name))
