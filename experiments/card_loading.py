"""How each form of an export is loaded: the sections of its model card that show code."""

from experiments.export_source import Source
from fastdrive_jax.export.onnx_programs import PRUNER, policy_file

LOADING = {
    "pruner": """\
`pruner/`: the pruner alone, safetensors and Orbax.

```python
from fastdrive_jax.export.pruner import read_pruner
config, params = read_pruner("pruner")            # "orbax" as second argument: the same
```

Without JAX, in PyTorch, with the single file `torch_pruner.py` next to this card (torch,
safetensors):

```python
from torch_pruner import keep, load_pruner
scores = load_pruner("pruner")(tokens)            # [B * C, n, D] to [B * C, n]: each picture alone
kept = keep(scores.reshape(B, -1), k)             # [B, K] of the C pictures of a sample together
```

A pruner with positions (`rope`) also takes `ids` [3, B * C, n]: 0, row and column in the image.
""",
    "policy": """\
`policy/`: the whole pruned policy, safetensors and Orbax.

```python
import jax
from fastdrive_jax.export.driving import read_policy
from fastdrive_jax.inference.policy import plan
policy, params = read_policy("policy")
planned = jax.jit(plan, static_argnums=0)(policy, params, images, speed, command)
```

`fastdrive_jax.export.bundle.read_bundle_orbax("policy", sharding)` restores it onto any mesh.
""",
    "stablehlo": """\
`stablehlo/`: the whole policy as programs for {platforms}, without this library (jax, flatbuffers,
safetensors). Buckets: {buckets}.

```python
from stablehlo.run import load_program
answer = load_program(keep_ratio={ratio}, batch={batch})(images, speed, command)
```
""",
    "int8": """\
`int8/`: the policy with the kernels of linear layers in eight bits (qwix).

```python
import jax
from fastdrive_jax.export.quantized import quantized_plan, read_quantized
quantized, tensors = read_quantized("int8")       # activations="int8": products of int8 too
planned = jax.jit(quantized_plan(quantized))(tensors, images, speed, command)
```
""",
    "onnx": """\
`onnx/`: ONNX with the weights inside, for onnxruntime and other readers of opset {opset}; static
shapes, see `onnx/config.json`.

```python
import onnxruntime
session = onnxruntime.InferenceSession("onnx/{model}")
{outputs} = session.run(None, dict({inputs}))
```
""",
}


QWEN_LOADING = LOADING | {
    "policy": """\
`policy/`: the whole pruned model, safetensors and Orbax, with the checkpoint's tokenizer.

```python
import jax
from fastdrive_jax.export.pruned_qwen import read_pruned_qwen
from fastdrive_jax.inference.pruned_qwen import answer_pictures, prompt_batch
from fastdrive_jax.models.qwen2_5_vl.processor import read_processor
asked, params = read_pruned_qwen("policy")
processor = read_processor("policy/processor")
prompt = processor.sample("What is ahead?", pictures).ids      # pictures resized already
found = jax.jit(answer_pictures, static_argnums=0)(
    asked, params, images, *prompt_batch(asked, [prompt])
)
text = processor.chat.decode(found.ids[0][: found.lengths[0]])
```

`fastdrive_jax.export.bundle.read_bundle_orbax("policy", sharding)` restores it onto any mesh.
""",
    "stablehlo": """\
`stablehlo/`: the whole model as programs for {platforms}, without this library (jax, flatbuffers,
safetensors). Buckets: {buckets}. `ids` come from the checkpoint's tokenizer, with one placeholder
per image, padded; `lengths` counts the real ones.

```python
from stablehlo.run import load_program
answer = load_program(keep_ratio={ratio}, batch={batch})(images, ids, lengths)
```
""",
    "int8": """\
`int8/`: the model with the kernels of linear layers in eight bits (qwix).

```python
import jax
from fastdrive_jax.export.pruned_qwen import quantized_answer, read_quantized_qwen
asked, bits, tensors = read_quantized_qwen("int8")   # activations="int8": products of int8 too
found = jax.jit(quantized_answer(asked, bits))(tensors, images, ids, lengths)
```
""",
}


def onnx_call(source: Source, batch: int) -> dict[str, str]:
    """File, inputs and outputs of what the card shows."""
    if source.vla is None:
        places = ["position_ids"] * source.pruner.rope
        inputs, outputs, model = ["tokens", *places], "(scores,)", PRUNER
    else:
        inputs, outputs = ["images", "speed", "command"], "waypoints, keep_indices"
        model = policy_file(batch)
    given = ", ".join(f"{name}={name}" for name in inputs)
    return {"model": model, "inputs": given, "outputs": outputs}
