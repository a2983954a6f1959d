"""The driving VLA, pruned by a method, as a policy of the closed loop."""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.closed_loop.policies import CONSTANT_VELOCITY, EXPERT, Policy, View
from data_pipelines.schema import STRAIGHT
from experiments.drives import UNPRUNED, Trained, method_of, step
from experiments.quickstart import WorldRun
from fastdrive_jax.inference.generate import generate
from fastdrive_jax.inference.policy import DrivingPolicy, start_state
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA, visual_positions
from fastdrive_jax.pruning.mistakes import check_kept

NO_IMAGE = "no_image"
CONTROLS = {"expert": EXPERT, "constant_velocity": CONSTANT_VELOCITY}


def driving_policy(world: WorldRun, name: str, ratio: float | None, seed: int) -> Policy:
    """What drives, by its name.

    Args:
        world: The VLA and what training gave the methods.
        name: Of `CONTROLS`, "unpruned", "no_image", or a method.
        ratio: Kept tokens, of methods.
        seed: Of methods that draw.
    """
    if name in CONTROLS:
        return CONTROLS[name]
    if name == NO_IMAGE:
        return no_image_policy(world.model, world.params)
    trained = Trained(world.run.recon.pruner, world.trained["pruner"], world.prior)
    pruner, weights = method_of(name, trained)
    ratio = 1.0 if name == UNPRUNED else ratio
    return vla_policy(
        DrivingPolicy(world.model, pruner, ratio), {"vla": world.params, "pruner": weights}, seed
    )


def vla_policy(policy: DrivingPolicy, params: dict, seed: int = 0) -> Policy:
    """A pruned VLA; its method's state, if it has one, goes from frame to frame."""

    def plan(state, view: View):
        key = jax.random.fold_in(jax.random.key(seed), view.frame)
        given = view.images[:, None], None, view.foreground, view.speed, view.command
        planned = step(policy, params, *given, key, state)
        kept = np.asarray(planned.keep_indices)
        check_kept(kept, policy.model.config.visual_tokens, policy.pruner.name, policy.keep_ratio)
        return np.asarray(planned.waypoints), kept, planned.state

    return Policy(plan, lambda count: start_state(policy, count))


def no_image_policy(model: DrivingVLA, params: dict) -> Policy:
    """The VLA that is shown no token of the picture, only speed and command."""

    def plan(memory, view: View):
        return np.asarray(_plan_blind(model, params, view.speed, view.command)), None, memory

    return Policy(plan, looks=False)


@partial(jax.jit, static_argnums=0)
def _plan_blind(model, params, speed, command):
    batch = len(speed)
    tokens = jnp.zeros((batch, 0, model.config.text.hidden_size))
    where = visual_positions(model.config, batch)[:, :, :0]
    prompt = model.config.vocabulary.prompt(speed, command)
    return generate(model, {"params": params}, tokens, where, prompt)


def frame_planner(policy: Policy, image_size: tuple[int, int], tokens: int) -> Callable[[], None]:
    """Plans a frame for one car with each call, as in the middle of a drive, and waits for it."""
    view = View(
        routes=(),
        states=(),
        time=0.0,
        frame=0,
        speed=np.full(1, 5.0, np.float32),
        command=np.full(1, STRAIGHT, np.int32),
        images=np.zeros((1, *image_size, 3), np.uint8),
        foreground=np.zeros((1, tokens), np.float32),
    )
    memory = policy.start(1)

    def plan() -> None:
        nonlocal memory
        _, _, memory = policy.plan(memory, view)
        jax.block_until_ready(memory)

    return plan


def frame_seconds(policy: Policy, image_size: tuple[int, int], tokens: int, rounds: int) -> float:
    """Median wall seconds of a plan for one car."""
    plan, spent = frame_planner(policy, image_size, tokens), []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        plan()
        spent.append(time.perf_counter() - begin)
    return float(np.median(spent[1:]))
