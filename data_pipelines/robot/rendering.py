"""MuJoCo with off-screen pictures on machines without a display."""

import ctypes.util
import importlib.util
import os

from fastdrive_jax.errors import UserError


def load_mujoco():
    """The module `mujoco`, set to render off screen.

    MUJOCO_GL chooses how, "osmesa" (on the CPU) unless it is set; MuJoCo reads it when it is
    imported.

    Raises:
        UserError: MuJoCo or the library that draws is not installed.
    """
    missing = absent()
    if missing:
        raise UserError(missing)
    if os.environ.setdefault("MUJOCO_GL", "osmesa") == "osmesa":
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
    # Small pictures are drawn fastest by the thread that asks, and workers share the cores.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    import mujoco

    return mujoco


def absent() -> str | None:
    """What rendering lacks here, as a sentence; None where it lacks nothing."""
    if importlib.util.find_spec("mujoco") is None:
        return "MuJoCo is not installed; run `pip install -e '.[robot]'` in the clone."
    osmesa = os.environ.get("MUJOCO_GL", "osmesa") == "osmesa"
    if osmesa and ctypes.util.find_library("OSMesa") is None:
        return (
            "The library OSMesa, with which MuJoCo draws without a display, is not installed; "
            "install it (Debian and Ubuntu: apt-get install libosmesa6), or set MUJOCO_GL=egl "
            "where there is a GPU."
        )
    return None
