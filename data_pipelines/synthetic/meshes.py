"""Low-poly models of everything that belongs to traffic: the foreground."""

import numpy as np

from data_pipelines.synthetic.config import BARRIER, GROUND, PERSON, SIGN, TRAFFIC_LIGHT, VEHICLE
from data_pipelines.synthetic.mesh import Mesh, MeshBuilder, beside, disc, facing

_GLASS = (52, 66, 84)
_TYRE = (24, 24, 26)


def car(colour, braking: bool, size=(1.9, 4.5, 1.6)) -> Mesh:
    """A car of `size` (width, length, height); its tail lights burn when it stands or brakes."""
    width, length, height = size
    mesh = MeshBuilder(VEHICLE)
    waist = height * 0.56
    half_l, half_w = length / 2, width / 2
    mesh.box((0, 0, 0.12 + waist / 2), (length, width, waist - 0.1), colour)
    for sign in (1, -1):
        side = sign * (half_w + 0.01)
        wheels = [disc((x * length, side, 0.34), 0.36, "y", sign) for x in (0.31, -0.31)]
        mesh.add(wheels, _TYRE)
        mesh.add(
            [disc((x * length, side, 0.34), 0.17, "y", sign) for x in (0.31, -0.31)], (150,) * 3
        )
    rear, front = -half_l - 0.01, half_l + 0.01
    mesh.add([facing(0, 0.32, width * 0.98, 0.26, rear)], (38, 38, 42))
    mesh.add([facing(0, 0.62, 0.5, 0.16, rear)], (225, 225, 215))
    lamp = (255, 36, 22) if braking else (96, 16, 18)
    tall = 0.34 if braking else 0.24
    lamps = [facing(s * (half_w - 0.27), waist - 0.14, 0.48, tall, rear) for s in (1, -1)]
    mesh.add(lamps, lamp, glowing=braking)
    mesh.add([facing(0, 0.32, width * 0.98, 0.26, front, 1)], (38, 38, 42))
    mesh.add([facing(0, 0.58, width * 0.5, 0.2, front, 1)], (30, 30, 34))
    lamps = [facing(s * (half_w - 0.27), waist - 0.14, 0.44, 0.22, front, 1) for s in (1, -1)]
    mesh.add(lamps, (250, 246, 220))
    cabin_z = 0.12 + waist + (height - waist - 0.12) / 2 - 0.06
    cabin = (length * 0.56, width * 0.9, height - waist - 0.1)
    roof = tuple(0.92 * c for c in colour)
    mesh.box((-0.06 * length, 0, cabin_z), cabin, _GLASS, top=0.82, faces="fblr")
    mesh.box(
        (-0.06 * length, 0, cabin_z + cabin[2] / 2), (cabin[0] * 0.82, cabin[1] * 0.82, 0.05), roof
    )
    if braking:
        mesh.add(
            [facing(0, cabin_z + cabin[2] * 0.36, 0.8, 0.11, -0.06 * length - cabin[0] * 0.44)],
            (255, 36, 22),
            glowing=True,
        )
    return mesh.build()


def slow_truck(size=(2.3, 5.6, 2.7)) -> Mesh:
    """A works vehicle, always crawling: orange, with a red and white board at the rear."""
    width, length, height = size
    mesh = MeshBuilder(VEHICLE)
    orange, dark = (236, 140, 24), (58, 58, 60)
    mesh.box((0, 0, 0.6), (length, width * 0.92, 0.5), dark)
    for sign in (1, -1):
        side = sign * (width / 2 + 0.01)
        mesh.add([disc((x * length, side, 0.48), 0.5, "y", sign) for x in (0.33, -0.28)], _TYRE)
    mesh.box(
        (-0.14 * length, 0, 0.85 + (height - 0.85) / 2),
        (length * 0.7, width, height - 0.85),
        orange,
    )
    mesh.box((0.36 * length, 0, 1.5), (length * 0.26, width * 0.92, 1.5), (240, 168, 60), top=0.88)
    rear = -0.49 * length - 0.02
    mesh.add([facing(0, 1.75, width * 0.9, 1.2, rear)], (245, 245, 240))
    stripes = [facing(y * width, 1.75, width * 0.14, 1.2, rear - 0.01) for y in (-0.32, 0.0, 0.32)]
    mesh.add(stripes, (214, 30, 34))
    mesh.add([facing(y * width, 0.98, 0.3, 0.2, rear) for y in (-0.4, 0.4)], (150, 24, 24))
    mesh.add([facing(0, height + 0.12, 0.5, 0.24, rear + 0.3)], (255, 196, 40), glowing=True)
    return mesh.build()


