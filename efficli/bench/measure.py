"""What a certificate measures, run in a child process: both models on the same tokens, reduced chunk by chunk.

Rules of llama-perplexity, so that figures compare with its: the text is cut into chunks of `ctx` tokens; where the file
asks for a begin token it replaces the first of each chunk; positions ctx/2 .. ctx-2 are scored, the earlier ones are
context.  The artifact runs with llama.cpp's default settings, as its user's will.  No logits are stored: blocks of
32 MiB from both sides are reduced to four numbers a position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.bench.origin import LogitSource, TorchEncoder, TorchModel, check_vocabularies
from efficli.bench.texts import Chunk, Text, choose_chunks
from efficli.errors import EffiError, UsageError
from efficli.ops.divergence import (
    Positions,
    clustered_mean,
    clustered_quantile,
    compare,
    cosine,
    join,
    perplexity,
    root_mean_square,
)
from efficli.ops.llama import LlamaFile, available_threads
from efficli.progress import Progress

MIN_LINE, MAX_LINES = 20, 256  # an embedding is compared on this many lines of each text, of so many characters

POOLED = "all"
"""The name of the row over all texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to measure; JSON-able."""

    artifacts: Sequence[str]
    base: str
    base_is_gguf: bool
    texts: Sequence[tuple[str, str]]
    """(name, content)."""
    ids: Sequence[Sequence[int]] | None
    """The source tokenizer's ids of each text; the file's own tokenizer is used where there are none."""
    ctx: int
    max_positions: int | None
    seed: int
    threads: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(argument: Mapping[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """What a measurement gives of each artifact's Certificate, as plain data; `argument` is a Request."""
    request = Request(**argument)
    threads = request.threads or available_threads()
    # llama.cpp comes first: loading it sets how OpenMP's threads wait, for PyTorch too
    with LlamaFile(request.artifacts[0], vocab_only=True) as file:
        pooled = file.metadata(f"{file.architecture}.pooling_type") not in (None, "0")
        ctx = min(request.ctx, int(file.metadata(f"{file.architecture}.context_length") or request.ctx))
    with ExitStack() as stack:
        return (_embeddings if pooled else _divergence)(request, ctx, threads, stack, progress)


# Language models


def _divergence(request: Request, ctx: int, threads: int, stack: ExitStack, progress: Progress) -> list[dict[str, Any]]:
    judged = [stack.enter_context(LlamaFile(file, ctx=ctx, threads=threads)) for file in request.artifacts]
    base: LlamaFile | TorchModel
    if request.base_is_gguf:
        base = stack.enter_context(LlamaFile(request.base, ctx=ctx, threads=threads, exact=True))
        runtime = f"{_llama_version()}, F32 file, F32 cache"
    else:
        base = TorchModel(request.base, threads=threads)
        runtime = base.runtime
    shared = [note for note in [check_vocabularies(base, judged[0])] if note]
    ids, notes = _token_ids(request, judged)
    chunks = choose_chunks([len(i) for i in ids], ctx, request.max_positions, request.seed)
    progress.start("certificate", sum(chunk.positions for chunk in chunks) * len(judged), "positions")
    positions, lengths = [list[Positions]() for _ in judged], list[int]()
    for chunk in chunks:
        tokens = list(ids[chunk.text][chunk.start : chunk.stop])
        if judged[0].add_bos and judged[0].bos is not None:
            tokens[0] = judged[0].bos
        for kept, found in zip(positions, compare_chunk(base, judged, tokens, chunk.first), strict=True):
            kept.append(found)
        spelt = tokens[chunk.first + 1 :] if judged[0].has_tokenizer else []
        lengths.append(sum(len(judged[0].piece(token)) for token in spelt))
        progress.advance(chunk.positions * len(judged))
    progress.finish()
    common = {
        "kind": "divergence",
        "base_runtime": runtime,
        "runtime": f"{_llama_version()}, default settings",
        "ctx": ctx,
        "texts": _texts(request, [len(i) for i in ids]),
    }
    return [
        common | {"rows": _rows(request, chunks, kept, lengths), "notes": shared + own}
        for kept, own in zip(positions, notes, strict=True)
    ]


