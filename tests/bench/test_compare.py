"""`try`: two models continue one prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficli.bench.compare import Side, model_file, try_artifact
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError, UsageError
from efficli.ops.llama import LlamaFile
from efficli.ops.sampling import Sampling
from tests.tiny_gguf import write_tiny

PROMPT = "def read(path, size=None):\n    with open("


def test_beside_the_origin(pico_model: Path, pico_files: dict[str, Path]) -> None:
    """Greedy, both runtimes write the same from the same weights, by turns, and every piece is heard."""
    heard: list[tuple[Side, str]] = []
    wrote = try_artifact(
        pico_files["F32"],
        PROMPT,
        base=open_checkpoint(pico_model),
        max_tokens=16,
        on_piece=lambda side, text: heard.append((side, text)),
    )
    assert wrote["artifact"].tokens == wrote["base"].tokens and len(wrote["base"].tokens) == 16
    assert wrote["artifact"].text.rstrip("\ufffd") == wrote["base"].text.rstrip("\ufffd")  # random weights, odd bytes
    for side in ("artifact", "base"):
        assert "".join(text for who, text in heard if who == side) == wrote[side].text
    assert [who for who, _ in heard][:2] == ["artifact", "base"]
    with LlamaFile(pico_files["F32"], ctx=128, threads=1) as file:
        ids = file.tokenize(PROMPT, add_special=True)
        assert file.generate(ids, 16).tokens == wrote["artifact"].tokens


def test_beside_another_file(pico_files: dict[str, Path]) -> None:
    """Fewer bits write something else; a seed gives the same again; without a base there is one side."""
    files, how = (pico_files["F32"], pico_files["Q2_K"]), Sampling(temperature=1.0, seed=5)
    first = try_artifact(files[0], PROMPT, base=files[1], max_tokens=40, sampling=how)
    assert first["artifact"].text != first["base"].text
    assert try_artifact(files[0], PROMPT, base=files[1], max_tokens=40, sampling=how) == first
    assert set(try_artifact(files[0], PROMPT, max_tokens=2)) == {"artifact"}


def test_refusals(pico_files: dict[str, Path], tmp_path: Path) -> None:
    """What is not there, what cannot read, what is too long."""
    with pytest.raises(UsageError, match="the prompt is empty"):
        try_artifact(pico_files["F32"], "")
    with pytest.raises(UsageError, match=r"a prompt of \d+ tokens, expected fewer than the model's"):
        try_artifact(pico_files["F32"], PROMPT * 2000)
    with pytest.raises(UsageError, match="the file has no tokenizer"):
        try_artifact(write_tiny(tmp_path / "tiny.gguf"), PROMPT)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        try_artifact(tmp_path / "nowhere", PROMPT)


def test_model_file(pico_files: dict[str, Path], tmp_path: Path) -> None:
    """The file, or the only one of a directory."""
    assert model_file(pico_files["F32"]) == pico_files["F32"]
    with pytest.raises(CheckpointError, match=r"no \.gguf file"):
        model_file(tmp_path)
    only = write_tiny(tmp_path / "only.gguf")
    assert model_file(str(tmp_path)) == only
    with pytest.raises(UsageError, match=r"holds 4 models: F32\.gguf, Q2_K\.gguf, ") as caught:
        model_file(pico_files["F32"].parent)
    assert caught.value.hint == f"name one: {pico_files['F32']}"
