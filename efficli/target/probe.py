"""A machine that was measured, as the text of a profile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from efficli.ops.byte_size import binary_bytes
from efficli.ops.machine import Machine, MemoryState
from efficli.target.profile import Confidence

BY = "measured by efficli targets probe"
QUICK, QUICK_LOW = 0.8, 0.5
"""Of what all cores read together, what llama.cpp is taken to read where it was not run: on a Raspberry Pi 4, whose
K-quants wait for arithmetic, it was 0.6."""
ONNX = ("aarch64", "x86-64")
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """llama.cpp with a model of random weights."""

    threads: int
    """With which it was fastest."""
    tried: tuple[int, ...]
    gb_per_s: tuple[float, ...]
    """Active bytes of a token over the time of the fastest less the overhead, for each repeat."""
    overhead_ms: tuple[float, ...]
    """The fastest token of a model with as many layers and next to no weights, for each repeat."""
    what: str
    """The model: "205 MB in Q4_K and 24 layers"."""
    runtime: str
    """Version of llama.cpp's library: "llama-cpp-python 0.3.36"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What `efficli targets probe` measured; every sample, in the units of the profile."""

    machine: Machine
    memory: tuple[MemoryState, ...]
    """Looked at several times."""
    copy: tuple[float, ...]
    read: tuple[float, ...]
    buffer_bytes: int
    decoding: Decoding | None
    notes: tuple[str, ...] = ()
    """What else happened on the machine meanwhile, and what stands against a figure."""


def profile_text(found: Findings) -> str:
    """The profile as YAML of the form of `efficli/targets/`; free of dates, names of hosts and of users."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: Findings) -> Iterator[str]:
    machine = found.machine
    yield "version: 1"
    yield f"about: {_quoted(_about(found))}"
    yield f"arch: {machine.arch}"
    yield f"isa: [{', '.join(machine.isa)}]"
    yield "cores:"
    for kind in machine.cores:
        clock = f", ghz: {kind.ghz:g}" if kind.ghz else ""
        yield f"  - {{count: {kind.count}, name: {_quoted(kind.name)}{clock}}}"
    if machine.arch in ONNX:
        yield "runs: [gguf, onnx]"
    else:
        yield "runs: [gguf]"
        yield f"why_not: {_quoted(f'onnxruntime has no wheels for {machine.arch}')}"
    yield from _memory(found.memory)
    yield "bandwidth:"
    size = binary_bytes(found.buffer_bytes)
    yield _figure("  memcpy", found.copy, f"{BY}: memmove of {size}, 1 thread", n=len(found.copy))
    yield _figure("  read", found.read, f"{BY}: memchr over {size}, {_threads(machine.num_cores)}", n=len(found.read))
    yield "decode:"
    yield from _decode(found)
    notes = [*_doubled(machine), *found.notes]
    if notes:
        yield "notes:"
        yield from (f"  - {_quoted(note)}" for note in notes)


def _about(found: Findings) -> str:
    total = binary_bytes(found.memory[0].total)
    return f"{found.machine.name}, {found.machine.num_cores} cores, {total} of memory"


def _doubled(machine: Machine) -> Iterator[str]:
    if machine.threads_per_core > 1:
        yield f"each core runs {machine.threads_per_core} threads, and counts as so many here"


def _memory(states: Sequence[MemoryState]) -> Iterator[str]:
    first = states[0]
    told = "limit of the control group" if first.capped else "as the kernel shows it"
    usable = [max(1, state.usable // _MIB) for state in states]
    what = "MemAvailable, less what the control group forbids" if first.capped else "MemAvailable"
    yield "ram:"
    yield _figure("  total_mib", [first.total // _MIB], f"{BY}: {told}", digits=6)
    yield _figure("  usable_mib", usable, f"{BY}: {what}, lowest and highest of {len(usable)} looks", digits=6)


def _decode(found: Findings) -> Iterator[str]:
    """The calibration: llama.cpp's own speed, or a guess from the memory's that says that it is one."""
    yield "  - runtime: llama.cpp"
    one = found.decoding
    if one is None:
        best = median(found.read)
        yield f"    threads: {found.machine.num_cores}"
        guess = [best * QUICK_LOW, best * QUICK, best]
        how = f"{QUICK:g} ({QUICK_LOW:g} - 1) of what all cores read together; llama.cpp was not run"
        yield _figure("    gb_per_s", guess, f"{how} ({BY})", confidence="estimate")
        yield _figure("    overhead_ms", [1, 2, 3], "graph and sampler on a CPU", confidence="estimate")
        return
    tried = f" (also tried: {', '.join(str(n) for n in one.tried if n != one.threads)})" if len(one.tried) > 1 else ""
    yield f"    threads: {one.threads}"
    how = f"{BY}: {one.runtime} decoding random weights, {one.what}, {_threads(one.threads)}{tried}"
    # one core may well compute with Q4_K more slowly than it could read; F16 then comes near to what can be read
    if (most := median(found.read)) > max(one.gb_per_s):
        how += "; high: what all cores read, which types with less arithmetic come near to"
    yield _figure("    gb_per_s", one.gb_per_s, how, n=len(one.gb_per_s), high=most)
    how = f"{BY}: the fastest token of a model with as many layers, 256 wide"
    yield _figure("    overhead_ms", one.overhead_ms, how, n=len(one.overhead_ms))


def _figure(
    key: str,
    samples: Sequence[float],
    source: str,
    *,
    n: int | None = None,
    confidence: Confidence = "measured",
    digits: int = 4,
    high: float = 0,
) -> str:
    """The median of the samples, their ends (the upper one at least `high`), and how it was got."""
    ends = median(samples), min(samples), max(*samples, high)
    value, low, high = (float(f"{end:.{digits}g}") for end in ends)
    spread = f"low: {low:g}, high: {high:g}, " if len(samples) > 1 else ""
    count = f"n: {n}, " if n is not None else ""
    return f"{key}: {{value: {value:g}, {spread}{count}source: {_quoted(source)}, confidence: {confidence}}}"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _quoted(text: str) -> str:
    """A scalar that YAML reads as this text, whatever is in it: JSON's strings are YAML's."""
    return json.dumps(text)
