"""What a device will do with a model file, reckoned from its profile; every figure with a range and its reasons.

    t_token = sum over types of max(bytes / BW, 2 weights / G) + KV bytes / BW + t0

BW (GB/s, the calibration; less with fewer threads than it was calibrated with) and G (operations a second of a type
that is computed more slowly than it is read) are the profile's. Reading a prompt is bound by arithmetic and is
predicted only where the profile has it measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from efficli.target.profile import ORDER, Confidence, Decode, Figure, Floor, Range, Target
from efficli.target.work import Share, Work

FORMULA = "t_token = sum over types of max(bytes / BW, 2 weights / G) + KV bytes / BW + t0"
MARGIN = 0.1
"""Of the usable memory that stays free."""
FOUR_BITS = 4.5 / 8
"""Bytes per weight that a type below 4 bits is reckoned with where its speed is not known: no gain is promised."""
BELOW_LOW, BELOW_HIGH = 0.5, 1.5
"""Range of that speed: Q2_K on a Pi 5 reached 0.49 of it (2 threads, 2024), a mixture of 2.7 bits 1.5 (4, 2026)."""
SATURATED = Range(0.7, 0.6, 1.0)
"""Share of the calibrated threads from which on memory is what limits; with fewer, speed goes with the threads.

A lone thread wrote 1.4 (1.2 - 1.7) times its share of the tokens/s of all, median of 13 pairs of runs of llama.cpp and
ik_llama.cpp on a Pi 5, an AGX Orin, an M2 Ultra and an i7-1065G7 (microsoft/T-MAC profiling_data.md, potato-os/core
mnn_spike_results.md).
"""
PROMPT_SHARE = 0.98
"""Share of a prompt's weights whose types must have a measured speed."""
_GIGA, _MEGA, _MIB = 1e9, 1e6, 1 << 20

