"""The tabletop's expert: from where things are to the next action, without memory.

Above the object, down, close, lift; into the tray also over, down, open. Since it looks only at
what is, it recovers from whatever has happened: a lost object is fetched again.
"""

import numpy as np

from data_pipelines.robot.policies import ACTION_SIZE, Acted, RobotPolicy
from data_pipelines.robot.scene import TRAY_INSIDE
from data_pipelines.robot.tabletop import STEP, TURN, TabletopState

_SAFE = 0.085  # height of the fingertips over what stands on the table
_CARRY = 0.10
_DROP = 0.035  # of what is let go over the tray
_OPEN, _CLOSE = -1.0, 1.0


def expert_action(state: TabletopState) -> np.ndarray:
    """The action `[7]` at a state."""
    here, target = np.array(state.gripper), np.array(state.target)
    off = target[:2] - here[:2]
    if state.place and _over_tray(state):
        return _action([0, 0, 0], 0.0, _OPEN)
    held = np.linalg.norm(target[:3] - here[:3]) < 0.022 and state.opening < state.width + 0.004
    if held and not state.place:
        return _action([0, 0, STEP], 0.0, _CLOSE)
    if held:
        return _carry(state)
    turn, grip = _turn(state), max(target[2] - 0.002, 0.016)
    away = np.linalg.norm(off)
    # A funnel: the farther from over the object, or the more turned, the higher the fingertips are
    # to be. So nearly the same states ask for nearly the same, which is what can be learned.
    open_share = max(_ramp(away, 0.008, 0.035), _ramp(abs(turn), 0.25, 0.6))
    height = grip + open_share * (_SAFE - grip)
    # Fingers that are too low for where they are go up before they go aside.
    aside = 1 - _ramp(height - here[2], 0.015, 0.045) * _ramp(away, 0.015, 0.03)
    if away < 0.016 and abs(turn) < 0.35 and abs(grip - here[2]) < 0.012:
        return _action([*off, grip - here[2]], 0.0, _CLOSE)
    return _action([*(aside * off), height - here[2]], turn, _OPEN)


def _carry(state: TabletopState) -> np.ndarray:
    """The next action with the object between the fingers: the same funnel, over the tray."""
    height_now, off = state.gripper[2], np.subtract(state.tray, state.target[:2])
    away, low = np.linalg.norm(off), state.rest + 0.012
    height = low + _ramp(away, 0.02, 0.05) * (_CARRY - low)
    aside = 1 - _ramp(height - height_now, 0.02, 0.05)
    return _action([*(aside * off), height - height_now], 0.0, _CLOSE)


def _ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on."""
    return float(np.clip((value - low) / (high - low), 0, 1))


def _over_tray(state: TabletopState) -> bool:
    """Whether the object falls into the tray if it is let go, or lies in it."""
    off = np.abs(np.subtract(state.target[:2], state.tray))
    return bool((off < TRAY_INSIDE - 0.025).all()) and state.target[2] < state.rest + _DROP


def _turn(state: TabletopState) -> float:
    """Yaw by which the fingers come to lie along the object's sides."""
    if not state.square:
        return 0.0
    # A cube looks the same after a quarter turn; the nearest one is taken.
    off = state.target[3] - state.gripper[3]
    return float((off + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _action(move: list[float], turn: float, gripper: float) -> np.ndarray:
    action = np.zeros(ACTION_SIZE, np.float32)
    action[:3] = np.clip(np.divide(move, STEP), -1, 1)
    action[5] = np.clip(turn / TURN, -1, 1)
    action[6] = gripper
    return action


def expert_policy() -> RobotPolicy:
    """The control that knows where everything is; of the tabletop only."""

    def act(observations, memory, first) -> Acted:
        del first
        states = [TabletopState.unpack(observation.state) for observation in observations]
        return Acted(np.stack([expert_action(state)[None] for state in states]), memory=memory)

    return RobotPolicy(lambda batch: None, act)
