"""`efficli inspect` as it is typed: exit codes, what is on which stream, JSON, and rows 36 and 41 of the programme."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

import efficli
from efficli import cli
from efficli.export.gguf.parse import read_gguf
from tests.inspection.onnx_models import make, write, write_external
from tests.lost_nothing import lost_nothing
from tests.pico import write_llama
from tests.test_imports import loaded_after

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TENSOR = "blk.3.ffn_up.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the reference checkpoint."""
    out = tmp_path_factory.mktemp("inspect") / "out"
    efficli.export("reference", out, types=("Q4_K_M",), certificate=False)
    return out


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(exported, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no llama.cpp is installed: fewer processes to start."""
    monkeypatch.setattr("efficli.inspection.llama_view.is_installed", lambda: False)


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `efficli inspect`, in this process."""
    capsys.readouterr()
    code = cli.main(["inspect", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_an_artifact_is_clean(exported, capsys):
    with lost_nothing(exported.parent):
        code, out, err = run(capsys, exported)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "No findings."
    assert "ok  hashes                sha256 as in efficli.json and SHA256SUMS" in out
    others = len(list(exported.iterdir())) - 3  # the model, SHA256SUMS itself, run.json
    assert f"ok  hashes                {others} other files as in efficli.json and SHA256SUMS" in out
    assert "feed-forward        24    6.29 M     3.63 MiB    4.84   Q4_K 83 %, Q6_K 17 %" in out
    assert "Reference-8.9M-Q4_K_M.gguf: 5.47 MiB, 8.92 M weights, 5.03 bits each" in out


def test_json_has_everything(exported, capsys):
    code, out, err = run(capsys, exported, "--json", "--no-scan")
    told = json.loads(out)
    manifest = json.loads((exported / "efficli.json").read_text())
    assert (code, err, told["kind"], told["exit_code"], told["findings"]) == (0, "", "artifact", 0, [])
    (model,) = told["models"]
    assert model["num_weights"] == manifest["num_weights"]
    assert model["bits_per_weight"] == pytest.approx(manifest["artifacts"][0]["bits_per_weight"], abs=1e-4)
    assert sum(group["nbytes"] for group in model["groups"]) < model["bytes"] == manifest["artifacts"][0]["bytes"]
    assert model["details"]["metadata"]["general.architecture"] == "llama"
    assert {check["status"] for check in model["checks"]} <= {"ok", "info", "skipped"}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_names_its_tensor(artifact, alone, capsys):
    """Row 41: llama.cpp takes the file; the manifest's hashes say which tensor it is."""
    (path,) = artifact.glob("*.gguf")
    tensor = read_gguf(path).tensors[TENSOR]
    flip(path, tensor.offset + tensor.nbytes // 2)
    for place in (artifact, path):
        code, out, err = run(capsys, place)
        assert code == 6
        assert f"{path.name}: verify: sha256 differs in tensor {TENSOR}" in out
        assert err.splitlines()[0] == f"error: {path.name}: verify: sha256 differs in tensor {TENSOR}"
        assert err.splitlines()[1].startswith("hint: ")
    code, out, err = run(capsys, artifact, "--json")
    (finding,) = json.loads(out)["findings"]
    assert (finding["code"], finding["check"]) == (6, "hashes")


@pytest.mark.parametrize(
    ("name", "at", "line"),
    [
        ("header", 4096, "verify: sha256 differs outside its tensors: in the header or between them"),
        ("README.md", 10, "README.md: verify: sha256 differs"),
        ("efficli.json", 10, "efficli.json"),
        ("SHA256SUMS", 10, "verify: SHA256SUMS and efficli.json have different hashes of it"),
    ],
)
def test_one_flipped_bit_elsewhere(artifact, alone, capsys, name, at, line):
    path = next(artifact.glob("*.gguf")) if name == "header" else artifact / name
    if name == "header":
        at = path.read_bytes().index(b"Reference")
    flip(path, at)
    code, out, err = run(capsys, artifact)
    assert code == 6
    assert line in out
    assert err.startswith("error: ")
    assert "\nhint: " in err


def test_a_file_that_is_missing(artifact, alone, capsys):
    (artifact / "README.md").unlink()
    code, out, _ = run(capsys, artifact, "--no-scan")
    assert code == 1
    assert "README.md is missing" in out


def test_a_file_that_the_manifest_does_not_name(artifact, alone, capsys):
    (artifact / "more.gguf").write_bytes(b"GGUF")
    code, out, _ = run(capsys, artifact, "--no-scan")
    assert code == 1
    assert "more.gguf: efficli.json does not name it" in out
    assert "more.gguf: not a GGUF v2/v3 file" in out


def test_a_template_that_does_not_end(tmp_path, capsys):
    """Row 36, of a checkpoint."""
    path = write_llama(tmp_path / "pico", layers=1, chat_template=LOOP)
    with lost_nothing(tmp_path):
        code, out, err = run(capsys, path)
    assert code == 6
    assert "chat template did not render in 2 s" in out
    assert err.splitlines()[0] == "error: chat template did not render in 2 s"
    assert err.splitlines()[1].startswith("hint: ")


TEMPLATES = {
    "leaves the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template tried to leave its sandbo"),
    "a huge string": ("{{ 'a' * 10000000000 }}", "chat template needs more than 512 MiB"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_templates(name, tmp_path, capsys):
    """Row 36, the other kinds."""
    template, line = TEMPLATES[name]
    path = write_llama(tmp_path / "pico", layers=1, chat_template=template)
    code, _, err = run(capsys, path)
    assert code == 6
    assert f"error: {line}" in err


@pytest.mark.slow
def test_a_template_that_does_not_end_in_a_gguf_file(artifact, capsys):
    """Row 36, of a file that somebody else wrote."""
    from efficli.export.gguf.layout import string
    from tests.inspection.rewrite import rewrite

    (path,) = artifact.glob("*.gguf")
    moved = path.rename(artifact.parent / "model.gguf")
    rewrite(moved, lambda metadata: metadata.update({"tokenizer.chat_template": string(LOOP)}))
    code, _, err = run(capsys, moved)
    assert (code, err.splitlines()[0]) == (6, "error: chat template did not render in 2 s")


ERRORS: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "nowhere": (lambda p: None, "no such checkpoint: ", 1),
    "text": (lambda p: p.write_text("a text"), "neither a GGUF nor an ONNX file", 5),
    "x.safetensors": (lambda p: p.write_text("a text"), "x.safetensors: neither a GGUF nor an ONNX file", 5),
    "x.gguf": (lambda p: p.write_text("a text"), "x.gguf: not a GGUF v2/v3 file", 1),
    "x.onnx": (lambda p: p.write_text("a text"), "x.onnx: not an ONNX model, or damaged: ", 1),
    "pipe.gguf": (os.mkfifo, "pipe.gguf: not a regular file", 1),
    "empty": (lambda p: p.mkdir(), "empty: config.json not found", 1),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_read(name, tmp_path, capsys):
    make, message, expected = ERRORS[name]
    make(tmp_path / name)
    code, out, err = run(capsys, tmp_path / name)
    assert (code, out) == (expected, "")
    error, hint = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint.startswith("hint: ")


def test_no_word_is_not_the_current_directory(capsys):
    code, out, err = run(capsys, "")
    assert (code, out, err.splitlines()[0]) == (1, "", "error: no such checkpoint: ''")


def model_without_outputs() -> onnx.ModelProto:
    model = make()
    model.graph.ClearField("output")
    return model


def test_a_folder_of_several_models(tmp_path, capsys):
    """One that cannot be read is a finding, and the others are shown."""
    write(tmp_path / "a.onnx", model_without_outputs())
    write_external(tmp_path / "b.onnx")
    (tmp_path / "c.onnx").write_bytes(b"\x08")
    code, out, _ = run(capsys, tmp_path)
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines() if "weights," in line] == ["a.onnx", "b.onnx"]
    assert "c.onnx: not an ONNX model, or damaged" in out
    assert out.splitlines()[-5] == "2 findings:"
    assert " 1. a.onnx: the graph has no outputs" in out


@pytest.mark.slow
def test_a_terminal_of_80_columns(artifact):
    """Nothing is wider than the terminal, and no word is cut."""
    (path,) = artifact.glob("*.gguf")
    flip(path, read_gguf(path).tensors[TENSOR].offset)
    code = (
        "import os, pty, sys, fcntl, termios, struct\n"
        "pid, fd = pty.fork()\n"
        "if pid == 0:\n"
        "    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))\n"
        "    os.execv(sys.executable, [sys.executable, '-m', 'efficli', 'inspect', '-q', *sys.argv[1:]])\n"
        "data = b''\n"
        "try:\n"
        "    while part := os.read(fd, 65536): data += part\n"
        "except OSError: pass\n"
        "os.waitpid(pid, 0); sys.stdout.buffer.write(data)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }
    done = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, env=environment, check=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout.decode())
    lines = [line.rstrip() for line in plain.splitlines()]
    shown = lines[: next(i for i, line in enumerate(lines) if line.startswith("error: "))]
    assert len(shown) > 20
    assert max(map(len, shown)) <= 80
    assert any(TENSOR in line for line in shown)


def test_neither_torch_nor_transformers_is_loaded(exported):
    loaded = loaded_after(f"from efficli.cli import main; main(['inspect', {str(exported)!r}, '-q'])")
    assert "efficli.inspection.gguf_file" in loaded
    assert not loaded & {"torch", "transformers", "onnx", "onnxruntime", "jinja2", "llama_cpp"}


@pytest.mark.slow
def test_a_reader_that_leaves_is_silent(exported):
    command = f"{sys.executable} -m efficli inspect {exported} --no-scan | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
