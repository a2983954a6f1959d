"""A stand-in for SIMPLER's packages, for the interpreter that SIMPLER_PYTHON names."""

import sys
from pathlib import Path

GYMNASIUM = '''
import json, os
from types import SimpleNamespace
import numpy as np

class Simulator:
    """Counts; the picture shows the steps, the task is done while the first numbers add up to 1."""

    def __init__(self, name, settings):
        self.name, self.settings = name, settings
        self.unwrapped, self.agent = self, SimpleNamespace(robot=self)
        with open(os.environ["FAKE_SIMPLER_LOG"], "a") as log:
            log.write(json.dumps({"made": name, **settings}) + "\\n")

    def reset(self, seed, options):
        assert seed == 0
        assert isinstance(options["robot_init_options"]["init_rot_quat"], np.ndarray)
        print("a simulator prints what it likes")
        self.options, self.steps, self.sum = options, 0, 0.0
        return self.observe(), {}

    def step(self, action):
        assert action.shape == (7,)
        if action[1] == 9:
            raise ZeroDivisionError("the arm fell off")
        if action[1] == 8:
            os.write(2, b"no Vulkan here\\n")
            os._exit(3)
        self.steps, self.sum = self.steps + 1, self.sum + action[0]
        self.tcp = SimpleNamespace(pose=SimpleNamespace(p=action[:3], q=np.array([1.0, 0, 0, 0])))
        self.told = action[6]
        return self.observe(), 0.0, abs(self.sum - 1) < 1e-6, False, {}

    def observe(self):
        if not self.steps:
            half = np.sqrt(0.5)
            pose = SimpleNamespace(p=np.array([1.0, 2, 3]), q=np.array([half, half, 0, 0]))
            self.tcp, self.told = SimpleNamespace(pose=pose), 0.0
        camera = self.settings["rgb_overlay_cameras"][0]
        picture = np.full((48, 64, 4), self.steps, np.uint8)[..., :3]
        return {"image": {camera: {"rgb": picture}}}

    def get_active_joints(self):
        names = ("joint_torso", "joint_finger_right", "joint_finger_left", "joint_head_pan")
        return [SimpleNamespace(name=name) for name in names]

    def get_qpos(self):
        return np.array([7.0, self.told, 0.5, 7.0])

    def get_language_instruction(self):
        return f"episode {self.options['obj_init_options'].get('episode_id', 'none')}"

    def close(self):
        pass

def make(name, **settings):
    return Simulator(name, settings)
'''


def write_simulator(folder: Path) -> Path:
    """Writes the packages; returns an interpreter that has them."""
    package = folder / "mani_skill2_real2sim"
    (package / "envs").mkdir(parents=True)
    (folder / "gymnasium.py").write_text(GYMNASIUM)
    (package / "__init__.py").write_text("from pathlib import Path\nASSET_DIR = Path('/assets')\n")
    (package / "envs" / "__init__.py").write_text("")
    python = folder / "python"
    python.write_text(f"#!/bin/sh\nPYTHONPATH='{folder}' exec '{sys.executable}' \"$@\"\n")
    python.chmod(0o755)
    return python
