"""Every damaged checkpoint that docs/reliability.md lists, as a user meets it: one line, its code, nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.artifact import draft, read_artifact
from efficli.cli import main
from tests.lost_nothing import lost_nothing
from tests.pico import llama_tensors, to_bytes, write_llama, write_raw, write_safetensors

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FIRST, SECOND, LAST = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
UP = "model.layers.0.mlp.up_proj.weight"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"

Damage = Callable[[Path], Any]


# What is done to a checkpoint


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change a JSON file."""

    def damage(model: Path) -> None:
        value = json.loads((model / name).read_text())
        change(value)
        (model / name).write_text(json.dumps(value, indent=2))

    return damage


def config(**values: Any) -> Damage:
    return edit(CONFIG, lambda c: c.update(values))


def write(name: str, data: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda model: (model / name).unlink()


def shorten(name: str, count: int) -> Damage:
    return lambda model: os.truncate(model / name, (model / name).stat().st_size - count)


def append(name: str, data: bytes) -> Damage:
    return lambda model: (model / name).write_bytes((model / name).read_bytes() + data)


def header(*entries: tuple[str, Any, Any], dtype: str = "F32", data: int = 16) -> Damage:
    """Weights whose header has these (name, shape, offsets), written as text: names may come twice."""
    items = (f"{json.dumps(n)}: {json.dumps({'dtype': dtype, 'shape': s, 'data_offsets': o})}" for n, s, o in entries)
    text = "{" + ", ".join(items) + "}"
    return lambda model: write_raw(model / WEIGHTS, text, bytes(data))


def tensors(change: Callable[[dict[str, Any]], Any], dtype: str = "F32") -> Damage:
    """Weights after a change of name -> values; a value may also be (dtype, shape, bytes)."""

    def damage(model: Path) -> None:
        values: dict[str, Any] = dict(llama_tensors(json.loads((model / CONFIG).read_text())))
        change(values)
        coded = {n: v if isinstance(v, tuple) else (dtype, v.shape, to_bytes(v, dtype)) for n, v in values.items()}
        write_safetensors(model / WEIGHTS, coded)

    return damage


def point(target: str) -> Damage:
    """An index that says that a tensor is in `target`."""
    return edit(INDEX, lambda i: i["weight_map"].update({NORM: target}))


def in_place(name: str, make: Callable[[Path], Any]) -> Damage:
    """Something else where a file was."""

    def damage(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return damage


def link_outside(model: Path) -> None:
    (model / LAST).rename(model.parent / "outside.safetensors")
    (model / LAST).symlink_to(model.parent / "outside.safetensors")


def in_two_shards(model: Path) -> None:
    write_safetensors(model / LAST, {EMBEDDING: ("F32", (64,), bytes(256))})
    edit(INDEX, lambda i: i.update(weight_map={n: f for n, f in i["weight_map"].items() if f != LAST} | {"x": LAST}))(
        model
    )


def many_tensors(model: Path) -> None:
    entry = '"t{0}": {{"dtype": "U8", "shape": [1], "data_offsets": [{0}, {1}]}}'
    write_raw(model / WEIGHTS, "{" + ", ".join(entry.format(i, i + 1) for i in range(200_000)) + "}", bytes(200_000))


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def pickled(rest: bytes) -> Damage:
    def damage(model: Path) -> None:
        (model / WEIGHTS).unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(model.parent / "canary")) + rest)

    return damage


def add_token(t: dict[str, Any]) -> None:
    t["added_tokens"].append(t["added_tokens"][0] | {"id": 384, "content": "<|one more|>"})


