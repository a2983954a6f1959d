"""The protocols against a slow way of counting that shares no code with them."""

import itertools

import cv2
import numpy as np
import pytest
import shapely
from truths import random_truth, random_ways

from fastdrive_jax.evaluation.open_loop import protocol_metrics
from fastdrive_jax.evaluation.protocols import PROTOCOLS
from fastdrive_jax.evaluation.rasters import draw_lines
from fastdrive_jax.evaluation.truth import KINDS, Area


def _rectangle(x, y, yaw, length, width):
    turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
    halves = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) * (length / 2, width / 2)
    return halves @ turn.T + (x, y)


def _agents(truth, k, step, kinds, seen, now):
    agents = truth.agents
    for a, kind in enumerate(agents.kind[k]):
        there = agents.valid[k, a, step] and (agents.valid[k, a, 0] or not now)
        if there and KINDS[kind] in kinds and (agents.seen[k, a, step] or not seen):
            yield agents.boxes[k, a, step].astype(float)


def _polygon_hits(truth, k, way):
    way, ego = [np.zeros(2)], [np.zeros(2), *way]  # of the lidar and of the rear axle
    for before, here in itertools.pairwise(ego):
        dx, dy = here - before
        turn = np.arctan2(dy, dx) if np.hypot(dx, dy) >= 1 else 0.0
        way.append(here + 0.943713 * np.array([np.cos(turn) - 1, np.sin(turn)]))
    still = np.hypot(*(way[6] - way[1])) < 0.5
    hits = []
    for i in range(1, 7):
        a, b = (way[i + 1], way[i - 1]) if i < 6 else (way[6], way[5])
        yaw = 0.0 if still else np.arctan2(a[1] - b[1], a[0] - b[0])
        x, y = way[i] + 0.5 * np.array([np.cos(yaw), np.sin(yaw)])
        car = shapely.Polygon(_rectangle(x + 0.943713, y, yaw, 4.084, 1.85))
        others = _agents(truth, k, i, KINDS, True, False)
        hits.append(any(car.intersects(shapely.Polygon(_rectangle(*box))) for box in others))
    return np.array(hits)


def _raster_hits(name, marks, way):
    """Hits of a way on one picture [1000, 1000] for each step."""
    draw = pytest.importorskip("skimage.draw")
    cell = float(np.float32(0.1))
    x = np.array([-2.042, 2.042, 2.042, -2.042]) + 1.485793
    y = np.array([0.925, 0.925, -0.925, -0.925])
    columns, rows = draw.polygon((x + 49.95) / cell, (y + 49.95) / cell)
    cells = np.stack([columns, rows], 1) - 499.5
    last = np.zeros(2)
    hits = []
    for place, mark in zip(way, marks, strict=True):
        dx, dy = place - last
        yaw = np.arctan2(dy, dx) if np.hypot(dx, dy) >= 1 else 0.0
        turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]], np.float32)
        at = np.trunc(np.round(cells @ turn + 499.5) + place / cell).astype(int).clip(0, 999)
        hits.append(mark[at[:, 1], at[:, 0]].any())
        last = place
    return np.array(hits)


def _drawn_agents(name, truth, k):
    cell = float(np.float32(0.1))
    vehicles = ("vehicle", "cycle", "emergency") if name == "omnidrive" else ("vehicle", "cycle")
    marks = np.zeros((6, 1000, 1000), np.uint8)
    for step in range(1, 7):
        for box in _agents(truth, k, step, vehicles, name != "omnidrive", name == "omnidrive"):
            points = _rectangle(*box) / cell
            points = np.round(points + 500) if name == "omnidrive" else np.trunc(points + 499.5)
            cv2.fillPoly(marks[step - 1], [points.astype(np.int32)], 1)
    return marks


def _values(hits, name):
    parts = [hits[:2], hits[:4], hits]
    return [p.mean() if name == "impromptu" else float(p.any()) for p in parts]


@pytest.mark.parametrize("name", ["impromptu", "omnidrive", "bevplanner"])
def test_collisions_of_random_ways(name):
    rng = np.random.default_rng(5)
    truth = random_truth(rng, drivable=((),) * 40, boundaries=((),) * 40)
    planned = random_ways(rng, 40)
    found = protocol_metrics(PROTOCOLS[name], planned, truth).values
    total = 0
    for k in range(40):
        if name == "impromptu":
            hits = [_polygon_hits(truth, k, way) for way in (planned[k], truth.future[k])]
        else:
            marks = _drawn_agents(name, truth, k)
            hits = [_raster_hits(name, marks, way) for way in (planned[k], truth.future[k])]
        want = _values(hits[0] & ~hits[1], name)
        got = [found[f"collision_{name}_{t}s"][k] for t in (1, 2, 3)]
        assert got == pytest.approx(want), (name, k)
        total += want[2] > 0
    assert 4 <= total <= 36


