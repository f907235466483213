"""A machine that was measured, as a profile: it loads again, says how each figure was got, and predictions take it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import efficli
from efficli.errors import OutputError, UsageError
from efficli.ops.machine import CoreKind, Machine, MemoryState
from efficli.pipeline import targets as pipeline
from efficli.pipeline.targets import probe_target
from efficli.progress import Silent
from efficli.target import Share, Work, load_target, predict
from efficli.target.probe import Decoding, Findings, profile_text
from efficli.target.profile import parse_target
from tests.tiny_gguf import write_tiny

MIB = 1 << 20
BOARD = Machine(
    name='Board "1": a # b',
    arch="aarch64",
    isa=("neon", "dotprod"),
    cores=(CoreKind(4, "Cortex-A76", 2.4), CoreKind(4, "0x41/0xd05", None)),
    threads_per_core=1,
    cache_bytes=2 * MIB,
)
DECODING = Decoding(
    threads=4,
    tried=(8, 4),
    gb_per_s=(9.0, 10.0, 12.0),
    overhead_ms=(1.0, 1.5, 2.0),
    what="205 MB in Q4_K and 24 layers",
    runtime="llama-cpp-python 0.3.36",
)
FOUND = Findings(
    machine=BOARD,
    memory=(MemoryState(4000 * MIB, 3000 * MIB, False), MemoryState(4000 * MIB, 2900 * MIB, False)),
    copy=(5.0, 6.0, 5.5),
    read=(10.0, 12.0, 11.0),
    buffer_bytes=256 * MIB,
    decoding=DECODING,
    notes=("busy neighbour: 'make' used 0.5 cores",),
)
SMALL = {"buffer_bytes": 2 * MIB, "model_bytes": 1_000_000}


def test_a_profile_holds_medians_ends_counts_and_how_they_were_got():
    target = parse_target(profile_text(FOUND), "mine")
    assert (target.name, target.arch, target.isa, target.runs) == ("mine", "aarch64", BOARD.isa, ("gguf", "onnx"))
    assert target.about == 'Board "1": a # b, 8 cores, 3.91 GiB of memory'
    assert [(kind.count, kind.name, kind.ghz) for kind in target.cores] == [
        (4, "Cortex-A76", 2.4),
        (4, "0x41/0xd05", None),
    ]
    ram, band, (speed,) = target.ram, target.bandwidth, target.decode
    assert (ram.total_mib.value, ram.usable_mib.value) == (4000, 2950)
    assert (ram.usable_mib.low, ram.usable_mib.high) == (2900, 3000)
    assert band.memcpy and band.read
    assert (band.memcpy.value, band.memcpy.low, band.memcpy.high, band.memcpy.n) == (5.5, 5, 6, 3)
    assert (band.read.value, band.read.n, band.theoretical) == (11, 3, None)
    assert "8 threads" in band.read.source and "256.00 MiB" in band.read.source
    assert (speed.threads, speed.gb_per_s.value, speed.gb_per_s.n, speed.overhead_ms.value) == (4, 10, 3, 1.5)
    assert (speed.gb_per_s.low, speed.gb_per_s.high) == (9, 12)
    assert "205 MB in Q4_K and 24 layers, 4 threads (also tried: 8)" in speed.gb_per_s.source
    measured = (ram.total_mib, ram.usable_mib, band.memcpy, band.read, speed.gb_per_s, speed.overhead_ms)
    assert {figure.confidence for figure in measured} == {"measured"}
    assert all(figure.source.startswith("measured by efficli targets probe: ") for figure in measured)
    assert target.notes == FOUND.notes
    assert target.link is None and target.storage == () and target.power.load_w is None


def test_what_can_be_read_is_the_high_end_where_arithmetic_was_slower():
    (speed,) = parse_target(profile_text(replace(FOUND, read=(19.0, 20.0, 24.0))), "mine").decode
    assert (speed.gb_per_s.value, speed.gb_per_s.low, speed.gb_per_s.high) == (10, 9, 20)
    assert "high: what all cores read" in speed.gb_per_s.source
    (speed,) = parse_target(profile_text(FOUND), "mine").decode
    assert "high:" not in speed.gb_per_s.source


def test_without_llama_cpp_the_speed_of_decoding_is_an_estimate():
    (speed,) = parse_target(profile_text(replace(FOUND, decoding=None)), "mine").decode
    assert (speed.gb_per_s.value, speed.gb_per_s.low, speed.gb_per_s.high) == (8.8, 5.5, 11)
    assert (speed.gb_per_s.confidence, speed.overhead_ms.confidence, speed.threads) == ("estimate", "estimate", 8)
    assert "llama.cpp was not run" in speed.gb_per_s.source


def test_a_profile_says_what_stands_against_its_figures():
    capped = tuple(replace(state, capped=True) for state in FOUND.memory)
    small = replace(FOUND, machine=replace(BOARD, threads_per_core=2, arch="armv7"), memory=capped)
    target = parse_target(profile_text(small), "mine")
    assert target.notes[0] == "each core runs 2 threads, and counts as so many here"
    assert (target.runs, target.why_not) == (("gguf",), "onnxruntime has no wheels for armv7")
    assert "control group" in target.ram.total_mib.source and "control group" in target.ram.usable_mib.source


def test_yaml_as_others_read_it_has_the_same_values():
    text = profile_text(FOUND)
    assert parse_target(text, "mine").to_json().items() >= {"about": yaml.safe_load(text)["about"]}.items()
    assert yaml.safe_load(text)["decode"][0]["gb_per_s"]["value"] == 10


def test_this_machine_is_measured_written_and_loaded_again(tmp_path):
    path = tmp_path / "here.yaml"
    found = probe_target(path, **SMALL)
    assert found.output == path
    assert load_target(path) == found.target
    assert path.read_text() == found.text
    assert list(tmp_path.iterdir()) == [path]
    (speed,) = found.target.decode
    assert speed.gb_per_s.confidence == "measured" and (speed.gb_per_s.n or 0) >= 7
    assert 1 <= (speed.threads or 0) <= found.target.num_cores
    assert not re.search(r"\b20\d\d-\d\d", found.text)  # free of dates: the same machine gives the same sources
    weights = Work(file_bytes=10**8, types={"Q4_K": Share(10**8, 1.7e8)})
    decode = predict(found.target, weights).decode
    assert decode is not None and decode.low <= decode.value <= decode.high


def test_what_caches_hold_is_said_to_be_too_fast(monkeypatch):
    monkeypatch.setattr(pipeline, "read_machine", lambda: replace(BOARD, cores=(CoreKind(1, "x", 1.0),)))
    assert "which is not far beyond the caches of 2.00 MiB" in probe_target(quick=True, **SMALL).target.notes[0]
    roomy = probe_target(quick=True, buffer_bytes=8 * MIB).target
    assert not any("caches" in note for note in roomy.notes)


def test_where_llama_cpp_is_not_installed_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr("efficli.ops.libraries.importlib.util.find_spec", lambda name: None)
    told = Silent()
    (speed,) = probe_target(**SMALL, progress=told).target.decode
    assert speed.gb_per_s.confidence == "estimate"
    assert told.notes[0].startswith("llama-cpp-python is not installed")


def test_bench_predicts_for_a_probed_machine(tmp_path):
    probe_target(tmp_path / "here.yaml", quick=True, **SMALL)
    tiny = write_tiny(tmp_path / "tiny.gguf")
    result = efficli.bench([tiny], targets=(str(tmp_path / "here.yaml"),), dry_run=True)
    (prediction,) = result.artifacts[0].predictions
    assert (prediction.target, prediction.confidence) == ("here", "estimate")


@pytest.mark.parametrize(
    ("name", "kind", "line"),
    [
        ("here.json", UsageError, "-o {}, expected a name that ends in .yaml"),
        ("none/here.yaml", OutputError, "{parent}: no such directory"),
        ("there.yaml", OutputError, "{}: exists"),
        ("folder.yaml", OutputError, "{}: is a directory"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_anything_is_measured(tmp_path, monkeypatch, name, kind, line):
    (tmp_path / "there.yaml").write_text("kept")
    (tmp_path / "folder.yaml").mkdir()
    monkeypatch.setattr(pipeline, "read_machine", lambda: pytest.fail("measured"))
    with pytest.raises(kind) as caught:
        probe_target(tmp_path / name)
    assert caught.value.line == line.format(tmp_path / name, parent=(tmp_path / name).parent)
    assert (tmp_path / "there.yaml").read_text() == "kept"


def test_force_replaces_a_profile(tmp_path):
    path = tmp_path / "there.yaml"
    path.write_text("old")
    probe_target(path, quick=True, force=True, **SMALL)
    assert load_target(path).name == "there"


def test_no_room_for_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usage = type("Usage", (), {"free": 5 * MIB})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(efficli.errors.FitError) as caught:
        probe_target(buffer_bytes=2 * MIB, model_bytes=20_000_000)
    assert caught.value.line.startswith(f"{tmp_path}: 5.00 MiB free, expected 3")
    assert not list(Path(tmp_path).iterdir())
