"""Whether a file and its context fit a device, which term decides that, and how fast it should be there.

    need = file + KV cache + compute scratch + repacked weights     (RssAnon + file)

FIT: need <= the low end of the usable memory - 10 %. TIGHT: need <= its high end, or that holds once the weights are
not there twice: what is repacked is read from the file once, so that its pages can go, and `--no-repack` of llama.cpp
keeps it from being copied. NO: neither, or the device's runtime does not load the file at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from efficli.ops.byte_size import binary_bytes
from efficli.planning.cache import CacheLayer, kv_bytes
from efficli.planning.repack import repacked_bytes
from efficli.planning.scratch import Network, read_network, scratch_bytes
from efficli.target import Active, Prediction, Range, Target, Work, active_bytes, predict
from efficli.target.predict import MARGIN
from efficli.target.profile import Confidence

PROMPT = 512
"""Tokens of the prompt that the time to the first token is told for, or the context where that is shorter."""
FILLED = 0.5
"""Share of the context that is in the cache while decoding is predicted: the mean over one that fills up."""
_MIB = 1 << 20

Verdict = Literal["FIT", "TIGHT", "NO"]
Term = Literal["weights", "KV cache", "compute scratch", "repacked weights", "runtime", "type"]
_GPU = ("CUDA", "Metal")
"""In a runtime's name: weights are in memory that the GPU holds, are not repacked and are not evictable."""


class ModelFacts(Protocol):
    """What fitting needs to know of a model; `PlannedModel` has it."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Plain GGUF values."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def num_merges(self) -> int:
        """Of a BPE vocabulary."""

    @property
    def max_positions(self) -> int:
        """The longest context."""

    @property
    def cache(self) -> Sequence[CacheLayer]:
        """None for a model that only reads."""


class FileFacts(Protocol):
    """What fitting needs to know of a file; `PlannedFile` has it."""

    @property
    def type(self) -> str:
        """llama.cpp's name."""

    @property
    def nbytes(self) -> int:
        """Of the whole file."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, int, tuple[int, ...]]]:
        """Name -> ggml's type, bytes, shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a device will do with a file and a context: predicted, nothing of it measured."""

    target: str
    type: str
    ctx: int
    verdict: Verdict
    limited_by: Term
    """FIT: the largest term. TIGHT and NO: the term with which the sum of weights, scratch, cache and repacked weights

    (in this order) goes beyond what FIT allows, or for NO beyond what there is; "runtime" or "type" where the device's
    runtime is missing or cannot load the type.
    """
    file_bytes: int
    kv_bytes: int
    scratch_bytes: Range
    repacked_bytes: int
    resident_bytes: int
    """Anonymous memory, which must be there: cache, scratch, repacked weights; on a GPU the weights too."""
    page_cache_bytes: int
    """Of the file, mapped: the kernel can drop it and read it again, slowly."""
    need_bytes: int
    usable_bytes: Range
    largest_ctx: int
    """The largest context that FITs, up to the one that the model was made for; 0: none does."""
    decode: Range | None
    """tokens/s with half of the context filled, as if there were memory enough; None where it is not known."""
    prefill: Range | None
    """tokens/s of a prompt."""
    prompt_tokens: int
    ttft_ms: Range | None
    """Milliseconds to read `prompt_tokens` and write a token."""
    confidence: Confidence | None
    """The least certain figure behind `decode`."""
    reasons: tuple[str, ...]
    """What the verdict does not say by itself; the first is the most important."""
    sentences: tuple[str, ...] = field(default=(), repr=False)
    """`reasons`, and what speed and memory were reckoned from."""

    @property
    def comfortable_bytes(self) -> int:
        """What a file may need in all to FIT."""
        return int(self.usable_bytes.low * (1 - MARGIN))

    @property
    def no_repack(self) -> bool:
        """Whether it would FIT, were no weights repacked."""
        loads = self.limited_by not in ("runtime", "type")
        return self.verdict == "TIGHT" and loads and self.need_bytes - self.repacked_bytes <= self.comfortable_bytes

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        plain = {
            name: getattr(self, name)
            for name in (
                "target", "type", "ctx", "verdict", "limited_by", "file_bytes", "kv_bytes", "repacked_bytes",
                "resident_bytes", "page_cache_bytes", "need_bytes", "largest_ctx", "prompt_tokens", "confidence",
            )
        }  # fmt: skip
        ranges = {"decode_tokens_per_s": self.decode, "prefill_tokens_per_s": self.prefill, "ttft_ms": self.ttft_ms}
        return {
            "predicted": True,
            **plain,
            "fits_without_repacking": self.no_repack,
            "scratch_bytes": _whole(self.scratch_bytes),
            "usable_bytes": _whole(self.usable_bytes),
            **{name: found and found.to_json() for name, found in ranges.items()},
            "sentences": list(self.sentences),
        }


