"""The policy's programs: one for each keep ratio and batch size, compiled before the first frame.

Executables are called, not jitted functions, so nothing can be compiled while frames wait: an
argument of another shape is an error. The vision encoder does not know the ratio and is a program
of its own. Memories go in and out as one pytree a frame, so a drive may share its batch with any
others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from fastdrive_jax.errors import UserError
from fastdrive_jax.inference.latency import Measured, measure_buckets
from fastdrive_jax.inference.pictures import encode_pictures, encoded_inputs
from fastdrive_jax.inference.policy import DrivingPolicy, plan_tokens, start_state
from fastdrive_jax.pruning import make_pruner
from fastdrive_jax.pruning.select import num_keep


@dataclass(frozen=True)
class Frame:
    """What is planned from.

    Attributes:
        images: uint8 pictures of the policy's cameras.
        speed: Metres per second.
        command: 0 left, 1 straight, 2 right.
        memory: What the frame before left; None if there is none.
    """

    images: UInt8[np.ndarray, "C H W 3"]
    speed: float
    command: int
    memory: Any = None


@dataclass(frozen=True)
class Planned:
    """What comes of it.

    Attributes:
        waypoints: [T, 2] metres, x forward, y left, every half second.
        kept: [K] visual tokens, camera after camera.
        memory: For the next frame; None of a method without.
        remembered: Whether the frame's memory was used.
    """

    waypoints: Float[np.ndarray, "T 2"]
    kept: Int[np.ndarray, " K"]
    memory: Any
    remembered: bool


@dataclass(frozen=True)
class Programs:
    """A policy, compiled.

    Attributes:
        policy: Model and method; its own ratio does not count.
        params: {"vla": ..., "pruner": ...} on the device.
        ratios: Keep ratios, largest first.
        sizes: Batch sizes, ascending.
        encode: Batch size to the vision encoder's program.
        decide: (ratio, batch size) to the program of all that follows.
        start: Ratio to the memory before a drive's first frame.
    """

    policy: DrivingPolicy
    params: dict
    ratios: tuple[float, ...]
    sizes: tuple[int, ...]
    encode: Mapping[int, Callable]
    decide: Mapping[tuple[float, int], Callable]
    start: Mapping[float, Any]

    @property
    def temporal(self) -> bool:
        """Whether the method remembers."""
        return self.policy.pruner.temporal is not None

    def size_for(self, count: int) -> int:
        """The compiled batch size that `count` frames take; the largest for more."""
        return next((size for size in self.sizes if size >= count), self.sizes[-1])

    @property
    def total(self) -> int:
        """N, visual tokens of a frame."""
        return self.policy.model.config.visual_tokens

    def tokens(self, ratio: float) -> int:
        """K of a ratio."""
        return self.policy.pruner.budget(self.total, ratio)


def bucket_policy(policy: DrivingPolicy, ratio: float) -> DrivingPolicy:
    """The policy at a ratio; without its method where that neither leaves out nor remembers."""
    if ratio == 1 and policy.pruner.temporal is None:
        return DrivingPolicy(policy.model, make_pruner("uniform"), 1.0)
    return replace(policy, keep_ratio=ratio)


def compile_programs(
    policy: DrivingPolicy,
    params: dict,
    ratios: Sequence[float],
    sizes: Sequence[int],
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Programs:
    """Compiles every ratio at every batch size.

    Args:
        policy: Model and method.
        params: {"vla": ..., "pruner": ...}.
        ratios: Keep ratios.
        sizes: Batch sizes.
        seed: Of methods that draw.
        progress: Called with the programs done and their number; may raise to stop.

    Raises:
        UserError: A ratio is outside (0, 1], or the method needs what no picture tells.
    """
    if "foreground" in policy.pruner.needs:
        raise UserError(
            f"{policy.pruner.name} prunes by the true foreground, which pictures do not tell; "
            "choose another method."
        )
    config = policy.model.config
    ratios = tuple(sorted(ratios, reverse=True))
    for ratio in ratios:
        num_keep(config.visual_tokens, ratio)
    params = jax.device_put(params)
    count, done = len(sizes) * (1 + len(ratios)), 0
    encode, decide, start = {}, {}, {}
    policies = {ratio: bucket_policy(policy, ratio) for ratio in ratios}
    needs = policy.pruner.needs
    for ratio in ratios:
        start[ratio] = start_state(policies[ratio], 1)
    for size in sizes:
        shape = size, len(config.cameras), *config.image_size, 3
        images = jax.ShapeDtypeStruct(shape, jnp.uint8)
        progress(done, count)
        lowered = jax.jit(partial(_encode, policy.model, needs)).lower(params["vla"], images)
        encode[size], done = lowered.compile(), done + 1
        encoded = lowered.out_info
        for ratio in ratios:
            progress(done, count)
            row, number = jax.ShapeDtypeStruct((size,), jnp.float32), jnp.uint32(0)
            command = jax.ShapeDtypeStruct((size,), jnp.int32)
            given = params, encoded, images, row, command, number, (start[ratio],) * size
            run = jax.jit(partial(_decide, policies[ratio], seed))
            decide[ratio, size], done = run.lower(*given).compile(), done + 1
    progress(done, count)
    return Programs(policy, params, ratios, tuple(sizes), encode, decide, start)


def run_batch(
    programs: Programs, ratio: float, frames: Sequence[Frame], number: int = 0
) -> list[Planned]:
    """Plans some frames at once and waits for it.

    Args:
        programs: Of `compile_programs`.
        ratio: One of its keep ratios.
        frames: At least one, at most the largest batch size; padded by the last to the next size.
        number: Of the batch, from which methods that draw do so.
    """
    size, start = programs.size_for(len(frames)), programs.start[ratio]
    padded = [*frames, *[frames[-1]] * (size - len(frames))]
    used = [frame.memory is not None and _fits(frame.memory, start) for frame in padded]
    memories = tuple(
        frame.memory if known else start for frame, known in zip(padded, used, strict=True)
    )
    images = jax.device_put(np.stack([frame.images for frame in padded]))
    speed = np.array([frame.speed for frame in padded], np.float32)
    command = np.array([frame.command for frame in padded], np.int32)
    encoded = programs.encode[size](programs.params["vla"], images)
    waypoints, kept, after = programs.decide[ratio, size](
        programs.params, encoded, images, speed, command, np.uint32(number), memories
    )
    waypoints, kept = jax.device_get((waypoints, kept))
    rows = list(zip(waypoints, kept, after, used, strict=True))
    return [Planned(*row) for row in rows[: len(frames)]]


def time_programs(
    programs: Programs, rounds: int = 12, progress: Callable[[], None] = lambda: None
) -> dict[int, Measured]:
    """Batch size to the times of all buckets, as in the middle of a drive.

    Args:
        programs: Of `compile_programs`.
        rounds: Of each.
        progress: Called before each frame; may raise to stop.
    """
    config = programs.policy.model.config
    blank = Frame(np.zeros((len(config.cameras), *config.image_size, 3), np.uint8), 5.0, 1)
    tokens = {ratio: programs.tokens(ratio) for ratio in programs.ratios}
    memories: dict[tuple[float, int], Any] = {}

    def frame(ratio: float, size: int) -> None:
        progress()
        batch = [replace(blank, memory=memories.get((ratio, size)))] * size
        memories[ratio, size] = run_batch(programs, ratio, batch)[0].memory

    return {
        size: measure_buckets(
            {ratio: partial(frame, ratio, size) for ratio in programs.ratios}, tokens, rounds
        )
        for size in programs.sizes
    }


def _encode(model, needs, vla, images):
    return encode_pictures(model, {"params": vla}, images, needs)


def _decide(policy, seed, params, encoded, images, speed, command, number, memories):
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *memories)
    inputs = encoded_inputs(policy.model, encoded, images, policy.pruner.needs)
    key = jax.random.fold_in(jax.random.key(seed), number)
    planned = plan_tokens(policy, params, inputs.replace(state=state), speed, command, key)
    after = tuple(
        jax.tree.map(lambda leaf: leaf[row : row + 1], planned.state)  # noqa: B023
        for row in range(len(memories))
    )
    return planned.waypoints, planned.keep_indices, after


def _fits(memory: Any, start: Any) -> bool:
    """Whether a memory is of this bucket's kind: one that reuses keys has another at each cut."""
    if jax.tree.structure(memory) != jax.tree.structure(start):
        return False
    pairs = zip(jax.tree.leaves(memory), jax.tree.leaves(start), strict=True)
    return all(a.shape == b.shape for a, b in pairs)
