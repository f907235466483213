"""Importance matrices: computed by llama.cpp's callback as by PyTorch, read and written as llama-imatrix does."""

import ctypes
import struct

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError
from efficli.export.gguf.imatrix import Sums, compute_imatrix, means, read_imatrix, write_imatrix
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.parse import read_gguf
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops import collect
from tests import models

CHUNK, CHUNKS = 64, 3


def sums(seed=0):
    generator = np.random.default_rng(seed)
    squares = {"blk.0.ffn_up.weight": (1, 64), "blk.0.ffn_down_exps.weight": (3, 32)}
    return {
        name: Sums(generator.exponential(1.0, shape).astype(np.float32), np.array([640, 0, 128][: shape[0]]))
        for name, shape in squares.items()
    }


def test_what_is_written_is_read():
    entry = sums()["blk.0.ffn_down_exps.weight"]
    mean = entry.mean().reshape(3, 32)
    assert np.array_equal(mean[0], entry.squares[0] / np.float32(640))
    assert (mean[1] == 1).all()  # an expert that saw nothing


def test_a_file_of_ours_is_one_of_llama_imatrix(tmp_path):
    path = tmp_path / "model.imatrix.gguf"
    write_imatrix(path, sums(), dataset="code.txt", chunk=128, chunks=5)
    header = read_gguf(path)
    assert header.metadata == {
        "general.type": "imatrix",
        "imatrix.datasets": ["code.txt"],
        "imatrix.chunk_count": 5,
        "imatrix.chunk_size": 128,
    }
    assert header.tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape == (3, 32)
    assert header.tensors["blk.0.ffn_down_exps.weight.counts"].shape == (3, 1)
    back = read_imatrix(path)
    assert back.keys() == sums().keys()
    for name, values in means(sums()).items():
        assert np.array_equal(back[name], values)


def legacy(entries, calls=4, trailer=b""):
    data = struct.pack("<i", len(entries))
    for name, values in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, np.float32).tobytes()
    return data + trailer


def test_the_older_format_is_read(tmp_path):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy({"blk.0.ffn_up.weight": [4.0, 8.0]}, trailer=struct.pack("<ii", 4, 5) + b"a.txt"))
    (values,) = read_imatrix(path).values()
    assert values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an importance matrix"),
        (b"hello, world: this is no matrix", "not an importance matrix"),
        (legacy({}), "holds no importance matrix"),
        (legacy({"w": [1.0, 2.0]})[:-1], "not an importance matrix"),
        (legacy({"w": [1.0, np.nan]}), "values of 'w' are negative or not finite"),
        (legacy({"w": [1.0, -2.0]}), "values of 'w' are negative or not finite"),
        (b"GGUF", "not a GGUF v2/v3 file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, data, message):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_imatrix(path)


def test_infinite_sums_and_missing_counts_are_refused(tmp_path):
    path = tmp_path / "imatrix.gguf"
    bad = {"w": Sums(np.array([[1.0, np.inf]], np.float32), np.array([1]))}
    write_imatrix(path, bad, dataset="x", chunk=1, chunks=1)
    with pytest.raises(CheckpointError, match="negative or not finite"):
        read_imatrix(path)
    path.write_bytes(path.read_bytes().replace(b"w.counts", b"v.counts"))
    with pytest.raises(CheckpointError, match="sums of 'w' have no counts"):
        read_imatrix(path)


def test_layout_of_the_tensor_structure():
    """Its size is told by ggml; its fields by a tensor that ggml itself makes."""
    dense, by_id = collect.operations()
    assert by_id == dense + 1
    library = ctypes.CDLL(str(collect.library_path("ggml-base")))

    class InitParams(ctypes.Structure):
        _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

    library.ggml_init.argtypes, library.ggml_init.restype = [InitParams], ctypes.c_void_p
    context = ctypes.c_void_p(library.ggml_init(InitParams(1 << 20, None, False)))
    library.ggml_new_tensor_2d.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    library.ggml_mul_mat.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    for function in (library.ggml_new_tensor_2d, library.ggml_mul_mat, library.ggml_set_name):
        function.restype = ctypes.c_void_p
    weight = library.ggml_new_tensor_2d(context, 0, 8, 3)
    x = library.ggml_new_tensor_2d(context, 0, 8, 5)
    library.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.ggml_set_name(weight, b"blk.7.ffn_up.weight")
    node = ctypes.cast(library.ggml_mul_mat(context, weight, x), ctypes.POINTER(collect.Tensor)).contents
    assert (node.op, list(node.ne), list(node.nb)[:2]) == (dense, [3, 5, 1, 1], [4, 12])
    assert node.src[0].contents.name == b"blk.7.ffn_up.weight"
    assert (node.src[0].contents.type, list(node.src[1].contents.ne)[:2]) == (0, [8, 5])
    library.ggml_free.argtypes = [ctypes.c_void_p]
    library.ggml_free(context)


def gguf_of(model, folder):
    """The F32 file of a transformers model, without a tokenizer, and the names of its tensors' sources."""
    ckpt = open_checkpoint(models.save(model, folder / "model"))
    shape = read_shape(ckpt.config)
    metadata, tensors, _ = layout(shape, ckpt)
    metadata |= {
        "general.architecture": string(shape.facts.gguf_arch),
        "tokenizer.ggml.model": string("none"),
    }
    choice = choose_types(metadata, tensors, TypeRequest(type="F32"))
    (written,) = write_files(ckpt, tensors, [(folder / "f32.gguf", metadata, choice)])
    return written.path, {t.name: t.sources for t in tensors}


def torch_sums(model, ids):
    """Sums of x² over the inputs of every Linear, by hooks: HF name -> (columns,)."""
    import torch

    found = {}

    def hook(name):
        def add(module, inputs):
            x = inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            found[name] = found.get(name, 0) + (x * x).sum(0).numpy()

        return add

    handles = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        for start in range(0, CHUNK * CHUNKS, CHUNK):
            model(torch.tensor([ids[start : start + CHUNK]]))
    for handle in handles:
        handle.remove()
    return found


def test_sums_are_pytorchs(tmp_path):
    model = models.build("llama")
    path, sources = gguf_of(model, tmp_path)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, CHUNK * CHUNKS + 7).tolist()
    found = compute_imatrix(path, ids, chunk=CHUNK)
    expected = torch_sums(model, ids)
    weights = {name: source for name, (source, *_) in sources.items() if source in expected and name.startswith("blk.")}
    assert found.keys() == weights.keys()
    for name, source in weights.items():
        assert found[name].counts.tolist() == [CHUNK * CHUNKS]
        # the KV cache is float16, as it is for a user
        np.testing.assert_allclose(found[name].squares[0], expected[source], rtol=5e-3)
    assert read_back_equal(tmp_path, found)


