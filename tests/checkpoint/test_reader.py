"""Reading weights: exact, bounded in memory, and noticed when the input changes; fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.fingerprint import fingerprint_of
from efficli.errors import CheckpointError, UnsupportedError
from efficli.progress import Silent
from tests.lost_nothing import lost_nothing
from tests.pico import llama_tensors, to_bytes, write_llama, write_safetensors, write_shards


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_reads_what_was_written(tmp_path: Path, dtype: str, shards: int) -> None:
    """Row 30: BF16 in, float32 out, equal to rounding the float32 weights to bfloat16 by torch."""
    import torch

    folder = write_llama(tmp_path / "m", dtype=dtype, shards=shards, tie=False)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    expected = llama_tensors(json.loads((folder / "config.json").read_text()))
    with lost_nothing(tmp_path):
        ckpt = open_checkpoint(folder)
        assert set(ckpt.tensors) == set(expected)
        for name, values in expected.items():
            found = ckpt.read(name)
            assert found.dtype == np.float32
            assert np.array_equal(found, torch.from_numpy(values).to(kind).float().numpy())
            assert ckpt.tensors[name].shape == values.shape
    assert ckpt.nbytes == sum(v.size for v in expected.values()) * (4 if dtype == "F32" else 2)


def test_rows_are_the_rows(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", dtype="BF16")
    ckpt = open_checkpoint(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    whole = ckpt.read_rows(name, 0, 128)
    assert (whole.dtype, whole.shape) == (np.uint16, (128, 64))
    for start, stop in [(0, 1), (5, 77), (127, 128), (9, 9)]:
        assert np.array_equal(ckpt.read_rows(name, start, stop), whole[start:stop])
    for start, stop in [(-1, 3), (0, 129), (5, 4)]:
        with pytest.raises(ValueError, match="rows"):
            ckpt.read_rows(name, start, stop)


def test_other_types_and_scalars(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m")
    tensors = {
        "half": ("F16", (2,), to_bytes(np.array([1.5, -2]), "F16")),
        "double": ("F64", (), to_bytes(np.array(0.1), "F64")),
        "ids": ("I64", (1, 3), np.arange(3).tobytes()),
        "mask": ("BOOL", (2,), b"\0\1"),
    }
    write_safetensors(folder / "model.safetensors", tensors)
    ckpt = open_checkpoint(folder)
    assert ckpt.read("half").tolist() == [1.5, -2]
    assert ckpt.read("double") == np.float32(0.1)
    assert ckpt.read_rows("ids", 0, 1).tolist() == [[0, 1, 2]]
    assert ckpt.read_rows("mask", 1, 2).tolist() == [1]
    with pytest.raises(UnsupportedError, match="dtype I64, expected F32"):
        ckpt.read("ids")


def test_memory_is_that_of_the_rows(tmp_path: Path) -> None:
    """200 MB are read in slabs: the process grows by less than 10 MB, and all of it was read."""
    folder = write_llama(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    rows, columns = 50_000, 1000
    with (folder / "model.safetensors").open("wb") as file:
        header = json.dumps({"w": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, rows * columns * 4]}})
        file.write(len(header).to_bytes(8, "little") + header.encode())
        for row in range(0, rows, 1000):
            file.write(np.full((1000, columns), row, np.float32).tobytes())
    script = (
        "import sys; from pathlib import Path; from efficli.checkpoint import open_checkpoint\n"
        # getrusage's ru_maxrss starts at the parent's
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "ckpt = open_checkpoint(sys.argv[1]); ckpt.read_rows('w', 0, 500)\n"
        "before = peak()\n"
        "total = sum(int(ckpt.read_rows('w', i, i + 500)[0, 0]) for i in range(0, 50_000, 500))\n"
        "print(ckpt.fingerprint() and total, peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True).stdout
    total, grown = map(int, out.split())
    assert total == 2 * sum(range(0, rows, 1000))
    assert grown < 10_000


def change_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:  # in place: the same inode and size
        file.write(data)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def replace_file(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(path)


@pytest.mark.parametrize("change", [change_bytes, replace_file, Path.unlink, lambda path: os.truncate(path, 500)])
def test_input_that_changes(tmp_path: Path, change) -> None:
    """Row 57, and for every way to read."""
    folder = write_llama(tmp_path / "m", shards=2)
    ckpt = open_checkpoint(folder)
    ckpt.check_unchanged()
    change(folder / "model-00002-of-00002.safetensors")
    for act in (lambda: ckpt.read("model.norm.weight"), ckpt.check_unchanged, ckpt.fingerprint):
        with pytest.raises(CheckpointError) as caught:
            act()
        assert caught.value.where == "model-00002-of-00002.safetensors"
        assert caught.value.message in ("input changed while reading", "not found")
    assert ckpt.read("model.embed_tokens.weight").shape == (384, 64)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_small_files_that_change(tmp_path: Path, file: str) -> None:
    ckpt = open_checkpoint(write_llama(tmp_path / "m"))
    ckpt.json("tokenizer.json")
    (ckpt.root / "notes.txt").write_text("a file that was never read may change")
    ckpt.check_unchanged()
    change_bytes(ckpt.root / file)
    with pytest.raises(CheckpointError, match="input changed while reading"):
        ckpt.check_unchanged()
    with pytest.raises(CheckpointError, match="input changed while reading"):
        ckpt.file(file)


def test_fingerprint(tmp_path: Path) -> None:
    """Depends on every weight, name, shape and value of the configuration; not on files, order or white space."""
    folder = write_llama(tmp_path / "m", dtype="BF16")
    ckpt = open_checkpoint(folder)
    first = ckpt.fingerprint()
    raw = (folder / "model.safetensors").read_bytes()
    hashes = {
        t.name: (t.dtype, t.shape, hashlib.sha256(raw[t.offset : t.offset + t.nbytes]).hexdigest())
        for t in reversed(ckpt.tensors.values())
    }
    config = json.loads((folder / "config.json").read_text())
    assert first == fingerprint_of(dict(reversed(config.items())), hashes)
    assert first.startswith("sha256:")
    assert len(first) == 71

    (folder / "model.safetensors").unlink()
    write_shards(folder, llama_tensors(config), "BF16", 3)
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).fingerprint() == first

    one = "model.norm.weight"
    others = [
        fingerprint_of(config | {"rope_theta": 1e6}, hashes),
        fingerprint_of(config, {n: h for n, h in hashes.items() if n != one}),
        fingerprint_of(config, hashes | {one: ("F16", hashes[one][1], hashes[one][2])}),
        fingerprint_of(config, hashes | {one: ("BF16", (32, 2), hashes[one][2])}),
        fingerprint_of(config, hashes | {one: ("BF16", (64,), "0" * 64)}),
    ]
    assert len({first, *others}) == 6


def test_fingerprint_reports_progress(tmp_path: Path) -> None:
    class Counting(Silent):
        total = done = 0.0

        def start(self, task: str, total: float, unit: str = "") -> None:
            self.total = total

        def advance(self, amount: float) -> None:
            self.done += amount

    ckpt = open_checkpoint(write_llama(tmp_path / "m"))
    progress = Counting()
    ckpt.fingerprint(progress)
    assert progress.total == progress.done == ckpt.nbytes


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "a model with spaces é")
    monkeypatch.chdir(folder)
    ckpt = open_checkpoint(".")
    assert (ckpt.name, ckpt.model, ckpt.revision) == ("a model with spaces é", ".", None)
    (folder.parent / "link").symlink_to(folder)
    assert open_checkpoint(folder.parent / "link").read("model.norm.weight").shape == (64,)
    reference = open_checkpoint("reference-twin")
    assert (reference.name, reference.revision) == ("reference-twin", None)


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "m", shards=2)
    write_shards(folder, llama_tensors(json.loads((folder / "config.json").read_text())))
    ckpt = open_checkpoint(folder)
    assert {t.file.name for t in ckpt.tensors.values()} == {"model.safetensors"}
    assert ckpt.notes == ("model.safetensors is read, model.safetensors.index.json beside it is not",)
