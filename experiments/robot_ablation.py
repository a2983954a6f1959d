r"""VLA-Pruner with parts left out, as methods of `fastdrive robot eval` and others.

As its authors released it, and with `formula_` before the name by the paper's formula:

fastdrive robot eval --policies openvla --ratios 0.25 0.125 --methods vlapruner_released \
        experiments/robot_ablation.py:prefill_only experiments/robot_ablation.py:action_only \
        experiments/robot_ablation.py:window_1 experiments/robot_ablation.py:window_5
"""

from fastdrive_jax.pruning.interface import Pruner
from fastdrive_jax.pruning.vla_pruner import vla_pruner, vla_pruner_released


def prefill_only() -> Pruner:
    """What the prompt looks at, alone."""
    return vla_pruner_released(signals="prefill")


def action_only() -> Pruner:
    """What gave actions looked at, alone."""
    return vla_pruner_released(signals="action")


def window_1() -> Pruner:
    """Actions of the last frame alone."""
    return vla_pruner_released(window=1)


def window_5() -> Pruner:
    """Actions of five frames."""
    return vla_pruner_released(window=5)


def formula_prefill_only() -> Pruner:
    """What all rows look at, alone."""
    return vla_pruner(signals="prefill")


def formula_action_only() -> Pruner:
    """What gave actions looked at, alone."""
    return vla_pruner(signals="action")


def formula_window_1() -> Pruner:
    """Actions of the last frame alone."""
    return vla_pruner(window=1)


def formula_window_5() -> Pruner:
    """Actions of five frames."""
    return vla_pruner(window=5)
