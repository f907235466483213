"""The stopwatch around llama.cpp: what it times is what it says, by the tokens and logits that come out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.ops.llama import LlamaFile, StockContext
from efficli.ops.llama_clock import LlamaClock
from tests import pico
from tests.converted import convert
from tests.tiny_architectures import VOCAB, write_encoder, write_recurrent, write_windowed
from tests.tiny_gguf import write_tiny

EXACT = StockContext(cache_type_k="f32", cache_type_v="f32", flash_attn="off")
TEXT = pico.TEXT[:200]
CTX = 200


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        "llama": write_tiny(folder / "llama.gguf"),
        "windowed": write_windowed(folder / "windowed.gguf"),
        "recurrent": write_recurrent(folder / "recurrent.gguf"),
        "encoder": write_encoder(folder / "encoder.gguf"),
    }


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer whose file asks for a begin token."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("spoken")
    file = pico.write_llama(folder / "model", seed=3) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{pico.SPECIALS[0]} $A", pair=f"{pico.SPECIALS[0]} $A $B", special_tokens=[(pico.SPECIALS[0], 0)]
    )
    tokenizer.save(str(file))
    return convert(folder / "model", folder / "out", "F32")[0]


@pytest.fixture
def clock(request: pytest.FixtureRequest, files: dict[str, Path]) -> Iterator[LlamaClock]:
    path = files[getattr(request, "param", "llama")]
    with LlamaFile(path, ctx=CTX, threads=1, stock=EXACT, embeddings=path.stem == "encoder") as file:
        found = LlamaClock(file)
        yield found
        found.close()


def last_logits(clock: LlamaClock) -> np.ndarray:
    """Of the token that was read last: llama.cpp's own pointer."""
    file = clock.file
    pointer = file.library.llama_get_logits_ith(file.context, -1)
    return np.ctypeslib.as_array(pointer, shape=(file.vocab_size,)).copy()


def fresh_logits(clock: LlamaClock, tokens: int) -> np.ndarray:
    """After so many tokens of the stream, by a context of its own that reads them one by one."""
    with LlamaFile(clock.file.path, ctx=CTX, threads=1, stock=EXACT) as file:
        for at, token in enumerate(clock.stream[:tokens]):
            found = file.read([token], at)
    return found


def held(clock: LlamaClock) -> int:
    """Tokens in the cache."""
    file = clock.file
    return int(file.library.llama_memory_seq_pos_max(file.library.llama_get_memory(file.context), 0)) + 1


# depth


ORDER = [
    ("prompt", 40, 0), ("prompt", 7, 40), ("generate", 9, 20), ("generate", 3, 60), ("prompt", 100, 100),
    ("generate", 12, 0), ("prompt", 1, 0), ("generate", 1, 150), ("prompt", 30, 29), ("generate", 5, 59),
]  # fmt: skip


@pytest.mark.parametrize("clock", ["llama", "windowed", "recurrent"], indirect=True)
def test_at_a_depth_the_cache_holds_exactly_so_many_tokens_of_the_stream(clock):
    """Cut, kept, extended or read again: the logits are those of a context that read it all from the start."""
    for do, n, depth in ORDER:
        spent = getattr(clock, do)(n, depth=depth, threads=1)
        assert len(spent) == (n if do == "generate" else 2)
        assert held(clock) == depth + n
        assert np.abs(last_logits(clock) - fresh_logits(clock, depth + n)).max() < 2e-3, (do, n, depth)


def test_logits_of_another_depth_are_far_off(clock):
    """What the test above would see if the depth were one off, or the window were forgotten."""
    clock.prompt(5, depth=60, threads=1)
    assert np.abs(last_logits(clock) - fresh_logits(clock, 64)).max() > 0.1
    assert np.abs(last_logits(clock) - fresh_logits(clock, 66)).max() > 0.1


