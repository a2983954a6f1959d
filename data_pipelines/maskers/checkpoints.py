"""Checkpoints of transformers models: found, loaded whole, and named by what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
# Hubs keep the same weights in other formats beside safetensors, which nobody needs here.
_WANTED = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's files.

    Attributes:
        folder: Where they are.
        identity: JSON values that tell this model from any other: its name, and the hub's commit
            or a hash of the weights.
    """

    folder: Path
    identity: dict[str, str]

    @property
    def model_type(self) -> str:
        """As in `config.json`."""
        return json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["model_type"]


def require_torch() -> tuple[Any, Any]:
    """The modules torch and transformers.

    Raises:
        UserError: One of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"This masker needs torch and transformers ({error}): "
            "run `pip install -e '.[masks]'` in the clone."
        ) from error
    return torch, transformers


def find_checkpoint(source: str | Path) -> Checkpoint:
    """A folder, or a repository of the Hugging Face hub such as "facebook/sam3".

    Raises:
        UserError: No such folder or repository, or it lacks `config.json` or weights.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise UserError(f"{source} is not a folder; give one that holds a checkpoint.")
        return _from_hub(str(source))
    _check_files(folder)
    return Checkpoint(folder, {"model": folder.resolve().name, "revision": _hash(folder)})


def load_whole(model_class: Any, checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """The model in evaluation mode, on a device.

    transformers fills what a checkpoint lacks with random values and only warns, so masks would
    be noise; here that is an error.

    Raises:
        UserError: The checkpoint is damaged, or lacks a weight or has it in another shape.
    """
    torch, _ = require_torch()
    with checkpoint_errors(checkpoint.folder):
        model, info = model_class.from_pretrained(
            checkpoint.folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
    broken = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind])
    if broken or info.get("error_msgs"):
        raise UserError(
            f"{checkpoint.folder} lacks {len(broken)} weights of {model_class.__name__} or has "
            f"them in another shape, such as {', '.join(broken[:3])}; get the whole checkpoint."
        )
    return model.to(device).eval()


@contextlib.contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """What transformers raises about a checkpoint's files, as one sentence."""
    try:
        yield
    except UserError:
        raise
    # safetensors and tokenizers raise classes of their own that derive from Exception only.
    except Exception as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"{folder} cannot be loaded ({type(error).__name__}: {text[:300]}); get the whole "
            "checkpoint again."
        ) from error


def check_dtype(dtype: str) -> str:
    """`dtype` if it is one of `DTYPES`, else `UserError`."""
    if dtype not in DTYPES:
        raise UserError(f'dtype is "{dtype}"; choose from {list(DTYPES)}.')
    return dtype


def pick_device(device: str | None) -> str:
    """The given device, or CUDA where there is one, else the CPU.

    Raises:
        UserError: CUDA is asked for and is not there.
    """
    torch, _ = require_torch()
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f'device is "{device}" but torch finds no CUDA device; use "cpu".')
    return device


def _from_hub(name: str) -> Checkpoint:
    require_torch()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # of the network, the hub, or its cache: many unrelated classes
        text = " ".join(str(error).split())
        raise UserError(
            f"{name} is no folder and cannot be had from the Hugging Face hub ({text[:200]}); "
            "check the name and the network, or give a folder."
        ) from error
    _check_files(folder)
    return Checkpoint(folder, {"model": name, "revision": folder.name})


def _check_files(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder / 'config.json'} is missing; give a whole checkpoint folder.")
    try:
        known = "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is damaged ({error}); restore it.") from error
    if not known:
        raise UserError(f'{folder / "config.json"} has no "model_type"; restore it.')
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no *.safetensors; give a whole checkpoint folder.")


def _hash(folder: Path) -> str:
    """Of all that decides what the model answers: weights, configuration, processor, tokenizer."""
    total = hashlib.sha256()
    for path in sorted(p for pattern in _WANTED for p in folder.glob(pattern)):
        with path.open("rb") as file:
            total.update(f"{path.name}:".encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()[:32]}"
