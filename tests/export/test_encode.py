"""Files written from one read: bit-equal to llama.cpp's quantizer, hashed, whatever the number of threads."""

import hashlib

import numpy as np
import pytest

from efficli.errors import UnsupportedError
from efficli.export.gguf import encode, output, stream
from efficli.ops import ggml
from efficli.ops.ggml_types import FILE_TYPES
from tests.encoding import Model, assert_same_tensors, quantize_by_llama
from tests.gguf_reader import Reader

# the tables of their encoders take seconds to build: 1, 3, 6 and 12
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"}

# but for Q1_0 where no row fits: see below
CASES = [
    pytest.param(which, kind, marks=pytest.mark.slow if kind in SLOW else ())
    for which in ("even", "odd")
    for kind in FILE_TYPES
    if (which, kind) != ("odd", "Q1_0")
]


@pytest.mark.parametrize(("which", "kind"), CASES)
def test_every_type_is_bit_equal_to_llama_cpps_quantizer(which, kind, request):
    model = request.getfixturevalue(which)
    imatrix = model.imatrix() if kind in SLOW or kind in {"Q2_K_S", "IQ3_XS", "IQ4_XS", "Q4_0"} else None
    choice = model.choose(kind, imatrix=imatrix, allow_non_ternary=True)
    (written,) = model.write(choice)
    ours = Reader(written.path)
    theirs = quantize_by_llama(model.folder / "f32-0.gguf", model.folder / "llama.gguf", kind, imatrix)
    assert_same_tensors(ours, theirs)
    kinds = {t.type for t in ours.tensors.values()}
    if which == "odd" and kind not in ("F32", "F16", "BF16"):
        assert choice.fallbacks
        assert "F16" in kinds
    elif which == "even":
        assert not choice.fallbacks


def test_a_type_without_a_fallback_is_refused_as_llama_cpp_does(odd):
    with pytest.raises(UnsupportedError, match="no tensor type fallback is defined for type q1_0") as raised:
        odd.choose("Q1_0")
    assert "rows do not fill the blocks" in raised.value.hint
    with pytest.raises(AssertionError):
        quantize_by_llama(odd.folder / "f32-0.gguf", odd.folder / "llama.gguf", "Q1_0")


def test_from_float16_equals_the_quantizer_on_the_f16_export(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, dtype="F16")
    f16, q4 = model.write(model.choose("F16"), model.choose("Q4_K_M"))
    theirs = quantize_by_llama(f16.path, tmp_path / "llama.gguf", "Q4_K_M")
    assert_same_tensors(Reader(q4.path), theirs)


def test_overrides_and_pure_reach_the_bytes(even):
    choice = even.choose("Q4_K_M", overrides=((r"blk\.0\.ffn_down", "Q8_0"), ("attn_q", "NVFP4")), pure=True)
    (written,) = even.write(choice)
    mine = Reader(written.path).tensors
    assert {mine[f"blk.{n}.attn_q.weight"].type for n in (0, 1)} == {"NVFP4"}
    weights = even.ckpt.read("model.layers.0.mlp.down_proj.weight")
    expected = np.empty(256 * ggml.row_bytes("Q8_0", 512), np.uint8)
    ggml.encode("Q8_0", weights, expected)
    assert mine["blk.0.ffn_down.weight"].data == expected.tobytes()
    assert mine["blk.1.ffn_down.weight"].type == "Q4_K"


def test_several_types_in_one_read_equal_single_runs(even):
    kinds = ["Q8_0", "Q4_K_M", "F16", "BF16", "Q4_0"]
    choices = [even.choose(kind) for kind in kinds]
    together = even.write(*choices, name="together")
    for choice, one in zip(choices, together, strict=True):
        (alone,) = even.write(choice, name="alone")
        assert alone.path.read_bytes() == one.path.read_bytes()
        assert alone.tensors == one.tensors
        assert alone.sources == one.sources


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bytes_do_not_depend_on_threads_slabs_or_blocks(even, threads, monkeypatch):
    choices = [even.choose(kind) for kind in ("Q4_K_M", "F32")]
    usual = [(f.sha256, f.tensors, f.sources) for f in even.write(*choices)]
    monkeypatch.setattr(stream, "SLAB_WEIGHTS", 5 * 256)
    monkeypatch.setattr(encode, "BLOCK_WEIGHTS", 2 * 256)
    cut = [(f.sha256, f.tensors, f.sources) for f in even.write(*choices, threads=threads)]
    assert cut == usual


def test_direct_io_writes_the_same_bytes(even, monkeypatch):
    (usual,) = even.write(even.choose("Q4_0"))
    expected = usual.path.read_bytes()
    monkeypatch.setattr(output, "DIRECT_BYTES", 0)
    for size in (4096, 12288, output.BUFFER_BYTES):
        monkeypatch.setattr(output, "BUFFER_BYTES", size)
        (direct,) = even.write(even.choose("Q4_0"), name="direct", threads=3)
        assert direct.path.read_bytes() == expected


@pytest.mark.parametrize("at", ["open", "pwrite"])
def test_where_direct_io_is_refused_the_page_cache_serves(even, monkeypatch, at):
    (usual,) = even.write(even.choose("Q4_0"))
    real_open, real_write, refused = output.os.open, output.os.pwrite, []

    def open_(path, flags, *mode, **more):
        if flags & output._O_DIRECT and at == "open":
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *mode, **more)

    def pwrite(descriptor, view, offset):
        if at == "pwrite" and not refused:
            refused.append(descriptor)
            raise OSError(22, "Invalid argument")
        return real_write(descriptor, view, offset)

    monkeypatch.setattr(output, "DIRECT_BYTES", 0)
    monkeypatch.setattr(output.os, "open", open_)
    monkeypatch.setattr(output.os, "pwrite", pwrite)
    (other,) = even.write(even.choose("Q4_0"), name="refused")
    assert refused
    assert other.sha256 == usual.sha256 == hashlib.sha256(other.path.read_bytes()).hexdigest()


def test_hashes_are_those_of_the_bytes(even):
    (written,) = even.write(even.choose("Q4_K_M"))
    data = written.path.read_bytes()
    assert written.nbytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    for name, tensor in Reader(written.path).tensors.items():
        told = written.tensors[name]
        assert (told.type, told.nbytes) == (tensor.type, len(tensor.data))
        assert told.sha256 == hashlib.sha256(tensor.data).hexdigest()
    assert written.sources == {name: even.ckpt.hash(name) for name in even.ckpt.tensors}
    assert even.ckpt.fingerprint()  # of the same hashes


def test_without_hashes_the_same_bytes(even):
    hashed, bare = (even.write(even.choose("Q4_0"), name=str(h), hashes=h)[0] for h in (True, False))
    assert hashed.path.read_bytes() == bare.path.read_bytes()
    assert (bare.sha256, bare.sources) == ("", {})


def test_metadata_and_tensor_order_are_ours(even):
    (written,) = even.write(even.choose("Q8_0"))
    reader = Reader(written.path)
    assert list(reader.tensors) == [t.name for t in even.tensors]
    assert reader.metadata["general.file_type"] == 7
    assert reader.metadata["llama.block_count"] == 2
