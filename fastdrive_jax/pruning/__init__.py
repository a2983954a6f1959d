"""Token pruners: one file per method, one interface, and the list of them by name."""

import contextlib
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

from fastdrive_jax.errors import UserError
from fastdrive_jax.own_files import own_function
from fastdrive_jax.pruning.budgets import keep_indices
from fastdrive_jax.pruning.cd_pruner import cd_pruner
from fastdrive_jax.pruning.div_prune import div_prune
from fastdrive_jax.pruning.fast_v import fast_v
from fastdrive_jax.pruning.ground_truth import ground_truth
from fastdrive_jax.pruning.interface import Pruner, PrunerInputs, pruner_scores
from fastdrive_jax.pruning.joint_pruner import joint_pruner
from fastdrive_jax.pruning.position_prior import position_prior
from fastdrive_jax.pruning.prune2drive import prune2drive
from fastdrive_jax.pruning.pyramid_drop import pyramid_drop
from fastdrive_jax.pruning.random_tokens import random_tokens
from fastdrive_jax.pruning.recon_pruner import ReconPruner, ReconPrunerConfig, recon_pruner
from fastdrive_jax.pruning.sparse_vlm import sparse_vlm, sparse_vlm_v1
from fastdrive_jax.pruning.spec_prune import spec_prune
from fastdrive_jax.pruning.tome import tome
from fastdrive_jax.pruning.uniform_grid import uniform_grid
from fastdrive_jax.pruning.vis_pruner import vis_pruner
from fastdrive_jax.pruning.vision_zip import vision_zip
from fastdrive_jax.pruning.vla_cache import vla_cache
from fastdrive_jax.pruning.vla_pruner import vla_pruner, vla_pruner_released

PRUNERS: Mapping[str, Callable[..., Pruner]] = MappingProxyType(
    {
        "reconpruner": recon_pruner,
        "jointpruner": joint_pruner,
        "random": random_tokens,
        "uniform": uniform_grid,
        "prior": position_prior,
        "ground_truth": ground_truth,
        "divprune": div_prune,
        "cdpruner": cd_pruner,
        "prune2drive": prune2drive,
        "fastv": fast_v,
        "sparsevlm": sparse_vlm,
        "sparsevlm_v1": sparse_vlm_v1,
        "pyramiddrop": pyramid_drop,
        "specprune": spec_prune,
        "vlapruner": vla_pruner,
        "vlapruner_released": vla_pruner_released,
        "vlacache": vla_cache,
        "vispruner": vis_pruner,
        "visionzip": vision_zip,
        "tome": tome,
    }
)


def make_pruner(name: str, **settings) -> Pruner:
    """A method made with its settings.

    Programs are known by their method: one of `PRUNERS` that was made before is given again, so
    that what was compiled for another seed, training or call serves this one too.

    Args:
        name: Of `PRUNERS`, or "FILE.py:FUNCTION", a function of your own that returns a `Pruner`.
        settings: Of the method; `config=` for one that `builds_on_recon`.

    Raises:
        UserError: There is no such method, or a function of your own returns something else.
    """
    maker = _maker(name)
    if name in PRUNERS:
        with contextlib.suppress(TypeError):  # of settings that are no keys, such as lists
            return _made(maker, **settings)
    made = maker(**settings)
    if not isinstance(made, Pruner):
        raise UserError(f"{name} returns {made!r}; let it return a fastdrive_jax.pruning.Pruner.")
    return made


def builds_on_recon(name: str) -> bool:
    """Whether a method takes the `config` of a trained ReconPruner, whose params are then its own.

    Raises:
        UserError: There is no such method.
    """
    return "config" in inspect.signature(_maker(name)).parameters


@functools.lru_cache(maxsize=None, typed=True)
def _made(maker: Callable[..., Pruner], /, **settings) -> Pruner:
    return maker(**settings)


def _maker(name: str) -> Callable[..., Pruner]:
    if name in PRUNERS:
        return PRUNERS[name]
    if ".py:" in name:
        return own_function(name, "pruner")
    close = difflib.get_close_matches(name, PRUNERS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(PRUNERS)}."
    raise UserError(f"There is no pruner {name!r}: {hint}")


__all__ = [
    "PRUNERS",
    "Pruner",
    "PrunerInputs",
    "ReconPruner",
    "ReconPrunerConfig",
    "builds_on_recon",
    "keep_indices",
    "make_pruner",
    "pruner_scores",
    "recon_pruner",
]
