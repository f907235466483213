"""Safetensors headers: what the library checks and what it lets through, sizes, times, and a fuzzer."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficli.checkpoint.header import MAX_HEADER_BYTES, read_header
from efficli.errors import EffiError
from tests.pico import write_raw


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(tmp_path: Path, header: str | bytes | dict[str, Any], data: bytes = b"") -> tuple[int, str]:
    """Exit code and line of reading such a file."""
    path = tmp_path / "x.safetensors"
    write_raw(path, json.dumps(header) if isinstance(header, dict) else header, data)
    with pytest.raises(EffiError) as caught:
        read_header(path)
    assert caught.value.line.startswith("x.safetensors: ")
    return caught.value.exit_code, caught.value.line.removeprefix("x.safetensors: ")


def test_what_a_good_header_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"b": entry(4, 12, [2, 2], "BF16"), "__metadata__": {"format": "pt"}, "a": entry(0, 4, [], "F32")}
    write_raw(path, json.dumps(header), bytes(12))
    found = read_header(path)
    base = path.stat().st_size - 12
    assert [(t.name, t.shape, t.dtype, t.offset, t.nbytes) for t in found.tensors] == [
        ("a", (), "F32", base, 4),
        ("b", (2, 2), "BF16", base + 4, 8),
    ]
    assert found.metadata == {"format": "pt"}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    arrays = {f"t{i}.weight": rng.random((i + 1, 3)).astype(np.float32) for i in range(9)}
    save_file(arrays, tmp_path / "x.safetensors", {"k": "v"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    for tensor in read_header(tmp_path / "x.safetensors").tensors:
        mine = np.frombuffer(raw, "<f4", 3 * tensor.shape[0], tensor.offset).reshape(tensor.shape)
        assert np.array_equal(mine, load_file(tmp_path / "x.safetensors")[tensor.name])


@pytest.mark.parametrize(
    ("header", "num_bytes", "code", "message"),
    [
        # row 12: the library keeps the last of two
        ('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
         2, 1, "duplicate tensor 'x'"),
        ('{"x":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1, 1, "header: duplicate key 'dtype'"),
        # row 13
        ({"a": entry(0, 4), "b": entry(3, 7)}, 7, 1, "invalid offset for tensor 'b': overlaps the one before it"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, 1, "invalid offset for tensor 'b': overlaps the one before it"),
        ({"a": entry(0, 4), "b": entry(5, 7)}, 7, 1, "invalid offset for tensor 'b': leaves a hole before it"),
        ({"a": entry(2, 4)}, 4, 1, "invalid offset for tensor 'a': leaves a hole before it"),
        ({"b": entry(4, 0, [4])}, 4, 1, "invalid offset for tensor 'b': [4, 0)"),
        ({"b": entry(-4, 0, [4])}, 4, 1, "invalid offset for tensor 'b': [-4, 0)"),
        ({"b": entry(0, 1 << 64, [1 << 64])}, 4, 1, "invalid offset for tensor 'b'"),
        ({"b": entry(0.0, 4.0, [4])}, 4, 1, "invalid offset for tensor 'b'"),
        ({"b": entry(False, True, [1])}, 1, 1, "invalid offset for tensor 'b'"),
        ({"b": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, 4, 1, "invalid offset for tensor 'b'"),
        # row 14
        ({"a": entry(0, 16, [5], "F32")}, 16, 1, "tensor 'a': shape needs 20 bytes, has 16"),
        ({"a": entry(0, 4, [-4])}, 4, 1, "tensor 'a' has an invalid shape"),
        ({"a": entry(0, 4, [4.0])}, 4, 1, "tensor 'a' has an invalid shape"),
        ({"a": entry(0, 1, [True])}, 1, 1, "tensor 'a' has an invalid shape"),
        ({"a": entry(0, 4, "4")}, 4, 1, "tensor 'a' has an invalid shape"),
        ({"a": entry(0, 0, [1 << 32, 1 << 32])}, 0, 1, "tensor 'a': shape overflows"),
        ({"a": entry(0, 8, [1 << 62, 1 << 62, 0])}, 8, 1, "tensor 'a': shape overflows"),
        # row 15: the library accepts it
        ({"a": entry(0, 0, [0, 4])}, 0, 1, "tensor 'a' is empty"),
        # row 10, and 11
        ({"a": entry(0, 8)}, 5, 1, "3 bytes short of what its header says"),
        ({"a": entry(0, 8)}, 9, 6, "1 bytes not covered by any tensor"),
        ({}, 4096, 6, "4096 bytes not covered by any tensor"),
        # entries that are none
        ({"a": 1}, 0, 1, "tensor 'a' lacks dtype, shape or data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, 1, "tensor 'a' lacks dtype, shape or data_offsets"),
        ({"a": entry(0, 1, None, "X9")}, 1, 5, "tensor 'a' has the unknown dtype 'X9'"),
        ({"a": entry(0, 1, None, ["U8"])}, 1, 5, "tensor 'a' has the unknown dtype ['U8']"),
        ({"__metadata__": {"a": 1}}, 0, 1, "header: __metadata__ holds something other than strings"),
        ({"__metadata__": []}, 0, 1, "header: __metadata__ holds something other than strings"),
        ("[]", 0, 1, "header does not begin with '{'"),
        (' {"a": 1}', 0, 1, "header does not begin with '{'"),
        (b'{"a\xff": 1}', 0, 1, "header is not UTF-8 (byte 11)"),
        ('{"a": 1', 0, 1, "header: not valid JSON"),
        ('{"a": NaN}', 0, 1, "header: NaN is not a JSON number"),
        ("{}{}", 0, 1, "header: not valid JSON (extra data)"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, header: Any, num_bytes: int, code: int, message: str) -> None:
    found = refusal(tmp_path, header, bytes(num_bytes))
    assert found[0] == code, found
    assert found[1].startswith(message), found


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("../../x", "'/'"),
        ("a/b", "'/'"),
        ("a\\b", "'\\\\'"),
        ("a\0b", "'\\x00'"),
        ("a\nb", "'\\n'"),
        ("a\x1b[2Jb", "'\\x1b'"),
        ("a\u202eb", "'\\u202e'"),
        ("a\ud800b", "'\\ud800'"),
    ],
)
def test_names_that_could_do_harm(tmp_path: Path, name: str, sign: str) -> None:
    code, line = refusal(tmp_path, {name: entry(0, 1)}, b"x")
    assert code == 6
    assert line.startswith(f"tensor name contains {sign}: ")
    assert line.isprintable()
    assert line.isascii()


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_names_that_are_none(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, {name: entry(0, 1)}, b"x") == (6, f"tensor name is empty or a path: {name!r}")


def test_names_in_other_scripts_are_names(tmp_path: Path) -> None:
    write_raw(tmp_path / "x", json.dumps({"größe.权重 1": entry(0, 1)}, ensure_ascii=False), b"x")
    assert read_header(tmp_path / "x").tensors[0].name == "größe.权重 1"


def in_fresh_interpreter(path: Path) -> tuple[str, float, float]:
    """The error's line (or "ok"), CPU seconds and MiB of memory that reading a header took."""
    script = (
        "import sys, time; from pathlib import Path\n"
        "from efficli.checkpoint.header import read_header; from efficli.errors import EffiError\n"
        # getrusage's ru_maxrss starts at the parent's
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "start, before = time.process_time(), peak()\n"
        "try: line = read_header(Path(sys.argv[1])) and 'ok'\n"
        "except EffiError as error: line = error.line\n"
        "print(line, time.process_time() - start, (peak() - before) / 1024, sep='\\n')"
    )
    out = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True).stdout
    line, seconds, mebibytes = out.splitlines()
    return line, float(seconds), float(mebibytes)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, MAX_HEADER_BYTES + 1, MAX_HEADER_BYTES])
