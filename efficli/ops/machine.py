"""What this machine is, as Linux tells it: kinds of cores, instruction set, memory that is left, caches."""

from __future__ import annotations

import platform
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from efficli.errors import UnsupportedError
from efficli.ops.hardware import cpu_name
from efficli.ops.processors import allowed, control_groups

ARM_FLAGS = {
    "neon": "neon", "asimd": "neon", "crc32": "crc", "aes": "aes", "asimdhp": "fp16", "asimddp": "dotprod",
    "i8mm": "i8mm", "bf16": "bf16", "sve": "sve", "sve2": "sve2", "sme": "sme", "sme2": "sme2",
}  # fmt: skip
"""Of /proc/cpuinfo's Features (arch/arm64/kernel/cpuinfo.c), in the words of the profiles."""
X86_FLAGS = {
    "sse4_2": "sse4.2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c", "bmi2": "bmi2",
    "avx_vnni": "avx-vnni", "avx512vbmi": "avx512-vbmi", "avx512_vnni": "avx512-vnni", "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
}  # fmt: skip
AVX512 = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
"""What llama.cpp calls AVX512."""

_ARCHES = {"aarch64": "aarch64", "arm64": "aarch64", "x86_64": "x86-64", "amd64": "x86-64", "riscv64": "riscv64"}
_PARTS = {
    0x41: {
        0xC07: "Cortex-A7", 0xC09: "Cortex-A9", 0xC0F: "Cortex-A15", 0xD03: "Cortex-A53", 0xD04: "Cortex-A35",
        0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73", 0xD0A: "Cortex-A75",
        0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1", 0xD41: "Cortex-A78",
        0xD42: "Cortex-A78AE", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD48: "Cortex-X2",
        0xD49: "Neoverse-N2", 0xD4B: "Cortex-A78C", 0xD4D: "Cortex-A715", 0xD4E: "Cortex-X3", 0xD4F: "Neoverse-V2",
        0xD80: "Cortex-A520", 0xD81: "Cortex-A720", 0xD82: "Cortex-X4",
    },
    0x4E: {0x003: "Denver 2", 0x004: "Carmel"},
    0x51: {
        0x001: "Oryon", 0x800: "Kryo 2xx gold", 0x801: "Kryo 2xx silver", 0x802: "Kryo 3xx gold",
        0x803: "Kryo 3xx silver", 0x804: "Kryo 4xx gold", 0x805: "Kryo 4xx silver",
    },
}  # fmt: skip
"""ARM's MIDR: implementer (0x41 ARM, 0x4e NVIDIA, 0x51 Qualcomm) and part, as util-linux names them (lscpu-arm.c)."""


@dataclass(frozen=True, slots=True)
class CoreKind:
    """Cores that are alike, as many as this process may use; `ghz` the highest clock, None where it is not told."""

    count: int
    name: str
    ghz: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What does not change while it runs."""

    name: str
    """Of the board or the processor."""
    arch: str
    """aarch64, armv7, x86-64 or riscv64: of the programs, not of the kernel."""
    isa: tuple[str, ...]
    """Extensions that every core has, in the words of the profiles."""
    cores: tuple[CoreKind, ...]
    """The fastest first; processors as the kernel counts them, so two for a core that runs two threads."""
    threads_per_core: int
    cache_bytes: int | None
    """Of the last level, all that these cores share; None where it is not told."""

    @property
    def num_cores(self) -> int:
        """Of all kinds."""
        return sum(kind.count for kind in self.cores)


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Bytes: what there is, and what a new process could fill now without swapping."""

    total: int
    usable: int
    capped: bool
    """Whether a control group allows less than the machine has."""


def read_machine(
    proc: Path = Path("/proc"), sys: Path = Path("/sys"), *, arch: str | None = None, cpus: frozenset[int] | None = None
) -> Machine:
    """This machine; UnsupportedError where the kernel does not tell, or for an architecture that no profile knows."""
    cpus = allowed() if cpus is None else cpus
    arch = arch or _arch()
    blocks = _blocks(proc / "cpuinfo", cpus)
    cpu = sys / "devices/system/cpu"
    kinds = Counter((_core_name(blocks.get(number, {})), _ghz(cpu, number)) for number in sorted(cpus))
    cores = [CoreKind(count, name or cpu_name(proc), ghz) for (name, ghz), count in kinds.items()]
    siblings = [_listed(cpu / f"cpu{number}/topology/thread_siblings_list") & cpus for number in cpus]
    return Machine(
        name=cpu_name(proc),
        arch=arch,
        isa=_isa(arch, list(blocks.values())),
        cores=tuple(sorted(cores, key=lambda kind: kind.ghz or 0.0, reverse=True)),
        threads_per_core=max((len(group) for group in siblings), default=1) or 1,
        cache_bytes=_last_cache(cpu, cpus),
    )


