"""Collect the input statistics of every weight while llama.cpp computes: its evaluation callback, read by ctypes.

Source: ggml.h (struct ggml_tensor) and llama.cpp's tools/imatrix, whose sums these are, in float64. `collect` runs in a
child process (`ops.child`).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError, FitError, UnsupportedError
from efficli.ops.libraries import library_path
from efficli.ops.llama import LlamaFile, available_threads
from efficli.ops.llama_log import captured_log, complaint, llama_cpp
from efficli.progress import Progress

_F32, _OBJECT_BYTES = 0, 32
_OUTPUT_BYTES = 1 << 25


class Tensor(ctypes.Structure):
    """struct ggml_tensor."""


_POINTER = ctypes.POINTER(Tensor)
Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", _POINTER * 10),
    ("view_src", _POINTER),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
)


def operations() -> tuple[int, int]:
    """The numbers of MUL_MAT and MUL_MAT_ID; UnsupportedError when the installed ggml lays tensors out otherwise."""
    library = ctypes.CDLL(str(library_path("ggml-base")))
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_op_name.restype = ctypes.c_char_p
    if library.ggml_tensor_overhead() != ctypes.sizeof(Tensor) + _OBJECT_BYTES:
        raise UnsupportedError("the installed ggml has another layout of its tensors", hint="give --imatrix FILE")
    names: list[bytes] = []
    while b"MUL_MAT_ID" not in names:
        names.append(library.ggml_op_name(len(names)))
    return names.index(b"MUL_MAT"), names.index(b"MUL_MAT_ID")


class Collector:
    """Sums of x² per column (float64) of every weight of a block, and how many rows each of its matrices saw."""

    def __init__(self) -> None:
        self.dense, self.by_id = operations()
        self.squares: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.int64]] = {}
        self.error: Exception | None = None

    def hear(self, address: int, ask: bool, _user_data: object) -> bool:
        """llama.cpp asks which results it must stop at, and then shows them; False stops the computation."""
        node = ctypes.cast(address, _POINTER).contents
        if node.op not in (self.dense, self.by_id):
            return not ask
        weight, x = node.src[0].contents, node.src[1].contents
        wanted = weight.name.startswith(b"blk.") and x.type == _F32
        if ask or not wanted:
            return wanted or not ask
        try:
            if node.op == self.dense:
                self._add_dense(weight, _view(x, np.dtype(np.float32)))
            else:
                self._add_experts(
                    weight, _view(x, np.dtype(np.float32)), _view(node.src[2].contents, np.dtype(np.int32))
                )
        except Exception as error:  # noqa: BLE001 (must not cross C; raised again by `collect`)
            self.error = error
            return False
        return True

    def _entry(self, weight: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        name, matrices = weight.name.decode(), weight.ne[2] * weight.ne[3]
        if name not in self.squares:
            self.squares[name] = np.zeros((matrices, weight.ne[0]))
            self.counts[name] = np.zeros(matrices, np.int64)
        return self.squares[name], self.counts[name]

    def _add_dense(self, weight: Tensor, x: NDArray[np.float32]) -> None:
        """x (outer, heads, rows, columns); matrix m of the weight sees those whose index is m modulo its count."""
        squares, counts = self._entry(weight)
        for outer in range(x.shape[0]):
            for inner in range(x.shape[1]):
                matrix = (outer % weight.ne[3]) * weight.ne[2] + inner % weight.ne[2]
                squares[matrix] += np.einsum("rc,rc->c", x[outer, inner], x[outer, inner], dtype=np.float64)
                counts[matrix] += x.shape[2]

    def _add_experts(self, weight: Tensor, x: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """x (1, tokens, slots or 1, columns); ids (1, 1, tokens, slots) name the expert that each row goes to."""
        squares, counts = self._entry(weight)
        chosen = ids[0, 0]
        for slot in range(chosen.shape[1]):
            rows = x[0, :, slot % x.shape[2]]
            for expert in np.unique(chosen[:, slot]):
                mine = rows[chosen[:, slot] == expert]
                squares[expert] += np.einsum("rc,rc->c", mine, mine, dtype=np.float64)
                counts[expert] += len(mine)


def _view(tensor: Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The tensor's memory as an array, axes in numpy order; valid until the computation goes on."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return np.ndarray(shape, dtype, memory, 0, strides)


def collect(argument: dict[str, Any], progress: Progress) -> None:
    """The child's part of `export.gguf.imatrix.compute_imatrix`: writes the sums to argument["out"], an .npz file."""
    path, chunk = Path(argument["gguf"]), int(argument["chunk"])
    with LlamaFile(path, vocab_only=True) as vocabulary:
        given = argument["text"]
        ids = vocabulary.tokenize(given, add_special=True) if isinstance(given, str) else given
        bos, rows = vocabulary.bos if vocabulary.add_bos else None, vocabulary.vocab_size
    chunks = len(ids) // chunk
    if argument["max_chunks"]:
        chunks = min(chunks, int(argument["max_chunks"]))
    if not chunks:
        raise CheckpointError(f"the calibration text has {len(ids)} tokens, expected at least {chunk}")
    # all logits are asked for, or the last block would only see the last token; a few rows at a time bound them
    step = min(chunk, max(16, _OUTPUT_BYTES // (4 * rows)))
    collector = Collector()
    threads = argument["threads"] or available_threads()
    with _Run(path, collector, chunk, step, threads, exact=bool(argument.get("exact"))) as run:
        progress.start("importance matrix", chunks * chunk, "tokens")
        for n in range(chunks):
            piece = ids[n * chunk : (n + 1) * chunk]
            run.feed([bos, *piece[1:]] if bos is not None else piece)
            progress.advance(chunk)
        progress.finish()
    stored: dict[str, NDArray[Any]] = {}
    for name, squares in collector.squares.items():
        if not np.isfinite(squares).all():
            raise CheckpointError(f"inputs of {name} are not finite on the calibration text")
        stored[f"{name}.in_sum2"] = squares.astype(np.float32)
        stored[f"{name}.counts"] = collector.counts[name]
    np.savez(argument["out"], allow_pickle=False, **stored)


class _Run:
    """A model whose evaluation is watched; a context manager. `exact` as in `LlamaFile`."""

    def __init__(
        self, path: Path, collector: Collector, chunk: int, step: int, threads: int, *, exact: bool = False
    ) -> None:
        self._lib, self._step, self._collector = llama_cpp(), step, collector
        lib = self._lib
        lib.llama_backend_init()
        model = lib.llama_model_default_params()
        model.n_gpu_layers = 0
        # repacked weights would be shown under other types; nothing is gained on float weights
        model.use_extra_bufts = False
        with captured_log() as log:
            self._model = lib.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise CheckpointError(f"llama.cpp refused it: {complaint(log, 'no reason given')}", where=path.name)
        context = lib.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = chunk, step, step
        context.n_threads = context.n_threads_batch = threads
        context.n_outputs_max = step
        if exact:
            context.type_k = context.type_v = _F32
            context.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # kept: Python would free the callback while C calls it
        self._callback = lib.ggml_backend_sched_eval_callback(collector.hear)
        context.cb_eval = self._callback
        with captured_log() as log:
            self._context = lib.llama_init_from_model(self._model, context)
        if not self._context:
            lib.llama_model_free(self._model)
            raise FitError(f"no context of {chunk} tokens: {complaint(log, 'out of memory')}", where=path.name)

    def __enter__(self) -> _Run:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def feed(self, ids: list[int]) -> None:
        """Run one chunk from an empty cache."""
        lib = self._lib
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._step):
            piece = ids[start : start + self._step]
            batch = lib.llama_batch_init(len(piece), 0, 1)
            batch.n_tokens = len(piece)
            for i, token in enumerate(piece):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            with captured_log() as log:
                code = lib.llama_decode(self._context, batch)
            lib.llama_batch_free(batch)
            if self._collector.error:
                raise self._collector.error
            if code:
                raise UnsupportedError(f"llama.cpp could not compute the calibration text: {complaint(log, str(code))}")