def test_a_huge_length_is_not_allocated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    line, seconds, mebibytes = in_fresh_interpreter(path)
    short = length == MAX_HEADER_BYTES
    assert line.startswith(f"x.safetensors: {length - 2} bytes short" if short else "x.safetensors: header too large")
    assert seconds < 0.1
    assert mebibytes < 4


def test_200_000_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {f"model.layers.{i}.weight": entry(4 * i, 4 * i + 4, [1], "F32") for i in range(200_000)}
    write_raw(path, json.dumps(header), bytes(800_000))
    line, seconds, mebibytes = in_fresh_interpreter(path)
    assert line == "ok"
    assert seconds < 5
    assert mebibytes < 250


def test_deep_json_is_refused_at_once(tmp_path: Path) -> None:
    start = time.process_time()
    for opening in ('{"a":', '{"a":[' + "[" * 9):
        code, line = refusal(tmp_path, "{" + opening[1:] + opening * 200_000)
        assert (code, line) == (1, "header: not valid JSON (nested too deeply)")
    assert time.process_time() - start < 2


# The fuzzer: a valid file, changed where the structure is, must be read or refused, quickly.

VALUES = st.one_of(
    st.integers(-(2**65), 2**65),
    st.sampled_from([0, 1, 3, 4, 8, 12, 16, 2**31, 2**32, 2**62, 2**63]),
    st.floats(allow_nan=False),
    st.text(max_size=4),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-1, 9), max_size=3),
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "C64", "?", ""]) | VALUES,
        "shape": st.lists(VALUES | st.integers(0, 4), max_size=3) | VALUES,
        "data_offsets": st.lists(st.integers(0, 20), min_size=2, max_size=2) | st.lists(VALUES, max_size=3) | VALUES,
        "extra": VALUES,
    },
)
HEADERS = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), ENTRY | VALUES, max_size=4)


