"""Small ONNX models, written by the onnx package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 64, 96, 32
UP = "model.layers.0.mlp.up_proj.MatMul.weight_Q4"
EMBEDDING = "model.embed_tokens.weight"


def value(name: str, kind: int, axes: list[Any] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, axes)


def make() -> onnx.ModelProto:
    """An embedding, a matrix of 4 bits, one of 8 with scales, and an If with a node in each branch."""
    rng = np.random.default_rng(0)
    branch = {
        name: helper.make_graph([helper.make_node(op, ["y"], [name])], name, [], [value(name, TensorProto.FLOAT, None)])
        for name, op in (("then", "Identity"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Gather", [EMBEDDING, "input_ids"], ["e"]),
        helper.make_node("Cast", ["e"], ["x"], to=TensorProto.FLOAT),
        helper.make_node(
            "MatMulNBits", ["x", UP, "up.scales"], ["u"], domain="com.microsoft", K=K, N=N, bits=4, block_size=BLOCK
        ),
        helper.make_node("DequantizeLinear", ["q8", "q8.scale", "q8.zero"], ["w"]),
        helper.make_node("MatMul", ["u", "w"], ["y"]),
        helper.make_node("If", ["c"], ["logits"], then_branch=branch["then"], else_branch=branch["else"]),
    ]
    arrays = {
        EMBEDDING: rng.standard_normal((100, K)).astype(np.float16),
        UP: rng.integers(0, 256, (N, K // BLOCK, BLOCK // 2)).astype(np.uint8),
        "up.scales": rng.standard_normal(N * K // BLOCK).astype(np.float32),
        "q8": rng.integers(-128, 128, (N, 32)).astype(np.int8),
        "q8.scale": np.array(0.01, np.float32),
        "q8.zero": np.array(0, np.int8),
        "c": np.array(True),
    }
    graph = helper.make_graph(
        nodes,
        "main",
        [value("input_ids", TensorProto.INT64, ["batch", 16])],
        [value("logits", TensorProto.FLOAT, ["batch", 16, 32])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, producer_name="a test", ir_version=10)


def write(path: Path, model: onnx.ModelProto | None = None) -> Path:
    """All in one file."""
    path.write_bytes((model or make()).SerializeToString())
    return path


def write_external(path: Path, data: str = "weights.data") -> Path:
    """Every tensor beside the model."""
    onnx.save(make(), path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def point(path: Path, key: str, text: str | None, tensor: int = 0) -> Path:
    """Change what a model says of where the data of a tensor is."""
    model = onnx.load(path, load_external_data=False)
    entries = model.graph.initializer[tensor].external_data
    for entry in list(entries):
        if entry.key == key:
            entries.remove(entry)
    if text is not None:
        entries.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return path
