"""Packed blocks are copied verbatim; experts take their own importance."""

import numpy as np
import pytest

from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import Sidecar, write_packed, write_sidecar
from efficli.errors import CheckpointError
from efficli.export.gguf import packed
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.types import TypeChoice
from efficli.export.gguf.writer import write_files
from efficli.ops import ggml
from tests.encoding import Model
from tests.gguf_reader import Reader


def packed_checkpoint(even, kind="Q4_K"):
    """Codes for other weights than those stored, so that encoding anew would show; on a plain and a permuted matrix."""
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    blocks = {}
    for name in names:
        weights = even.ckpt.read(name) * np.float32(1.5)
        data = np.empty(len(weights) * ggml.row_bytes(kind, weights.shape[1]), np.uint8)
        ggml.encode(kind, weights, data)
        blocks[name] = (kind, data.tobytes())
    return names, blocks


def test_packed_blocks_are_copied_verbatim(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, layers=1, dtype="BF16")
    (up, query), blocks = packed_checkpoint(model)
    write_sidecar(model.ckpt.root, Sidecar(packed=write_packed(model.ckpt.root, blocks)))
    model.ckpt = open_checkpoint(model.ckpt.root)
    four, eight = model.write(model.choose("Q4_K_S"), model.choose("Q8_0"))
    stored = Reader(four.path).tensors
    assert stored["blk.0.ffn_up.weight"].data == blocks[up][1]
    # row 2j of a head is its row j, row 2j + 1 its row j + half
    rows = np.frombuffer(blocks[query][1], np.uint8).reshape(4, 2, 32, -1)
    interleaved = np.stack([rows[:, 0], rows[:, 1]], axis=2)
    assert stored["blk.0.attn_q.weight"].data == interleaved.tobytes()
    weights = model.ckpt.read(up)
    plain = np.empty(256 * ggml.row_bytes("Q8_0", 256), np.uint8)
    ggml.encode("Q8_0", weights, plain)
    assert Reader(eight.path).tensors["blk.0.ffn_up.weight"].data == plain.tobytes()
    assert packed.notes(model.ckpt, model.tensors, model.choose("Q4_K_S")) == []
    assert packed.notes(model.ckpt, model.tensors, model.choose("Q8_0")) == [
        "blk.0.attn_q.weight: encoded anew as Q8_0, not copied from its Q4_K blocks",
        "blk.0.ffn_up.weight: encoded anew as Q8_0, not copied from its Q4_K blocks",
    ]


def test_packed_blocks_of_another_shape_are_refused(tmp_path):
    model = Model(tmp_path, hidden=256, ffn=256, layers=1, dtype="BF16")
    (up, _), blocks = packed_checkpoint(model)
    cut = {up: ("Q4_K", blocks[up][1][:-144])}
    write_sidecar(model.ckpt.root, Sidecar(packed=write_packed(model.ckpt.root, cut)))
    model.ckpt = open_checkpoint(model.ckpt.root)
    with pytest.raises(CheckpointError, match="bytes of packed blocks, expected 36864"):
        model.write(model.choose("Q4_K_S"))


def test_experts_take_their_own_importance(tmp_path):
    """A matrix of importances per expert, one after the other, as llama.cpp reads it."""

    class Stored:
        sidecar = None

        def __init__(self, weights):
            self.weights = weights
            self.tensors = {}

        def read_rows(self, name, start, stop):
            return self.weights[int(name)][start:stop]

        def check_unchanged(self):
            pass

    from efficli.checkpoint import TensorRef

    generator = np.random.default_rng(0)
    weights = generator.standard_normal((3, 8, 256)).astype(np.float32)
    importance = generator.exponential(1.0, (3, 256)).astype(np.float32)
    ckpt = Stored(weights)
    ckpt.tensors = {str(n): TensorRef(str(n), (8, 256), "F32", tmp_path, 0, 8 * 1024) for n in range(3)}
    tensor = OutTensor(name="e", shape=(3, 8, 256), sources=("0", "1", "2"), transform="stack")
    choice = TypeChoice(type="Q2_K", types={"e": "Q2_K"}, imatrix={"e": importance.reshape(-1)})
    write_files(ckpt, [tensor], [(tmp_path / "e.gguf", {}, choice)], hashes=False)
    expected = np.empty((3, 8 * 84), np.uint8)
    for n in range(3):
        ggml.encode("Q2_K", weights[n], expected[n], importance[n])
    assert Reader(tmp_path / "e.gguf").tensors["e"].data == expected.tobytes()
