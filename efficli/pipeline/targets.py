"""`efficli targets`: the devices that efficli knows, and a profile of the one that it runs on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from efficli.artifact.temporary import scratch_directory
from efficli.errors import FitError, MissingExtra, OutputError, UsageError
from efficli.export.gguf.stand_in import Shape, write_stand_in
from efficli.ops.byte_size import binary_bytes
from efficli.ops.child import run_child
from efficli.ops.disturbance import Watch
from efficli.ops.libraries import library_path
from efficli.ops.machine import Machine, read_machine, read_memory
from efficli.ops.probe import copy_gb_per_s, read_gb_per_s
from efficli.ops.storage import replace_file
from efficli.progress import Progress, Silent
from efficli.target import Target, active_bytes, table
from efficli.target.probe import Decoding, Findings, profile_text
from efficli.target.profile import parse_target

KIND = "Q4_K"
"""What most models are run in; also the type whose arithmetic costs most of those that are read as fast as stored."""
MODEL_BYTES = 200_000_000
BUFFER_BYTES = 256 << 20
BEYOND, ENOUGH = 8, 4
"""How many times the last cache what is measured with should be; with less than ENOUGH, the profile says so."""
SHARE = 5
"""At most this part of the usable memory, and the model is there twice: as a file's pages, and repacked."""
MOST_BYTES = 2 << 30
TOKENS = 8
MOST_OVERHEAD = 0.2
"""Of the time of a token, what its overhead is taken to be at most."""
_UNNAMED = "this-machine"


@dataclass(frozen=True, slots=True)
class Probed:
    """A profile of this machine, and its text; `output` is where it was written, if it was."""

    target: Target
    text: str
    output: Path | None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema_version": 1,
            "command": "targets probe",
            "output": None if self.output is None else str(self.output),
            "target": table.to_json(self.target),
        }


def probe_target(
    output: str | os.PathLike[str] | None = None,
    *,
    quick: bool = False,
    force: bool = False,
    buffer_bytes: int | None = None,
    model_bytes: int | None = None,
    progress: Progress | None = None,
) -> Probed:
    """Measure this machine and write its profile to `output` (FILE.yaml), or nowhere.

    `quick` leaves llama.cpp out: the speed of decoding is then an estimate. `buffer_bytes` and `model_bytes` are what
    memory and decoding are measured with; by default several times the last cache. Errors: UsageError or OutputError
    before anything is measured, UnsupportedError where the kernel does not tell enough, FitError without room.
    """
    progress = progress or Silent()
    place = None if output is None else _place(Path(output), force)
    machine, memory = read_machine(), [read_memory()]
    if not quick and not _has_llama():
        progress.note("llama-cpp-python is not installed: the speed of decoding is guessed from the memory's")
        quick = True
    watch = Watch(lambda: [os.getpid()])
    buffer = buffer_bytes or _size(machine, memory[0].usable, BUFFER_BYTES)
    with _task(progress, "measuring the memory"):
        watch.start()
        copy = copy_gb_per_s(buffer)
        read = read_gb_per_s(buffer, machine.num_cores)
        watch.pause()
    memory.append(read_memory())
    model = model_bytes or _size(machine, memory[-1].usable, MODEL_BYTES)
    decoding = None if quick else _decoding(machine, model, watch, progress)
    memory.append(read_memory())
    noise = watch.stop().lines
    for line in noise:
        progress.note(f"{line}; on a quiet machine the figures may be higher")
    found = Findings(
        machine=machine,
        memory=tuple(memory),
        copy=copy,
        read=read,
        buffer_bytes=buffer,
        decoding=decoding,
        notes=(*_small(machine, buffer if quick else min(buffer, model)), *noise),
    )
    text = profile_text(found)
    target = parse_target(text, place.stem if place else _UNNAMED)
    if place:
        replace_file(place, text)
    return Probed(target, text, place)


def _place(path: Path, force: bool) -> Path:
    """The file, if it can be written there."""
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"-o {path}, expected a name that ends in .yaml")
    if not path.parent.is_dir():
        raise OutputError("no such directory", where=str(path.parent))
    if path.is_dir() or (os.path.lexists(path) and not force):
        hint = None if path.is_dir() else "--force replaces it"
        raise OutputError("is a directory" if path.is_dir() else "exists", where=str(path), hint=hint)
    return path


def _has_llama() -> bool:
    try:
        library_path("llama")
    except MissingExtra:
        return False
    return True


def _size(machine: Machine, usable: int, least: int) -> int:
    """Bytes well beyond the caches, and well within the memory."""
    return min(max(least, BEYOND * (machine.cache_bytes or 0)), MOST_BYTES, usable // SHARE)


def _small(machine: Machine, nbytes: int) -> Iterator[str]:
    if machine.cache_bytes and nbytes < ENOUGH * machine.cache_bytes:
        caches = binary_bytes(machine.cache_bytes)
        yield f"measured with {binary_bytes(nbytes)}, which is not far beyond the caches of {caches}: maybe too fast"


def _decoding(machine: Machine, nbytes: int, watch: Watch, progress: Progress) -> Decoding:
    """Let llama.cpp decode random weights, with several counts of threads; the fastest."""
    shape = Shape.of_bytes(nbytes, KIND)
    with scratch_directory() as folder, _task(progress, "measuring llama.cpp"):
        _check_room(folder, 2 * shape.nbytes(KIND))
        large, narrow = folder / "large.gguf", folder / "narrow.gguf"
        tensors = write_stand_in(large, shape, KIND)
        write_stand_in(narrow, shape.narrow, KIND)
        watch.start()
        seconds = _seconds(large, _counts(machine))
        threads = min(seconds, key=lambda count: median(seconds[count]))
        overhead = _seconds(narrow, [threads])[threads]
        watch.pause()
    active = active_bytes(tensors, {"general.architecture": "llama"}).nbytes
    # threads that wait for each other make the overhead large where others run: what disturbs only adds
    read = [one - min(*overhead, MOST_OVERHEAD * one) for one in seconds[threads]]
    return Decoding(
        threads=threads,
        tried=tuple(seconds),
        gb_per_s=tuple(active / one / 1e9 for one in read),
        overhead_ms=tuple(1000 * one for one in overhead),
        what=f"{active / 1e6:.0f} MB in {KIND} and {shape.layers} layers",
        runtime=f"llama-cpp-python {version('llama-cpp-python')}",
    )


def _counts(machine: Machine) -> list[int]:
    """Threads to try: all, one a core, the fastest kind of cores, half."""
    cores = machine.num_cores
    found = {cores, -(-cores // machine.threads_per_core), machine.cores[0].count, -(-cores // 2)}
    return sorted(found, reverse=True)


def _seconds(path: Path, counts: list[int]) -> dict[int, list[float]]:
    request = {"path": str(path), "threads": counts, "tokens": TOKENS}
    found = run_child("efficli.ops.probe:decode", request, what="decoding random weights")
    return {int(count): samples for count, samples in found.items()}


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        hint = "TMPDIR=... names another folder; --quick needs none"
        raise FitError(
            f"{binary_bytes(free)} free, expected {binary_bytes(nbytes)}", where=str(folder.parent), hint=hint
        )


@contextmanager
def _task(progress: Progress, what: str) -> Iterator[None]:
    progress.start(what, 0)
    try:
        yield
    finally:
        progress.finish()
