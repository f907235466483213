"""What a machine tells of itself, from files as real kernels write them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from efficli.errors import UnsupportedError
from efficli.ops.machine import CoreKind, read_machine, read_memory

PI5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
PI4 = "fp asimd evtstrm crc32 cpuid"
PHONE = "fp asimd aes crc32 atomics fphp asimdhp asimddp sve sve2 i8mm bf16"
N150 = "fpu sse4_2 avx avx2 fma f16c bmi2 avx_vnni"
EPYC = "fpu sse4_2 avx avx2 fma f16c avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni"
OLD_XEON = "fpu sse4_2 avx avx2 fma f16c avx512f avx512cd"


def machine_files(root: Path, blocks: list[dict[str, str]], board: str = "", khz: dict[int, int] | None = None) -> None:
    """/proc/cpuinfo and /sys/devices/system/cpu of such a machine."""
    (root / "proc").mkdir(parents=True)
    text = "\n".join("".join(f"{name}\t: {value}\n" for name, value in block.items()) for block in blocks)
    (root / "proc/cpuinfo").write_text(text + (f"\n{board}\n" if board else ""))
    for number, clock in (khz or {}).items():
        folder = root / f"sys/devices/system/cpu/cpu{number}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "cpuinfo_max_freq").write_text(f"{clock}\n")


def read(root: Path, arch: str, count: int):
    return read_machine(root / "proc", root / "sys", arch=arch, cpus=frozenset(range(count)))


def arm(number: int, features: str, part: str, maker: str = "0x41") -> dict[str, str]:
    return {"processor": str(number), "Features": features, "CPU implementer": maker, "CPU part": part}


def test_a_pi_5(tmp_path):
    blocks = [arm(n, PI5, "0xd0b") for n in range(4)]
    machine_files(tmp_path, blocks, "Model\t\t: Raspberry Pi 5 Model B Rev 1.0", dict.fromkeys(range(4), 2_400_000))
    found = read(tmp_path, "aarch64", 4)
    assert found.name == "Raspberry Pi 5 Model B Rev 1.0"
    assert found.cores == (CoreKind(4, "Cortex-A76", 2.4),)
    assert found.isa == ("neon", "crc", "aes", "fp16", "dotprod")
    assert (found.num_cores, found.threads_per_core, found.cache_bytes) == (4, 1, None)


def test_a_pi_4_has_no_dotprod(tmp_path):
    machine_files(tmp_path, [arm(n, PI4, "0xd08") for n in range(4)])
    found = read(tmp_path, "aarch64", 4)
    assert found.isa == ("neon", "crc")
    assert found.cores == (CoreKind(4, "Cortex-A72", None),)


def test_a_phone_has_several_kinds_of_cores_the_fastest_first(tmp_path):
    parts = ["0xd46"] * 3 + ["0xd4d"] * 4 + ["0xd4e"]
    clocks = {n: 2_016_000 if n < 3 else 2_803_200 if n < 7 else 3_187_200 for n in range(8)}
    machine_files(tmp_path, [arm(n, PHONE, part) for n, part in enumerate(parts)], khz=clocks)
    found = read(tmp_path, "aarch64", 8)
    assert found.cores == (
        CoreKind(1, "Cortex-X3", 3.19),
        CoreKind(4, "Cortex-A715", 2.8),
        CoreKind(3, "Cortex-A510", 2.02),
    )
    assert found.isa == ("neon", "crc", "aes", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2")


def test_what_one_core_lacks_the_machine_lacks(tmp_path):
    machine_files(tmp_path, [arm(0, PI5, "0xd0b"), arm(1, PI4, "0xd08")])
    assert read(tmp_path, "aarch64", 2).isa == ("neon", "crc")


def test_a_core_that_no_table_knows_keeps_its_numbers(tmp_path):
    machine_files(tmp_path, [arm(0, PI4, "0xfff", "0x99")])
    assert read(tmp_path, "aarch64", 1).cores == (CoreKind(1, "0x99/0xfff", None),)


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        (N150, ("sse4.2", "avx", "avx2", "fma", "f16c", "bmi2", "avx-vnni")),
        (EPYC, ("sse4.2", "avx", "avx2", "fma", "f16c", "avx512", "avx512-vnni")),
        (OLD_XEON, ("sse4.2", "avx", "avx2", "fma", "f16c")),  # llama.cpp's AVX512 needs five of its parts
    ],
)
def test_x86(tmp_path, flags, isa):
    machine_files(tmp_path, [{"processor": str(n), "model name": "Some CPU", "flags": flags} for n in range(2)])
    found = read(tmp_path, "x86-64", 2)
    assert (found.isa, found.cores, found.name) == (isa, (CoreKind(2, "Some CPU", None),), "Some CPU")


def test_arm_of_32_bits_and_risc_v(tmp_path):
    machine_files(tmp_path / "arm", [arm(n, "half thumb fastmult vfp edsp neon vfpv3", "0xc09") for n in range(2)])
    found = read(tmp_path / "arm", "armv7", 2)
    assert (found.isa, found.cores[0].name) == (("neon",), "Cortex-A9")
    vector = {"processor": "0", "isa": "rv64imafdcv_zba_zbb", "uarch": "sifive,x280"}
    machine_files(tmp_path / "vector", [vector])
    assert read(tmp_path / "vector", "riscv64", 1).isa == ("rvv",)
    machine_files(tmp_path / "scalar", [vector | {"isa": "rv64imafdc_zba_zvkb"}])
    assert read(tmp_path / "scalar", "riscv64", 1).isa == ()


def test_only_processors_that_we_may_use_count(tmp_path):
    blocks = [arm(n, PI5, part) for n, part in enumerate(["0xd05", "0xd0b", "0xd0b"])]
    machine_files(tmp_path, blocks)
    found = read_machine(tmp_path / "proc", tmp_path / "sys", arch="aarch64", cpus=frozenset({1, 2}))
    assert found.cores == (CoreKind(2, "Cortex-A76", None),)


def test_caches_that_are_shared_count_once_and_siblings_are_threads(tmp_path):
    machine_files(tmp_path, [{"processor": str(n), "model name": "x", "flags": N150} for n in range(4)])
    for number in range(4):
        cpu = tmp_path / f"sys/devices/system/cpu/cpu{number}"
        pair = "0-1" if number < 2 else "2-3"
        for index, (level, kind, size, shared) in enumerate(
            [(1, "Data", "32K", pair), (1, "Instruction", "64K", pair), (3, "Unified", "16M", pair)]
        ):
            folder = cpu / f"cache/index{index}"
            folder.mkdir(parents=True)
            for name, value in {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}.items():
                (folder / name).write_text(f"{value}\n")
        (cpu / "topology").mkdir()
        (cpu / "topology/thread_siblings_list").write_text(f"{pair}\n")
    found = read(tmp_path, "x86-64", 4)
    assert (found.cache_bytes, found.threads_per_core) == (32 << 20, 2)


def memory_files(root: Path, group: str, files: dict[str, str]) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal:        4000000 kB\nMemFree: 9 kB\nMemAvailable:    3000000 kB\n")
    (root / "proc/self/cgroup").write_text(f"{group}\n")
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)


MB = 1_000_000


@pytest.mark.parametrize(
    ("group", "files", "total", "usable"),
    [
        ("0::/", {"cgroup.procs": ""}, 4_096_000_000, 3_072_000_000),
        ("0::/box/inner", {"cgroup.procs": "", "box/memory.max": f"{800 * MB}\n", "box/memory.current": f"{300 * MB}",
         "box/memory.stat": f"anon 5\ninactive_file {100 * MB}\n", "box/inner/memory.max": "max\n"},
         800 * MB, 600 * MB),
        ("4:memory:/box", {"memory/cgroup.procs": "", "memory/box/memory.limit_in_bytes": f"{800 * MB}",
         "memory/box/memory.usage_in_bytes": f"{300 * MB}",
         "memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * MB}\n"}, 800 * MB, 700 * MB),
        ("4:memory:/box", {"memory/cgroup.procs": "", "memory/box/memory.limit_in_bytes": "9223372036854771712"},
         4_096_000_000, 3_072_000_000),
        ("0::/box", {"cgroup.procs": "", "box/memory.max": "5000", "box/memory.current": "9000"}, 5000, 0),
    ],
    ids=["no limit", "version 2, around us", "version 1", "version 1, no limit", "full"],
)  # fmt: skip
def test_memory_is_what_control_groups_leave(tmp_path, group, files, total, usable):
    memory_files(tmp_path, group, files)
    found = read_memory(tmp_path / "proc", tmp_path / "sys")
    assert (found.total, found.usable, found.capped) == (total, usable, total < 4_096_000_000)


def test_where_the_kernel_does_not_tell(tmp_path):
    with pytest.raises(UnsupportedError, match="MemAvailable"):
        read_memory(tmp_path, tmp_path)


def test_this_machine():
    found, memory = read_machine(), read_memory()
    assert found.num_cores == len(os.sched_getaffinity(0))
    assert found.arch.replace("-", "_") == platform.machine() or found.arch == "armv7"
    assert found.isa
    assert 0 < memory.usable <= memory.total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
