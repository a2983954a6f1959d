"""A frame in stages that are timed apart: the parts of `inference.policy.plan`, each a program.

Preprocess is the host's: decoding and resizing. Vision does not know the method, so a round of many
settings runs it once. The pruner stage is what a method does before the language model; what one
within the model does is part of its prefill.
"""

import os
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fastdrive_jax.inference.pictures import Encoded, encode_pictures, encoded_inputs
from fastdrive_jax.inference.policy import (
    Chosen,
    DrivingPolicy,
    Plan,
    ReadPrompt,
    answer_prompt,
    choose_inputs,
    read_prompt,
)
from fastdrive_jax.models.qwen2_5_vl.driving import DrivingVLA
from fastdrive_jax.pruning import PrunerInputs, make_pruner
from fastdrive_jax.pruning.interface import Need, stands_before

STAGES = ("preprocess", "vision", "pruner", "prefill", "decode")
BUSY = "busy_"
_WHOLE = make_pruner("fastv")  # a method within the model cuts nothing at a ratio of 1


@dataclass(frozen=True)
class Setting:
    """A method at a ratio.

    Attributes:
        policy: The model with the method.
        pruner_params: Its parameters.
    """

    policy: DrivingPolicy
    pruner_params: Any = None

    @property
    def whole(self) -> bool:
        """Whether nothing is pruned."""
        return self.policy.pruner is _WHOLE


class Given(flax.struct.PyTreeNode):
    """What all settings get.

    Attributes:
        prompt: Token ids.
        foreground: What the control that knows the truth chooses by.
        key: Of methods that draw.
    """

    prompt: Int[Array, "B L"]
    foreground: Float[Array, "B N"]
    key: jax.Array


def unpruned(model: DrivingVLA) -> Setting:
    """The model alone."""
    return Setting(DrivingPolicy(model, _WHOLE, 1.0))


def preprocess(jpegs: Sequence[bytes], size: tuple[int, int]) -> UInt8[np.ndarray, "B 1 H W 3"]:
    """RGB pictures of H, W pixels from JPEGs, one a sample."""
    height, width = size
    found = []
    for jpeg in jpegs:
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        if picture.shape[:2] != size:
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        found.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
    return np.stack(found)[:, None]


def vision_stage(model: DrivingVLA, needs: frozenset[Need], vla: dict, images: Array) -> Encoded:
    """The vision encoder, with the queries and keys that some methods read."""
    return encode_pictures(model, {"params": vla}, images, needs)


def pruner_stage(
    policy: DrivingPolicy, params: dict, encoded: Encoded, images: Array, given: Given, state: Any
) -> Chosen:
    """What a method does before the language model."""
    inputs = encoded_inputs(policy.model, encoded, images, policy.pruner.needs)
    inputs = inputs.replace(foreground=given.foreground, state=state)
    chosen = choose_inputs(policy, params, inputs, given.prompt, given.key)
    if reader(policy) is policy:
        return chosen
    return chosen.replace(inputs=PrunerInputs(chosen.tokens))  # nothing behind reads more


def prefill_stage(policy: DrivingPolicy, params: dict, chosen: Chosen, given: Given) -> ReadPrompt:
    """The language model over what was kept, and what a method within it does."""
    return read_prompt(policy, params, chosen, given.prompt, given.key)


def decode_stage(policy: DrivingPolicy, params: dict, chosen: Chosen, read: ReadPrompt) -> Plan:
    """All tokens of the trajectory but the first, which the prefill gives."""
    return answer_prompt(policy, params, chosen, read)


def reader(policy: DrivingPolicy) -> DrivingPolicy:
    """The policy of the later stages: of a method that is done before the model, the model's own.

    So methods that leave as many tokens share one program.
    """
    if stands_before(policy.pruner) and policy.pruner.temporal is None:
        return unpruned(policy.model).policy
    return policy


def trace_stages(
    setting: Setting,
    vla: dict,
    encoded: Encoded,
    images: Array,
    given: Given,
    state: Any,
    known: MutableMapping[Any, jax.stages.Traced],
) -> dict[str, jax.stages.Traced]:
    """The stages behind the encoder, traced; of all arguments, shapes will do.

    Args:
        setting: The method.
        vla: The model's parameters.
        encoded: Of `vision_stage`.
        images: Of `preprocess`.
        given: What all settings get.
        state: Of `start_state`.
        known: Traced before, which grows: settings that differ before the language model only
            share what is behind.
    """
    found = {}

    def trace(stage, function, policy, *arguments):
        shapes = jax.eval_shape(lambda tree: tree, arguments)
        leaves, tree = jax.tree.flatten(shapes)
        key = stage, policy, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in known:
            known[key] = jax.jit(partial(function, policy)).trace(*shapes)
        found[stage] = known[key]
        return known[key].out_info

    policy, late = setting.policy, reader(setting.policy)
    params = {"vla": vla, "pruner": setting.pruner_params}
    chosen = trace("pruner", pruner_stage, policy, params, encoded, images, given, state)
    params = late_params(setting, vla)
    read = trace("prefill", prefill_stage, late, params, chosen, given)
    trace("decode", decode_stage, late, params, chosen, read)
    return found


def compile_stages(
    traced: Mapping[Any, Mapping[str, jax.stages.Traced]],
) -> dict[Any, dict[str, jax.stages.Compiled]]:
    """Programs of `trace_stages` of several settings, under their keys.

    What settings share is compiled once, and all is compiled at the same time: the compiler works
    on a large program with few threads.
    """
    wanted = list(dict.fromkeys(stage for each in traced.values() for stage in each.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda stage: stage.lower().compile(), wanted)
        programs = dict(zip(wanted, found, strict=True))
    return {
        key: {name: programs[stage] for name, stage in each.items()} for key, each in traced.items()
    }


def time_stages(
    programs: Mapping[str, jax.stages.Compiled],
    setting: Setting,
    vla: dict,
    encoded: Encoded,
    images: Array,
    given: Given,
    state: Any,
) -> tuple[dict[str, float], Plan]:
    """Milliseconds of the stages behind the encoder, and the plan.

    Args:
        programs: Of `compile_stages`.
        setting: The method; without one its stage takes no time.
        vla: See `trace_stages`, for this and what follows.
        encoded: See there.
        images: See there.
        given: See there.
        state: See there.
    """
    times: dict[str, float] = {}
    params = {"vla": vla, "pruner": setting.pruner_params}
    chosen = clock(times, "pruner", programs["pruner"], params, encoded, images, given, state)
    if setting.whole:
        times["pruner"] = times[BUSY + "pruner"] = 0.0
    params = late_params(setting, vla)
    read = clock(times, "prefill", programs["prefill"], params, chosen, given)
    return times, clock(times, "decode", programs["decode"], params, chosen, read)


def clock(times: MutableMapping[str, float], name: str, function: Callable, *arguments: Any) -> Any:
    """The function's result, and in `times` the milliseconds until it is there.

    Beside them, under `BUSY`, those that this process's threads worked: on a CPU that others use
    too, work says more of a program than the time that it waited for its turn.
    """
    begin, busy = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(function(*arguments))
    times[name] = 1e3 * (time.perf_counter() - begin)
    times[BUSY + name] = 1e3 * (time.process_time() - busy)
    return out


def late_params(setting: Setting, vla: dict) -> dict:
    """Parameters of the stages behind the pruner's."""
    whole = reader(setting.policy) is setting.policy
    return {"vla": vla, "pruner": setting.pruner_params if whole else None}
