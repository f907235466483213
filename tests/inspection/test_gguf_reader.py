"""Rows 38 to 40: what is no GGUF file, or lies about itself, is one line, at once, whatever it claims."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficli.errors import CheckpointError, EffiError
from efficli.export.gguf.parse import MAX_ITEMS, read_gguf
from tests.tiny_gguf import write_tiny

HEAD = struct.Struct("<4sIQQ")


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def array(item: int, count: int, data: bytes = b"") -> bytes:
    """A metadata field "a" that is an array."""
    return string(b"a") + struct.pack("<IIQ", 9, item, count) + data


def file(*fields: bytes, tensors: int = 0, count: int | None = None, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return HEAD.pack(magic, version, tensors, len(fields) if count is None else count) + b"".join(fields)


NESTED = array(9, 1, struct.pack("<IQ", 9, 1) * 5000)
PAD = bytes(64)
TENSOR = string(b"t") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
HOSTILE = {
    "magic": (file(magic=b"GGML") + PAD, "not a GGUF v2/v3 file"),
    "v1": (file(version=1) + PAD, r"not a GGUF v2/v3 file \(version 1\)"),
    "v99": (file(version=99) + PAD, r"not a GGUF v2/v3 file \(version 99\)"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0) + PAD, r"not a GGUF v2/v3 file \(big-endian\)"),
    "empty": (b"", "not a GGUF v2/v3 file"),
    "five bytes": (b"GGUF\3", "not a GGUF v2/v3 file"),
    "fields 2^60": (file(count=1 << 60) + PAD, "damaged: 1152921504606846976 metadata fields in 64 bytes"),
    "tensors 2^60": (file(tensors=1 << 60) + PAD, "damaged: 1152921504606846976 tensors in 64 bytes"),
    "string 2^63": (file(string(b"", 1 << 63)) + PAD, "damaged: 9223372036854775808 bytes of a string"),
    "array 2^60": (file(array(4, 1 << 60)) + PAD, "damaged: 1152921504606846976 items of 'a'"),
    "strings 2^60": (file(array(8, 1 << 60)) + PAD, "damaged: 1152921504606846976 strings of 'a'"),
    "nested arrays": (file(NESTED), "'a' is an array of the type 9"),
    "type of a value": (file(string(b"a") + struct.pack("<I", 77)) + PAD, "'a' has the unknown type 77"),
    "key twice": (file(*[string(b"a") + struct.pack("<IB", 0, 1)] * 2) + PAD, "duplicate key 'a'"),
    "shape 2^80": (file(TENSOR, tensors=1, count=0) + PAD, "tensor 't' has an unknown type"),
    "alignment 3": (file(string(b"general.alignment") + struct.pack("<II", 4, 3)) + PAD, "alignment is 3"),
    "escape in a key": (file(*[string(b"\x1b[2J") + struct.pack("<IB", 0, 1)] * 2), r"duplicate key '\\x1b\[2J'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line_at_once(name, tmp_path):
    data, message = HOSTILE[name]
    (tmp_path / "x.gguf").write_bytes(data)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(tmp_path / "x.gguf")
    assert time.process_time() - began < 1
    assert caught.value.exit_code == 1
    assert len(caught.value.line) < 300
    assert caught.value.line.isprintable()


def write_sparse(path: Path, head: bytes) -> Path:
    """The head of a file whose other terabyte is a hole: what it claims fits."""
    with path.open("wb") as out:
        out.write(head)
        out.truncate(1 << 40)
    return path


SPARSE = {
    "string": (file(string(b"a") + struct.pack("<IQ", 8, 1 << 36)), "68719476736 bytes of a string, at most"),
    "array": (file(array(0, 1 << 36)), f"68719476736 items of 'a', at most {MAX_ITEMS}"),
    "floats": (file(array(12, MAX_ITEMS // 4)), ""),
    "strings": (file(array(8, MAX_ITEMS + 1)), "strings of 'a', at most"),
    "fields": (file(count=1 << 34), "metadata fields, at most"),
    "tensors": (file(tensors=1 << 34), "tensors, at most"),
}


def test_what_a_header_claims_is_not_allocated(tmp_path):
    """The peak of a process that reads all of these, and what each says; of the two kinds a hole makes valid, too."""
    for name, (data, _) in HOSTILE.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    for name, (data, _) in SPARSE.items():
        write_sparse(tmp_path / f"{name}.sparse", data)
    script = (
        "import json, sys; from pathlib import Path; from efficli.errors import EffiError\n"
        "from efficli.export.gguf.parse import read_gguf\n"
        "told = {}\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try: read_gguf(path); told[path.name] = ''\n"
        "    except EffiError as error: told[path.name] = error.line\n"
        "print(json.dumps(told)); print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    paths = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True, check=True)
    told, peak = done.stdout.splitlines()
    assert int(peak) < 100 << 10  # kB
    said = json.loads(told)
    for name, (_, message) in SPARSE.items():
        assert message in said[f"{name}.sparse"], name


def test_cut_short(tmp_path):
    """Row 40: by one byte, and anywhere in the header."""
    whole = write_tiny(tmp_path / "x.gguf").read_bytes()
    header = read_gguf(tmp_path / "x.gguf")
    last = max(header.tensors, key=lambda name: header.tensors[name].offset)
    (tmp_path / "x.gguf").write_bytes(whole[: header.data_end - 1])
    with pytest.raises(CheckpointError, match=f"tensor '{last}' ends 1 byte past the file") as caught:
        read_gguf(tmp_path / "x.gguf")
    assert caught.value.hint == "copy or make the whole file again"
    for size in range(0, header.data_start, 37):
        (tmp_path / "x.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"not a GGUF|damaged|past the file"):
            read_gguf(tmp_path / "x.gguf")


def test_no_pipe_is_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_gguf(tmp_path / "x.gguf")


def test_tensors_that_overlap_are_refused_as_by_ggml(tmp_path):
    """Places are those of gguf.cpp: one after the other, padded."""
    data = bytearray(write_tiny(tmp_path / "x.gguf").read_bytes())
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    (offset,) = struct.unpack_from("<Q", data, at)
    data[at : at + 8] = struct.pack("<Q", offset - 32)
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensor 'output_norm[.]weight' is at byte"):
        read_gguf(tmp_path / "x.gguf")


def test_a_vocabulary_of_200_thousand_is_read_quickly_and_right(tmp_path):
    """CPU seconds with a wide margin: it takes 0.1."""
    count = 200_000
    tokens = [f"tökén {i}" for i in range(count)]
    texts = b"".join(string(token.encode()) for token in tokens)
    numbers = np.arange(0, -count, -1).astype("<f4").tobytes()
    fields = [
        string(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, count) + texts,
        string(b"tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, count) + numbers,
    ]
    (tmp_path / "v.gguf").write_bytes(file(*fields))
    began = time.process_time()
    header = read_gguf(tmp_path / "v.gguf")
    assert time.process_time() - began < 2
    assert header.metadata["tokenizer.ggml.tokens"] == tokens
    assert header.metadata["tokenizer.ggml.scores"][7] == -7.0
    assert header.kinds["tokenizer.ggml.scores"] == (9, 6)
    assert (header.version, header.tensors) == (3, {})


def mutate(path: Path, whole: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    """A copy with bytes changed, and cut to at least half."""
    data = bytearray(whole)
    for at, value in changes:
        data[at % len(data)] = value
    path.write_bytes(data[: len(data) - cut % (len(data) // 2)])


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8)


def read_or_error(path: Path) -> None:
    """An EffiError or a header, soon; CPU seconds, looked at again where another process disturbed them."""
    for left in (1, 0):
        began = time.process_time()
        try:
            read_gguf(path)
        except EffiError as error:
            assert error.line.isprintable()
        if time.process_time() - began < 1 or not left:
            break
    assert time.process_time() - began < 1


def fuzz(folder: Path, examples: int) -> None:
    whole = write_tiny(folder / "whole.gguf").read_bytes()[: 1 << 13]
    padded = whole + bytes(1 << 17)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=CHANGES, cut=st.sampled_from([0, 0, 0, 1, 100, 1 << 12]), near=st.booleans())
    def look(changes, cut, near):
        # half of the changes in the first bytes, where counts and lengths are
        mutate(folder / "x.gguf", padded, [(at % 256 if near else at % (1 << 12), v) for at, v in changes], cut)
        read_or_error(folder / "x.gguf")

    look()


def test_changed_bytes(tmp_path):
    fuzz(tmp_path, 100)


@pytest.mark.slow
def test_changed_bytes_at_length(tmp_path):
    fuzz(tmp_path, 10_000)
