"""The wrapper of llama.cpp: what it says, refuses and leaves behind; run on real files by the real library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from efficli.errors import CheckpointError, EffiError, MissingExtra, UnsupportedError, UsageError
from efficli.ops.llama import LlamaFile, available_threads
from efficli.ops.llama_log import ERROR, LlamaLog, LogLine, captured_log, complaint
from efficli.ops.sampling import Sampling
from tests import pico
from tests.converted import convert
from tests.tiny_gguf import VOCAB, write_tiny

IDS = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file without a tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaFile]:
    """A file with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("spoken")
    [path] = convert(pico.write_llama(folder / "model"), folder / "out", "F32")
    with LlamaFile(path, ctx=128, threads=1, exact=True) as file:
        yield file


def test_blocks_are_the_logits(tiny: Path) -> None:
    """Blocks of any size, from any first position, and one call for all, are the same numbers."""
    with LlamaFile(tiny, ctx=64, threads=1, exact=True) as file:
        whole = file.logits(IDS)
        assert whole.shape == (60, VOCAB)
        blocks = list(file.logit_blocks(IDS, first=31, rows=7))
    assert [start for start, _ in blocks] == [31, 38, 45, 52, 59]
    assert np.abs(np.concatenate([rows for _, rows in blocks]) - whole[31:]).max() < 1e-4


def test_later_tokens_do_not_change_earlier_logits(tiny: Path) -> None:
    """Causality, and that nothing of the text before stays in the cache."""
    with LlamaFile(tiny, ctx=64, threads=1, exact=True) as file:
        whole, half = file.logits(IDS), file.logits(IDS[:30])
        again = file.logits(IDS)
    assert np.abs(whole[:30] - half).max() < 1e-4
    assert np.array_equal(whole, again)
    assert np.abs(whole[:30] - whole[30:]).max() > 0.1


def test_one_block_at_a_time(tmp_path: Path) -> None:
    """With a vocabulary so large that 32 MiB hold few positions, no block is larger."""
    path = write_tiny(tmp_path / "wide.gguf", vocab=300_000)
    with LlamaFile(path, ctx=64, threads=1) as file:
        assert file.rows_at_once == 27
        blocks = list(file.logit_blocks([1, 2, 3] * 20, first=4, rows=50))
        assert [len(rows) for _, rows in blocks] == [27, 27, 2]
        assert np.abs(blocks[1][1][:1] - file.logits([1, 2, 3] * 11)[31]).max() < 0.05  # F16 cache


def test_greedy_is_the_largest_logit_each_time(tiny: Path) -> None:
    """The cache gives what reading the whole text again gives."""
    with LlamaFile(tiny, ctx=64, threads=1, exact=True) as file:
        heard: list[str] = []
        done = file.generate(IDS[:5], 12, on_piece=heard.append)
        text = list(IDS[:5])
        for token in done.tokens:
            assert token == int(file.logits(text)[-1].argmax())
            text.append(token)
    assert (len(done.tokens), done.stopped) == (12, "length")
    assert done.text == "".join(heard) == "".join(f" {token}" for token in done.tokens)


def test_completion_ends_with_the_context(tiny: Path) -> None:
    """A full context is an end, not an error."""
    with LlamaFile(tiny, ctx=64, threads=1) as file:
        done = file.generate(IDS, 100)
        assert done.stopped == "context"
        assert len(IDS) + len(done.tokens) == 65  # the last one is written, and never read
        assert file.generate(IDS[:3], 0).tokens == ()


def test_seeded_sampling(tiny: Path) -> None:
    """A seed fixes the text, another seed gives another."""
    with LlamaFile(tiny, ctx=64, threads=1) as file:
        how = Sampling(temperature=1.5, top_p=1.0, seed=3)
        first = file.generate(IDS[:5], 20, sampling=how).tokens
        assert file.generate(IDS[:5], 20, sampling=how).tokens == first
        assert file.generate(IDS[:5], 20, sampling=Sampling(temperature=1.5, seed=4)).tokens != first


def test_text_and_tokens(spoken: LlamaFile) -> None:
    """Pieces spell the text, byte for byte; special tokens only where asked."""
    text = "def read(path):\n\treturn 'naïve ☃ 𝔘'  # <|endoftext|>\r\n"
    ids = spoken.tokenize(text)
    assert b"".join(spoken.piece(token) for token in ids).decode() == text
    assert spoken.spell(ids) == text
    special = spoken.tokenize(text, parse_special=True)
    assert spoken.bos in special and spoken.bos not in ids
    assert spoken.tokenize("") == []
    assert spoken.piece(special[special.index(spoken.bos)]) == b""
    assert spoken.piece(special[special.index(spoken.bos)], special=True) == b"<|endoftext|>"


def test_unfinished_characters_wait(spoken: LlamaFile) -> None:
    """A snowman cut between its bytes is not spelt as a question mark."""
    ids = spoken.tokenize("a☃")
    assert [spoken.spell(ids[:n]) for n in range(1, len(ids) + 1)] == ["a"] * (len(ids) - 1) + ["a☃"]


