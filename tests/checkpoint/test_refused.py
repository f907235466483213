"""Damaged and hostile checkpoints: the error's class, exit code and line, and nothing lost (reliability rows 1-34)."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import EffiError
from tests.lost_nothing import lost_nothing
from tests.pico import to_bytes, write_llama, write_raw, write_safetensors

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAST = "model-00003-of-00003.safetensors"


def refused(model: Path | str, code: int, *parts: str, **options: Any) -> EffiError:
    """Opening fails with this exit code and a line with these parts; nothing beside the model changes."""
    folder = Path(model).parent
    with lost_nothing(folder), pytest.raises(EffiError) as caught:
        open_checkpoint(model, **options)
    line = caught.value.line
    assert caught.value.exit_code == code, line
    for part in parts:
        assert part in line, line
    assert "\n" not in line
    return caught.value


@pytest.fixture
def pico(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "in" / "pico", layers=1)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "in" / "pico", layers=1, shards=3)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value, indent=2))


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


# rows 1-6: the directory and its config.json


def test_missing_directory_suggests_near_names(pico: Path) -> None:
    error = refused(pico.parent / "pcio", 1, "no such checkpoint:", "pcio")
    assert error.hint == f"did you mean '{pico}'?"
    for word, near in (("refrence", "'reference'"), ("./Refernce-Twin", None)):
        with pytest.raises(EffiError, match="no such checkpoint") as caught:
            open_checkpoint(word)
        assert near is None or near in str(caught.value.hint)


def test_missing_directory_in_words_relative_to_the_current_one(pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pico.parent)
    with pytest.raises(EffiError, match=r"^no such checkpoint: pico-$") as caught:
        open_checkpoint("pico-")
    assert caught.value.hint == "did you mean 'pico'?"


def test_a_file_is_no_checkpoint(pico: Path) -> None:
    error = refused(pico / WEIGHTS, 1, "is a file, expected a checkpoint directory")
    assert error.hint == f"give the directory: {pico}"


def test_without_config(pico: Path) -> None:
    (pico / "config.json").unlink()
    refused(pico, 1, "pico: config.json not found")


def test_truncated_config(pico: Path) -> None:
    text = (pico / "config.json").read_text()
    (pico / "config.json").write_text(text[: text.index("rms_norm_eps")])
    line = text[: text.index("rms_norm_eps")].count("\n") + 1
    refused(pico, 1, f"config.json:{line}: not valid JSON (")


@pytest.mark.parametrize(
    ("extra", "line", "message"),
    [
        ('"hidden_size": 64,\n"a": {"hidden_size": 1},\n"hidden_size": 65', 4, "duplicate key 'hidden_size'"),
        ('"a": [1,\n{"b": "\\"b\\":", "b": 1}]', 3, "duplicate key 'b'"),
        ('"a": 1,\n"eps": NaN', 3, "NaN is not a JSON number"),
        ('"eps": "Infinity",\n"b": -Infinity', 3, "-Infinity is not a JSON number"),
        ('"eps": 1e999', 2, "1e999 is not a JSON number"),
    ],
)
def test_config_that_lenient_readers_take(pico: Path, extra: str, line: int, message: str) -> None:
    (pico / "config.json").write_text("{\n" + extra + "}")
    refused(pico, 1, f"config.json:{line}: {message}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[1]", "config.json: a JSON array, expected an object"),
        (b'{"a": "\xff"}', "config.json: not UTF-8 (byte 7)"),
        (b'{"a":' * 100_000, "config.json: not valid JSON (nested too deeply)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json: not valid JSON (Exceeds the limit (4300 digits)"),
        (b"", "config.json:1: not valid JSON"),
    ],
)
def test_config_that_is_no_json_object(pico: Path, data: bytes, message: str) -> None:
    (pico / "config.json").write_bytes(data)
    refused(pico, 1, message)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_remote_code(pico: Path, file: str) -> None:
    edit_json(pico / file, lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))
    (pico / "evil.py").write_text("import pathlib; pathlib.Path('canary').touch()")
    refused(pico, 6, f"{file}: refusing to run code from the checkpoint (auto_map)")
    ckpt = open_checkpoint(pico, trust_remote_code=True)
    assert ckpt.notes == (f"{file}: auto_map ignored; no code from the checkpoint is run",)


# rows 7-17: headers (more of them in test_header.py)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "header too small"),
        (b"\1\0\0", "header too small"),
        (struct.pack("<Q", 0), "header too small"),
        (struct.pack("<Q", 1 << 63) + b"{}", "header too large"),
        (struct.pack("<Q", 100_000_001) + b"{}", "header too large"),
        (struct.pack("<Q", 10) + b"{}", "8 bytes short of what its header says"),
    ],
)
def test_header_length(pico: Path, raw: bytes, message: str) -> None:
    (pico / WEIGHTS).write_bytes(raw)
    refused(pico, 1, f"{WEIGHTS}: {message}")


def test_clone_without_git_lfs(pico: Path) -> None:
    (pico / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    refused(pico, 1, f"{WEIGHTS}: is a Git LFS pointer, the weights were not fetched")


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 7)
    refused(sharded, 1, f"{path.name}: 7 bytes short of what its header says")


def test_trailing_zip(pico: Path) -> None:
    with (pico / WEIGHTS).open("ab") as file:
        file.write(b"PK\3\4" * 1024)
    refused(pico, 6, f"{WEIGHTS}: 4096 bytes not covered by any tensor")


# rows 18-24: shards


def test_missing_shard(sharded: Path) -> None:
    (sharded / LAST).unlink()
    refused(sharded, 1, f"index names {LAST}, which is not here")


@pytest.mark.parametrize(
    "target", ["../secret/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "a\0.safetensors", "..\\x"]
)
def test_index_that_escapes(sharded: Path, target: str) -> None:
    secret = sharded.parent / "secret"
    secret.mkdir()
    (secret / WEIGHTS).write_bytes((sharded / LAST).read_bytes())
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": target}))
    refused(sharded, 6, "index points outside the checkpoint:", repr(target))


def test_shard_that_is_a_link_out_of_the_directory(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    (sharded / LAST).rename(outside)
    (sharded / LAST).symlink_to(outside)
    refused(sharded, 6, f"{LAST}: leaves the checkpoint directory")


def test_folder_named_like_a_cache_opens_no_other_folder(sharded: Path) -> None:
    """A directory that only looks like a cache's snapshot may reach its own blobs, nothing else."""
    snapshot = sharded.parent / "models--a--b" / "snapshots" / "main"
    snapshot.parent.mkdir(parents=True)
    sharded.rename(snapshot)
    for target in ("blobs/x", "models--c--d/blobs/x", "blobs/ab/x"):
        path = sharded.parent / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((snapshot / LAST).read_bytes())
        (snapshot / LAST).unlink()
        (snapshot / LAST).symlink_to(path)
        refused(snapshot, 6, "leaves the checkpoint directory")


