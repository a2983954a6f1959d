"""Small truths, shared by the tests of the planning protocols."""

import numpy as np

from fastdrive_jax.evaluation.truth import KINDS, Agents, DrivingTruth

STILL = np.zeros((6, 2))


def straight(speed):
    """Places every 0.5 s along x at a speed in m/s."""
    return np.stack([np.arange(1, 7) * speed / 2, np.zeros(6)], 1)


def one(future=STILL, boxes=(), **fields):
    """A truth of one sample, on a map without anything.

    Each of `boxes` is (kind, step or steps, x, y, yaw, length, width); it is there at these steps
    and at the present moment.
    """
    table = np.zeros((1, len(boxes), 7, 5), np.float32)
    valid = np.zeros((1, len(boxes), 7), bool)
    for k, (_, steps, *box) in enumerate(boxes):
        table[0, k] = box
        valid[0, k, steps] = True
        table[0, k, 0, :2] = 200.0, 200.0
        valid[0, k, 0] = True
    kind = np.array([[KINDS.index(box[0]) for box in boxes]], np.int32).reshape(1, -1)
    given = {
        "token": np.array(["a"]),
        "scene": np.array(["drive"]),
        "future": np.asarray(future)[None],
        "future_valid": np.ones((1, 6), bool),
        "agents": Agents(table, valid, valid.copy(), kind),
        "drivable": ((),),
        "boundaries": ((),),
    }
    return DrivingTruth(**(given | fields))


def random_truth(rng, samples=40, agents=6, **fields):
    """Ways that bend, and boxes of all kinds close to them, some hidden, gone or new."""
    shape = (samples, agents)
    boxes = np.zeros((*shape, 7, 5), np.float32)
    boxes[..., :2] = rng.uniform((-6, -7), (32, 7), (*shape, 1, 2))
    boxes[..., :2] += rng.normal(0, 0.4, (*shape, 7, 2)).cumsum(2)
    boxes[..., 2] = rng.uniform(-4, 4, (*shape, 1))
    boxes[..., 3:] = rng.uniform((0.4, 0.4), (9.0, 2.6), (*shape, 1, 2))
    valid = rng.random((*shape, 7)) < 0.85
    return DrivingTruth(
        token=np.array([f"t{k}" for k in range(samples)]),
        scene=np.array([f"drive{k // 5}" for k in range(samples)]),
        future=random_ways(rng, samples),
        future_valid=np.ones((samples, 6), bool),
        agents=Agents(
            boxes,
            valid,
            valid & (rng.random(valid.shape) < 0.8),
            rng.integers(0, len(KINDS), shape).astype(np.int32),
        ),
        **fields,
    )


def random_ways(rng, samples):
    """Arcs [S, 6, 2], some standing still and some written with two decimals."""
    speed = rng.choice([0.0, 0.05, 1.0, 3.0, 5.0], (samples, 1)) * rng.uniform(0.8, 1.2)
    yaw = np.cumsum(np.repeat(rng.uniform(-0.3, 0.3, (samples, 1)), 6, 1), 1)
    ways = np.stack([np.cumsum(speed * np.cos(yaw), 1), np.cumsum(speed * np.sin(yaw), 1)], -1)
    return np.where(rng.random((samples, 1, 1)) < 0.5, ways, np.round(ways, 2))