def _whole(found: Range) -> dict[str, int]:
    return {"value": round(found.value), "low": round(found.low), "high": round(found.high)}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Demand:
    """A file on a device; what it takes depends on the context."""

    target: Target
    model: ModelFacts
    file: FileFacts
    type_k: str
    type_v: str
    threads: int
    network: Network
    kinds: frozenset[str]
    active: Active
    repacked: int
    on_gpu: bool

    def cache(self, ctx: int) -> int:
        return kv_bytes(self.model.cache, ctx, type_k=self.type_k, type_v=self.type_v).nbytes

    def scratch(self, ctx: int) -> Range:
        return scratch_bytes(
            self.network, self.model.cache, ctx, threads=self.threads, types=self.kinds, merges=self.model.num_merges
        ).total

    def need(self, ctx: int) -> int:
        """Bytes with repacked weights."""
        return self.file.nbytes + self.cache(ctx) + round(self.scratch(ctx).value) + self.repacked

    def predicted(self, ctx: int, threads: int | None) -> Prediction:
        """With the context filled to FILLED; what that many positions take of the cache is read for each token."""
        depth = max(1, round(FILLED * ctx))
        work = Work.of(
            self.active,
            self.file.nbytes,
            kv_bytes_per_token=self.cache(depth) / depth,
            depth=depth,
            threads=threads,
            peak_anon=self.need(ctx) - self.file.nbytes,
        )
        return predict(self.target, work)


def fit(
    target: Target,
    model: ModelFacts,
    file: FileFacts,
    ctx: int,
    *,
    type_k: str = "F16",
    type_v: str = "F16",
    threads: int | None = None,
) -> Fit:
    """What `target` will do with `file` and a context of `ctx` positions; `threads`: None as it was calibrated.

    UsageError for a context below 1 or an unknown type of the cache; UnsupportedError for one whose blocks do not
    divide the model's keys or values.
    """
    demand = _demand(target, model, file, type_k, type_v, threads)
    told = demand.predicted(ctx, threads)
    cache, scratch, need = demand.cache(ctx), demand.scratch(ctx), demand.need(ctx)
    usable = told.memory.usable_bytes
    verdict, limited_by, reasons = _judge(demand, ctx, need, usable, told)
    loads = limited_by not in ("runtime", "type")
    if not loads or not model.cache:
        prefill = told.prefill if loads else None
        told = replace(told, decode=None, token_ms=None, prefill=prefill, confidence=None)
    anon = need - file.nbytes
    prompt = min(PROMPT, ctx)
    return Fit(
        target=target.name,
        type=file.type,
        ctx=ctx,
        verdict=verdict,
        limited_by=limited_by,
        file_bytes=file.nbytes,
        kv_bytes=cache,
        scratch_bytes=scratch,
        repacked_bytes=demand.repacked,
        resident_bytes=need if demand.on_gpu else anon,
        page_cache_bytes=0 if demand.on_gpu else file.nbytes,
        need_bytes=need,
        usable_bytes=usable,
        largest_ctx=_largest(demand, usable.low * (1 - MARGIN)) if loads else 0,
        decode=told.decode,
        prefill=told.prefill,
        prompt_tokens=prompt,
        ttft_ms=told.ttft_ms(prompt),
        confidence=told.confidence,
        reasons=tuple(reasons),
        sentences=(*reasons, *told.sentences),
    )