def test_what_a_file_says(spoken: LlamaFile) -> None:
    """Metadata of every length, sizes, tokens."""
    assert spoken.architecture == "llama"
    assert spoken.metadata("general.file_type") == "0"
    assert spoken.metadata("no.such.key") is None
    assert (spoken.width, spoken.vocab_size, spoken.has_tokenizer) == (64, pico.TOKENIZER_SIZE, True)
    assert spoken.ends(spoken.tokenize("<|endoftext|>", parse_special=True)[0])
    assert spoken.description.startswith("llama") and spoken.tensor_bytes > 4 * spoken.num_weights * 0.99


def test_nothing_is_printed(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a load nor a failure writes to the terminal; the log can be heard."""
    with captured_log() as log, LlamaFile(tiny, ctx=64, threads=1) as file:
        file.logits(IDS)
    assert any("n_layer" in line.text for line in log)
    (tmp_path / "junk.gguf").write_bytes(b"hello world" * 10)
    with pytest.raises(CheckpointError):
        LlamaFile(tmp_path / "junk.gguf")
    assert capfd.readouterr() == ("", "")


def test_refusals(tiny: Path, tmp_path: Path) -> None:
    """Each way of being wrong is llama.cpp's own line that matters, not the generic one after it."""
    whole = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-5000])
    (tmp_path / "junk.gguf").write_bytes(b"hello world" * 10)
    write_tiny(tmp_path / "arch.gguf", arch="nosuch")
    write_tiny(tmp_path / "missing.gguf", without="blk.1.ffn_up.weight")
    expected: list[tuple[str, type[EffiError], str]] = [
        ("absent", CheckpointError, "no such file"),
        ("cut", CheckpointError, "data is not within the file bounds, model is corrupted or incomplete"),
        ("junk", CheckpointError, "invalid magic characters: 'hell', expected 'GGUF'"),
        ("arch", UnsupportedError, "unknown model architecture: 'nosuch'"),
        ("missing", CheckpointError, "llama.cpp refused it: tensor 'blk.1.ffn_up.weight' not found"),
    ]
    for name, kind, line in expected:
        with pytest.raises(kind) as caught:
            LlamaFile(tmp_path / f"{name}.gguf")
        assert caught.value.message.endswith(line)
        assert caught.value.where == str(tmp_path / f"{name}.gguf")


def test_wrong_tokens(tiny: Path) -> None:
    """Ids that would be read out of bounds never reach the library."""
    with LlamaFile(tiny, ctx=64, threads=1) as file:
        for ids, line in (([], "no tokens"), ([0] * 65, "65 tokens do not fit a context of 64"), ([64], "token id 64")):
            with pytest.raises(UsageError, match=line):
                file.logits(ids)
        with pytest.raises(UnsupportedError, match="no pooling"):
            file.embed(IDS)
    with pytest.raises(ValueError, match="closed"):
        file.logits(IDS)
    file.close()
    with LlamaFile(tiny, vocab_only=True) as file, pytest.raises(ValueError, match="vocabulary only"):
        file.logits(IDS)


def test_missing_package(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without llama-cpp-python the line names the extra."""
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingExtra) as caught:
        LlamaFile(tiny)
    assert caught.value.hint == "pip install 'efficli[gguf]'"


def test_threads_heed_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS bounds the threads, and nonsense in it does not."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_threads() == 1
    for other in ("", "0", "many", "100000"):
        monkeypatch.setenv("OMP_NUM_THREADS", other)
        assert 1 <= available_threads() < 100000


def test_log_lines_are_joined() -> None:
    """Messages come in pieces; a line is complete when its break has come."""
    log, heard = LlamaLog(), list[LogLine]()
    log.listeners.append(heard)
    log.hear(2, "loading ")
    log.hear(5, "..")
    log.hear(5, ".\nnext: ")
    log.hear(5, "done\n")
    assert heard == [LogLine(2, "loading ..."), LogLine(2, "next: done")] == list(log.lines)
    assert complaint([LogLine(ERROR, "llama_model_load_from_file_impl: failed to load model")], "nothing") == "nothing"


def test_a_process_that_measures_loads_the_library_and_little_else() -> None:
    """Numpy, its threads and jinja2 would be in the memory, the start and the speed of what is measured."""
    code = (
        "import sys, efficli.bench.gguf_session\n"
        "from efficli.ops.llama_log import llama_cpp\n"
        "llama_cpp(stock=True).llama_print_system_info()\n"
        "print(sorted({'numpy', 'jinja2', 'pydantic', 'rich', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("own", ["", "GOMP_SPINCOUNT=7", "OMP_WAIT_POLICY=active"])
def test_threads_spin_briefly_unless_the_environment_says_otherwise(own: str) -> None:
    """And no child that measures inherits it."""
    code = (
        "import os\n"
        "from efficli.ops.llama_log import llama_cpp\n"
        "llama_cpp(); print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= dict([own.split("=")]) if own else {}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    name, _, value = own.partition("=")
    assert done.stdout.split() == [value if name == word else "None" for word in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")]
    if name != "OMP_WAIT_POLICY":
        assert f"GOMP_SPINCOUNT = '{value or 1000}'" in done.stderr