def truck(colour, size=(2.5, 7.0, 3.2)) -> Mesh:
    """A lorry of `size` (width, length, height): a closed body behind a cab."""
    width, length, height = size
    mesh = MeshBuilder(VEHICLE)
    dark = (52, 54, 58)
    mesh.box((0, 0, 0.65), (length, 0.9 * width, 0.4), dark)
    mesh.box((-0.14 * length, 0, (0.85 + height) / 2), (0.72 * length, width, height - 0.85),
             (222, 222, 216))  # fmt: skip
    cab = min(height, 2.6)
    mesh.box((0.37 * length, 0, (0.6 + cab) / 2), (0.26 * length, 0.94 * width, cab - 0.6), colour)
    mesh.add([facing(0, 0.72 * cab, 0.8 * width, 0.3 * cab, length / 2 + 0.01, 1)], _GLASS)
    for sign in (1, -1):
        side = sign * (width / 2 + 0.01)
        mesh.add([disc((x * length, side, 0.5), 0.5, "y", sign) for x in (0.33, -0.3)], _TYRE)
        mesh.add([beside(0.37 * length, 0.74 * cab, 0.12 * length, 0.25 * cab, side, sign)], _GLASS)
    rear = -length / 2 - 0.01
    mesh.add([facing(0, 0.55, 0.9 * width, 0.3, rear)], dark)
    mesh.add([facing(s * 0.4 * width, 0.75, 0.3, 0.22, rear) for s in (1, -1)], (130, 20, 20))
    return mesh.build()


def bus(colour, size=(2.6, 10.0, 3.1)) -> Mesh:
    """A bus with a row of windows."""
    width, length, height = size
    mesh = MeshBuilder(VEHICLE)
    mesh.box((0, 0, 0.3 + (height - 0.3) / 2), (length, width, height - 0.3), colour)
    for sign in (1, -1):
        side = sign * (width / 2 + 0.01)
        mesh.add(
            [beside(x, 2.05, 1.5, 0.95, side, sign) for x in np.arange(-3.9, 4.2, 1.7)], _GLASS
        )
        mesh.add([disc((x, side, 0.5), 0.5, "y", sign) for x in (3.0, -2.8)], _TYRE)
        mesh.add([facing(0, 2.0, width * 0.84, 1.1, sign * (length / 2 + 0.01), sign)], _GLASS)
        lamp = (250, 246, 220) if sign > 0 else (110, 18, 18)
        lamps = [
            facing(y, 0.75, 0.4, 0.25, sign * (length / 2 + 0.01), sign) for y in (-0.95, 0.95)
        ]
        mesh.add(lamps, lamp)
    return mesh.build()


def cyclist(shirt, size=(0.8, 1.9, 1.85)) -> Mesh:
    """A rider on a bicycle; the rider is a person, the bicycle a vehicle."""
    mesh = MeshBuilder(PERSON)
    frame = (40, 44, 52)
    mesh.box((0, 0, 0.62), (1.0, 0.1, 0.1), frame, VEHICLE)
    for x in (0.55, -0.55):
        mesh.box((x, 0, 0.36), (0.62, 0.1, 0.66), _TYRE, VEHICLE)
    mesh.box((-0.05, 0.14, 0.72), (0.3, 0.17, 0.62), (44, 52, 84))
    mesh.box((-0.05, -0.14, 0.78), (0.3, 0.17, 0.62), (44, 52, 84))
    mesh.box((0.1, 0, 1.28), (0.42, 0.56, 0.64), shirt)
    mesh.box((0.3, 0, 1.32), (0.3, 0.78, 0.16), shirt)
    mesh.box((0.16, 0, 1.72), (0.26, 0.26, 0.26), (226, 178, 146))
    mesh.box((0.16, 0, 1.86), (0.3, 0.3, 0.14), (238, 228, 60))
    return mesh.build()


