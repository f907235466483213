"""Open a written GGUF file as its user will: llama.cpp loads it, in a child process, and runs a few tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efficli.errors import UnsupportedError
from efficli.ops.child import run_child
from efficli.ops.llama import LlamaFile
from efficli.progress import Progress

PROMPT = "The quick brown fox"
NUM_TOKENS = 6
_CTX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What the runtime made of the file: the tokens it wrote (none for an embedding model) and how long it took."""

    architecture: str
    tokens: tuple[int, ...]
    text: str
    embedding: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What a run reports; the seconds are no function of the inputs and stay out of the manifest."""
        return {
            "loaded": True,
            "architecture": self.architecture,
            "tokens": list(self.tokens),
            "text": self.text,
            "embedding": self.embedding,
        }


def verify_file(
    path: Path,
    *,
    expected_ids: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    timeout_s: float | None = 600.0,
    progress: Progress | None = None,
) -> Verified:
    """Load the file with llama.cpp in a child process and decode 6 tokens greedily; an embedding model embeds a text.

    `expected_ids`: text -> token ids without special tokens, compared with the file's tokenizer. UnsupportedError: the
    runtime crashed or refused the file, computed something that is not finite, or tokenizes differently.
    """
    told = run_child(
        "efficli.export.gguf.verify:check",
        {
            "path": str(path.absolute()),
            "expected": [[text, list(ids)] for text, ids in (expected_ids or {}).items()],
            "threads": threads,
        },
        what=f"loading {path.name}",
        timeout_s=timeout_s,
        progress=progress,
    )
    told["tokens"] = tuple(told["tokens"])
    return Verified(**told)


def check(argument: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The child's part of `verify_file`: JSON in, JSON out."""
    began = time.monotonic()
    path, threads = Path(argument["path"]), argument["threads"]
    with LlamaFile(path, vocab_only=True) as vocabulary:
        _compare_ids(vocabulary, argument["expected"])
        architecture = vocabulary.architecture
        embeds = vocabulary.metadata(f"{architecture}.attention.causal") == "false"
        ctx = max(2, min(_CTX, vocabulary.trained_ctx or _CTX))
        ids = _prompt(vocabulary, ctx)
    tokens: list[int] = []
    text = ""
    with LlamaFile(path, ctx=ctx, threads=threads, embeddings=embeds) as model:
        if embeds:
            _check_finite(model.embed(ids), path, "numbers of the embedding")
        else:
            written = model.generate(ids, NUM_TOKENS, stop_at_end=False)
            tokens, text = list(written.tokens), written.text
            _check_finite(model.logits([*ids, *tokens][:ctx]), path, "logits")
    seconds = time.monotonic() - began
    return {"architecture": architecture, "tokens": tokens, "text": text, "embedding": embeds, "seconds": seconds}


def _prompt(file: LlamaFile, ctx: int) -> list[int]:
    """Token ids of the fixed prompt, cut so that the continuation fits; ids 0.. where the file has no tokenizer."""
    ids = file.tokenize(PROMPT, add_special=True) if file.has_tokenizer else list(range(min(8, file.vocab_size)))
    # a vocabulary may know none of the prompt's characters
    return (ids or [0])[: max(1, ctx - NUM_TOKENS)]


def _compare_ids(file: LlamaFile, expected: list[list[Any]]) -> None:
    for text, ids in expected:
        found = file.tokenize(text)
        if found != ids:
            same = (i for i, (one, other) in enumerate(zip(ids, found, strict=False)) if one != other)
            at = next(same, min(len(ids), len(found)))
            there = f"source {ids[at : at + 4]}, GGUF {found[at : at + 4]}"
            raise UnsupportedError(f"token ids of {text[:40]!r} differ from id {at} on: {there}", where=file.path.name)


def _check_finite(values: np.ndarray[Any, np.dtype[np.float32]], path: Path, what: str) -> None:
    wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
    if wrong:
        raise UnsupportedError(
            f"llama.cpp computes {wrong} of {values.size} {what} that are not finite",
            where=path.name,
            hint="compare with --type F32: if that is finite, the type is too coarse for this model",
        )