def check_invariant(path: Path, raw: bytes) -> bool:
    """An EffiError or a header whose every tensor lies in the file; less than a second. Whether it was read."""
    path.unlink(missing_ok=True)  # file systems write a file that is overwritten to disk at once
    path.write_bytes(raw)
    start = time.process_time()
    try:
        header = read_header(path)
    except EffiError as error:
        assert error.line.encode("utf-8", "strict")
        assert "\n" not in error.line
        assert time.process_time() - start < 1
        return False
    else:
        (length,) = struct.unpack("<Q", raw[:8])
        position = 8 + length
        for tensor in header.tensors:
            assert tensor.offset == position
            assert tensor.nbytes > 0
            position += tensor.nbytes
        assert position == len(raw)
    assert time.process_time() - start < 1
    return True


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(header=HEADERS, data=st.binary(max_size=24), lie=st.none() | st.integers(0, 2**64 - 1))
def test_fuzz_structure(tmp_path: Path, header: dict[str, Any], data: bytes, lie: int | None) -> None:
    text = json.dumps(header).encode()
    check_invariant(tmp_path / "x", struct.pack("<Q", len(text) if lie is None else lie) + text + data)


@FUZZ
@given(changes=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=6), cut=st.integers(0, 40))
def test_fuzz_bytes(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    header = {"a": entry(0, 16, [2, 2], "F32"), "b": entry(16, 24, [4], "BF16"), "__metadata__": {"format": "pt"}}
    text = json.dumps(header).encode()
    raw = bytearray(struct.pack("<Q", len(text)) + text + bytes(24))
    for place, byte in changes:
        raw[place % len(raw)] = byte
    check_invariant(tmp_path / "x", bytes(raw[: len(raw) - cut]))


@pytest.mark.slow
def test_100_000_mutations(tmp_path: Path) -> None:
    """Each a valid file with a few bytes overwritten, inserted, removed or doubled, most of them in the header."""
    header = {"a": entry(0, 16, [2, 2], "F32"), "b": entry(16, 24, [4], "BF16"), "__metadata__": {"format": "pt"}}
    text = json.dumps(header).encode()
    valid = struct.pack("<Q", len(text)) + text + bytes(24)
    alphabet = b'0123456789-.eE[]{}",:abNF \\u\0\xff'
    random = np.random.default_rng(0)
    read = 0
    for _ in range(100_000):
        raw = bytearray(valid)
        for _ in range(random.integers(1, 5)):
            place = int(random.integers(0 if random.random() < 0.1 else 8, len(raw)))
            byte = alphabet[random.integers(len(alphabet))]
            kind = random.integers(4)
            if kind == 0:
                raw[place] = byte
            elif kind == 1:
                raw.insert(place, byte)
            elif kind == 2:
                del raw[place : place + int(random.integers(1, 9))]
            else:
                raw[place:place] = raw[place : place + int(random.integers(1, 40))]
        if random.random() < 0.5 and len(raw) > 8:  # the right length, so that more than its check is tested
            raw[:8] = struct.pack("<Q", max(2, len(text) + len(raw) - len(valid)))
        read += check_invariant(tmp_path / "x", bytes(raw))
    assert 100 < read < 90_000


@FUZZ
@given(data=st.binary(max_size=64))
def test_fuzz_noise(tmp_path: Path, data: bytes) -> None:
    check_invariant(tmp_path / "x", data)
    check_invariant(tmp_path / "x", struct.pack("<Q", max(0, len(data) - 8)) + data)
