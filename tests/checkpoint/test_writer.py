"""A checkpoint that is written opens in efficli and in transformers, has the source's bytes, and is always the same."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.checkpoint.sidecar import PACKED, Packed, Sidecar, packed_sizes, write_packed, write_sidecar
from efficli.checkpoint.writer import NewTensor, Written, as_stored, copied, natural, write_checkpoint
from efficli.errors import CheckpointError, OutputError, SecurityError
from tests import pico

ROOT = Path(__file__).resolve().parents[2]
UP = "model.layers.0.mlp.up_proj.weight"


CHILD = """
import resource, sys
from pathlib import Path
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.writer import copied, write_checkpoint
ckpt = open_checkpoint(Path(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_checkpoint(ckpt, Path(sys.argv[2]), [copied(t) for t in ckpt.tensors.values()])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def copy(ckpt: Checkpoint, folder: Path, **options: object) -> Written:
    """All tensors as they are."""
    folder.mkdir()
    return write_checkpoint(ckpt, folder, [copied(t) for t in ckpt.tensors.values()], **options)  # type: ignore[arg-type]


def test_a_copy_is_the_checkpoint(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a", dtype="BF16", shards=3, chat_template="{{ messages }}"))
    written = copy(ckpt, tmp_path / "b")
    found = open_checkpoint(tmp_path / "b")
    assert found.fingerprint() == ckpt.fingerprint()
    assert (written.packed, written.notes) == ({}, ())
    names = {path.name for path in (tmp_path / "b").iterdir()}
    small = {path.name for path in (tmp_path / "a").iterdir() if ".safetensors" not in path.name}
    assert names == small | {"model.safetensors"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_bytes_do_not_depend_on_how_the_source_is_spread(tmp_path: Path) -> None:
    for shards in (1, 2, 5):
        copy(open_checkpoint(pico.write_llama(tmp_path / f"a{shards}", shards=shards)), tmp_path / f"b{shards}")
    first = (tmp_path / "b1" / "model.safetensors").read_bytes()
    assert all((tmp_path / f"b{n}" / "model.safetensors").read_bytes() == first for n in (2, 5))


def test_shards_have_an_index_that_transformers_reads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a", layers=12, tie=False))
    limit = 300_000
    copy(ckpt, tmp_path / "b", max_shard_bytes=limit)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3 and index["metadata"]["total_size"] == ckpt.nbytes
    assert all((tmp_path / "b" / file).stat().st_size < limit + 4096 for file in files)
    assert open_checkpoint(tmp_path / "b").fingerprint() == ckpt.fingerprint()
    order = [index["weight_map"][f"model.layers.{n}.mlp.up_proj.weight"] for n in range(12)]
    assert order == sorted(order)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("a", "b"))
    assert torch.equal(one, two)


def test_a_tensor_larger_than_a_shard_has_one_for_itself(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a"))
    copy(ckpt, tmp_path / "b", max_shard_bytes=1)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) == len(ckpt.tensors)
    assert open_checkpoint(tmp_path / "b").fingerprint() == ckpt.fingerprint()


def test_wide_types_come_first_so_that_values_are_aligned(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a")
    ckpt = open_checkpoint(folder)
    tensors = [copied(t) for t in ckpt.tensors.values()]
    odd = np.arange(3, dtype=np.uint8)
    tensors.insert(0, NewTensor(name="a", dtype="U8", shape=(3,), content=lambda: iter([odd])))
    (tmp_path / "b").mkdir()
    write_checkpoint(ckpt, tmp_path / "b", tensors)
    found = open_checkpoint(tmp_path / "b").tensors
    assert all(tensor.offset % 4 == 0 for name, tensor in found.items() if name != "a")


def test_new_values_in_pieces_and_under_new_names(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a", dtype="BF16"))
    values = np.random.default_rng(0).standard_normal((128, 64)).astype(np.float32)
    made = NewTensor(
        name=UP, dtype="BF16", shape=(128, 64), source=UP,
        content=lambda: (as_stored(values[i : i + 50], "BF16", UP) for i in range(0, 128, 50)),
    )  # fmt: skip
    moved = copied(ckpt.tensors["model.norm.weight"], "model.other.weight")
    (tmp_path / "b").mkdir()
    write_checkpoint(ckpt, tmp_path / "b", [moved, made])
    found = open_checkpoint(tmp_path / "b")
    assert set(found.tensors) == {UP, "model.other.weight"}
    assert found.hash("model.other.weight") == ckpt.hash("model.norm.weight")
    expected = np.frombuffer(pico.to_bytes(values, "BF16"), "<u2").reshape(128, 64)
    assert np.array_equal(found.read_rows(UP, 0, 128), expected)


def test_too_few_bytes_are_noticed(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a"))
    short = NewTensor(name="x", dtype="F32", shape=(4,), content=lambda: iter([np.zeros(3, np.float32)]))
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="x: 12 bytes for F32"):
        write_checkpoint(ckpt, tmp_path / "b", [short])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_rounding_is_to_nearest(dtype: str) -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * np.float32(10) ** np.arange(
        -4, 4
    ).repeat(500)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    expected = torch.from_numpy(values).to(kind).view(torch.uint8).numpy().tobytes()
    assert as_stored(values, dtype, "x").tobytes() == expected
    for bad in (np.nan, np.inf, *([1e5] if dtype == "F16" else []), *([3.4e38] if dtype == "BF16" else [])):
        with pytest.raises(CheckpointError, match=f"not finite, or too large for {dtype}"):
            as_stored(np.array([1.0, bad], np.float32), dtype, "x")


def test_another_configuration(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a"))
    copy(ckpt, tmp_path / "b", config={**ckpt.config, "note": "naïve ✓"})
    found = open_checkpoint(tmp_path / "b").config
    assert found == {**ckpt.config, "note": "naïve ✓"}
    assert list(found) == [*ckpt.config, "note"]


def test_which_files_come_along(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja",
                 "LICENSE", "spiece.model", "modeling_x.py"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    for name in ("onnx/model.json", "original/params.json", "checkpoint-5/config.json", ".git/HEAD", ".gitattributes",
                 "pytorch_model.bin", "model.gguf", "2_Dense/pytorch_model.bin"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(3 * 10**8)
    written = copy(open_checkpoint(folder), tmp_path / "b")
    assert written.notes == ("huge.txt: not taken over, it has 300 MB",)
    found = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert found == {
        "1_Pooling/config.json", "2_Dense/model.safetensors", "additional_chat_templates/tool.jinja", "LICENSE",
        "spiece.model", "modeling_x.py", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "README.md", "model.safetensors",
    }  # fmt: skip
    assert (tmp_path / "b" / "2_Dense/model.safetensors").read_bytes() == b"2_Dense/model.safetensors"


def test_a_link_out_of_the_checkpoint_is_not_followed(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(SecurityError, match="leaves the checkpoint directory"):
        copy(open_checkpoint(folder), tmp_path / "b")
    assert not (tmp_path / "b" / "notes.txt").exists()
    (folder / "notes.txt").unlink()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    (folder / "1_Pooling").symlink_to(tmp_path / "outside")
    with pytest.raises(SecurityError, match="leaves the checkpoint directory"):
        copy(open_checkpoint(folder), tmp_path / "c")


def test_packed_blocks_come_along_under_their_tensors_new_names(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a")
    packed = write_packed(folder, {UP: ("Q4_K", b"\x01" * 144), "model.norm.weight": ("F16", b"\x02" * 9)})
    (folder / "own.q8").write_bytes(b"\x03" * 34)
    digest = hashlib.sha256(b"\x03" * 34).hexdigest()
    gate = "model.layers.1.mlp.gate_proj.weight"
    packed[gate] = Packed(type="Q8_0", file="own.q8", sha256=digest)
    sidecar = Sidecar(packed=packed)
    write_sidecar(folder, sidecar)
    assert packed_sizes(folder, sidecar) == {UP: 144, "model.norm.weight": 9, gate: 34}
    ckpt = open_checkpoint(folder)
    tensors = [copied(t, "moved" if name == gate else None) for name, t in ckpt.tensors.items() if "norm" not in name]
    (tmp_path / "b").mkdir()
    written = write_checkpoint(ckpt, tmp_path / "b", tensors)
    assert set(written.packed) == {UP, "moved"} and written.notes == ()
    assert not (tmp_path / "b" / "own.q8").exists()
    write_sidecar(tmp_path / "b", Sidecar(packed=dict(written.packed)))
    found = open_checkpoint(tmp_path / "b")
    assert found.packed_blocks(UP) == b"\x01" * 144
    assert found.packed_blocks("moved") == b"\x03" * 34
    (folder / "own.q8").write_bytes(b"\x04" * 34)
    (tmp_path / "c").mkdir()
    with pytest.raises(SecurityError, match=r"differs from efficli\.json"):
        write_checkpoint(open_checkpoint(folder), tmp_path / "c", tensors)
    (folder / PACKED).unlink()
    with pytest.raises(CheckpointError, match=f"efficli.json names {PACKED}, which is not here"):
        packed_sizes(folder, sidecar)


def test_headers_only_is_planned_with(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a", layers=8, vocab=4000))

    def never() -> object:
        raise AssertionError("no values are asked for")

    tensors = [
        NewTensor(name=t.name, dtype=t.dtype, shape=t.shape, source=t.name, content=never)  # type: ignore[arg-type]
        for t in ckpt.tensors.values()
    ]
    (tmp_path / "b").mkdir()
    write_checkpoint(ckpt, tmp_path / "b", tensors, headers_only=True)
    found = open_checkpoint(tmp_path / "b")
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in ckpt.tensors.items()
    }
    assert not found.read("model.norm.weight").any()


def test_what_is_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    ckpt = open_checkpoint(pico.write_llama(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.safetensors").symlink_to(tmp_path / "a" / "model.safetensors")
    with pytest.raises(OutputError, match=r"cannot write model\.safetensors: File exists"):
        write_checkpoint(ckpt, tmp_path / "b", [copied(t) for t in ckpt.tensors.values()])
    open_checkpoint(tmp_path / "a").check_unchanged()


def test_a_file_that_may_not_grow_is_one_line(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a")
    (tmp_path / "b").mkdir()
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n" + CHILD
    done = subprocess.run(
        [sys.executable, "-c", limited, str(folder), str(tmp_path / "b")], capture_output=True, text=True, cwd=ROOT
    )
    assert (
        "OutputError: cannot write model.safetensors: larger than the file system or `ulimit -f` allows" in done.stderr
    )


def test_memory_holds_a_chunk(tmp_path: Path) -> None:
    folder = pico.write_llama(tmp_path / "a", layers=1)
    config = open_checkpoint(folder).config
    values = {name: np.zeros(t.shape, np.float32) for name, t in open_checkpoint(folder).tensors.items()}
    values["model.embed_tokens.weight"] = np.ones((1 << 19, 64), np.float32)  # 128 MB
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 1 << 19}))
    pico.write_shards(folder, values)
    (tmp_path / "b").mkdir()
    run = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "b")]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 16 * 1024  # kB: of the 128 MB no more than an eighth
    assert open_checkpoint(tmp_path / "b").fingerprint() == open_checkpoint(folder).fingerprint()


def test_names_are_sorted_as_a_reader_would() -> None:
    names = ["a.10.b", "a.2.b", "a.2.a", "a", "b.1", "a.10"]
    assert sorted(names, key=natural) == ["a", "a.2.a", "a.2.b", "a.10", "a.10.b", "b.1"]
