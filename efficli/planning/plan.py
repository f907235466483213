"""Plan: what a model will be as files, what each takes, and what devices will do with it, from small files alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from efficli.errors import FitError, UnsupportedError, UsageError
from efficli.ops.ggml_types import file_type
from efficli.planning.cache import KvCache, kv_bytes
from efficli.planning.fit import Fit, fit
from efficli.planning.model import TYPES, PlannedFile, PlannedModel, plan_files
from efficli.planning.scratch import Scratch, read_network, scratch_bytes
from efficli.planning.uplink import Uplink, make_uplink
from efficli.progress import Progress, Silent
from efficli.target import Target, load_target

USUAL = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K")
"""Types that are planned unless others are named."""
TERNARY = ("TQ2_0", "TQ1_0", "Q2_0")
"""And of a model that was trained for them."""
_TERNARY_ARCHS = frozenset({"bitnet"})
CONTEXT = 2048
CONTEXTS = (2048, 8192, 32768)
"""What is planned with a target and without one, unless contexts are named."""
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "IQ4_NL", "Q5_0", "Q5_1")
"""Types of the KV cache that llama.cpp's tools take."""
_WHOLE = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory beside the weights, whatever their type."""

    ctx: int
    cache: KvCache
    scratch: Scratch
    """With the weights' most usual types; it hardly depends on them."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"ctx": self.ctx, "kv_cache": asdict(self.cache), "compute_scratch": self.scratch.to_json()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLink:
    """A link, and the targets that it leads to."""

    uplink: Uplink
    targets: tuple[str, ...]
    """None of them where no target was named."""
    about: str | None
    """As the profile calls it, where rate, pass and passes are the profile's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """What `plan` found. Sizes are exact, memory is reckoned, speeds are predicted."""

    model: PlannedModel
    files: tuple[PlannedFile, ...]
    """The largest first."""
    contexts: tuple[int, ...]
    cache_types: tuple[str, str]
    rooms: tuple[Room, ...]
    """One a context."""
    targets: tuple[Target, ...]
    fits: tuple[Fit, ...]
    """For each target, context and file, in this order."""
    links: tuple[PlannedLink, ...]
    notes: tuple[str, ...]
    """What a user should know of contexts and types."""

    def of(self, target: Target, ctx: int) -> tuple[Fit, ...]:
        """For each file."""
        return tuple(one for one in self.fits if one.target == target.name and one.ctx == ctx)

    def best(self, target: Target, ctx: int) -> tuple[PlannedFile, Fit] | None:
        """The largest file that FITs, of the types that anybody would choose for it; None where none does."""
        pairs = [pair for pair in zip(self.files, self.of(target, ctx), strict=True) if pair[1].verdict == "FIT"]
        return next((pair for pair in pairs if self.is_choice(pair[0])), None)

    def is_choice(self, file: PlannedFile) -> bool:
        """Whether a type is one to recommend: no ternary one of other weights, and 16 bits only beside nothing less."""
        usual = [one for one in self.files if one.type not in _WHOLE and not self._ruins(one)]
        return file in usual if usual else True

    def _ruins(self, file: PlannedFile) -> bool:
        moe = any("_exps." in name for name in file.tensors)
        ternary = file.ternary and self.model.gguf_arch not in _TERNARY_ARCHS
        return ternary or (file.type == "MXFP4_MOE" and not moe)

    @property
    def failure(self) -> FitError | None:
        """Where targets were named and not one of them can hold anything: the error, with what comes nearest."""
        if not self.fits or any(one.verdict != "NO" for one in self.fits):
            return None
        loads = [one for one in self.fits if one.limited_by not in ("runtime", "type")]
        names = ", ".join(target.name for target in self.targets)
        if not loads:
            return FitError(f"nothing fits {names}: {self.fits[0].reasons[0]}", hint="efficli targets lists devices")
        near = min(loads, key=lambda one: one.need_bytes - one.repacked_bytes)
        need = (near.need_bytes - near.repacked_bytes) / (1 << 20)
        there = near.usable_bytes.high / (1 << 20)
        return FitError(
            f"nothing fits {names}: {near.type} with a context of {near.ctx} needs {need:,.0f} MiB, expected at most "
            f"{there:,.0f} MiB; limited by the {near.limited_by}",
            hint=_hint(near),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        model = self.model
        return {
            "schema_version": 1,
            "command": "plan",
            "model": model.name,
            "revision": model.revision,
            "architecture": model.architecture,
            "gguf_arch": model.gguf_arch,
            "num_weights": model.num_weights,
            "tied_embeddings": model.tied,
            "vocab_size": model.vocab_size,
            "max_context": model.max_positions,
            "sizes_from": model.basis,
            "sizes_exact": not model.unread_nbytes,
            "exportable": model.exportable,
            "why_not_exportable": model.why_not,
            "cache_type_k": self.cache_types[0],
            "cache_type_v": self.cache_types[1],
            "files": [_file(file) for file in self.files],
            "refused": dict(model.refused),
            "memory": [room.to_json() for room in self.rooms],
            "fits": [one.to_json() for one in self.fits],
            "recommended": [
                {"target": target.name, "ctx": ctx, "type": best[0].type if best else None}
                for target in self.targets
                for ctx in self.contexts
                for best in [self.best(target, ctx)]
            ],
            "anything_fits": self.failure is None if self.fits else None,
            "uplinks": [
                link.uplink.to_json()
                | {
                    "targets": list(link.targets),
                    "files": {file.type: link.uplink.transfer(file.nbytes).to_json() for file in self.files},
                }
                for link in self.links
            ],
            "notes": [*self.notes, *model.notes],
        }


def _hint(near: Fit) -> str:
    if near.largest_ctx:
        return f"--ctx-size {near.largest_ctx} fits"
    return "--ctx-size N with less, or --cache-type-k q8_0" if near.limited_by == "KV cache" else "a smaller model"


def _file(file: PlannedFile) -> dict[str, Any]:
    return {
        "type": file.type,
        "bytes": file.nbytes,
        "data_bytes": file.data_nbytes,
        "bits_per_weight": round(file.bits_per_weight, 4),
        "fallbacks": [asdict(fallback) for fallback in file.fallbacks],
        "needs_imatrix": file.needs_imatrix,
        "ternary": file.ternary,
    }


def plan(
    model: str,
    *,
    targets: Sequence[str] = (),
    ctx: Sequence[int] | None = None,
    types: Sequence[str] | None = None,
    all_types: bool = False,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    threads: int | None = None,
    uplink: float | None = None,
    pass_s: float | None = None,
    passes_per_day: float | None = None,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PlanResult:
    """What `model` (directory, hub id, `reference`) would be as GGUF files, and what devices would do with them.

    No weight is read, and of a hub id only the small files are fetched. `targets`: names, or YAML files. `ctx`:
    lengths of contexts, cut to the longest that the model was made for, an error if none is within it. `types`:
    llama.cpp's names, a usual dozen by default, `all_types` all. `cache_type_k`, `cache_type_v`: of the KV cache.
    `uplink` in bits a second, `pass_s` in seconds; what is left out is the target's link, or the usual. Errors:
    UsageError (an unknown target or type, a context below 1), UnsupportedError (a family that is not known), those of
    the checkpoint. That nothing fits is no error here: `failure` of the result.
    """
    if types is not None and all_types:
        raise UsageError("--type and --all-types, expected one of them")
    if ctx is not None and (not ctx or min(ctx) < 1):
        raise UsageError(f"--ctx-size {','.join(map(str, ctx))}, expected numbers above 0")
    kinds = _cache_type("--cache-type-k", cache_type_k), _cache_type("--cache-type-v", cache_type_v)
    known = list({target.name: target for target in map(load_target, targets)}.values())
    links = _links(known, uplink, pass_s, passes_per_day)
    if not links and (pass_s, passes_per_day) != (None, None):
        raise UsageError("--pass and --passes-per-day need --uplink, or a target with a link", hint="--uplink 256kbps")
    found = _found(model, types, all_types, pre_tokenizer, revision, trust_remote_code, progress or Silent())
    files = _files(found, named=types is not None or all_types)
    contexts, notes = _contexts(found, ctx, bool(known))
    fits = (
        fit(target, found, file, one, type_k=kinds[0], type_v=kinds[1], threads=threads)
        for target in known
        for one in contexts
        for file in files
    )
    return PlanResult(
        model=found,
        files=files,
        contexts=contexts,
        cache_types=kinds,
        rooms=tuple(_room(found, one, kinds, threads) for one in contexts),
        targets=tuple(known),
        fits=tuple(fits),
        links=links,
        notes=tuple(notes),
    )


def _cache_type(flag: str, word: str) -> str:
    if word.upper() not in CACHE_TYPES:
        raise UsageError(f"{flag} {word!r}, expected one of {', '.join(CACHE_TYPES).lower()}")
    return word.upper()


def _found(
    model: str,
    types: Sequence[str] | None,
    all_types: bool,
    pre_tokenizer: str | None,
    revision: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> PlannedModel:
    """The model with the types that are asked for; UnsupportedError where it can have none of them."""
    chosen = dict.fromkeys(map(file_type, types)) if types is not None else TYPES if all_types else (*USUAL, *TERNARY)

    def read(names: Iterable[str]) -> PlannedModel:
        return plan_files(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            types=tuple(names),
            pre_tokenizer=pre_tokenizer,
            progress=progress,
        )

    found = read(chosen)
    if not found.files and types is None:
        found = read(TYPES)
    if not found.files:
        name, why = next(iter(found.refused.items()))
        raise UnsupportedError(f"{name}: {why}", where=found.name)
    return found


def _files(model: PlannedModel, *, named: bool) -> tuple[PlannedFile, ...]:
    """The largest first; of equal ones the more usual. Ternary types of an ordinary model only where they are named."""
    ternary = named or model.gguf_arch in _TERNARY_ARCHS
    kept = [file for file in model.files if ternary or not file.ternary]
    rank = {name: place for place, name in enumerate(USUAL)}
    return tuple(sorted(kept, key=lambda file: (-file.nbytes, rank.get(file.type, len(rank)))))


def _contexts(model: PlannedModel, asked: Sequence[int] | None, with_target: bool) -> tuple[tuple[int, ...], list[str]]:
    """None longer than the model was made for, in their order; and what is to be said of those that were."""
    wanted = asked or ((CONTEXT,) if with_target else CONTEXTS)
    longest = model.max_positions
    beyond = [str(one) for one in asked or () if one > longest]
    if asked and len(beyond) == len(asked):
        told = f"--ctx-size {','.join(beyond)}: {model.name} was made for at most {longest}"
        raise UsageError(told, hint=f"--ctx-size {longest}")
    notes = [f"a context of {', '.join(beyond)} is more than the {longest} that it was made for"] if beyond else []
    return tuple(sorted({min(one, longest) for one in wanted})), notes


def _room(model: PlannedModel, ctx: int, kinds: tuple[str, str], threads: int | None) -> Room:
    network = read_network(model.metadata, model.vocab_size)
    merges, count = model.num_merges, threads or 4
    return Room(
        ctx=ctx,
        cache=kv_bytes(model.cache, ctx, type_k=kinds[0], type_v=kinds[1]),
        scratch=scratch_bytes(network, model.cache, ctx, merges=merges, threads=count),
    )


def _links(
    targets: Sequence[Target], rate: float | None, pass_s: float | None, passes_per_day: float | None
) -> tuple[PlannedLink, ...]:
    """One for all targets that have the same."""
    if not targets:
        made = make_uplink(None, rate=rate, pass_s=pass_s, passes_per_day=passes_per_day)
        return () if made is None else (PlannedLink(uplink=made, targets=(), about=None),)
    found: dict[tuple[Uplink, str | None], list[str]] = {}
    for target in targets:
        one = make_uplink(target.link, rate=rate, pass_s=pass_s, passes_per_day=passes_per_day)
        about = target.link.about if target.link and (rate, pass_s, passes_per_day) == (None, None, None) else None
        if one is not None and "gguf" in target.runs:
            found.setdefault((one, about), []).append(target.name)
    return tuple(PlannedLink(uplink=one, targets=tuple(names), about=about) for (one, about), names in found.items())
