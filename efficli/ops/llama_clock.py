"""A stopwatch around llama.cpp: the workloads of llama-bench, and whole requests, timed where they run.

As llama-bench does (tools/llama-bench of llama.cpp), tokens are random ids, a prompt asks for its last position's
logits only, and `llama_synchronize` ends what is timed. A call through ctypes costs about 5 microseconds.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from efficli.errors import EffiError, UnsupportedError, UsageError
from efficli.ops.llama_log import complaint, recent_log
from efficli.ops.llama_model import LlamaModel


@dataclass(frozen=True, slots=True)
class Answer:
    """A request's tokens and nanoseconds: to the first token, and of each further one."""

    prompt_tokens: int
    first_token_ns: int
    token_ns: tuple[int, ...]
    tokens: tuple[int, ...]


class LlamaClock:
    """Times one open file. Prompts and generations read one stream of random ids drawn from `seed`.

    The cache keeps what it holds of the stream, so that a test at a depth need not read the depth again.
    """

    def __init__(self, file: LlamaModel, seed: int = 0) -> None:
        self.file = file
        self._lib, self._context = file.library, file.context
        generator = random.Random(seed)
        stream = (ctypes.c_int32 * file.ctx)(*(generator.randrange(file.vocab_size) for _ in range(file.ctx)))
        if file.add_bos and file.bos is not None:
            stream[0] = file.bos
        self.stream = stream
        """As many ids as the context holds."""
        self._held = 0  # tokens of the stream at the front of the cache
        self._greedy: Any = None

    def prompt(self, n: int, *, depth: int, threads: int) -> tuple[int, int]:
        """Read n tokens at a depth; nanoseconds until they are read, and until the next token is chosen.

        An embedding model chooses none: both are the same. UsageError for more than the context holds.
        """
        self._check_room(n, depth)
        self._use(threads)
        self._seek(depth)
        if self.file.embeddings:
            return self._embed(n)
        began = perf_counter_ns()
        self._read(depth, depth + n)
        self._lib.llama_synchronize(self._context)
        read = perf_counter_ns()
        self._choose()
        chosen = perf_counter_ns()
        self._held = depth + n
        return read - began, chosen - began

    def generate(self, n: int, *, depth: int, threads: int) -> list[int]:
        """Write n tokens at a depth, one after the other; nanoseconds of each. UsageError as above."""
        self._check_writes()
        self._check_room(n, depth)
        self._use(threads)
        self._seek(depth)
        self._held = depth
        decode, synchronize, context = self._lib.llama_decode, self._lib.llama_synchronize, self._context
        one = (ctypes.c_int32 * 1)()
        batch = self._lib.llama_batch_get_one(one, 1)
        tokens = self.stream[depth : depth + n]
        marks = [perf_counter_ns()]
        for token in tokens:
            one[0] = token
            if decode(context, batch):
                raise self._failure(1)
            synchronize(context)
            marks.append(perf_counter_ns())
        self._held = depth + n
        return [after - before for before, after in itertools.pairwise(marks)]

    def answer(self, text: str, n: int, *, special: bool, begin: bool, threads: int) -> Answer:
        """Read a text and write n tokens greedily, from an empty cache; the end token does not end it.

        `special`: control tokens may be written out in the text (a rendered chat); `begin`: add the begin token.
        """
        self._check_writes()
        self._use(threads)
        self._seek(0)
        self._held = 0
        began = perf_counter_ns()
        ids = self.file.tokenize(text, add_special=begin, parse_special=special)
        if not ids:
            raise UsageError("no tokens: the text is empty", where=str(self.file.path))
        if len(ids) + n > self.file.ctx:
            raise UsageError(
                f"a prompt of {len(ids)} tokens and {n} to write are longer than the context of {self.file.ctx}",
                where=str(self.file.path),
            )
        self._decode((ctypes.c_int32 * len(ids))(*ids), 0, len(ids))
        tokens = [self._choose()]
        first = perf_counter_ns()
        one, marks = (ctypes.c_int32 * 1)(), [first]
        for _ in range(n - 1):
            one[0] = tokens[-1]
            self._decode(one, 0, 1)
            tokens.append(self._choose())
            marks.append(perf_counter_ns())
        spent = tuple(after - before for before, after in itertools.pairwise(marks))
        return Answer(len(ids), first - began, spent, tuple(tokens))

    def close(self) -> None:
        """Free the sampler; the file is closed by whoever opened it."""
        if self._greedy:
            self._lib.llama_sampler_free(self._greedy)
            self._greedy = None

    def _check_room(self, n: int, depth: int) -> None:
        if n < 1 or depth < 0 or depth + n > self.file.ctx:
            at = f" at a depth of {depth}" if depth else ""
            raise UsageError(f"{n} tokens{at}, expected 1 to {self.file.ctx} in all", where=str(self.file.path))

    def _check_writes(self) -> None:
        if self.file.embeddings:
            raise UnsupportedError("an embedding model writes no text", where=str(self.file.path))

    def _use(self, threads: int) -> None:
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def _seek(self, depth: int) -> None:
        """Make the cache hold the first `depth` tokens of the stream and nothing else."""
        memory = self._lib.llama_get_memory(self._context)
        if not memory:  # bert has none
            return
        # windows forget what lies behind them, and a recurrent state cannot be cut: those are read again
        keep = min(depth, self._held) if not self._lib.llama_model_n_swa(self.file.model) else 0
        if not (keep and self._lib.llama_memory_seq_rm(memory, 0, keep, -1)):
            keep = 0
            self._lib.llama_memory_clear(memory, False)
        self._read(keep, depth)
        self._lib.llama_synchronize(self._context)
        self._held = depth

    def _read(self, start: int, stop: int) -> None:
        self._decode(self.stream, start, stop)

    def _decode(self, ids: ctypes.Array[ctypes.c_int32], start: int, stop: int) -> None:
        """Read ids[start:stop] after what the cache holds."""
        size = ctypes.sizeof(ctypes.c_int32)
        for at in range(start, stop, self.file.batch):
            n = min(self.file.batch, stop - at)
            first = ctypes.cast(ctypes.byref(ids, at * size), ctypes.POINTER(ctypes.c_int32))
            if self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(first, n)):
                raise self._failure(n)

    def _embed(self, n: int) -> tuple[int, int]:
        """An embedding model reads n tokens and pools them."""
        lib, ids = self._lib, self.stream[:n]
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
                batch.seq_id[i][0] = 0
            began = perf_counter_ns()
            status = lib.llama_decode(self._context, batch)
            lib.llama_synchronize(self._context)
            spent = perf_counter_ns() - began
        finally:
            lib.llama_batch_free(batch)
        if status:
            raise self._failure(n)
        return spent, spent

    def _choose(self) -> int:
        if self._greedy is None:
            self._greedy = self._lib.llama_sampler_init_greedy()
        return int(self._lib.llama_sampler_sample(self._greedy, self._context, -1))

    def _failure(self, n: int) -> EffiError:
        found = complaint(recent_log(), "it does not say why")
        return EffiError(f"llama.cpp could not run {n} tokens: {found}", where=str(self.file.path))