def test_link_within_the_directory_is_fine(sharded: Path) -> None:
    (sharded / LAST).rename(sharded / "real.bytes")
    (sharded / LAST).symlink_to("real.bytes")
    assert open_checkpoint(sharded).read("model.norm.weight").shape == (64,)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "socket"])
def test_weights_that_are_no_file(pico: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pico / WEIGHTS
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        monkeypatch.chdir(pico)  # a socket's name has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(WEIGHTS)
    else:
        try:
            os.mknod(path, 0o20666, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("making a device needs root")
    refused(pico, 1, f"{WEIGHTS}: not a regular file")


def test_config_that_is_a_fifo(pico: Path) -> None:
    (pico / "config.json").unlink()
    os.mkfifo(pico / "config.json")
    refused(pico, 1, "config.json: not a regular file")


def test_tensor_in_two_shards(sharded: Path) -> None:
    data = to_bytes(np.ones(64), "F32")
    write_safetensors(sharded / LAST, {"model.embed_tokens.weight": ("F32", (64,), data)})
    edit_json(
        sharded / INDEX,
        lambda i: i.update(weight_map={k: v for k, v in i["weight_map"].items() if v != LAST} | {"x": LAST}),
    )
    refused(sharded, 1, "tensor 'model.embed_tokens.weight' is in two shards:", LAST)


def test_index_and_shards_disagree(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda i: i["weight_map"].pop("model.norm.weight"))
    refused(sharded, 1, f"tensor 'model.norm.weight' is in {LAST}, the index says no file")
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": LAST, "ghost": LAST}))
    refused(sharded, 1, f"index says tensor 'ghost' is in {LAST}, which does not have it")


def test_index_without_a_map(sharded: Path) -> None:
    for wrong in ({}, {"weight_map": []}, {"weight_map": {}}):
        (sharded / INDEX).write_text(json.dumps(wrong))
        refused(sharded, 1, f"{INDEX}: weight_map is missing or empty")
    (sharded / INDEX).write_text('{"weight_map": {"a": 3}}')
    refused(sharded, 1, "index names '3', which is not a safetensors file")


def test_no_weights(pico: Path) -> None:
    (pico / WEIGHTS).rename(pico / "weights.safetensors")
    error = refused(pico, 1, f"neither {WEIGHTS} nor {INDEX} found")
    assert "found weights.safetensors" in str(error.hint)
    (pico / "weights.safetensors").rename(pico / "adapter_model.safetensors")
    refused(pico, 5, "this is an adapter")


# rows 31-33: what is not plain weights


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_float8(pico: Path, dtype: str) -> None:
    data = {"model.a.weight": (dtype, (4, 4), bytes(16))}
    write_safetensors(pico / WEIGHTS, data)
    refused(pico, 5, f"dtype {dtype} needs its scales (weight_scale_inv)")
    write_safetensors(pico / WEIGHTS, data | {"model.a.weight_scale_inv": ("F32", (1, 1), bytes(4))})
    refused(pico, 5, f"already quantized ({dtype.lower()})")


def test_float4(pico: Path) -> None:
    write_safetensors(pico / WEIGHTS, {"a.weight": ("F4", (3, 4), bytes(6))})
    refused(pico, 5, "dtype F4 needs its scales")


@pytest.mark.parametrize(
    ("extra", "scheme"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "bitnet"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx"),
    ],
)
def test_codes_of_another_quantizer(pico: Path, extra: dict[str, Any], scheme: str) -> None:
    edit_json(pico / "config.json", lambda c: c.update(extra))
    refused(pico, 5, f"config.json: the checkpoint is already quantized ({scheme})")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
@pytest.mark.parametrize("form", ["plain", "zip", "broken"])
def test_pickles(pico: Path, name: str, form: str) -> None:
    """Plain, in a zip as torch writes, and with a payload before a broken rest (nullifAI): none is opened."""
    (pico / WEIGHTS).unlink()
    payload = pickle.dumps(Canary(pico.parent / "canary"))
    if form == "zip":
        with zipfile.ZipFile(pico / name, "w") as file:
            file.writestr("archive/data.pkl", payload)
    else:
        (pico / name).write_bytes(payload + (b"\xff broken" if form == "broken" else b""))
    refused(pico, 6, f"pico/{name}: refusing pickle checkpoint; convert to safetensors")
    refused(pico, 5, "pickle checkpoints are not read", allow_pickle=True)
    assert not (pico.parent / "canary").exists()


def test_pickles_in_an_index(sharded: Path) -> None:
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": "pytorch_model.bin"}))
    refused(sharded, 6, "refusing pickle checkpoint; convert to safetensors")
    for path in [*sharded.glob("*.safetensors"), sharded / INDEX]:
        path.unlink()
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    refused(sharded, 6, "refusing pickle checkpoint; convert to safetensors")


def test_trainers_pickles_beside_weights_do_no_harm(pico: Path) -> None:
    (pico / "training_args.bin").write_bytes(pickle.dumps(Canary(pico.parent / "canary")))
    assert open_checkpoint(pico).tensors
    assert not (pico.parent / "canary").exists()


# row 34 and files in general


def test_tokenizer_files(pico: Path) -> None:
    ckpt = open_checkpoint(pico)
    assert ckpt.file("spiece.model") is None
    assert ckpt.json("tokenizer.json")["model"]["type"] == "BPE"
    (pico / "tokenizer_config.json").write_text('{"a": 1,\n"a": 2}')
    with pytest.raises(EffiError, match="duplicate key 'a'") as caught:
        open_checkpoint(pico)
    assert caught.value.where == "tokenizer_config.json:2"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a\0", "a\n"])
def test_names_that_leave(pico: Path, name: str) -> None:
    (pico.parent / "x").write_text("secret")
    with pytest.raises(EffiError) as caught:
        open_checkpoint(pico).file(name)
    assert caught.value.exit_code == 6


def test_links_that_leave(pico: Path) -> None:
    (pico.parent / "x").write_text("{}")
    (pico / "added_tokens.json").symlink_to(pico.parent / "x")
    (pico / "sub").symlink_to(pico.parent)
    for name in ("added_tokens.json", "sub/x"):
        with pytest.raises(EffiError, match="leaves the checkpoint directory") as caught:
            open_checkpoint(pico).json(name)
        assert caught.value.exit_code == 6


def test_header_in_words_of_bytes(pico: Path) -> None:
    """A header written by hand, as every test of test_header.py writes it, is what the reader reads."""
    header, data = parts_of(pico / WEIGHTS)
    write_raw(pico / WEIGHTS, json.dumps(header), data)
    assert set(open_checkpoint(pico).tensors) == set(header) - {"__metadata__"}
