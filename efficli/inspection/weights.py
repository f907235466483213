"""Read every weight once, in pieces: NaN and infinite values, matrices of nothing but zeros, hashes on the way.

Quantized blocks are judged by ggml's own check of their scales, and decoded where it objects. A GGUF file is read in a
child process: ggml's decoder sees data that nobody vouches for, and says what it finds on stderr.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint.files import changed, open_regular, read_exactly
from efficli.errors import MissingExtra
from efficli.inspection.report import Finding, printable
from efficli.ops import ggml
from efficli.ops.child import run_child
from efficli.ops.ggml_types import BLOCKS
from efficli.ops.scan import scan
from efficli.progress import Progress

SLAB_BYTES = 4 << 20
"""Read at a time."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_NAMED = 5

Read = Callable[[int, memoryview], None]
"""Fill a buffer from a byte of the tensor on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where a tensor's bytes are in a file: `type` of ggml or safetensors, `shape` in numpy order."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a tensor's values are: counts, and the flat index of the first that is wrong (-1: none)."""

    nan: int = 0
    infinite: int = 0
    first: int = -1
    zeros: bool = False
    """All of it is zero."""

    @property
    def is_wrong(self) -> bool:
        """Whether something in it is not finite."""
        return bool(self.nan or self.infinite)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRead:
    """One pass over a file: its SHA-256, what tensors hold that is noteworthy, hashes of some, types not looked at."""

    sha256: str
    seen: Mapping[str, Seen]
    hashes: Mapping[str, str]
    skipped: tuple[str, ...] = ()


def look(read: Read, kind: str, nbytes: int, digest: Callable[[memoryview], None] | None = None) -> Seen:
    """What the values of a tensor are; `read` gives its bytes in order, and `digest` sees them too.

    MissingExtra for quantized blocks without llama-cpp-python.
    """
    step = SLAB_BYTES - SLAB_BYTES % _unit(kind)
    slab = np.empty(min(step, nbytes), np.uint8)
    nan = infinite = 0
    first, zeros = -1, True
    for start in range(0, nbytes, step):
        part = slab[: min(step, nbytes - start)]
        read(start, part.data)
        if digest:
            digest(part.data)
        zeros = zeros and not part.any()
        found = _look_at(part, kind)
        if found.nan or found.infinite:
            nan, infinite = nan + found.nan, infinite + found.infinite
            if first < 0:
                first = found.first + start // _unit(kind) * _weights(kind)
    return Seen(nan=nan, infinite=infinite, first=first, zeros=zeros and nbytes > 0)


def _unit(kind: str) -> int:
    return np.dtype(_NUMPY[kind]).itemsize if kind in _NUMPY else BLOCKS[kind][1]


def _weights(kind: str) -> int:
    return 1 if kind in _NUMPY else BLOCKS[kind][0]