Verdict = Literal["fits", "tight", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Whether it fits: RssAnon + file <= usable memory - 10 %."""

    verdict: Verdict
    """fits: at the low end of what is usable; tight: only with luck; no."""
    need_bytes: float
    usable_bytes: Range
    anon_known: bool
    """Whether `need_bytes` has the real peak of anonymous memory, or just the cache."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "verdict": self.verdict,
            "need_bytes": round(self.need_bytes),
            "usable_bytes": self.usable_bytes.to_json(),
            "anon_known": self.anon_known,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What `target` should do with a file. None stands where nothing is known, and a sentence says why."""

    target: str
    runtime: str | None
    decode: Range | None
    """tokens/s"""
    token_ms: Range | None
    limited_by: str | None
    """What a written token waits for: "memory", or "arithmetic of Q2_K"."""
    confidence: Confidence | None
    """The least certain figure behind `decode`."""
    prefill: Range | None
    """tokens/s of a prompt of some hundred tokens"""
    load_s: Mapping[str, Range]
    """Seconds to read the file, by storage, the usual one first."""
    energy_j: Range | None
    """J per written token, of the whole device."""
    memory: Memory
    formula: str = FORMULA
    sentences: tuple[str, ...] = field(default=())
    """From what it was reckoned, and what is not known."""

    def ttft_ms(self, prompt_tokens: int) -> Range | None:
        """Milliseconds to read a prompt and write one token; None where the prefill is not known."""
        if self.prefill is None or self.token_ms is None:
            return None
        read = Range(1000.0 * prompt_tokens, *[1000.0 * prompt_tokens] * 2).over(self.prefill)
        token = self.token_ms
        return Range(read.value + token.value, read.low + token.low, read.high + token.high)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        ranges = {name: getattr(self, name) for name in ("decode", "token_ms", "prefill", "energy_j")}
        return {
            "predicted": True,
            "target": self.target,
            "runtime": self.runtime,
            **{name: found and found.to_json() for name, found in ranges.items()},
            "limited_by": self.limited_by,
            "confidence": self.confidence,
            "load_s": {kind: found.to_json() for kind, found in self.load_s.items()},
            "memory": self.memory.to_json(),
            "formula": self.formula,
            "sentences": list(self.sentences),
        }


def predict(target: Target, work: Work, runtime: str | None = None) -> Prediction:
    """What `target` should do; `runtime` as its profile names it, by default the profile's first."""
    said: list[str] = []
    speed = _decode_entry(target, runtime, said)
    token = _token(speed, target, work, said) if speed else None
    energy = None
    if token and target.power.load_w:
        watts = target.power.load_w.range
        energy = Range(*(w * s for w, s in zip(_ends(watts), _ends(token.seconds), strict=True)))
        said.append(f"energy is {target.power.load_w.value:g} W of the whole device ({target.power.load_w.source})")
    return Prediction(
        target=target.name,
        runtime=speed.runtime if speed else runtime,
        decode=Range(1, 1, 1).over(token.seconds) if token else None,
        token_ms=_scaled(token.seconds, 1000) if token else None,
        limited_by=token.limited_by if token else None,
        confidence=token.confidence if token else None,
        prefill=_prefill(target, work, speed.runtime if speed else runtime, said),
        load_s={
            store.kind: _scaled(_one(work.file_bytes).over(store.mb_per_s.range), 1 / _MEGA) for store in target.storage
        },
        energy_j=energy,
        memory=_memory(target, work, said),
        sentences=(*said, *target.notes),
    )


@dataclass(frozen=True, slots=True)
class _Token:
    seconds: Range
    limited_by: str
    confidence: Confidence


def _decode_entry(target: Target, runtime: str | None, said: list[str]) -> Decode | None:
    found = next((one for one in target.decode if runtime in (None, one.runtime)), None)
    if "gguf" not in target.runs:
        said.append(f"does not run there: {target.why_not}")
    elif found is None:
        what = f"with {runtime} " if runtime else ""
        said.append(
            f"decode speed {what}is not known: nobody's measurement was found, and bandwidth alone would mislead"
        )
    return found


def _token(speed: Decode, target: Target, work: Work, said: list[str]) -> _Token:
    """Seconds of a token: the best value, fastest and slowest end, each reckoned with its own figures."""
    threads = min(work.threads or speed.threads or target.num_cores, target.num_cores)
    bandwidth = speed.gb_per_s.range
    used: list[Figure] = [speed.gb_per_s]
    said.append(f"{speed.runtime} on {target.name}: {bandwidth.text('GB/s')}, {_basis(speed.gb_per_s)}")
    if speed.threads and threads < speed.threads:
        bandwidth = _of_threads(bandwidth, threads / speed.threads)
    if speed.threads and threads != speed.threads:
        said.append(f"calibrated with {speed.threads} threads, not {threads}")
    overhead = _scaled(speed.overhead_ms.range, 1 / 1000)
    parts = [_scaled(_one(work.kv_bytes).over(bandwidth), 1 / _GIGA), overhead]
    waits = {"memory": parts[0].value, "overhead": overhead.value}
    unmeasured: list[str] = []
    for kind, share in sorted(work.types.items()):
        read = took = _scaled(_one(share.nbytes).over(bandwidth), 1 / _GIGA)
        floor = next((floor for floor in speed.floors if kind in floor.types), None)
        if floor:
            took = _slower(read, _floor_seconds(share, floor, threads))
        elif 8 * share.nbytes < 4 * share.weights and not speed.scales_below_4_bits:
            took = _slower(read, _as_four_bits(share, bandwidth))
            unmeasured.append(kind)
        bound = f"arithmetic of {kind}" if took.value > read.value else "memory"
        waits[bound] = waits.get(bound, 0.0) + took.value
        if floor and took.value > read.value:
            used.append(floor.gops_per_thread)
            said.append(f"{kind} is computed more slowly than it is read: {_basis(floor.gops_per_thread)}")
        parts.append(took)
    if unmeasured:
        kinds = ", ".join(unmeasured)
        said.append(f"{kinds}: not measured there; below 4 bits a stock runtime is not taken to be faster than at 4")
    total = _sum(parts)
    if overhead.value > 0.1 * total.value:
        used.append(speed.overhead_ms)
        said.append(f"{overhead.value / total.value:.0%} of a token is overhead ({speed.overhead_ms.source})")
    confidence: Confidence = "estimate" if unmeasured else _worst(used)
    return _Token(total, max(waits, key=waits.__getitem__), confidence)


def _of_threads(bandwidth: Range, share: float) -> Range:
    """GB/s with a share of the threads; more exactly known only where a floor says what a thread computes."""
    slow, value, fast = (min(1.0, share / end) for end in (SATURATED.high, SATURATED.value, SATURATED.low))
    return Range(bandwidth.value * value, bandwidth.low * slow, bandwidth.high * fast)


def _slower(one: Range, other: Range) -> Range:
    return Range(*map(max, _ends(one), _ends(other)))


def _floor_seconds(share: Share, floor: Floor, threads: int) -> Range:
    """Of the arithmetic; the slow end takes no more threads for granted than were measured."""
    rate = floor.gops_per_thread.range
    gops = Range(rate.value * threads, rate.low * min(threads, floor.threads), rate.high * threads)
    return _scaled(_one(2 * share.weights).over(gops), 1 / _GIGA)


def _as_four_bits(share: Share, bandwidth: Range) -> Range:
    """Of a type below 4 bits whose speed is not known."""
    at_four = _one(share.weights * FOUR_BITS / _GIGA).over(bandwidth)
    return Range(at_four.value, at_four.value / BELOW_HIGH, max(at_four.value / BELOW_LOW, at_four.high))


def _prefill(target: Target, work: Work, runtime: str | None, said: list[str]) -> Range | None:
    """tokens/s of a prompt, where its types were measured."""
    entries = [one for one in target.prefill if one.runtime == runtime]
    if not entries:
        said.append("prefill is not predicted: it is bound by arithmetic, and was not measured there")
        return None
    shares = work.types if work.prompt_types is None else work.prompt_types
    weights = sum(share.weights for share in shares.values())
    known = {kind: one for one in entries for kind in one.types if kind in shares}
    covered = sum(shares[kind].weights for kind in known)
    if not weights or covered < PROMPT_SHARE * weights:
        missing = ", ".join(sorted(kind for kind in shares if kind not in known and shares[kind].weights))
        said.append(f"prefill is not predicted: {missing or 'nothing'} was not measured there")
        return None
    seconds = _sum(
        _scaled(_one(2 * shares[kind].weights).over(one.gops.range), 1 / _GIGA) for kind, one in known.items()
    )
    said.extend(f"prefill: {text}" for text in dict.fromkeys(_basis(one.gops) for one in known.values()))
    return Range(1, 1, 1).over(_scaled(seconds, weights / covered))


def _memory(target: Target, work: Work, said: list[str]) -> Memory:
    """RssAnon + file against what is usable, less the margin."""
    anon = work.kv_bytes if work.peak_anon is None else work.peak_anon
    need, usable = work.file_bytes + anon, _scaled(target.ram.usable_mib.range, _MIB)
    fits = need <= usable.low * (1 - MARGIN)
    verdict: Verdict = "fits" if fits else "tight" if need <= usable.high else "no"
    if work.peak_anon is None:
        said.append("memory beyond the file and the cache is not known, and not counted")
    return Memory(verdict=verdict, need_bytes=need, usable_bytes=usable, anon_known=work.peak_anon is not None)


def _basis(figure: Figure) -> str:
    points = "" if figure.n is None else ", one point" if figure.n == 1 else f", {figure.n} points"
    return f"{figure.confidence}{points}: {figure.source}"


def _worst(figures: Iterable[Figure]) -> Confidence:
    return max((figure.confidence for figure in figures), key=ORDER.index)


def _one(value: float) -> Range:
    return Range(value, value, value)


def _ends(found: Range) -> tuple[float, float, float]:
    return found.value, found.low, found.high


def _scaled(found: Range, factor: float) -> Range:
    return Range(*(end * factor for end in _ends(found)))


def _sum(parts: Iterable[Range]) -> Range:
    ends = [_ends(part) for part in parts]
    return Range(*(sum(column) for column in zip(*ends, strict=True)))