def read_back_equal(folder, found):
    path = folder / "imatrix.gguf"
    write_imatrix(path, found, dataset="ids", chunk=CHUNK, chunks=CHUNKS)
    back = read_imatrix(path)
    return all(np.array_equal(back[name], values) for name, values in means(found).items())


def test_experts_have_their_own_sums(tmp_path):
    """Every token goes to `num_experts_per_tok` experts; what the experts saw adds up to what their layer saw."""
    model = models.build("qwen3_moe")
    path, _ = gguf_of(model, tmp_path)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, CHUNK).tolist()
    found = compute_imatrix(path, ids, chunk=CHUNK)
    used = model.config.num_experts_per_tok
    for name in [name for name in found if "_exps" in name]:
        assert found[name].squares.shape[0] == model.config.num_experts
        assert found[name].counts.sum() == CHUNK * used
    up, router = found["blk.0.ffn_up_exps.weight"], found["blk.0.ffn_gate_inp.weight"]
    np.testing.assert_allclose(up.squares.sum(0), used * router.squares[0], rtol=1e-4)
    assert (up.squares[up.counts == 0] == 0).all()


def test_a_text_that_fills_no_chunk_is_refused(tmp_path):
    path, _ = gguf_of(models.build("llama"), tmp_path)
    with pytest.raises(CheckpointError, match="has 5 tokens, expected at least 64"):
        compute_imatrix(path, [1, 2, 3, 4, 5], chunk=CHUNK)


def mutations():
    """Places of a GGUF header, and what a hostile file puts there."""
    return [
        (0, b"GGML", "not a GGUF v2/v3 file"),
        (4, struct.pack("<I", 99), "not a GGUF v2/v3 file"),
        (8, struct.pack("<Q", 1 << 60), "damaged: 1152921504606846976 tensors"),
        (16, struct.pack("<Q", 1 << 60), "damaged: 1152921504606846976 metadata fields"),
        (24, struct.pack("<Q", 1 << 63), "bytes of a string"),
    ]


@pytest.mark.parametrize(("at", "data", "message"), mutations())
def test_hostile_headers_end_in_one_line(tmp_path, at, data, message):
    path = tmp_path / "x.gguf"
    write_imatrix(path, sums(), dataset="x", chunk=1, chunks=1)
    whole = bytearray(path.read_bytes())
    whole[at : at + len(data)] = data
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(path)


def test_every_cut_of_a_file_is_seen(tmp_path):
    path = tmp_path / "x.gguf"
    write_imatrix(path, sums(), dataset="x", chunk=1, chunks=1)
    whole = path.read_bytes()
    tensors = read_gguf(path).tensors.values()
    end = max(t.offset + t.nbytes for t in tensors)
    for size in [*range(0, 400, 7), end - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"not a GGUF|damaged|past the file"):
            read_gguf(path)