def test_leaving_random_areas():
    rng = np.random.default_rng(6)
    planned = random_ways(rng, 40)
    areas, want = [], []
    for way in planned:
        street = np.array([(-9, -4), (30, -4), (30, 4), (-9, 4)]) + rng.uniform(-4, 4, (4, 2))
        hole = np.array([(8, 2), (9, 2), (9, 3)]) + rng.uniform(-2, 2, 2)
        areas.append((Area(street, (hole,)),))
        road = np.zeros((1000, 1000), np.uint8)
        cv2.fillPoly(road, [np.round(street * 10 + 500).astype(np.int32)], 1)
        cv2.fillPoly(road, [np.round(hole * 10 + 500).astype(np.int32)], 0)
        out, last = [], np.zeros(2)
        for place in (np.zeros(2), *way):
            dx, dy = place - last
            car = np.zeros((1000, 1000), np.uint8)
            box = _rectangle(place[0] + 1.485793, place[1], np.arctan2(dy, dx), 4.08, 1.85)
            cv2.fillPoly(car, [np.round((box + 50) / np.float32(0.1)).astype(np.int32)], 1)
            out.append(bool(((road == 0) & (car == 1)).any()))
            last = place
        want.append([any(out[1 : 2 * t + 1]) and not out[0] for t in (1, 2, 3)])
    truth = random_truth(rng, drivable=tuple(areas))
    found = protocol_metrics(PROTOCOLS["omnidrive"], planned, truth).values
    got = np.stack([found[f"intersection_omnidrive_{t}s"] for t in (1, 2, 3)], 1)
    np.testing.assert_array_equal(got, want)
    assert 5 < np.sum(want, 0)[2] < 35


def test_crossing_random_lines():
    rng = np.random.default_rng(7)
    planned = random_ways(rng, 40)
    lines = tuple(
        tuple(rng.uniform((-10, -8), (35, 8), (rng.integers(2, 5), 2)) for _ in range(2))
        for _ in range(40)
    )
    truth = random_truth(rng, boundaries=lines)
    found = protocol_metrics(PROTOCOLS["bevplanner"], planned, truth).values
    for k in range(40):
        mark = np.zeros((1000, 1000), np.uint8)
        for line in lines[k]:
            along = np.r_[0, np.cumsum(np.hypot(*np.diff(line, axis=0).T))]
            spots = [
                [np.interp(s, along, line[:, c]) for c in (0, 1)]
                for s in np.linspace(0, along[-1], 20)
            ]
            cells = np.trunc((np.array(spots) + 49.95) / 0.1 + 1e-9).astype(int).clip(0, 999)
            for a, b in itertools.pairwise(cells):
                cv2.line(mark, a.tolist(), b.tolist(), 1, 1)
        np.testing.assert_array_equal(mark, draw_lines(np.ones_like(mark), lines[k]))
        ways = (planned[k], truth.future[k])
        hits = [_raster_hits("bevplanner", [mark] * 6, way) for way in ways]
        got = [found[f"intersection_bevplanner_{t}s"][k] for t in (1, 2, 3)]
        assert got == _values(hits[0] & ~hits[1], "bevplanner")
    assert 4 < found["intersection_bevplanner_3s"].sum() < 36


@pytest.mark.parametrize("name", ["omnidrive", "bevplanner"])
def test_boxes_that_almost_touch_and_ways_that_leave_the_grid(name):
    """One box a sample, within 30 cm of the car at one step, or at the grid's edge."""
    rng = np.random.default_rng(8)
    count = 150
    planned = np.cumsum(np.repeat(rng.uniform((1.1, -3), (10.5, 3), (count, 1, 2)), 6, 1), 1)
    truth = random_truth(rng, count, 1, drivable=((),) * count, boundaries=((),) * count)
    agents = truth.agents
    agents.valid[:], agents.seen[:], agents.kind[:] = False, True, 0
    truth.future[:] = [0.0, -30.0]  # the true car is elsewhere
    steps = rng.integers(1, 7, count)
    gaps = np.zeros(count)
    for k, step in enumerate(steps):
        dx, dy = planned[k, step - 1] / step
        yaw = np.arctan2(dy, dx)
        x, y = planned[k, step - 1] + 1.485793 * np.array([np.cos(yaw), np.sin(yaw)])
        turn, side, away = rng.uniform(-0.2, 0.2), rng.choice([-1, 1]), rng.uniform(0, 0.3)
        shift = side * (1.85 / 2 + 0.5 + away)
        box = (x - shift * np.sin(yaw), y + shift * np.cos(yaw), yaw + turn, 3.0, 1.0)
        box = (*np.clip(box[:2], -50, 50), *box[2:])
        agents.boxes[k, 0] = box
        agents.valid[k, 0, [0, step]] = True
        car = shapely.Polygon(_rectangle(x, y, yaw, 4.084, 1.85))
        gaps[k] = car.distance(shapely.Polygon(_rectangle(*box)))
    found = protocol_metrics(PROTOCOLS[name], planned, truth).values[f"collision_{name}_3s"]
    want = [
        _raster_hits(name, _drawn_agents(name, truth, k), planned[k]).any() for k in range(count)
    ]
    np.testing.assert_array_equal(found, want)
    inside = np.abs(planned).max((1, 2)) < 45
    assert (found[inside & (gaps > 0)] > 0).sum() >= 3  # cells meet where rectangles do not
    assert (found[~inside] > 0).sum() > 5
