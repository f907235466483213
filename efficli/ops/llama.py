"""llama.cpp, run from Python: logits of every position of a text, embeddings, a completion.

What a file says and how it is opened is in `llama_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from efficli.errors import EffiError, UnsupportedError, UsageError
from efficli.ops.llama_log import captured_log, complaint
from efficli.ops.llama_model import LlamaModel, StockContext, available_threads
from efficli.ops.sampling import Completion, Sampling, complete

__all__ = ["LlamaFile", "StockContext", "available_threads"]


class LlamaFile(LlamaModel):
    """A LlamaModel that gives its numbers as arrays, and continues texts."""

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position of one text: ids (n,) -> (n, vocab) float32, row t predicting token t + 1."""
        blocks = list(self.logit_blocks(ids))
        return np.concatenate([rows for _, rows in blocks]) if blocks else np.empty((0, self.vocab_size), np.float32)

    def logit_blocks(
        self, ids: Sequence[int], *, first: int = 0, rows: int | None = None
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Logits of positions first.. in blocks of up to `rows`: (position of the first row, (rows, vocab) float32).

        Memory stays at one block of `rows_at_once` however large the vocabulary. Each block is a copy of its own.
        """
        self._check_ids(ids)
        self.forget()
        step = min(rows or self.rows_at_once, self.rows_at_once)
        if first:
            self._decode(ids[:first], at=0, outputs="none")
        for start in range(first, len(ids), step):
            part = ids[start : start + step]
            self._decode(part, at=start, outputs="all")
            yield start, self._outputs(len(part))

    def embed(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """The pooled vector of one text, not normalised: ids (n,) -> (width,) float32. Needs `embeddings=True`."""
        self._check_ids(ids)
        self.forget()
        self._decode(ids, at=0, outputs="all")
        pointer = self._lib.llama_get_embeddings_seq(self._context, 0)
        if not pointer:
            raise UnsupportedError("the file names no pooling, so it has no vector for a text", where=str(self.path))
        return np.ctypeslib.as_array(pointer, shape=(self.width,)).copy()

    def write(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling | None = None, *, stop_at_end: bool = True
    ) -> Generator[str, None, Completion]:
        """Continue a prompt by up to `max_tokens`, greedily unless `sampling` says otherwise, piece by piece.

        Bytes that are not yet a whole character wait for the next piece. The generator returns the Completion.
        """
        self._check_ids(ids)
        return complete(self, ids, max_tokens, sampling, stop_at_end=stop_at_end)

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        sampling: Sampling | None = None,
        on_piece: Callable[[str], None] | None = None,
        stop_at_end: bool = True,
    ) -> Completion:
        """As `write`, to the end; `on_piece` hears each piece of text as it comes."""
        pieces = self.write(ids, max_tokens, sampling, stop_at_end=stop_at_end)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as done:
                result: Completion = done.value
                return result
            if on_piece:
                on_piece(piece)

    def read(self, ids: Sequence[int], at: int) -> NDArray[np.float32]:
        """Read tokens at positions at.. (0 begins a new text) and return the last one's logits: (vocab,)."""
        if at == 0:
            self.forget()
        self._decode(ids, at=at, outputs="last")
        last: NDArray[np.float32] = self._outputs(1)[0]
        return last

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not self._context:
            raise ValueError("a LlamaFile that is closed, or holds a vocabulary only, cannot run")
        if not ids:
            raise UsageError("no tokens: the text is empty", where=str(self.path))
        if len(ids) > self.ctx:
            raise UsageError(f"{len(ids)} tokens do not fit a context of {self.ctx}", where=str(self.path))
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise UsageError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}", where=str(self.path))

    def _decode(self, ids: Sequence[int], *, at: int, outputs: str) -> None:
        """Run tokens at positions at..; `outputs`: logits of "all", the "last" or "none" of them."""
        lib, n = self._lib, len(ids)
        batch = lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, at + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = outputs == "all" or (outputs == "last" and i == n - 1)
            with captured_log() as log:
                status = lib.llama_decode(self._context, batch)
        finally:
            lib.llama_batch_free(batch)
        if status == 1:
            raise UsageError(f"{at + n} tokens do not fit a context of {self.ctx}", where=str(self.path))
        if status:
            found = complaint(log, f"status {status}")
            raise EffiError(f"llama.cpp could not run {n} tokens: {found}", where=str(self.path))

    def _outputs(self, rows: int) -> NDArray[np.float32]:
        """A copy of the logits of the last decoded batch: (rows, vocab)."""
        pointer = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size)).copy()
