"""GGUF files: a good one is clean, and each thing that can be wrong with one is a finding that names it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import efficli
from efficli.errors import EffiError
from efficli.export.gguf.layout import Metadata, array, f32, string, u32
from efficli.export.gguf.parse import read_gguf
from efficli.inspection.report_table import facts_line
from efficli.inspection.weights import look
from efficli.ops import ggml
from efficli.pipeline import inspect
from efficli.pipeline.inspect import inspect as inspect_function
from tests.gguf_reader import Reader
from tests.inspection.rewrite import rewrite
from tests.tiny_gguf import write_tiny

UP = "blk.1.ffn_up.weight"


@pytest.fixture
def bare(model, monkeypatch) -> Path:
    """The file without a chat template, where no llama.cpp is installed: fewer processes to start."""
    monkeypatch.setattr("efficli.inspection.llama_view.is_installed", lambda: False)
    return rewrite(model, lambda metadata: metadata.pop("tokenizer.chat_template"))


def checks(path: Path, **options: bool) -> dict[str, str]:
    """What each check saw, of a file that is clean."""
    found = inspect(path, **options)
    assert found.all_findings == []
    return {check.name: check.seen for check in found.models[0].checks}


def findings(path: Path, *, scan: bool = True) -> list[str]:
    """The lines of what was found; there is something, and each has a hint."""
    found = inspect(path, scan=scan)
    assert found.all_findings
    assert all(finding.hint for finding in found.all_findings)
    return [finding.line for finding in found.all_findings]


def test_the_public_function():
    assert efficli.inspect is inspect is inspect_function


def test_a_good_file(model):
    told = checks(model)
    plain = Reader(model)
    (report,) = inspect(model).models
    assert told["types"] == "those of Q8_0"
    assert told["chat template"] == "renders 4 messages; llama.cpp's function makes the same text"
    assert told["begin and end tokens"] == "the tokenizer adds neither token, the template does not write it"
    assert told["layers"] == "2, all with tensors"
    assert told["vocabulary"] == "384 tokens, 384 rows of the embedding"
    assert told["tied embeddings"] == "tied: the output matrix is the embedding"
    assert report.num_weights == sum(math.prod(tensor.shape) for tensor in plain.tensors.values())
    assert sum(group.nbytes for group in report.groups) == sum(len(tensor.data) for tensor in plain.tensors.values())
    assert report.details["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert {group.name: group.count for group in report.groups} == {
        "embedding": 1, "attention": 8, "feed-forward": 6, "norms": 5,
    }  # fmt: skip


def test_the_quick_look_reads_no_weights(model, monkeypatch):
    monkeypatch.setattr("efficli.inspection.gguf_file.read_file", None)
    told = checks(model, scan=False)
    assert told["values"] == told["hashes"] == "weights not read (--no-scan)"


def set_field(**values: object) -> Callable[[Metadata], None]:
    """Change metadata; a dot in a key is written as two underscores, None removes it."""

    def change(metadata: Metadata) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            metadata.pop(key, None)
            if value is not None:
                metadata[key] = value  # type: ignore[assignment]

    return change


def shorten(key: str, count: int) -> Callable[[Metadata], object]:
    return lambda metadata: metadata[key].value.__delitem__(slice(count, None))


HEADS = array([2, 2, 2], GGUFValueType.INT32)
METADATA: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "layers": (set_field(llama__block_count=u32(3)), "block_count is 3, and the file has no tensors for layer 2"),
    "billions": (set_field(llama__block_count=u32((1 << 32) - 1)), "the file has no tensors for layer 2"),
    "fewer": (set_field(llama__block_count=u32(1)), "block_count is 1, and the file has tensors for layer 1"),
    "per layer": (
        set_field(llama__attention__head_count_kv=HEADS),
        "llama.attention.head_count_kv has 3 values, block_count is 2",
    ),
    "tokens": (shorten("tokenizer.ggml.tokens", 380), "tokenizer has 380 ids, embedding 384 rows"),
    "types of tokens": (shorten("tokenizer.ggml.token_type", 9), "tokenizer.ggml.token_type has 9 values, there are"),
    "end": (set_field(tokenizer__ggml__eos_token_id=u32(384)), "tokenizer.ggml.eos_token_id is 384, there are 384"),
    "no end": (set_field(tokenizer__ggml__eos_token_id=None), "runtimes need tokenizer.ggml.eos_token_id: missing"),
    "pre": (set_field(tokenizer__ggml__pre=None), "runtimes need tokenizer.ggml.pre: missing"),
    "context": (set_field(llama__context_length=None), "runtimes need llama.context_length: missing"),
    "licence": (set_field(general__license=None), "people need general.license: missing"),
    "NaN": (set_field(llama__rope__freq_base=f32(math.nan)), "not a finite number: llama.rope.freq_base"),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata(name, bare):
    change, message = METADATA[name]
    told = findings(rewrite(bare, change), scan=False)
    assert message in told[0]
    assert len(told) == 1 + (name == "tokens")


def test_what_llama_cpp_says(model):
    """Of a vocabulary without a pre-tokenizer, of a file that is called by another type, of what it does not know."""
    rewrite(model, set_field(tokenizer__ggml__pre=None, general__file_type=u32(10)))
    told = findings(model, scan=False)
    assert any("llama.cpp warns" in line for line in told), told
    assert any("general.file_type says Q2_K, most of its bytes are Q8_0" in line for line in told)
    told = findings(rewrite(model, set_field(general__architecture=string("newer"))), scan=False)
    assert any("llama.cpp refuses it: " in line for line in told)


def test_numbers_that_json_lacks_are_text_in_json(bare):
    rewrite(bare, set_field(llama__rope__freq_base=f32(math.inf), general__name=string("a\x1b[31mb\0")))
    found = inspect(bare, scan=False)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["models"][0]["facts"]["name"] == "a\\x1b[31mb\\x00"


def test_layers_that_were_dropped(bare):
    told = findings(rewrite(bare, drop=lambda name: name.startswith("blk.0.")), scan=False)
    assert any("block_count is 2, and the file has no tensors for layer 0" in line for line in told)


def test_parts_of_a_model_and_other_files_are_not_judged_as_whole_ones(bare, tmp_path):
    part = set_field(split__count=u32(2), split__no=u32(0))
    rewrite(bare, part, drop=lambda name: name.startswith("blk.1."))
    assert inspect(bare, scan=False).exit_code == 0
    rewrite(bare, set_field(split__count=None, general__type=string("imatrix")))
    assert inspect(bare, scan=False).exit_code == 0


def poke(path: Path, tensor: str, at: int, data: bytes) -> Path:
    """Bytes written over those of a tensor."""
    whole = bytearray(path.read_bytes())
    start = read_gguf(path).tensors[tensor].offset + at
    whole[start : start + len(data)] = data
    path.write_bytes(whole)
    return path


def test_a_scale_that_is_not_a_number(bare):
    """One Q8_0 block of row 1: its 32 weights are NaN."""
    poke(bare, UP, (128 // 32) * 34 + 34, b"\x00\x7e")
    assert findings(bare) == [f"model.gguf: 32 NaN in {UP} (first at [1,32])"]
    assert inspect(bare, scan=False).exit_code == 0


def test_an_infinite_norm(bare):
    poke(bare, "output_norm.weight", 8, b"\0\0\x80\x7f")
    assert findings(bare) == ["model.gguf: 1 Inf in output_norm.weight (first at [2])"]


def test_a_hole(bare):
    """What a download leaves that was cut and resumed."""
    poke(bare, UP, 0, bytes(read_gguf(bare).tensors[UP].nbytes))
    assert findings(bare) == [f"model.gguf: 1 matrix is all zero: {UP}"]


def encoded(kind: str, weights: int = 2048) -> bytearray:
    values = np.random.default_rng(0).standard_normal((1, weights)).astype(np.float32)
    out = np.empty(ggml.row_bytes(kind, weights), np.uint8)
    ggml.encode(kind, values, out, np.ones(weights, np.float32) if kind in ggml.NEEDS_IMATRIX else None)
    return bytearray(out.tobytes())


SCALES = {
    "F32": (b"\0\0\xc0\x7f", 0), "F16": (b"\x00\x7e", 0), "BF16": (b"\xc0\x7f", 0), "Q8_0": (b"\x00\x7e", 0),
    "Q4_0": (b"\x00\x7e", 0), "Q2_0": (b"\x00\x7e", 0), "Q4_K": (b"\x00\x7e", 0), "Q6_K": (b"\x00\x7e", 208),
    "IQ4_XS": (b"\x00\x7e", 0), "Q2_K": (b"\x00\x7e", 80), "MXFP4": (b"\xff", 0), "TQ2_0": (b"\x00\x7e", 64),
}  # fmt: skip
"""A scale that is not a number, and where the third block of the type has it."""


@pytest.mark.parametrize("kind", SCALES)
def test_each_type_in_its_third_block(kind):
    size, nbytes = (1, len(SCALES[kind][0])) if kind in ("F32", "F16", "BF16") else (0, 0)
    size, nbytes = (size, nbytes) if size else (ggml.type_info(kind).block_size, ggml.type_info(kind).block_bytes)
    data = encoded(kind)

    def read(start: int, part: memoryview) -> None:
        part[:] = data[start : start + len(part)]

    assert not look(read, kind, len(data)).is_wrong
    value, at = SCALES[kind]
    data[2 * nbytes + at : 2 * nbytes + at + len(value)] = value
    found = look(read, kind, len(data))
    assert found.is_wrong
    assert 2 * size <= found.first < 3 * size


def test_bytes_behind_the_last_tensor(bare):
    with bare.open("ab") as file:
        file.write(b"PK\3\4" * 100)
    (line,) = findings(bare, scan=False)
    assert line == "400 bytes behind the last tensor: no runtime reads them"
    assert inspect(bare, scan=False).exit_code == 6


def test_what_fell_back_is_what_the_export_said(tmp_path):
    """The twin's rows of 96 fill no block of 256: the tensors, wanted types and types of the export; one was chosen."""
    result = efficli.export(
        "reference-twin",
        tmp_path / "out",
        types=("Q4_K_M",),
        tensor_types=(("blk.1.attn_q", "F16"),),
        certificate=False,
    )
    found = inspect(tmp_path / "out", scan=False)
    assert found.exit_code == 0, found.all_findings
    (report,) = found.models
    said = {(f.tensor, f.wanted, f.got) for f in result.files[0].fallbacks}
    assert said
    chosen = [one for one in report.fallbacks if one.got == "F16"]
    assert [(one.tensor, one.why) for one in chosen] == [("blk.1.attn_q.weight", "llama.cpp's Q4_K_M has Q5_0 here")]
    assert {(one.tensor, one.wanted, one.got) for one in report.fallbacks if one not in chosen} == said
    assert "rows of 96 do not fill the blocks of 256" in report.fallbacks[0].why


