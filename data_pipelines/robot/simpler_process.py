"""SIMPLER's simulator behind a pipe, run by the interpreter that SIMPLER is installed in.

SAPIEN 2.2.2 needs NumPy 1 and this library NumPy 2, so they cannot share a process. This file
imports nothing of the library. A request is a line of JSON on stdin, an answer a line of JSON on
stdout, behind which a picture's bytes may follow; what else is printed goes to stderr.
"""

import contextlib
import json
import os
import sys
import traceback

import numpy as np


def main() -> None:
    """Answers until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the simulator prints
    env, camera = None, None
    for line in sys.stdin.buffer:
        request, image = json.loads(line), b""
        try:
            if request["do"] == "make":
                if env is not None:
                    env.close()
                env, camera, answer = make(request), request["camera"], {}
            elif request["do"] == "reset":
                options = request["options"]
                for part in options.values():
                    part.update({k: np.array(v) for k, v in part.items() if isinstance(v, list)})
                observation, _ = env.reset(seed=0, options=options)
                answer, image = seen(env, observation, camera, False)
            else:
                observation, _, success, _, _ = env.step(np.array(request["action"]))
                answer, image = seen(env, observation, camera, bool(success))
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer).encode() + b"\n" + image)
        answers.flush()
    if env is not None:
        with contextlib.suppress(Exception):  # the parent is gone
            env.close()


def make(request):
    """The environment of a request."""
    import gymnasium
    import mani_skill2_real2sim.envs  # noqa: F401 (registers them)
    from mani_skill2_real2sim import ASSET_DIR

    return gymnasium.make(
        request["environment"],
        obs_mode="rgbd",
        rgb_overlay_path=str(ASSET_DIR / "real_inpainting" / request["overlay"]),
        rgb_overlay_cameras=[request["camera"]],
        camera_cfgs={"add_segmentation": True},  # tells what the photograph must not hide
        **request["settings"],
    )


def seen(env, observation, camera, success):
    """What a policy may see and feel, and whether the task is done at this moment."""
    image = np.ascontiguousarray(observation["image"][camera]["rgb"], np.uint8)
    env = env.unwrapped
    pose, robot = env.tcp.pose, env.agent.robot
    joints = dict(zip((j.name for j in robot.get_active_joints()), robot.get_qpos(), strict=True))
    answer = {
        "shape": image.shape,
        "place": pose.p.tolist(),
        "quaternion": pose.q.tolist(),  # real part first
        "fingers": [float(place) for name, place in joints.items() if "finger" in name],
        "instruction": env.get_language_instruction(),
        "success": success,
    }
    return answer, image.tobytes()


if __name__ == "__main__":
    main()
