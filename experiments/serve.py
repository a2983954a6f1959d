"""The driving policy as a local HTTP service with a page (extra `serve`).

    fastdrive serve                                             # the packaged VLA, front camera
    fastdrive serve --bundle runs/quickstart/export --target-ms 80
    fastdrive serve --bundle bundled-six                        # the packaged VLA of six cameras

Compiles every ratio at every batch size first: 15 programs of the packaged VLA take 1 to 2 minutes
on 2 CPU cores, and half a minute from the second start on with JAX_COMPILATION_CACHE_DIR set.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_pipelines.schema import CAMERAS
from experiments.drives import NEED_DATA
from experiments.serve_demo import demo_drives
from fastdrive_jax.configs import from_plain
from fastdrive_jax.errors import UserError
from fastdrive_jax.export import manifest
from fastdrive_jax.export.driving import read_policy
from fastdrive_jax.inference.policy import DrivingPolicy
from fastdrive_jax.models.qwen2_5_vl.bundled import FRONT, load_vla, saved_cameras
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.pruning import builds_on_recon, make_pruner
from fastdrive_jax.pruning.recon_pruner import ReconPrunerConfig
from fastdrive_jax.serving.config import ServeConfig

BUNDLED, BUNDLED_SIX = "bundled", "bundled-six"
UNTRAINED = "divprune"  # of those that need no training it plans best at 50%


@dataclass(frozen=True)
class ServeArgs:
    """Serve plans over HTTP, with a web page for viewing them.

    Attributes:
        bundle: Folder of an exported policy; "bundled" for the VLA in the package, "bundled-six"
            for its six-camera VLA; or a vla.safetensors from `fastdrive widen-vla`, with the
            cameras it names, or six.
        method: Pruning method; by default the bundle's own, or divprune if no pruner was trained.
        demo: Drives of the synthetic world that the page can play.
        service: Address, buckets, batches and limits.
    """

    bundle: str = BUNDLED
    method: str | None = None
    demo: int = 6
    service: Annotated[ServeConfig, tyro.conf.arg(name="")] = field(default_factory=ServeConfig)

    def __post_init__(self):
        if self.demo < 0:
            raise UserError(f"demo={self.demo} must not be negative.")


def serve(args: ServeArgs) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        from fastdrive_jax.serving.server import serve as run
    except ImportError as error:
        raise UserError(
            f"fastdrive serve needs {error.name}: run `pip install -e '.[serve]'` in the clone."
        ) from error
    policy, params = served_policy(args.bundle, args.method)
    run(policy, params, args.service, demo_drives(policy.model.config, args.demo))


def served_policy(bundle: str, method: str | None) -> tuple[DrivingPolicy, dict[str, Any]]:
    """What is served, and its parameters.

    Args:
        bundle: See `ServeArgs`.
        method: See `ServeArgs`.

    Raises:
        UserError: There is no such bundle or method, or the method needs what the bundle lacks.
    """
    if method in NEED_DATA:
        raise UserError(f"{method} prunes by {NEED_DATA[method]}, which a service does not have.")
    if bundle in (BUNDLED, BUNDLED_SIX) or bundle.endswith(".safetensors"):
        name = method or UNTRAINED
        if builds_on_recon(name):
            raise UserError(
                f"{name} needs a trained ReconPruner, which {bundle} does not hold; name the "
                "export/ folder of a quick start, or another method."
            )
        path = Path(bundle) if bundle.endswith(".safetensors") else None
        cameras = FRONT if bundle == BUNDLED else CAMERAS
        config = DrivingConfig(cameras=(path and saved_cameras(path)) or cameras)
        model, vla = load_vla(path, config)
        return DrivingPolicy(model, make_pruner(name), 1.0), {"vla": vla, "pruner": None}
    policy, params = read_policy(Path(bundle))
    if method is None:
        return policy, params
    if builds_on_recon(method):
        config = from_plain(ReconPrunerConfig, manifest.load(Path(bundle)).config["pruner"])
        pruner = make_pruner(method, config=config)
    else:
        pruner, params = make_pruner(method), {**params, "pruner": None}
    return DrivingPolicy(policy.model, pruner, policy.keep_ratio), params