def put(name: str, at: Any, *values: float) -> Callable[[dict[str, Any]], None]:
    """Set values of a tensor, the first at index `at` of its flat form."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name].reshape(-1)[at : at + len(values)] = values

    return change


@dataclass(frozen=True)
class Row:
    """One way to damage a checkpoint: its number in docs/reliability.md, the line and the exit code expected."""

    number: int
    about: str
    damage: Damage
    line: str
    code: int = 1
    hint: str = ""
    model: str = "plain"
    options: tuple[str, ...] = ("--type", "Q4_0")


ROWS = (
    Row(1, "misspelt", lambda m: m.rename(m.with_name("pico-1")), "no such checkpoint: {model}", hint="pico-1'"),
    Row(2, "no config", remove(CONFIG), "pico: config.json not found"),
    Row(3, "cut off", shorten(CONFIG, 30), "config.json:22: not valid JSON ("),
    Row(
        4,
        "key twice",
        write(CONFIG, b'{"hidden_size": 1,\n"hidden_size": 2}'),
        "config.json:2: duplicate key 'hidden_size'",
    ),
    Row(4, "NaN", config(rms_norm_eps=float("nan")), "config.json:15: NaN is not a JSON number"),
    Row(5, "family", config(architectures=["Foo"]), "config.json: architecture 'Foo' is not supported", 5),
    Row(6, "code", config(auto_map={"AutoModel": "a.B"}), "config.json: refusing to run code from the checkpoint (", 6),
    Row(7, "empty", write(WEIGHTS, b""), "model.safetensors: header too small"),
    Row(8, "length 2^63", write(WEIGHTS, struct.pack("<Q", 1 << 63)), "model.safetensors: header too large"),
    Row(9, "length 10^8 + 1", write(WEIGHTS, struct.pack("<Q", 10**8 + 1)), "model.safetensors: header too large"),
    Row(10, "cut off", shorten(SECOND, 7), f"{SECOND}: 7 bytes short of what its header says", model="sharded"),
    Row(11, "zip behind", append(WEIGHTS, b"PK\3\4" * 1024), f"{WEIGHTS}: 4096 bytes not covered by any tensor", 6),
    Row(12, "name twice", header(("x", [2], [0, 8]), ("x", [2], [8, 16])), f"{WEIGHTS}: duplicate tensor 'x'"),
    Row(13, "overlap", header(("a", [3], [0, 12]), ("b", [2], [8, 16])), "invalid offset for tensor 'b': overlaps"),
    Row(13, "hole", header(("a", [1], [0, 4]), ("b", [2], [8, 16])), "invalid offset for tensor 'b': leaves a hole"),
    Row(13, "reversed", header(("a", [4], [0, 16]), ("b", [1], [20, 16])), "invalid offset for tensor 'b'"),
    Row(14, "bytes", header(("a", [5], [0, 16])), f"{WEIGHTS}: tensor 'a': shape needs 20 bytes, has 16"),
    Row(14, "negative", header(("a", [-4], [0, 16])), "tensor 'a' has an invalid shape"),
    Row(14, "overflow", header(("a", [1 << 40, 1 << 40], [0, 16])), "tensor 'a': shape overflows"),
    Row(15, "no elements", header(("b", [4], [0, 16]), ("a", [0, 4], [16, 16])), "tensor 'a' is empty"),
    Row(16, "200,000 tensors", many_tensors, "missing "),
    Row(
        16, "deep", in_place(WEIGHTS, lambda p: write_raw(p, b'{"a":' * 200_000)), "not valid JSON (nested too deeply)"
    ),
    Row(17, "path", header(("../../x", [4], [0, 16])), "tensor name contains '/': '../../x'", 6),
    Row(17, "NUL", header(("a\0", [4], [0, 16])), "tensor name contains '\\x00'", 6),
    Row(17, "new line", header(("a\nb", [4], [0, 16])), "tensor name contains '\\n': 'a\\nb'", 6),
    Row(18, "shard gone", remove(LAST), f"{INDEX}: index names {LAST}, which is not here", model="sharded"),
    Row(19, "..", point("../a/b.safetensors"), "index points outside the checkpoint: '../a/", 6, model="sharded"),
    Row(20, "absolute", point("/etc/passwd"), "index points outside the checkpoint: '/etc/passwd'", 6, model="sharded"),
    Row(21, "link", link_outside, f"{LAST}: leaves the checkpoint directory", 6, model="sharded"),
    Row(23, "FIFO", in_place(WEIGHTS, os.mkfifo), f"{WEIGHTS}: not a regular file"),
    Row(23, "directory", in_place(WEIGHTS, Path.mkdir), f"{WEIGHTS}: not a regular file"),
    Row(24, "two shards", in_two_shards, f"tensor '{EMBEDDING}' is in two shards: {FIRST} and", model="sharded"),
    Row(25, "weight gone", tensors(lambda t: t.pop(UP)), f"missing 1 of 11 tensors: {UP}"),
    Row(26, "one more", tensors(lambda t: t.update(x=t[NORM])), "unexpected tensor: x", options=("--strict",)),
    Row(27, "shape", tensors(lambda t: t.update({UP: np.ones((129, 64))})), f"{UP} is 129×64, config says 128×64"),
    Row(28, "NaN", tensors(put(UP, 65, np.nan, np.nan)), f"2 NaN in {UP} (first at [1,1])"),
    Row(28, "NaN in a vector", tensors(put(NORM, 3, np.nan)), f"1 NaN in {NORM} (first at [3])"),
    Row(29, "Inf", tensors(put(UP, 0, np.inf)), f"1 Inf in {UP} (first at [0,0])"),
    Row(29, "7e4", tensors(put(UP, 0, 7e4), "BF16"), f"{UP}: 1 value overflows float16", options=("--type", "F16")),
    Row(
        31, "fp8", tensors(lambda t: t.update({UP: ("F8_E4M3", (128, 64), bytes(8192))})), "dtype F8_E4M3 needs its", 5
    ),
    Row(31, "fp4", tensors(lambda t: t.update({UP: ("F4", (128, 64), bytes(4096))})), "dtype F4 needs its scales", 5),
    Row(32, "pickle", pickled(b""), "refusing pickle checkpoint; convert to safetensors", 6),
    Row(33, "broken pickle", pickled(b"\xff broken"), "refusing pickle checkpoint; convert to safetensors", 6),
    Row(34, "no tokenizer", remove("tokenizer.json"), "tokenizer.json not found"),
    Row(34, "cut off", shorten("tokenizer.json", 9), "tokenizer.json:"),
    Row(35, "one token more", edit("tokenizer.json", add_token), "tokenizer has 385 ids, embedding 384 rows"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A checkpoint in one file and one in three."""
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "plain", layers=1)
    write_llama(folder / "sharded", layers=1, shards=3)
    return folder