def test_an_output_matrix_that_repeats_the_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr("efficli.inspection.llama_view.is_installed", lambda: False)
    path = write_tiny(tmp_path / "tiny.gguf")
    header = read_gguf(path)
    embedding = header.tensors["token_embd.weight"]
    data = path.read_bytes()[embedding.offset : embedding.offset + embedding.nbytes]
    seen = {check.name: check.seen for check in inspect(path).models[0].checks}
    assert seen["tied embeddings"] == "not tied: output.weight is a matrix of its own"
    poke(path, "output.weight", 0, data)
    seen = {check.name: check.seen for check in inspect(path).models[0].checks}
    assert seen["tied embeddings"] == f"stored twice: output.weight repeats {len(data)} bytes"


def test_without_llama_cpp_what_needs_it_is_said_to_be_left_out(model, monkeypatch):
    monkeypatch.setattr("efficli.inspection.llama_view.is_installed", lambda: False)
    told = checks(model)
    assert "not installed" in told["types"]
    assert "not installed" in told["llama.cpp"]
    assert told["chat template"].endswith("not compared")


def fuzz(path: Path, monkeypatch, examples: int) -> None:
    """Any metadata gives a report that JSON and a terminal can hold; what runs in other processes is left out."""
    monkeypatch.setattr("efficli.inspection.gguf_file.check_chat", lambda report, chat: None)
    whole = path.read_bytes()
    start = read_gguf(path).data_start
    vocabulary = whole.index(b"tokenizer.ggml.tokens")
    tail = whole.index(b"tokenizer.ggml.merges")
    changes = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=changes, at_the_end=st.booleans())
    def run(changes, at_the_end):
        data = bytearray(whole)
        for at, byte in changes:
            data[tail + at % (start - tail) if at_the_end else 24 + at % (vocabulary - 24)] = byte
        path.write_bytes(data)
        try:
            found = inspect(path, scan=False)
        except EffiError:
            return
        json.dumps(found.to_json(), allow_nan=False)
        assert all(finding.line.isprintable() for finding in found.all_findings)
        assert facts_line(found.models[0]).isprintable()

    run()


def test_changed_metadata(bare, monkeypatch):
    fuzz(bare, monkeypatch, 60)


@pytest.mark.slow
def test_changed_metadata_at_length(bare, monkeypatch):
    fuzz(bare, monkeypatch, 10_000)
