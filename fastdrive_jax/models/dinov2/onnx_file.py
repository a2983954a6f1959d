"""Reads a DINOv2 encoder's tensors out of an ONNX graph.

PyTorch's exporter keeps the names of biases, norms and convolutions but stores the matrices of
linear layers, already transposed, under numbers. The graph itself says which is which: a product
with a numbered matrix goes into a sum with a named bias.
"""

from pathlib import Path

import numpy as np

from fastdrive_jax.errors import UserError

_PREFIX = "backbone."


def read_onnx_encoder(path: Path) -> dict[str, np.ndarray]:
    """Tensors with Hugging Face names and PyTorch layouts; parts other than the encoder are left.

    Raises:
        UserError: The `onnx` package is absent, the file unreadable, or a matrix without a place.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise UserError(
            f"Reading {path} needs the onnx package; run `pip install -e '.[dino]'` in the clone."
        ) from error
    try:
        graph = onnx.load(str(path)).graph
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} is no readable ONNX file ({error}).") from error
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    users = {name: node for node in graph.node for name in node.input}
    found: dict[str, np.ndarray] = {}
    anonymous = []
    for name, tensor in tensors.items():
        if name.startswith(_PREFIX):
            found[name.removeprefix(_PREFIX)] = numpy_helper.to_array(tensor)
        elif "::" in name and tensor.dims:
            anonymous.append(name)
    positions: dict[str, np.ndarray] = {}
    for name in anonymous:
        node, value = users.get(name), numpy_helper.to_array(tensors[name])
        if node is not None and node.op_type == "MatMul" and value.ndim == 2:
            bias = _bias_of(users.get(node.output[0]), tensors)
            if bias and bias.startswith(_PREFIX):
                key = bias.removeprefix(_PREFIX).removesuffix(".bias") + ".weight"
                found[key] = value.T
                continue
        # The exporter split the position embeddings: class part to a concat, patches to a reshape.
        elif node is not None and node.op_type in ("Concat", "Reshape") and value.ndim == 3:
            positions[node.op_type] = value
            continue
        raise UserError(f"{path} holds a matrix {name} whose place in DINOv2 is not clear.")
    if set(positions) != {"Concat", "Reshape"}:
        raise UserError(f"{path} holds no position embeddings of a DINOv2 encoder.")
    found["embeddings.position_embeddings"] = np.concatenate(
        [positions["Concat"], positions["Reshape"]], axis=1
    )
    return found


def _bias_of(node, tensors) -> str | None:
    if node is None or node.op_type != "Add":
        return None
    return next((name for name in node.input if name in tensors and name.endswith(".bias")), None)
