"""A GGUF file opened by llama.cpp: what it says, and its tokenizer; no numpy, so that a process that times it is lean.

This module, `llama.py` and `llama_clock.py` on top of it, and `llama_log.py` below are the only ones that call
llama-cpp-python's low-level functions for running models. llama.cpp ends the whole process where an assertion of its
own fails (`GGML_ASSERT`) and where the build does not fit the CPU: open files that were just written in a child process
(`ops/child.py`).
"""

from __future__ import annotations

import codecs
import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from efficli.errors import CheckpointError, FitError, UnsupportedError, UsageError
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.llama_log import captured_log, complaint, llama_cpp

_GGML_F32 = 0
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
_OUTPUT_BYTES = 1 << 25  # logits held at once by `LlamaFile.logit_blocks`: 32 MiB
_UBATCH = 512  # tokens computed at once; llama.cpp's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class StockContext:
    """A context as llama.cpp's own tools open it; the defaults are theirs."""

    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: str = "auto"
    batch: int = 2048
    ubatch: int = 512


def available_threads() -> int:
    """The cores that this process may use, or OMP_NUM_THREADS where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(wanted)) if wanted.isdecimal() and int(wanted) else cores


class LlamaModel:
    """A GGUF file opened by llama.cpp on the CPU; a context manager.

    `ctx` tokens of context; `exact` keeps the KV cache in float32 and turns flash attention off (to compare with
    PyTorch), otherwise llama.cpp's defaults run, as a user's would. `use_extra_bufts=False` refuses weight repacking
    (less memory; the way round the AMX crash of gguf builds that do not fit their CPU). `embeddings` gives pooled
    sentence vectors instead of logits; `vocab_only` reads the vocabulary and no weights. `stock` opens the context as
    llama.cpp's tools do, where ours saves memory.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        ctx: int = 512,
        threads: int | None = None,
        exact: bool = False,
        use_extra_bufts: bool = True,
        embeddings: bool = False,
        vocab_only: bool = False,
        stock: StockContext | None = None,
    ) -> None:
        self.path, self.ctx, self.embeddings = Path(path), ctx, embeddings
        self.threads = threads or available_threads()
        self.batch = ctx
        """Tokens that one call may read."""
        self._model: Any = None
        self._context: Any = None
        self._lib = llama_cpp()
        if not self.path.is_file():
            raise CheckpointError("no such file", where=str(path))
        self._load(vocab_only=vocab_only, use_extra_bufts=use_extra_bufts)
        if not vocab_only:
            try:
                self._open_context(exact=exact, stock=stock)
            except BaseException:
                self.close()
                raise

    def _load(self, *, vocab_only: bool, use_extra_bufts: bool) -> None:
        lib = self._lib
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0  # a certificate must not depend on the graphics card of whoever makes it
        params.vocab_only = vocab_only
        params.use_extra_bufts = use_extra_bufts
        with captured_log() as log:
            self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            found = complaint(log, "llama.cpp could not load it and did not say why")
            kind = UnsupportedError if "unknown" in found or "not supported" in found else CheckpointError
            hint = "a newer llama-cpp-python may know it" if kind is UnsupportedError else None
            raise kind(f"llama.cpp refused it: {found}", where=str(self.path), hint=hint)
        self._vocab = lib.llama_model_get_vocab(self._model)

    def _open_context(self, *, exact: bool, stock: StockContext | None) -> None:
        lib = self._lib
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = self.ctx
        # A model without a cache (bert) needs its whole text in one micro-batch.
        params.n_ubatch = self.ctx if self.embeddings else min(self.ctx, _UBATCH)
        params.n_threads = params.n_threads_batch = self.threads
        params.embeddings = self.embeddings
        # By default room for every position's logits is reserved: 300 MB for a vocabulary of 150k.
        params.n_outputs_max = self.ctx if self.embeddings else self.rows_at_once
        params.n_outputs_max_per_seq = 0
        if stock:
            self._as_tools_do(params, stock)
        self.batch = params.n_batch
        if exact:
            params.type_k = params.type_v = _GGML_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with captured_log() as log:
            self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            found = complaint(log, "out of memory")
            # a quantized cache without flash attention, a width that its blocks do not fit
            if "requires" in found or "does not divide" in found:
                raise UnsupportedError(f"llama.cpp refuses such a context: {found}", where=str(self.path))
            hint = "ask for a shorter context"
            raise FitError(f"no context of {self.ctx} tokens: {found}", where=str(self.path), hint=hint)

    def _as_tools_do(self, params: Any, stock: StockContext) -> None:
        params.n_batch = max(stock.batch, self.ctx) if self.embeddings else stock.batch
        params.n_ubatch = self.ctx if self.embeddings else stock.ubatch
        params.n_outputs_max = self._lib.llama_context_default_params().n_outputs_max
        params.swa_full = False
        params.type_k, params.type_v = (TYPE_IDS[name.upper()] for name in (stock.cache_type_k, stock.cache_type_v))
        params.flash_attn_type = _FLASH_ATTENTION[stock.flash_attn]

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free context and model; more than once does no harm."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    # What the file is

    @property
    def library(self) -> Any:
        """llama.cpp's functions; with `model` and `context` for those who time them one by one."""
        return self._lib

    @property
    def model(self) -> Any:
        """The library's pointer to the model."""
        return self._model

    @property
    def context(self) -> Any:
        """The library's pointer to the context."""
        return self._context

    @property
    def description(self) -> str:
        """What llama.cpp calls it: "llama 8B Q4_K - Medium"."""
        buffer = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def num_weights(self) -> int:
        """Number of weights, as llama.cpp counts them."""
        return int(self._lib.llama_model_n_params(self._model))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._lib.llama_model_size(self._model))

    @property
    def rows_at_once(self) -> int:
        """Positions whose logits are held at a time: 32 MiB of them, 16 at least."""
        return min(self.ctx, max(16, _OUTPUT_BYTES // (4 * self.vocab_size)))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def has_tokenizer(self) -> bool:
        """False where the file says `tokenizer.ggml.model = none`: token ids in, token ids out."""
        return bool(self._lib.llama_vocab_type(self._vocab) != self._lib.LLAMA_VOCAB_TYPE_NONE)

    @property
    def trained_ctx(self) -> int:
        """The context length that the file names."""
        return int(self._lib.llama_model_n_ctx_train(self._model))

    @property
    def width(self) -> int:
        """Width of the residual stream, and of an embedding."""
        return int(self._lib.llama_model_n_embd(self._model))

    @property
    def bos(self) -> int | None:
        """The token that begins a text, or None."""
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    @property
    def eos(self) -> int | None:
        """The token that ends a text, or None."""
        token = int(self._lib.llama_vocab_eos(self._vocab))
        return token if token >= 0 else None

    @property
    def add_bos(self) -> bool:
        """Whether the file asks for the begin token before a text."""
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.metadata("general.architecture") or ""

    def metadata(self, key: str) -> str | None:
        """A scalar or string of the file's metadata, as llama.cpp prints it, or None."""
        size = 1 << 12
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._lib.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < size:
                return buffer.value.decode("utf-8", "replace") if length >= 0 else None
            size = length + 1

    # Text

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text; `add_special` adds begin and end tokens as the file asks, `parse_special` reads
        control tokens written out in the text."""
        data = text.encode()
        room = len(data) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if n >= 0:
                return list(ids[:n])
            if n == -(1 << 31):
                raise UsageError(f"a text of {len(data)} bytes is too long to tokenize", where=str(self.path))
            room = -n

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token, which need not be whole characters; control tokens are empty unless `special`."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def ends(self, token: int) -> bool:
        """Whether a model that writes this token has finished."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def spell(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens; an unfinished character at the end is left out."""
        if not self.has_tokenizer:
            return "".join(f" {token}" for token in tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return decoder.decode(b"".join(self.piece(token) for token in tokens))

    def forget(self) -> None:
        """Empty the cache: the next text starts at position 0."""
        memory = self._lib.llama_get_memory(self._context)
        if memory:  # bert has none
            self._lib.llama_memory_clear(memory, True)
