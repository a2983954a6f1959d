"""The tabletop's expert: from where things are to the next action, without memory.

Above the object, down, close, lift; into the tray also over, down, open. Since it looks only at
what is, it recovers from whatever has happened: a lost object is fetched again.
"""

import numpy as np

from data_pipelines.robot.policies import ACTION_SIZE, Acted, RobotPolicy
from data_pipelines.robot.scene import TRAY_INSIDE, TRAY_RIM
from data_pipelines.robot.tabletop import STEP, TURN, TabletopState

_SAFE = 0.085  # height of the fingertips over what stands on the table
_CARRY = 0.10
_OPEN, _CLOSE = -1.0, 1.0


def expert_action(state: TabletopState) -> np.ndarray:
    """The action `[7]` at a state."""
    here, target = np.array(state.gripper), np.array(state.target)
    off = target[:2] - here[:2]
    if state.place and _in_tray(state):
        return _action([0, 0, _CARRY - here[2]], 0.0, _OPEN)
    held = np.linalg.norm(target[:3] - here[:3]) < 0.022 and state.opening < state.width + 0.004
    if held and not state.place:
        return _action([0, 0, STEP], 0.0, _CLOSE)
    if held:
        return _carry(state)
    turn = _turn(state)
    grip = max(target[2] - 0.002, 0.016)
    if np.linalg.norm(off) > 0.01 or abs(turn) > 0.15:
        # Fingers that are low are raised before they are moved aside.
        low = here[2] < _SAFE - 0.015 and np.linalg.norm(off) > 0.02
        return _action([0, 0, _SAFE - here[2]] if low else [*off, _SAFE - here[2]], turn, _OPEN)
    down = grip - here[2]
    if abs(down) > 0.008:
        return _action([*off, down], turn, _OPEN)
    return _action([*off, down], 0.0, _CLOSE)


def _carry(state: TabletopState) -> np.ndarray:
    """The next action with the object between the fingers."""
    here = np.array(state.gripper)
    off = np.subtract(state.tray, state.target[:2])
    if np.linalg.norm(off) < 0.02:
        down = state.rest + 0.012 - here[2]
        if abs(down) > 0.01:
            return _action([*off, down], 0.0, _CLOSE)
        return _action([0, 0, 0], 0.0, _OPEN)
    if here[2] < _CARRY - 0.02:
        return _action([0, 0, _CARRY - here[2]], 0.0, _CLOSE)
    return _action([*off, _CARRY - here[2]], 0.0, _CLOSE)


def _in_tray(state: TabletopState) -> bool:
    """Whether the object lies in the tray or is low enough over it to be let go."""
    off = np.abs(np.subtract(state.target[:2], state.tray))
    return (
        bool((off < TRAY_INSIDE - 0.02).all()) and state.target[2] < state.rest + TRAY_RIM - 0.004
    )


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
