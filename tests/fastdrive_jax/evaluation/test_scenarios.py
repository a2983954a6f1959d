import numpy as np

from fastdrive_jax.evaluation.scenarios import SCENARIOS, scenario_of


def way(x, y=0.0):
    """Six waypoints that end at (x, y), evenly."""
    return np.linspace([x / 6, y / 6], [x, y], 6)


def test_each_kind_by_hand():
    braking = np.array([[3, 0], [5, 0], [6, 0], [6.5, 0], [6.6, 0], [6.6, 0]], float)
    turned = np.array([[3, 0], [5, 1], [6, 2], [6.5, 3], [6.6, 3.1], [6.6, 3.2]], float)
    cases = [
        (way(20), "straight"),
        (way(20, 1.99), "straight"),
        (way(20, -2.01), "turn"),
        (way(0), "stopped"),
        (braking, "stopped"),
        (turned, "stopped"),  # it turned, and stands now
        (way(1.45), "stopped"),  # 0.24 m in the last half second
        (way(1.55), "straight"),
    ]
    future = np.stack([case for case, _ in cases])
    found = scenario_of(future, np.ones((len(cases), 6), bool))
    assert [SCENARIOS[k] for k in found] == [name for _, name in cases]


def test_what_is_not_known_does_not_count():
    future = np.stack([way(20, 5)] * 3)
    valid = np.zeros((3, 6), bool)
    valid[0, :2] = True  # 1.7 m to the side by then
    valid[1, :1] = True
    assert scenario_of(future, valid).tolist() == [0, 0, 0]
    assert scenario_of(0 * future, valid).tolist() == [2, 2, 0]