def person(shirt, trousers, skin, hair, stride: float, height: float) -> Mesh:
    """A standing or walking person, 1.95 m for `height` 1; turned towards the camera."""
    mesh = MeshBuilder(PERSON)
    k = height
    for side in (1, -1):
        foot = side * (0.13 + stride)
        leg = [(0, foot - 0.11, 0), (0, foot + 0.11, 0), (0, side * 0.12 + 0.13, 0.92)]
        leg.append((0, side * 0.12 - 0.13, 0.92))
        mesh.add([np.array(leg) * k], trousers, culled=False)
        mesh.add([np.array(facing(foot, 0.05, 0.28, 0.12)) * k], (34, 28, 26), culled=False)
    for side in (1, -1):
        hand = side * (0.36 + stride * 0.6)
        arm = [(0, side * 0.25, 1.52), (0, side * 0.38, 1.48), (0, hand + 0.07, 0.86)]
        arm.append((0, hand - 0.07, 0.86))
        mesh.add([np.array(arm) * k], tuple(0.8 * c for c in shirt), culled=False)
    torso = [(0, -0.24, 0.86), (0, 0.24, 0.86), (0, 0.3, 1.55), (0, -0.3, 1.55)]
    mesh.add([np.array(torso) * k], shirt, culled=False)
    mesh.add([disc((0, 0, 1.74 * k), 0.2 * k)], skin, culled=False)
    mesh.add([np.array(facing(0, 1.88, 0.34, 0.14)) * k], hair, culled=False)
    return mesh.build(billboard=True)


def _plate(mesh: MeshBuilder, z: float):
    mesh.box((0.06, 0, z / 2), (0.1, 0.12, z), (128, 130, 134), GROUND)


def stop_sign() -> Mesh:
    """A red octagon, 1.1 m wide and 2.5 m high, for traffic that comes from behind it (-x)."""
    mesh = MeshBuilder(SIGN)
    _plate(mesh, 2.5)
    mesh.add([disc((0.01, 0, 2.5), 0.6, sign=1)], (120, 122, 126))
    mesh.add([disc((0, 0, 2.5), 0.62)], (246, 246, 246))
    mesh.add([disc((-0.01, 0, 2.5), 0.55)], (204, 18, 26))
    mesh.add([facing(0, 2.5, 0.74, 0.2, -0.02)], (246, 246, 246))
    return mesh.build()


def other_sign(kind: int) -> Mesh:
    """A sign that asks for nothing: 0 speed, 1 blue disc, 2 yellow diamond, 3 green board."""
    mesh = MeshBuilder(SIGN)
    _plate(mesh, 2.4)
    mesh.add([disc((0.01, 0, 2.4), 0.45, sign=1)], (120, 122, 126))
    if kind == 0:
        mesh.add([disc((0, 0, 2.4), 0.5)], (206, 30, 36))
        mesh.add([disc((-0.01, 0, 2.4), 0.38)], (246, 246, 246))
        mesh.add([facing(0, 2.4, 0.34, 0.26, -0.02)], (24, 24, 24))
    elif kind == 1:
        mesh.add([disc((0, 0, 2.4), 0.5)], (24, 86, 190))
        mesh.add([facing(0, 2.4, 0.14, 0.5, -0.01)], (246, 246, 246))
    elif kind == 2:
        mesh.add([disc((0, 0, 2.4), 0.58, corners=4) @ _QUARTER.T + _QUARTER_SHIFT], (246, 196, 20))
        mesh.add([facing(0, 2.4, 0.12, 0.44, -0.01)], (24, 24, 24))
    else:
        mesh.add([facing(0, 2.5, 1.3, 0.8)], (18, 120, 72))
        mesh.add([facing(0, 2.5 + dz, 0.9, 0.14, -0.01) for dz in (-0.18, 0.18)], (240,) * 3)
    return mesh.build()


