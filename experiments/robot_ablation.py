r"""VLA-Pruner with parts left out, as methods of `fastdrive robot eval` and others.

fastdrive robot eval --policies openvla --ratios 0.25 0.125 --methods vlapruner \
        experiments/robot_ablation.py:prefill_only experiments/robot_ablation.py:action_only \
        experiments/robot_ablation.py:window_1 experiments/robot_ablation.py:window_5
"""

from fastdrive_jax.pruning.interface import Pruner
from fastdrive_jax.pruning.vla_pruner import vla_pruner


def prefill_only() -> Pruner:
    """What the prompt looks at, alone."""
    return vla_pruner(signals="prefill")


def action_only() -> Pruner:
    """What gave actions looked at, alone."""
    return vla_pruner(signals="action")


def window_1() -> Pruner:
    """Actions of the last frame alone."""
    return vla_pruner(window=1)


def window_5() -> Pruner:
    """Actions of five frames."""
    return vla_pruner(window=5)
