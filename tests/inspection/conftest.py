"""Artifacts that the tests of inspection damage copies of."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import efficli
from tests.pico import write_llama

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML, which llama.cpp knows."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico model with a chat template, as an artifact of one Q8_0 file."""
    folder = tmp_path_factory.mktemp("inspected")
    write_llama(folder / "pico", chat_template=TEMPLATE, ffn=256, hidden=128)
    efficli.export(folder / "pico", folder / "out", types=("Q8_0",), certificate=False)
    return folder / "out"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the artifact, for damaging."""

    def make() -> Path:
        shutil.copytree(exported, tmp_path / "copy")
        return tmp_path / "copy"

    return make


@pytest.fixture
def model(copy: Callable[[], Path], tmp_path: Path) -> Path:
    """A copy of its GGUF file, with nothing beside it."""
    (path,) = copy().glob("*.gguf")
    return path.rename(tmp_path / "model.gguf")
