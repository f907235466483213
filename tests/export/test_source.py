"""Rows of output tensors against slow definitions: every transform, every dtype, every cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.errors import UnsupportedError
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.source import rows, to_float32
from tests.pico import to_bytes, write_safetensors

RANDOM = np.random.default_rng(3)
ARRAYS: dict[str, NDArray[np.float32]] = {
    "matrix": RANDOM.normal(size=(24, 10)).astype(np.float32),
    "vector": RANDOM.normal(size=24).astype(np.float32),
    "experts": RANDOM.normal(size=(3, 8, 5)).astype(np.float32),
    "expert 0": RANDOM.normal(size=(4, 5)).astype(np.float32),
    "expert 1": RANDOM.normal(size=(4, 5)).astype(np.float32),
    "expert 2": RANDOM.normal(size=(4, 5)).astype(np.float32),
}


def half_to_interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Row by row: pair j of a head is its rows j and j + half in the source, 2j and 2j + 1 in the file."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = weight[head * size + j]
            out[head * size + 2 * j + 1] = weight[head * size + size // 2 + j]
    return out


def tensor(shape: tuple[int, ...], *sources: str, **values: object) -> OutTensor:
    """An output tensor called x."""
    return OutTensor(name="x", shape=shape, sources=sources, **values)  # type: ignore[arg-type]


CASES = {
    "copy": tensor((24, 10), "matrix"),
    "copy of a vector": tensor((24,), "vector"),
    "copy of experts": tensor((3, 8, 5), "experts"),
    "cut": tensor((17, 10), "matrix"),
    "padded": tensor((31, 10), "matrix"),
    "permute": tensor((24, 10), "matrix", transform="permute", heads=4),
    "permute of a vector": tensor((24,), "vector", transform="permute", heads=2),
    "add_one": tensor((24,), "vector", transform="add_one"),
    "transpose": tensor((10, 24), "matrix", transform="transpose"),
    "stack": tensor((3, 4, 5), "expert 0", "expert 1", "expert 2", transform="stack"),
    "slice": tensor((3, 5, 5), "experts", transform="slice", span=(2, 7)),
    "constant": tensor((4,), transform="constant", values=(1.0, 2.0, 3.0, 4.5)),
}


def definition(name: str, arrays: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """The whole tensor, from whole sources."""
    matrix, vector, experts = arrays["matrix"], arrays["vector"], arrays["experts"]
    return {
        "copy": matrix,
        "copy of a vector": vector,
        "copy of experts": experts,
        "cut": matrix[:17],
        "padded": np.vstack([matrix, np.zeros((7, 10), np.float32)]),
        "permute": half_to_interleaved(matrix, 4),
        "permute of a vector": half_to_interleaved(vector, 2),
        "add_one": vector + np.float32(1),
        "transpose": matrix.T,
        "stack": np.stack([arrays[f"expert {n}"] for n in range(3)]),
        "slice": experts[:, 2:7],
        "constant": np.array([1.0, 2.0, 3.0, 4.5], np.float32),
    }[name]


def checkpoint(folder: Path, dtype: str) -> tuple[Checkpoint, dict[str, NDArray[np.float32]]]:
    """ARRAYS stored as `dtype`, and the numbers that this keeps."""
    tensors = {name: (dtype, values.shape, to_bytes(values, dtype)) for name, values in ARRAYS.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    ckpt = open_checkpoint(folder)
    return ckpt, {name: ckpt.read(name) for name in ARRAYS}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("name", CASES)
def test_every_cut(name: str, dtype: str, tmp_path: Path) -> None:
    """All runs of rows of every transform equal those of the slow definition, bit for bit."""
    ckpt, arrays = checkpoint(tmp_path, dtype)
    out = CASES[name]
    expected = definition(name, arrays)
    assert expected.shape == out.shape
    expected = expected.reshape(-1, out.shape[-1])
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            found = rows(ckpt, out, start, stop)
            assert found.shape == (stop - start, out.shape[-1])
            np.testing.assert_array_equal(to_float32(found), expected[start:stop])
    kept = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float32}[dtype]
    assert found.dtype == (np.float32 if out.transform in ("add_one", "constant") else kept)


def test_mixed_dtypes_become_float32(tmp_path: Path) -> None:
    """Experts stored in two ways are stacked as float32."""
    pieces = {"expert 0": "BF16", "expert 1": "F32", "expert 2": "F16"}
    tensors = {name: (kind, (4, 5), to_bytes(ARRAYS[name], kind)) for name, kind in pieces.items()}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    ckpt = open_checkpoint(tmp_path)
    found = rows(ckpt, CASES["stack"], 0, 12)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.concatenate([ckpt.read(name) for name in pieces]))


def test_codes_without_scales(tmp_path: Path) -> None:
    """float8 weights are no numbers by themselves: row 31 of the test programme."""
    write_safetensors(tmp_path / "model.safetensors", {"matrix": ("F8_E4M3", (24, 10), bytes(240))})
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnsupportedError, match="dtype F8_E4M3 needs its scales"):
        rows(open_checkpoint(tmp_path), CASES["copy"], 0, 4)
