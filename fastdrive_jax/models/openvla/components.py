"""OFT's parts, which are published as files of their own beside the checkpoint."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from fastdrive_jax.errors import UserError
from fastdrive_jax.models.hf_files import Readable, read_header

ACTION_HEAD, PROPRIO_PROJECTOR = "action_head", "proprio_projector"
_UNKNOWN = ("noisy_action_projector", "vision_backbone")  # of diffusion heads and of FiLM


@dataclass(frozen=True)
class Held:
    """A tensor that is in memory already.

    Attributes:
        value: Its values.
    """

    value: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.value.shape

    def read(self) -> np.ndarray:
        """Its values."""
        return self.value


def list_components(checkpoint_dir: Path) -> dict[str, Readable]:
    """Tensors of the action head and the proprio projector, by component and name; {} of none.

    Args:
        checkpoint_dir: Holds `action_head--*_checkpoint.pt` and perhaps
            `proprio_projector--*_checkpoint.pt`, or the same as `.safetensors`.

    Raises:
        UserError: There are several of one kind or parts that are not built here, a file is
            damaged, or PyTorch is absent, which `.pt` files need.
    """
    folder = Path(checkpoint_dir)
    for name in _UNKNOWN:
        if found := _files(folder, name):
            raise UserError(
                f"{found[0]} belongs to a variant that is not built here; only models with an L1 "
                "action head and without FiLM are."
            )
    tensors: dict[str, Readable] = {}
    for name in (ACTION_HEAD, PROPRIO_PROJECTOR):
        found = _files(folder, name)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"{folder} holds several {name} files ({names}); keep one.")
        for path in found:
            read = read_header if path.suffix == ".safetensors" else _read_torch
            # Training on several GPUs leaves the wrapper's name in front.
            own = {tensor.removeprefix("module."): value for tensor, value in read(path).items()}
            tensors |= {f"{name}.{tensor}": value for tensor, value in own.items()}
    return tensors


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(
        path for suffix in ("pt", "safetensors") for path in folder.glob(f"{name}--*.{suffix}")
    )


def _read_torch(path: Path) -> dict[str, Held]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs PyTorch; run `pip install -e '.[parity]'` in the clone, or "
            "convert the file to safetensors."
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        return {name: Held(_array(tensor, torch)) for name, tensor in found.items()}
    except (pickle.PickleError, OSError, RuntimeError, AttributeError, EOFError) as error:
        raise UserError(
            f"{path} holds no PyTorch tensors or is damaged; fetch it again."
        ) from error


def _array(tensor, torch) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
