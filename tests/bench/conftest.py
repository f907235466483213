"""A pico Llama, its files, and a text to measure on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from efficli.bench.engine import Repeat
from efficli.bench.figures import SpeedTest
from efficli.bench.gguf_engine import GgufEngine
from efficli.data import committed
from tests import pico
from tests.bench.measuring import Heard
from tests.converted import convert


@pytest.fixture(scope="session")
def pico_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: 256 wide, so that every quantized type fits; small embeddings, so that it is not certain."""
    folder = pico.write_llama(tmp_path_factory.mktemp("pico") / "model", hidden=256, ffn=256, layers=2, seed=1)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def pico_files(pico_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its GGUF files by type."""
    types = ("F32", "Q8_0", "Q4_K_M", "Q2_K")
    return dict(zip(types, convert(pico_model, tmp_path_factory.mktemp("files"), *types), strict=True))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six thousand characters of code."""
    file = tmp_path_factory.mktemp("text") / "code.txt"
    file.write_text(committed("evaluation-code")[:6000], encoding="utf-8")
    return file


@pytest.fixture
def write_scenario(tmp_path: Path) -> Callable[..., Path]:
    """Writes a scenario's YAML, and beside it the text.txt that it may name."""

    def write(content: str, text: str = "") -> Path:
        (tmp_path / "text.txt").write_text(text)
        (tmp_path / "s.yaml").write_text(content)
        return tmp_path / "s.yaml"

    return write


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    found, real = Heard(), GgufEngine.repeat

    def repeat(self: GgufEngine, test: SpeedTest) -> Repeat:
        made = real(self, test)
        found.files.append(self.file.path.stem)
        found.tests.append(test)
        found.repeats.append(made)
        found.pids[self.file.path.stem] = self.pid
        return made

    monkeypatch.setattr(GgufEngine, "repeat", repeat)
    return found