def gantry(rng: np.random.Generator, span: float) -> Mesh:
    """Direction boards above the road, on a beam from one pole at the right-hand side."""
    mesh = MeshBuilder(SIGN)
    grey = (112, 116, 120)
    mesh.box((0.3, 0, 3.1), (0.3, 0.3, 6.2), grey, GROUND)
    mesh.box((0.3, span / 2, 6.0), (0.2, span, 0.25), grey, GROUND)
    colour = ((20, 84, 176), (18, 112, 68))[rng.integers(0, 2)]
    count = int(rng.integers(1, 3))
    for k in range(count):
        y, width = span * (k + 1) / (count + 0.6), rng.uniform(2.0, 2.9)
        mesh.box((0.1, y, 5.7), (0.12, width, 1.7), (120, 122, 126))
        mesh.add([facing(y, 5.7, width, 1.7, 0.02)], (240, 240, 240))
        mesh.add([facing(y, 5.7, width - 0.2, 1.5, 0.01)], colour)
        lines = [
            facing(y, 5.7 + dz, width * rng.uniform(0.4, 0.7), 0.24, 0.0) for dz in (-0.35, 0.35)
        ]
        mesh.add(lines, (240, 240, 240))
    return mesh.build()


_C = np.sqrt(0.5)
_QUARTER = np.array([[1, 0, 0], [0, _C, -_C], [0, _C, _C]])
_QUARTER_SHIFT = np.array([0, 2.4 * _C, 2.4 * (1 - _C)])

_LAMPS = {"red": (255, 28, 20), "yellow": (255, 196, 24), "green": (30, 240, 96)}


def traffic_light(state: str, reach: float, bottom: float = 3.6) -> Mesh:
    """A signal head of three 0.9 m lamps on a mast arm.

    Args:
        state: "red", "yellow" or "green" for traffic coming from -x, "off" for none lit.
        reach: How far the head hangs to the left of the pole (0 puts it on the pole), metres.
        bottom: Height of the head's lower edge, metres.
    """
    mesh = MeshBuilder(TRAFFIC_LIGHT)
    grey = (92, 96, 100)
    mesh.box((0.3, 0, (bottom + 2.4) / 2), (0.2, 0.2, bottom + 2.4), grey, GROUND)
    if reach:
        mesh.box((0.3, reach / 2, bottom + 2.3), (0.16, abs(reach), 0.16), grey, GROUND)
    mesh.box((0.2, reach, bottom + 1.45), (0.36, 1.2, 2.9), (28, 30, 30))
    mesh.add([facing(reach, bottom + 1.45, 1.3, 3.0, 0.01)], (232, 190, 40))
    mesh.add([facing(reach, bottom + 1.45, 1.14, 2.86, 0.0)], (22, 24, 24))
    for k, name in enumerate(("green", "yellow", "red")):
        lit = name == state
        colour = _LAMPS[name] if lit else tuple(0.2 * c for c in _LAMPS[name])
        mesh.add([disc((-0.01, reach, bottom + 0.5 + 0.95 * k), 0.45)], colour, glowing=lit)
    return mesh.build()


def barrier(size=(1.6, 0.45, 1.1)) -> Mesh:
    """A red and white board across the lane; `size` is (width, length, height)."""
    width, length, height = size
    mesh = MeshBuilder(BARRIER)
    mesh.box((0, 0, height / 2), (length, width, height), (240, 240, 236))
    for sign in (1, -1):
        face = sign * (length / 2 + 0.01)
        stripes = [
            facing(y * width, height * 0.62, width * 0.17, height * 0.66, face, sign)
            for y in (-0.36, 0.0, 0.36)
        ]
        mesh.add(stripes, (220, 34, 30))
    return mesh.build()


def cone(size=(0.6, 0.6, 1.0)) -> Mesh:
    """An orange cone with a white band."""
    mesh = MeshBuilder(BARRIER)
    mesh.box((0, 0, 0.05), (size[1], size[0], 0.1), (60, 40, 30))
    mesh.box((0, 0, 0.3), (0.46, 0.46, 0.44), (255, 106, 20), top=0.72, faces="fblr")
    mesh.box((0, 0, 0.62), (0.34, 0.34, 0.2), (246, 246, 246), top=0.76, faces="fblr")
    mesh.box((0, 0, 0.86), (0.26, 0.26, 0.28), (255, 106, 20), top=0.36)
    return mesh.build()