def decoded(clock: LlamaClock, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of llama_decode from here on."""
    sizes, library = list[int](), clock.file.library
    whole = library.llama_decode

    def count(context, batch):
        sizes.append(batch.n_tokens)
        return whole(context, batch)

    monkeypatch.setattr(library, "llama_decode", count)
    return sizes


@pytest.mark.parametrize(("clock", "again"), [("llama", 0), ("windowed", 100), ("recurrent", 100)], indirect=["clock"])
def test_a_depth_is_read_once_where_the_cache_can_be_cut(clock, again, monkeypatch):
    clock.prompt(20, depth=100, threads=1)
    sizes = decoded(clock, monkeypatch)
    for _ in range(2):
        clock.prompt(20, depth=100, threads=1)
        clock.generate(3, depth=100, threads=1)
    assert sum(sizes) == 2 * (23 + 2 * again)


def test_an_interrupted_measurement_leaves_no_wrong_depth(clock, monkeypatch):
    """A failure in the middle, and the next one is right."""
    sizes = decoded(clock, monkeypatch)
    monkeypatch.setattr(clock.file.library, "llama_synchronize", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        clock.generate(30, depth=50, threads=1)
    monkeypatch.undo()
    assert sizes
    clock.prompt(10, depth=50, threads=1)
    assert held(clock) == 60
    assert np.abs(last_logits(clock) - fresh_logits(clock, 60)).max() < 2e-3


def test_a_prompt_longer_than_a_batch_is_read_in_batches(files, monkeypatch):
    stock = StockContext(cache_type_k="f32", cache_type_v="f32", flash_attn="off", batch=32, ubatch=16)
    with LlamaFile(files["llama"], ctx=CTX, threads=1, stock=stock) as file:
        clock = LlamaClock(file)
        sizes = decoded(clock, monkeypatch)
        clock.prompt(100, depth=50, threads=1)
        assert sizes == [32, 18, 32, 32, 32, 4]
        assert np.abs(last_logits(clock) - fresh_logits(clock, 150)).max() < 2e-3


# times and threads


def test_times_are_of_their_parts(clock):
    """Reading is part of choosing the first token, and each token takes some time."""
    read, chosen = clock.prompt(64, depth=0, threads=1)
    assert 0 < read <= chosen
    spent = clock.generate(32, depth=0, threads=1)
    assert len(spent) == 32
    assert min(spent) > 0


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_computes_the_same(clock, threads):
    clock.prompt(30, depth=10, threads=threads)
    assert clock.file.library.llama_n_threads(clock.file.context) == threads
    assert clock.file.library.llama_n_threads_batch(clock.file.context) == threads
    assert np.abs(last_logits(clock) - fresh_logits(clock, 40)).max() < 2e-3


def test_the_seed_chooses_the_stream_and_the_begin_token_begins_it(files, spoken):
    with LlamaFile(files["llama"], ctx=CTX, threads=1, stock=EXACT) as file:
        first, same, other = LlamaClock(file), LlamaClock(file), LlamaClock(file, seed=1)
        assert list(first.stream) == list(same.stream)
        assert list(first.stream) != list(other.stream)
        assert len(first.stream) == CTX
        assert 0 <= min(first.stream) < max(first.stream) < VOCAB
    with LlamaFile(spoken, ctx=CTX, threads=1, stock=EXACT) as file:
        assert file.add_bos
        assert [LlamaClock(file, seed).stream[0] for seed in range(4)] == [file.bos] * 4


# requests


@pytest.mark.parametrize("batch", [16, 2048])
def test_an_answer_is_what_the_model_writes_greedily(spoken, batch):
    stock = StockContext(cache_type_k="f32", cache_type_v="f32", flash_attn="off", batch=batch, ubatch=batch)
    with LlamaFile(spoken, ctx=CTX, threads=1, exact=True) as file:
        ids = file.tokenize(TEXT)
        wanted = file.generate(ids, 20, stop_at_end=False).tokens
    with LlamaFile(spoken, ctx=CTX, threads=1, stock=stock) as file:
        clock = LlamaClock(file)
        clock.prompt(50, depth=20, threads=1)
        for _ in range(2):
            answer = clock.answer(TEXT, 20, special=False, begin=False, threads=1)
            assert answer.tokens == wanted
            assert answer.prompt_tokens == len(ids)
            assert len(answer.token_ns) == 19
            assert min(answer.first_token_ns, *answer.token_ns) > 0
        clock.prompt(5, depth=3, threads=1)
        assert held(clock) == 8
        assert np.abs(last_logits(clock) - fresh_logits(clock, 8)).max() < 2e-3
        assert clock.answer(TEXT, 1, special=False, begin=False, threads=1).token_ns == ()
        clock.close()
        clock.close()


def test_control_tokens_and_the_begin_token_are_read_only_where_asked(spoken):
    text = "<|endoftext|>def"
    with LlamaFile(spoken, ctx=CTX, threads=1, stock=EXACT) as file:
        clock = LlamaClock(file)

        def read(*, special: bool, begin: bool) -> int:
            return clock.answer(text, 1, special=special, begin=begin, threads=1).prompt_tokens

        assert read(special=True, begin=False) < read(special=False, begin=False)
        assert read(special=True, begin=True) == read(special=True, begin=False) + 1
        clock.close()


# refusals


@pytest.mark.parametrize(("n", "depth"), [(201, 0), (1, 200), (101, 100), (0, 0), (5, -1)])
def test_more_than_the_context_holds_is_refused(clock, n, depth):
    for do in (clock.prompt, clock.generate):
        with pytest.raises(UsageError, match="expected 1 to 200 in all"):
            do(n, depth=depth, threads=1)
    clock.prompt(CTX, depth=0, threads=1)
    clock.generate(1, depth=CTX - 1, threads=1)


def test_an_answer_that_does_not_fit_is_refused(spoken):
    with LlamaFile(spoken, ctx=CTX, threads=1, stock=EXACT) as file:
        clock = LlamaClock(file)
        length = len(file.tokenize(TEXT))
        assert clock.answer(TEXT, CTX - length, special=False, begin=False, threads=1).prompt_tokens == length
        with pytest.raises(UsageError, match=rf"prompt of {length} tokens and {CTX - length + 1} to write are longer"):
            clock.answer(TEXT, CTX - length + 1, special=False, begin=False, threads=1)
        with pytest.raises(UsageError, match="the text is empty"):
            clock.answer("", 1, special=False, begin=False, threads=1)
        clock.close()


@pytest.mark.parametrize("clock", ["encoder"], indirect=True)
def test_an_embedding_model_reads_and_does_not_write(clock):
    ids = clock.stream[:50]
    read, chosen = clock.prompt(50, depth=0, threads=1)
    assert 0 < read == chosen
    pointer = clock.file.library.llama_get_embeddings_seq(clock.file.context, 0)
    pooled = np.ctypeslib.as_array(pointer, shape=(clock.file.width,)).copy()
    assert np.abs(pooled - clock.file.embed(ids)).max() < 1e-4
    assert clock.prompt(CTX, depth=0, threads=2)[0] > 0
    with pytest.raises(UnsupportedError, match="an embedding model writes no text"):
        clock.generate(1, depth=0, threads=1)
    with pytest.raises(UnsupportedError, match="an embedding model writes no text"):
        clock.answer("text", 1, special=False, begin=False, threads=1)