def compare_chunk(base: LogitSource, judged: Sequence[LlamaFile], tokens: Sequence[int], first: int) -> list[Positions]:
    """The base and each judged model over one chunk: positions first .. n - 2, each predicting the token after it."""
    following, columns = np.array(tokens[1:]), min(base.vocab_size, judged[0].vocab_size)
    rows, parts = judged[0].rows_at_once, [list[Positions]() for _ in judged]
    models: list[LogitSource] = [base, *judged]
    for blocks in zip(*(model.logit_blocks(tokens[:-1], first=first, rows=rows) for model in models), strict=True):
        (start, wanted), *others = blocks
        for file, kept, (_, found) in zip(judged, parts, others, strict=True):
            part = compare(wanted[:, :columns], found[:, :columns], following[start : start + len(wanted)])
            if not np.isfinite(part.kld).all():
                side = "the base" if not np.isfinite(wanted).all() else "the artifact"
                raise EffiError(f"{side} computes NaN or Inf, expected numbers", where=str(file.path))
            kept.append(part)
    return [join(kept) for kept in parts]


def _token_ids(request: Request, judged: Sequence[LlamaFile]) -> tuple[list[list[int]], list[list[str]]]:
    """The ids of every text; for each file, a note where its tokenizer disagrees with the source's."""
    given, first = [list(ids) for ids in request.ids or ()], judged[0]
    if first.add_bos:  # the chunks get theirs
        given = [ids[1:] if ids[:1] == [first.bos] else ids for ids in given]
    if not first.has_tokenizer:
        if not given:
            raise UsageError("the file has no tokenizer, and no token ids were given", where=str(first.path))
        return given, [[] for _ in judged]
    given = given or [first.tokenize(content) for _, content in request.texts]
    return given, [_other_ids(request, file, given) for file in judged]


def _other_ids(request: Request, file: LlamaFile, given: Sequence[Sequence[int]]) -> list[str]:
    notes = []
    for (name, content), source in zip(request.texts, given, strict=True):
        own = file.tokenize(content)
        if own != source:
            at = next(
                (i for i, (a, b) in enumerate(zip(own, source, strict=False)) if a != b), min(len(own), len(source))
            )
            notes.append(f"{name}: the file's tokenizer gives other ids than the source's, from token {at} on")
    return notes