def damaged(models: Path, folder: Path, row: Row) -> Path:
    """The path of a copy of a checkpoint after the damage."""
    model = folder / "pico"
    shutil.copytree(models / row.model, model)
    row.damage(model)
    return model


def artifact(out: Path) -> None:
    """Something that a run with --force would replace."""
    with draft(out, inputs=[], needs_bytes=0, force=False) as drafted:
        (drafted.path / "model.gguf").write_bytes(b"GGUF")
        drafted.commit({}, {})


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, rather than wait, where the block does not end; a FIFO may wait for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.number}-{row.about}")
def test_one_line_and_nothing_lost(models, tmp_path, capsys, row):
    """Without an artifact at OUT; then with one that --force would replace, and with --json."""
    place = tmp_path / "place"
    place.mkdir()
    model = damaged(models, tmp_path, row)
    words = ["export", str(model), "-o", str(place / "out"), "--no-certificate", *row.options]
    for more in ([], ["--force", "--json"]):
        if more:
            artifact(place / "out")
        capsys.readouterr()
        with lost_nothing(tmp_path), within(60):
            code = main([*words, *more])
        out, err = capsys.readouterr()
        assert code == row.code, err
        (line,) = [told for told in err.splitlines() if not told.startswith("hint: ")]
        assert line.startswith("error: ")
        assert row.line.format(model=model) in line
        assert "Traceback" not in err
        assert len(line) < 400
        assert len(err.splitlines()) == 2, "what to do next is said in a hint"
        assert row.hint in err.splitlines()[1]
        if not more:
            assert out == ""
            continue
        told = json.loads(out)["error"]
        assert told["code"] == row.code
        assert line == "error: " + ": ".join(filter(None, [told["where"], told["message"]]))
        assert told["hint"] and f"hint: {told['hint']}" in err
    read_artifact(place / "out").verify()


def test_the_rows_are_those_of_the_programme():
    """All of 1 to 35 but 22, which is ONNX, and 30, which is no error."""
    assert {row.number for row in ROWS} == set(range(1, 36)) - {22, 30}