def _look_at(part: NDArray[np.uint8], kind: str) -> Seen:
    if kind in _NUMPY:
        return _count(part.view(_NUMPY[kind]), kind)
    if ggml.is_valid(kind, part):
        return Seen()
    values = np.empty((1, part.nbytes // BLOCKS[kind][1] * BLOCKS[kind][0]), np.float32)
    ggml.decode_into(kind, part, values)
    found = _count(values, "F32")
    # a scale that ggml refuses may decode to finite numbers; it is wrong all the same
    return found if found.is_wrong else Seen(nan=1, first=0)


def _count(values: NDArray[Any], kind: str) -> Seen:
    found = scan(values, kind)
    firsts = [at for at in (found.first_nan, found.first_infinite) if at >= 0]
    return Seen(nan=found.nan, infinite=found.infinite, first=min(firsts, default=-1))


def read_file(
    path: Path, regions: Sequence[Region], *, hashed: Iterable[str] = (), scanned: bool = True, progress: Progress
) -> FileRead:
    """Read a file once from its first byte to its last, in a child process; tensors are in the order of the file.

    `hashed` are tensors whose own SHA-256 is wanted. Only noteworthy tensors are in `seen`.
    """
    argument = {
        "path": os.fspath(path.absolute()),
        "regions": [asdict(region) for region in sorted(regions, key=lambda region: region.offset)],
        "hashed": sorted(hashed),
        "scanned": scanned,
    }
    told = run_child(
        "efficli.inspection.weights:read_here", argument, what="reading its weights", progress=progress, runtime="ggml"
    )
    seen = {name: Seen(**values) for name, values in told["seen"].items()}
    return FileRead(sha256=told["sha256"], seen=seen, hashes=told["hashes"], skipped=tuple(told["skipped"]))


def read_here(argument: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The child's part of `read_file`."""
    path, hashed = Path(argument["path"]), set(argument["hashed"])
    whole = hashlib.sha256()
    told: dict[str, Any] = {"seen": {}, "hashes": {}, "skipped": []}
    with open_regular(path, path.name) as (descriptor, stamp):
        progress.start(f"reading {path.name}", stamp.size, "B")
        at = 0

        def feed(part: memoryview) -> None:
            nonlocal at
            whole.update(part)
            at += len(part)
            progress.advance(len(part))

        for region in (Region(**values) for values in argument["regions"]):
            _pass_over(descriptor, at, region.offset, feed)
            own = hashlib.sha256() if region.name in hashed else None

            def both(part: memoryview, own: Any = own) -> None:
                feed(part)
                if own is not None:
                    own.update(part)

            seen = _look_in_file(descriptor, region, both, told["skipped"], scanned=argument["scanned"])
            if seen.is_wrong or seen.zeros:
                told["seen"][region.name] = asdict(seen)
            if own is not None:
                told["hashes"][region.name] = own.hexdigest()
        _pass_over(descriptor, at, stamp.size, feed)
        progress.finish()
    told["sha256"] = whole.hexdigest()
    return told


def _look_in_file(
    descriptor: int, region: Region, digest: Callable[[memoryview], None], skipped: list[str], *, scanned: bool
) -> Seen:
    def read(start: int, part: memoryview) -> None:
        if read_exactly(descriptor, part, region.offset + start) < len(part):
            raise changed(region.name)

    if scanned and region.type not in skipped:
        try:
            if region.type not in FLOATS:
                ggml.type_info(region.type)  # before the first byte: one that is passed on twice spoils the hash
            return look(read, region.type, region.nbytes, digest)
        except MissingExtra:
            skipped.append(region.type)
    _pass_over(descriptor, region.offset, region.offset + region.nbytes, digest)
    return Seen()


def _pass_over(descriptor: int, start: int, stop: int, digest: Callable[[memoryview], None]) -> None:
    """Bytes that are hashed and not looked at."""
    buffer = memoryview(bytearray(max(0, min(SLAB_BYTES, stop - start))))
    while start < stop:
        part = buffer[: min(len(buffer), stop - start)]
        if read_exactly(descriptor, part, start) < len(part):
            raise changed("its end")
        digest(part)
        start += len(part)


def value_findings(seen: Mapping[str, Seen], shapes: Mapping[str, tuple[int, ...]], where: str) -> list[Finding]:
    """Findings for tensors that hold what no model computes with."""
    found = []
    wrong = {name: one for name, one in seen.items() if one.is_wrong}
    for name, one in list(wrong.items())[:_NAMED]:
        counted = " and ".join(f"{n} {what}" for n, what in ((one.nan, "NaN"), (one.infinite, "Inf")) if n)
        at = ",".join(str(int(i)) for i in np.unravel_index(one.first, shapes[name]))
        found.append(
            Finding(
                check="values",
                message=f"{counted} in {printable(name)} (first at [{at}])",
                where=where,
                hint="the file is damaged, or the training diverged: take or make it again",
            )
        )
    if len(wrong) > _NAMED:
        found.append(
            Finding(check="values", message=f"{len(wrong) - _NAMED} more tensors with NaN or Inf", where=where)
        )
    empty = [name for name, one in seen.items() if one.zeros and len([n for n in shapes[name] if n > 1]) > 1]
    if empty:
        names = ", ".join(map(printable, empty[:3])) + (", ..." if len(empty) > 3 else "")
        found.append(
            Finding(
                check="values",
                message=f"{len(empty)} {'matrix is' if len(empty) == 1 else 'matrices are'} all zero: {names}",
                where=where,
                hint="a download that was cut and resumed leaves such holes: compare its hash, or fetch it again",
            )
        )
    return found


def weights_of(shape: Sequence[int]) -> int:
    """How many weights a shape has."""
    return prod(shape)