def _demand(
    target: Target, model: ModelFacts, file: FileFacts, type_k: str, type_v: str, threads: int | None
) -> _Demand:
    runtime = target.decode[0] if target.decode else None
    return _Demand(
        target=target,
        model=model,
        file=file,
        type_k=type_k,
        type_v=type_v,
        threads=threads or (runtime and runtime.threads) or target.num_cores,
        network=read_network(model.metadata, model.vocab_size),
        kinds=frozenset(kind for kind, _, shape in file.tensors.values() if len(shape) > 1),
        active=active_bytes(file.tensors, model.metadata),
        repacked=copied_bytes(target, file.tensors, reads_only=not model.cache),
        on_gpu=_on_gpu(target),
    )


def _on_gpu(target: Target) -> bool:
    return any(word in runtime.runtime for runtime in target.decode[:1] for word in _GPU)


def copied_bytes(target: Target, tensors: Mapping[str, tuple[str, int, tuple[int, ...]]], *, reads_only: bool) -> int:
    """Bytes of tensors (name -> ggml's type, bytes, shape) that the device's runtime copies, beside the file.

    `reads_only`: of a model without an output matrix (BERT).
    """
    return 0 if _on_gpu(target) else repacked_bytes(tensors, target.isa, reads_only=reads_only)


def _judge(demand: _Demand, ctx: int, need: int, usable: Range, told: Prediction) -> tuple[Verdict, Term, list[str]]:
    """The verdict, the term that decides it, and what is to be said of it."""
    target = demand.target
    if "gguf" not in target.runs:
        return "NO", "runtime", [f"does not run there: {target.why_not}"]
    if missing := sorted(demand.kinds & set(target.lacks)):
        return "NO", "type", [f"its runtime cannot load {', '.join(missing)}: {target.lacks_source}"]
    terms: list[tuple[Term, float]] = [
        ("weights", demand.file.nbytes),
        ("compute scratch", demand.scratch(ctx).value),
        ("KV cache", demand.cache(ctx)),
        ("repacked weights", demand.repacked),
    ]
    limit = usable.low * (1 - MARGIN)
    reasons = [] if demand.model.cache else ["writes no text: no speed of decoding"]
    if told.memory.verdict == "fits":
        return "FIT", max(terms, key=lambda term: term[1])[0], reasons
    once = need - demand.repacked
    if told.memory.verdict == "no" and once > usable.high:
        return "NO", _beyond(terms[:-1], usable.high), reasons
    if demand.repacked and once <= (limit if told.memory.verdict == "tight" else usable.high):
        held = "fits" if once <= limit else "is tight"
        copies = binary_bytes(demand.repacked)
        reasons.insert(0, f"llama.cpp copies {copies} of weights to repack them; with --no-repack it {held}")
    return "TIGHT", _beyond(terms, limit), reasons


def _beyond(terms: Sequence[tuple[Term, float]], limit: float) -> Term:
    """The term with which the sum of those until it goes beyond the limit."""
    total = 0.0
    for term, size in terms:
        total += size
        if total > limit:
            return term
    return terms[-1][0]


def _largest(demand: _Demand, limit: float) -> int:
    """The largest context whose need is within the limit: the need never falls where the context grows."""
    low, high = 0, demand.model.max_positions
    if demand.file.nbytes + demand.repacked > limit:
        return 0
    if high and demand.need(high) <= limit:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if demand.need(middle) <= limit else (low, middle)
    return low