def test_a_huge_header_costs_no_memory(models, tmp_path):
    """Rows 8 and 9: what a header claims is not allocated, also where the whole command runs."""
    script = (
        "import sys; from pathlib import Path; import efficli.pipeline, efficli.tables, rich.console\n"
        "from efficli.cli import main\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak(); code = main(sys.argv[1:]); print(code, peak() - before, peak())"
    )
    for row in ROWS:
        if row.number in (8, 9):
            model = damaged(models, tmp_path / str(row.number), row)
            words = [sys.executable, "-c", script, "export", str(model), "-o", str(tmp_path / "out")]
            done = subprocess.run(words, capture_output=True, text=True)
            code, more, peak = map(int, done.stdout.split())
            assert code == 1, done.stderr
            assert more < 16 << 10
            assert peak < 200 << 10  # kB, most of it Python and what it imports


@pytest.mark.slow
def test_tensors_by_the_hundred_thousand_are_read_in_time(models, tmp_path, capsys):
    """Row 16."""
    (row,) = [row for row in ROWS if row.number == 16 and row.damage is many_tensors]
    model = damaged(models, tmp_path, row)
    began = time.process_time()
    assert main(["export", str(model), "-o", str(tmp_path / "out")]) == 1
    assert time.process_time() - began < 5


def test_no_pickle_is_opened(models, tmp_path, capsys):
    """Rows 32 and 33: the canary, which a pickle's reader would touch, is not there; a reader does touch it."""
    for row in ROWS:
        if row.number in (32, 33):
            folder = tmp_path / str(row.number)
            model = damaged(models, folder, row)
            main(["export", str(model), "-o", str(folder / "out")])
            assert not (folder / "canary").exists()
            with contextlib.suppress(pickle.UnpicklingError):
                pickle.loads((model / "pytorch_model.bin").read_bytes())
            assert (folder / "canary").exists()


def test_code_is_not_run_when_it_is_trusted_either(models, tmp_path, capsys):
    """Row 6 with --trust-remote-code: a note, and the canary in the checkpoint's module is not there."""
    row = Row(6, "code", config(auto_map={"AutoModelForCausalLM": "evil.Model"}), "")
    model = damaged(models, tmp_path, row)
    (model / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Model: pass\n")
    with lost_nothing(tmp_path, published=["out"]):
        words = ["export", str(model), "-o", str(tmp_path / "out"), "--type", "Q8_0", "--no-certificate"]
        assert main([*words, "--trust-remote-code"]) == 0
    assert "note: config.json: auto_map ignored; no code from the checkpoint is run" in capsys.readouterr().err


def test_what_is_left_out_is_said(models, tmp_path, capsys):
    """Row 26 without --strict."""
    (row,) = [row for row in ROWS if row.number == 26]
    model = damaged(models, tmp_path, row)
    with lost_nothing(tmp_path, published=["out"]):
        code = main(["export", str(model), "-o", str(tmp_path / "out"), "--type", "Q8_0", "--no-certificate"])
    told = capsys.readouterr().err
    assert code == 0
    assert "note: unexpected tensor: x; left out" in told
    assert "x; left out" in (tmp_path / "out" / "efficli.json").read_text()


def test_bf16_is_its_values(tmp_path, capsys):
    """Row 30: from BF16 come the bytes that come from the same values in F32."""
    values = llama_tensors(json.loads((write_llama(tmp_path / "bf16", dtype="BF16") / CONFIG).read_text()))
    write_llama(tmp_path / "f32")
    rounded = {name: np.frombuffer(to_bytes(v, "BF16"), "<u2").astype("<u4") << 16 for name, v in values.items()}
    write_safetensors(
        tmp_path / "f32" / WEIGHTS, {name: ("F32", values[name].shape, v.tobytes()) for name, v in rounded.items()}
    )
    hashes = []
    for name in ("bf16", "f32"):
        with lost_nothing(tmp_path, published=[f"out-{name}"]):
            words = ["export", str(tmp_path / name), "-o", str(tmp_path / f"out-{name}"), "--no-certificate"]
            assert main([*words, "--type", "F32,Q4_K_M"]) == 0, capsys.readouterr().err
        manifest = json.loads((tmp_path / f"out-{name}" / "efficli.json").read_text())
        hashes.append([list(tensors.items()) for tensors in manifest["tensors"].values()])
    assert hashes[0] == hashes[1]