def read_memory(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> MemoryState:
    """Memory now: MemAvailable, and what the control groups around us leave; UnsupportedError where it is not told."""
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB$", _text(proc / "meminfo"), re.MULTILINE))
    if len(found) < 2:
        raise UnsupportedError(f"{proc}/meminfo has no MemAvailable: only Linux is probed")
    total, usable = 1024 * int(found["MemTotal"]), 1024 * int(found["MemAvailable"])
    limit = total
    for group in control_groups(proc, sys, "memory"):
        allowed_bytes = _number(group, "memory.max", "memory.limit_in_bytes")
        if allowed_bytes is None or allowed_bytes >= total:
            continue
        limit = min(limit, allowed_bytes)
        used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
        stats = dict(re.findall(r"^((?:total_)?inactive_file) (\d+)$", _text(group / "memory.stat"), re.MULTILINE))
        dropped = int(stats.get("total_inactive_file") or stats.get("inactive_file") or 0)
        usable = min(usable, allowed_bytes - used + dropped)
    return MemoryState(limit, max(usable, 0), limit < total)


def _arch() -> str:
    """Of this interpreter: one of 32 bits may run on a kernel of 64."""
    machine = platform.machine().lower()
    if machine.startswith("armv7") or (machine in ("aarch64", "arm64", "armv8l") and struct.calcsize("P") == 4):
        return "armv7"
    found = _ARCHES.get(machine)
    if found is None or not Path("/proc/cpuinfo").exists():
        raise UnsupportedError(f"{platform.system()} on {machine}: Linux on {', '.join(_ARCHES)} and armv7 is probed")
    return found


def _blocks(cpuinfo: Path, cpus: frozenset[int]) -> dict[int, dict[str, str]]:
    """The lines of each processor of `cpus`, by its number."""
    found: dict[int, dict[str, str]] = {}
    for block in re.split(r"\n\s*\n", _text(cpuinfo)):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {name.strip(): " ".join(value.split()) for name, _, value in pairs}
        number = fields.get("processor", "")
        if number.isdecimal() and int(number) in cpus:
            found[int(number)] = fields
    return found


def _core_name(fields: dict[str, str]) -> str:
    """Of its design; nothing where only the board is named."""
    try:
        maker, part = int(fields["CPU implementer"], 16), int(fields["CPU part"], 16)
    except (KeyError, ValueError):
        return fields.get("model name") or fields.get("uarch") or ""
    return _PARTS.get(maker, {}).get(part, f"{maker:#x}/{part:#x}")


def _isa(arch: str, blocks: list[dict[str, str]]) -> tuple[str, ...]:
    """Extensions that all processors show."""
    if arch == "riscv64":
        letters = [re.match(r"rv\d+([a-z]*)", block.get("isa", "")) for block in blocks]
        return ("rvv",) if letters and all(found and "v" in found[1] for found in letters) else ()
    flags = [set((block.get("Features") or block.get("flags") or "").split()) for block in blocks]
    shared = set.intersection(*flags) if flags else set()
    names = ARM_FLAGS if arch in ("aarch64", "armv7") else X86_FLAGS
    found = list(dict.fromkeys(name for flag, name in names.items() if flag in shared))
    if arch == "x86-64" and shared >= AVX512:
        before = next((at for at, name in enumerate(found) if name.startswith("avx512")), len(found))
        found.insert(before, "avx512")
    return tuple(found)


def _ghz(cpu: Path, number: int) -> float | None:
    khz = _number(cpu / f"cpu{number}/cpufreq", "cpuinfo_max_freq")
    return round(khz / 1e6, 2) if khz else None


def _last_cache(cpu: Path, cpus: frozenset[int]) -> int | None:
    """Bytes of the caches of the highest level; one that several processors share counts once."""
    sizes: dict[int, dict[str, int]] = {}
    for number in cpus:
        for index in (cpu / f"cpu{number}/cache").glob("index*"):
            size = re.fullmatch(r"(\d+)([KM])", _text(index / "size").strip())
            level = _number(index, "level")
            if size and level and _text(index / "type").strip() != "Instruction":
                group = _text(index / "shared_cpu_list").strip() or str(number)
                sizes.setdefault(level, {})[group] = int(size[1]) * (1024 if size[2] == "K" else 1024 * 1024)
    return sum(sizes[max(sizes)].values()) if sizes else None


def _listed(path: Path) -> frozenset[int]:
    """A file as "0-3,8"."""
    return frozenset(_numbers(_text(path).strip()))


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            yield from range(int(first), int(last or first) + 1)


def _number(folder: Path, *names: str) -> int | None:
    """What the first of these files holds that is there, if it is a number."""
    text = next((found for name in names if (found := _text(folder / name).strip())), "")
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
