"""Drives of the synthetic world for the service's page, drawn frame by frame as they are played."""

import threading
from functools import cache

import cv2

from data_pipelines.closed_loop.clean import clean_routes
from data_pipelines.closed_loop.route import Route, expert_waypoints
from data_pipelines.synthetic.camera import make_camera
from data_pipelines.synthetic.config import WorldConfig
from data_pipelines.synthetic.planner import DT
from data_pipelines.synthetic.render import Stage, prepare, render
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingConfig
from fastdrive_jax.serving.demo import DemoDrive, DemoFrame

FIRST = 300  # scenes below may have been measured with, see `experiments.drive_closed_loop`
PERIOD = 0.2
SECONDS = 10.0
_QUALITY = 92


def demo_drives(model: DrivingConfig, count: int) -> list[DemoDrive]:
    """Drives of unseen scenes, through the model's cameras, as the world's own driver drives them.

    Args:
        model: Whose cameras and picture size they have.
        count: Drives.
    """
    height, width = model.image_size
    world = WorldConfig(height=height, width=width, cameras=model.cameras)
    routes = clean_routes(world, "val", FIRST, count, SECONDS)
    return [demo_drive(route, world) for route in routes]


def demo_drive(route: Route, world: WorldConfig) -> DemoDrive:
    """A route, driven by its reference; what is drawn is kept."""
    stages: dict[int, Stage] = {}
    lock = threading.Lock()

    @cache
    def draw(frame: int) -> DemoFrame:
        time = frame * PERIOD
        state = route.reference[round(time / DT)]
        phase, scene = route.phase(time), route.scene(time)
        with lock:
            if phase not in stages:
                stages[phase] = prepare(scene)
            sway = scene.sway[frame % len(scene.sway)]
            given = state, route.begin + time, sway
            pictures = {}
            for number, name in enumerate(world.cameras):
                camera = make_camera(name, world.height, world.width, scene.pitch[name])
                drawn = render(scene, stages[phase], camera, *given, 64 * frame + number)
                flags = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
                pictures[name] = cv2.imencode(".jpg", drawn.image[..., ::-1], flags)[1].tobytes()
        ahead = expert_waypoints(route, state, time)
        return DemoFrame(
            pictures=pictures,
            speed=float(state.speed),
            command=int(route.command(state)),
            driven=tuple((float(x), float(y)) for x, y in ahead),
        )

    frames = round(SECONDS / PERIOD)
    return DemoDrive(route.scenario.replace("_", " "), frames, PERIOD, draw)
