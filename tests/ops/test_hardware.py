"""What a machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficli.ops.hardware import cpu_name, usable_memory


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor : 0\nmodel name\t: AMD  EPYC 9R14\nflags : avx\nmodel name : other\n", "AMD EPYC 9R14"),
        ("processor : 0\nFeatures : asimd\n\nModel\t\t: Raspberry Pi 5 Model B\n", "Raspberry Pi 5 Model B"),
        ("Hardware : BCM2835\n", "BCM2835"),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path) == name


def test_a_processor_without_a_name_has_an_architecture(tmp_path: Path) -> None:
    assert cpu_name(tmp_path)


def test_memory_is_the_machines_or_the_groups(tmp_path: Path) -> None:
    meminfo = Path("/proc/meminfo").read_text().split()
    total = int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    found = usable_memory(tmp_path)
    assert found is not None and abs(found - total) < 0.01 * total
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path) == found
    (tmp_path / "memory.max").write_text("536870912\n")
    assert usable_memory(tmp_path) == 512 << 20
