"""Models that are headers only: their weights are holes. llama.cpp tells, to the byte, what it would allocate."""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import Metadata, OutTensor, string
from efficli.export.gguf.model import layout
from efficli.families import ModelShape, read_shape
from efficli.families.tensors import expected_tensors
from efficli.ops import ggml
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.libraries import library_path
from efficli.ops.llama_log import captured_log, llama_cpp


def write_checkpoint(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of this config.json in BF16, whose weights are a hole in the file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries, end = {}, 0
    for spec in expected_tensors(read_shape(config)):
        start, end = end, end + 2 * prod(spec.shape)
        entries[spec.name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return open_checkpoint(folder)


def write_header(path: Path, metadata: Metadata, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """A GGUF file without a tokenizer whose tensors (name: type, shape) are a hole."""
    stored = [
        StoredTensor(name, shape, TYPE_IDS[kind], prod(shape[:-1]) * ggml.row_bytes(kind, shape[-1]))
        for name, (kind, shape) in tensors.items()
    ]
    found = lay_out(metadata | {"tokenizer.ggml.model": string("none")}, stored)
    with path.open("wb") as file:
        file.write(found.head)
        file.truncate(found.nbytes)
    return path


def described(folder: Path, config: Mapping[str, Any]) -> tuple[ModelShape, Metadata, list[OutTensor]]:
    """What `efficli export` would write for this config.json, without the vocabulary."""
    ckpt = write_checkpoint(folder, config)
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt)
    return shape, {"general.architecture": string(shape.facts.gguf_arch), **metadata}, tensors


def exported(path: Path, config: Mapping[str, Any], *, kind: str = "F16") -> ModelShape:
    """The header that `efficli export` writes for this config.json, in `path`, weights of one type; the shape."""
    shape, metadata, tensors = described(path.with_suffix(".checkpoint"), config)
    write_header(
        path, metadata, {tensor.name: ("F32" if tensor.keep_f32 else kind, tensor.shape) for tensor in tensors}
    )
    return shape


@dataclass(frozen=True, slots=True)
class Allocated:
    """Bytes of the buffers of one context, by llama.cpp's own count."""

    cache: int
    compute: int
    repacked: int
    log: tuple[str, ...] = ()


class _Map(ctypes.Structure):
    """std::map of libstdc++: 48 bytes, the root of its tree at byte 16."""

    _fields_ = (("words", ctypes.c_uint64 * 6),)


@contextmanager
def opened(path: Path, *, no_alloc: bool = True, use_extra_bufts: bool = True) -> Iterator[Any]:
    """The library's pointer to a model, by default without its weights."""
    lib = llama_cpp()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.use_extra_bufts = 0, no_alloc, use_extra_bufts
    if no_alloc:
        params.load_mode = 0  # LLAMA_LOAD_MODE_NONE: nothing is mapped
    with captured_log() as log:
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
    assert model, [line.text for line in log]
    try:
        yield model
    finally:
        lib.llama_model_free(model)


def allocated(model: Any, ctx: int, **changes: Any) -> Allocated:
    """What a context would allocate; `changes` are fields of llama_context_params."""
    lib = llama_cpp()
    params = lib.llama_context_default_params()
    params.n_threads = params.n_threads_batch = 1
    values: dict[str, Any] = {"n_ctx": ctx, "n_batch": 2048, "n_ubatch": 512, "swa_full": False, **changes}
    for name, value in values.items():
        assert hasattr(params, name), name
        setattr(params, name, value)
    with captured_log() as log:
        context = lib.llama_init_from_model(model, params)
    assert context, [line.text for line in log]
    try:
        found = _breakdown(context)
    finally:
        lib.llama_free(context)
    return Allocated(
        cache=sum(one[1] for one in found.values()),
        compute=sum(one[2] for one in found.values()),
        repacked=found.get("CPU_REPACK", (0, 0, 0))[0],
        log=tuple(line.text for line in log),
    )


def _breakdown(context: Any) -> dict[str, tuple[int, ...]]:
    """llama_get_memory_breakdown: buffer type -> bytes of weights, cache, compute buffers.

    Its C++ name and its std::map are read as they lie in memory (Linux, 64 bits); the log has two decimals of a MiB.
    """
    get = ctypes.CDLL(str(library_path("llama")))["_Z26llama_get_memory_breakdownPK13llama_context"]
    get.restype, get.argtypes = _Map, [ctypes.c_void_p]
    name = ctypes.CDLL(str(library_path("ggml-base"))).ggml_backend_buft_name
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    found = {}
    waiting = [get(ctypes.cast(context, ctypes.c_void_p)).words[2]]
    while waiting:
        node = waiting.pop()
        if node:
            _, _, left, right, key, *sizes = (ctypes.c_uint64 * 8).from_address(node)
            found[name(key).decode()] = tuple(sizes)
            waiting += [left, right]
    return found
