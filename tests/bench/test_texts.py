"""Which text, and which chunks of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from efficli.bench.texts import MIN_TOKENS, SLICES, Chunk, choose_chunks, evaluation_texts
from efficli.errors import CheckpointError, UsageError


def test_chunks_are_those_of_llama_perplexity() -> None:
    """n_ctx tokens each, the tail left out, positions n_ctx / 2 .. n_ctx - 2 scored."""
    chunks = choose_chunks([1050], 512, None, 0)
    assert chunks == [Chunk(0, 0, 512), Chunk(0, 512, 1024)]
    assert (chunks[0].first, chunks[0].positions) == (256, 255)
    odd = Chunk(0, 0, 33)
    assert list(range(odd.first, 32)) == list(range(16, 16 + odd.positions))


def test_budget_is_shared_and_sampled() -> None:
    """Even shares, what a short text leaves goes to the long one, whole chunks in order, and the seed decides which."""
    chunks = choose_chunks([100_000, 1024, 100_000], 512, 255 * 22, 0)
    count = [sum(chunk.text == text for chunk in chunks) for text in range(3)]
    assert count == [10, 2, 10]
    assert chunks == sorted(chunks, key=lambda c: (c.text, c.start))
    assert all(chunk.start % 512 == 0 for chunk in chunks) and len(set(chunks)) == 22
    assert choose_chunks([100_000, 1024, 100_000], 512, 255 * 22, 0) == chunks
    assert choose_chunks([100_000, 1024, 100_000], 512, 255 * 22, 1) != chunks
    assert [c.text for c in choose_chunks([1000, 1000], 512, 1, 0)] == [0, 1]  # a text is never dropped


def test_short_texts() -> None:
    """Shorter than a chunk: one chunk; next to nothing: left out, or an error if that is all there is."""
    assert choose_chunks([100, MIN_TOKENS - 1, MIN_TOKENS], 512, None, 0) == [Chunk(0, 0, 100), Chunk(2, 0, MIN_TOKENS)]
    with pytest.raises(UsageError, match="a text of 31 tokens is too short, expected 32 or more"):
        choose_chunks([31], 512, None, 0)


def test_committed_slices() -> None:
    """Code and prose, as committed."""
    texts = evaluation_texts(None)
    assert [text.name for text in texts] == list(SLICES)
    assert all(text.sha256 == hashlib.sha256(text.content.encode()).hexdigest() for text in texts)
    assert "import" in texts[0].content


def test_a_users_file(tmp_path: Path) -> None:
    """Any UTF-8 text as it is, JSON lines as their texts; what cannot be read is a line."""
    file = tmp_path / "notes.txt"
    file.write_bytes("naïve\r\ntext\n".encode())
    [text] = evaluation_texts(file)
    assert (text.name, text.content) == ("notes.txt", "naïve\r\ntext\n")
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert evaluation_texts(str(lines))[0].content == "one\n\ntwo"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(UsageError, match="empty"):
        evaluation_texts(tmp_path / "empty.txt")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        evaluation_texts(tmp_path / "latin.txt")
    with pytest.raises(CheckpointError, match=r"no such text: .*nowhere.txt"):
        evaluation_texts(tmp_path / "nowhere.txt")
