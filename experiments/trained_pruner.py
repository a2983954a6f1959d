"""An exported ReconPruner in front of a Qwen2.5-VL checkpoint."""

from pathlib import Path
from typing import Any

from fastdrive_jax.errors import UserError
from fastdrive_jax.export.pruner import read_pruner
from fastdrive_jax.inference.pruned_qwen import cast_params
from fastdrive_jax.models.qwen2_5_vl.config import QwenVLConfig
from fastdrive_jax.pruning import Pruner, make_pruner


def read_trained(
    name: str, folder: Path, checkpoint: Path, config: QwenVLConfig, dtype: str
) -> tuple[Pruner, Any]:
    """A method that builds on a ReconPruner, and its parameters.

    Args:
        name: Of the method.
        folder: The bundle, `train-pruner`'s export/.
        checkpoint: Whose tokens are pruned, for what is said.
        config: Its sizes.
        dtype: That the checkpoint computes in.

    Raises:
        UserError: There is no whole bundle, or one for tokens of another size.
    """
    own, params = read_pruner(folder)
    width = config.text.hidden_size
    if own.layer.hidden_size != width:
        raise UserError(
            f"The ReconPruner in {folder} takes tokens of {own.layer.hidden_size} numbers, "
            f"but those of {checkpoint} have {width}; train one on its tokens."
        )
    return make_pruner(name, config=own), cast_params(params, dtype)
