"""Small files to measure."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests import pico
from tests.converted import convert
from tests.tiny_gguf import write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with a tokenizer, wide enough for blocks of 256."""
    folder = tmp_path_factory.mktemp("spoken")
    model = pico.write_llama(folder / "model", hidden=256, ffn=256, seed=1)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 0.1  # so that it is not certain of everything
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return dict(zip(("F32", "Q4_0"), convert(model, folder / "out", "F32", "Q4_0"), strict=True))