def _rows(
    request: Request, chunks: Sequence[Chunk], positions: Sequence[Positions], lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """One row a text, and one over all of them where there are several."""
    rows = []
    used = sorted({chunk.text for chunk in chunks})
    for text in [*used, None] if len(used) > 1 else used:
        chosen = [i for i, chunk in enumerate(chunks) if text is None or chunk.text == text]
        name = POOLED if text is None else request.texts[text][0]
        figures = divergence_figures([positions[i] for i in chosen], sum(lengths[i] for i in chosen))
        rows.append({"text": name, "n": sum(len(positions[i]) for i in chosen), "chunks": len(chosen), **figures})
    return rows


def divergence_figures(chunks: Sequence[Positions], num_bytes: int) -> dict[str, float | None]:
    """Every figure of a certificate and its standard error; the tokens that came next spell `num_bytes` bytes."""
    kld = [chunk.kld for chunk in chunks]
    base: list[NDArray[np.float64]] = [chunk.loss_base.astype(np.float64) for chunk in chunks]
    loss: list[NDArray[np.float64]] = [chunk.loss.astype(np.float64) for chunk in chunks]
    difference = [b - a for a, b in zip(base, loss, strict=True)]
    probability = [np.exp(-b) - np.exp(-a) for a, b in zip(base, loss, strict=True)]
    found: dict[str, tuple[float, float | None]] = {
        "kld_mean": clustered_mean(kld),
        "kld_p99": clustered_quantile(kld, 0.99),
        "top1_agreement": clustered_mean([chunk.agrees for chunk in chunks]),
        "ppl_base": perplexity(base),
        "ppl": perplexity(loss),
        "ppl_ratio": perplexity(difference),
        "rms_dp": root_mean_square(probability),
    }
    flat: dict[str, float | None] = {"kld_max": max(float(k.max()) for k in kld)}
    for name, (value, error) in found.items():
        flat |= {name: value, f"{name}_stderr": error}
    if num_bytes:
        # bits a byte = nats a position x positions a byte / log 2; the text is what it is, only the loss is uncertain
        scale = sum(len(k) for k in kld) / num_bytes / math.log(2)
        for name, losses in (("bits_per_byte_base", base), ("bits_per_byte", loss)):
            mean, error = clustered_mean(losses)
            flat |= {name: mean * scale, f"{name}_stderr": None if error is None else error * scale}
    return flat


# Embedding models


def _embeddings(request: Request, ctx: int, threads: int, stack: ExitStack, progress: Progress) -> list[dict[str, Any]]:
    judged = [
        stack.enter_context(LlamaFile(file, ctx=ctx, threads=threads, embeddings=True)) for file in request.artifacts
    ]
    base: LlamaFile | TorchEncoder
    if request.base_is_gguf:
        base = LlamaFile(request.base, ctx=ctx, threads=threads, embeddings=True, exact=True)
        stack.enter_context(base)
        runtime = f"{_llama_version()}, F32 file"
    else:
        base = TorchEncoder(request.base, threads=threads)
        runtime = f"{base.runtime}, {base.pooling} pooling"
    lines = [_lines(Text(*text), judged[0], ctx, request.seed) for text in request.texts]
    if not any(lines):
        raise UsageError(f"no line of the text has {MIN_LINE} characters and fits {ctx} tokens")
    progress.start("certificate", sum(len(ids) for ids in lines), "texts")
    cosines = [[list[float]() for _ in lines] for _ in judged]
    for text, several in enumerate(lines):
        for ids in several:
            wanted = base.embed(ids)
            for file, kept in zip(judged, cosines, strict=True):
                kept[text].append(cosine(wanted, file.embed(ids)))
                if not math.isfinite(kept[text][-1]):
                    raise EffiError("an embedding is NaN or Inf, expected numbers", where=str(file.path))
            progress.advance(1)
    progress.finish()
    common = {
        "kind": "embedding",
        "base_runtime": runtime,
        "runtime": f"{_llama_version()}, default settings",
        "ctx": ctx,
        "texts": _texts(request, [sum(len(ids) for ids in several) for several in lines]),
        "notes": [],
    }
    return [common | {"rows": _cosine_rows(request, kept)} for kept in cosines]


def _cosine_rows(request: Request, cosines: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    named = [(name, list(values)) for (name, _), values in zip(request.texts, cosines, strict=True) if values]
    if len(named) > 1:
        named.append((POOLED, [value for _, values in named for value in values]))
    rows = []
    for name, values in named:
        mean, error = clustered_mean([np.array([value]) for value in values])
        figures = {"cosine_mean": mean, "cosine_mean_stderr": error, "cosine_min": min(values)}
        rows.append({"text": name, "n": len(values), "chunks": len(values), **figures})
    return rows


def _lines(text: Text, judged: LlamaFile, ctx: int, seed: int) -> list[list[int]]:
    """Token ids, with begin and end tokens, of up to MAX_LINES different lines that fit the context."""
    lines = sorted({line.strip() for line in text.content.splitlines() if len(line.strip()) >= MIN_LINE})
    order = np.random.default_rng(seed).permutation(len(lines))[:MAX_LINES]
    tokenized = [judged.tokenize(lines[i], add_special=True) for i in sorted(order)]
    return [ids for ids in tokenized if len(ids) <= ctx]


def _texts(request: Request, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """What was read of each text."""
    return [
        {"name": name, "bytes": len(content.encode()), "sha256": Text(name, content).sha256, "tokens": tokens[i]}
        for i, (name, content) in enumerate(request.texts)
    ]


def _llama_version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"
