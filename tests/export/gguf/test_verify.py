"""A written file is opened by the real runtime: good ones run, and each way of being bad is one line."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.verify import NUM_TOKENS, verify_file

WIDTH, FFN, VOCAB = 32, 64, 260


def characters() -> list[str]:
    """GPT-2's printable character of each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def write(path, *, arch="llama", tokenizer=True, poison=None, skip=None, ctx=128):
    """A one-layer Llama with a byte tokenizer, written by gguf-py, not by our writer."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(ctx)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*characters(), "th", "he", "<end>", "<pad>"])
        writer.add_token_types([1] * 258 + [3, 3])
        writer.add_token_merges(["t h", "h e"])
        writer.add_eos_token_id(258)
    else:
        writer.add_tokenizer_model("none")
    shapes = {
        "token_embd.weight": (VOCAB, WIDTH),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
        **{f"blk.0.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (FFN, WIDTH),
        "blk.0.ffn_up.weight": (FFN, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, FFN),
    }
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        if name == poison:
            values.flat[3] = np.nan
        if name != skip:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_good_file_loads_and_writes_the_same_tokens_each_time(tmp_path, tokenizer):
    path = write(tmp_path / "model.gguf", tokenizer=tokenizer)
    one = verify_file(path, threads=1)
    assert len(one.tokens) == NUM_TOKENS
    assert set(one.tokens) <= set(range(VOCAB))
    assert one.architecture == "llama"
    assert one.to_json()["loaded"] is True
    assert not one.embedding
    assert one.seconds > 0
    assert verify_file(path, threads=1).to_json() == one.to_json()


def test_a_context_shorter_than_the_prompt(tmp_path):
    assert 1 <= len(verify_file(write(tmp_path / "model.gguf", ctx=4), threads=1).tokens) <= NUM_TOKENS


def test_the_tokenizer_is_compared(tmp_path):
    path = write(tmp_path / "model.gguf")
    verify_file(path, expected_ids={"the he": [256, ord("e"), ord(" "), 257], "": []}, threads=1)
    with pytest.raises(UnsupportedError) as caught:
        verify_file(path, expected_ids={"the": [256, 1]}, threads=1)
    assert caught.value.line == "model.gguf: token ids of 'the' differ from id 1 on: source [1], GGUF [101]"


def test_what_is_not_finite_is_found(tmp_path):
    path = write(tmp_path / "model.gguf", poison="blk.0.ffn_down.weight")
    with pytest.raises(UnsupportedError, match=r"llama.cpp computes \d+ of \d+ logits that are not finite"):
        verify_file(path, threads=1)


def test_a_file_that_llama_refuses_is_one_line(tmp_path):
    whole = write(tmp_path / "model.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-1000])
    (tmp_path / "text.gguf").write_text("no model")
    write(tmp_path / "unknown.gguf", arch="flamingo")
    write(tmp_path / "holes.gguf", skip="blk.0.ffn_up.weight")
    cases = {
        "short": "llama.cpp",
        "text": "llama.cpp",
        "unknown": "flamingo",
        "holes": "ffn_up",
        "missing": "no such file",
    }
    for name, words in cases.items():
        with pytest.raises((CheckpointError, UnsupportedError), match=words) as caught:
            verify_file(tmp_path / f"{name}.gguf", threads=1)
        assert "\n" not in caught.value.line


STUB = """
import os, sys
llama_cpp = sys.modules["llama_cpp.llama_cpp"] = sys.modules[__name__]
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    os.kill(os.getpid(), {number})
"""


@pytest.mark.parametrize(("number", "words"), [(4, "instructions that this processor lacks"), (11, "processor")])
def test_a_library_that_crashes_is_one_line_with_the_cure(tmp_path, monkeypatch, number, words):
    """Row 58: a llama_cpp that dies as an illegal instruction or the AMX fault of a native build makes it die."""
    path = write(tmp_path / "model.gguf")
    (tmp_path / "stub" / "llama_cpp").mkdir(parents=True)
    (tmp_path / "stub" / "llama_cpp" / "__init__.py").write_text(STUB.format(number=number))
    monkeypatch.syspath_prepend(tmp_path / "stub")
    with pytest.raises(UnsupportedError) as caught:
        verify_file(path)
    assert caught.value.line.startswith(f"llama.cpp crashed (signal {number}) while loading model.gguf: ")
    assert words in caught.value.line
    assert "scripts/install-llama.sh" in caught.value.hint
    assert caught.value.exit_code == 5
