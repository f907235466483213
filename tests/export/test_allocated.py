"""Types that a pass allocated: what is refused, what the file says of itself, what llama.cpp reads in the text."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import Sidecar, write_packed, write_sidecar
from efficli.checkpoint.tensor_types import tensor_types_text
from efficli.errors import CheckpointError, UsageError
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.export.gguf.writer import write_files
from efficli.families import read_shape
from efficli.ops import ggml
from efficli.ops.ggml_types import FILE_TYPES, TYPE_IDS, main_type, mostly
from tests import models
from tests.gguf_reader import Reader

CYCLE = ("Q4_K", "Q6_K", "Q8_0", "Q3_K", "IQ4_NL", "F16", "Q5_0", "BF16")


def allocated(tensors):
    """Another type for each weight than for the one before it."""
    names = [t.name for t in tensors if not t.keep_f32]
    return {name: CYCLE[n % len(CYCLE)] for n, name in enumerate(names)}


def test_every_tensor_has_the_type_that_was_given(even, tmp_path):
    types = allocated(even.tensors)
    choice = even.choose("mixed", given={name: kind.lower() for name, kind in types.items()})
    assert (choice.type, choice.fallbacks) == ("MIXED", ())
    (file,) = even.write(choice, name="given")
    stored = Reader(file.path).tensors
    assert {name: tensor.type for name, tensor in stored.items() if name in types} == types
    assert {tensor.type for name, tensor in stored.items() if name not in types} == {"F32"}
    for tensor in (t for t in even.tensors if t.name.endswith("ffn_down.weight")):
        weights = even.ckpt.read(tensor.sources[0])
        plain = np.empty(len(weights) * ggml.row_bytes(types[tensor.name], weights.shape[1]), np.uint8)
        ggml.encode(types[tensor.name], weights, plain)
        assert stored[tensor.name].data == plain.tobytes()


def test_llama_cpp_chooses_the_same_from_the_text(even):
    """Its own dry run, with each line as it parses --tensor-type-file: split at white space and at the first `=`."""
    types = allocated(even.tensors)
    lines = [line.partition("=") for line in tensor_types_text(types).split()]
    assert len(lines) == len(types) and all(equals for _, equals, _ in lines)
    choice = even.choose("Q4_0", overrides=tuple((pattern, kind) for pattern, _, kind in lines))
    assert {name: choice.types[name] for name in types} == types


def test_the_text_is_in_the_order_of_the_blocks_and_its_names_match_alone():
    types = {"blk.10.ffn_up.weight": "Q4_K", "blk.2.ffn_up.weight": "IQ2_XXS", "a+b(c)[d]{e}|f?*^$\\": "F16"}
    assert tensor_types_text(types).splitlines() == [
        r"^a\+b\(c\)\[d\]\{e\}\|f\?\*\^\$\\$=f16",
        r"^blk\.2\.ffn_up\.weight$=iq2_xxs",
        r"^blk\.10\.ffn_up\.weight$=q4_k",
    ]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ2_S", "IQ3_S", "Q2_K", "F16"])
def test_the_file_type_is_that_of_most_weights(even, kind):
    types = {t.name: kind for t in even.tensors if not t.keep_f32}
    types["blk.0.attn_k.weight"] = "Q5_1"
    matrix = even.imatrix()
    choice = even.choose("MIXED", given=types, imatrix=matrix)
    named = next(name for name, number in FILE_TYPES.items() if number == choice.file_type)
    assert main_type(named) == kind


def test_file_types_of_single_types():
    for kind in TYPE_IDS:
        name = mostly({kind: 10, "Q5_1": 1})
        assert main_type(name) == (kind if kind != "NVFP4" else "Q5_1")
    assert mostly({"Q4_K": 3, "Q6_K": 2, "F32": 1}) == "Q4_K_M"
    assert mostly({"Q2_K": 1}) == "Q2_K" and mostly({"IQ3_S": 1}) == "IQ3_S" and mostly({"MXFP4": 1}) == "MXFP4_MOE"


def test_an_allocation_for_another_model_is_refused(even, odd):
    types = allocated(even.tensors)
    wrong = {
        "expected one of F32": {"blk.0.ffn_up.weight": "Q4_K_M"},
        "the allocation names 'blk.7.ffn_up.weight', which the file does not have": {"blk.7.ffn_up.weight": "Q8_0"},
        "blk.0.attn_norm.weight: its allocated type is Q8_0, and it stays F32": {"blk.0.attn_norm.weight": "Q8_0"},
    }
    for message, change in wrong.items():
        with pytest.raises(CheckpointError) as raised:
            even.choose("MIXED", given=types | change)
        assert message in raised.value.line
    del types["blk.1.attn_v.weight"]
    with pytest.raises(CheckpointError, match="has no type in the allocation") as raised:
        even.choose("MIXED", given=types)
    assert raised.value.where == "blk.1.attn_v.weight"
    with pytest.raises(CheckpointError, match="rows of 200 do not fill the blocks of 32 of its allocated type Q8_0"):
        odd.choose("MIXED", given={t.name: "Q8_0" for t in odd.tensors if not t.keep_f32})


def test_wishes_that_an_allocation_cannot_keep(even):
    types = allocated(even.tensors)
    with pytest.raises(UsageError, match="without an allocation") as raised:
        even.choose("mixed")
    assert "efficli quantize --max-bytes" in raised.value.hint
    for wish in ({"pure": True}, {"output_tensor_type": "Q8_0"}, {"overrides": (("attn", "Q8_0"),)}):
        with pytest.raises(UsageError, match="says the type of every tensor"):
            even.choose("MIXED", given=types, **wish)
    low = types | {"blk.0.ffn_up.weight": "IQ2_XXS"}
    with pytest.raises(UsageError, match=r"MIXED needs an importance matrix: blk\.0\.ffn_up\.weight becomes IQ2_XXS"):
        even.choose("MIXED", given=low)
    without = {name: values for name, values in even.imatrix().items() if name != "token_embd.weight"}
    with pytest.raises(UsageError, match=r"has nothing for token_embd\.weight, which becomes IQ1_S"):
        even.choose("MIXED", given=types | {"token_embd.weight": "IQ1_S"}, imatrix=without)
    assert even.choose("MIXED", given=low, imatrix=even.imatrix()).types["blk.0.ffn_up.weight"] == "IQ2_XXS"


def fuse_experts(root):
    """Matrices of all experts in one tensor: gate above up, and down."""
    arrays = load_file(root / "model.safetensors")
    parts = {}
    for name in [name for name in arrays if ".experts." in name]:
        base, number, word, _ = name.rsplit(".", 3)
        parts.setdefault(base, {})[int(number), word] = arrays.pop(name)
    for base, found in parts.items():
        gate, up, down = (
            np.stack([found[n, f"{word}_proj"] for n in range(len(found) // 3)]) for word in ("gate", "up", "down")
        )
        arrays |= {f"{base}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{base}.down_proj": down}
    save_file(arrays, root / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_blocks_are_rows_of_the_logical_matrix_however_it_is_stored(family, tmp_path):
    """Blocks of other values than those stored, so that encoding anew would show; of all matrices that are moved."""
    wider = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    root = models.save(models.build(family, **wider), tmp_path / "model")
    if family == "qwen3_moe":
        fuse_experts(root)
    ckpt = open_checkpoint(root)
    metadata, tensors, _ = layout(read_shape(ckpt.config), ckpt)
    metadata = {"general.architecture": string("none"), "tokenizer.ggml.model": string("none")} | metadata
    moved = [t for t in tensors if t.transform in ("transpose", "slice") or len(t.shape) == 3]
    assert {t.transform for t in moved} == ({"transpose"} if family == "gpt2" else {"slice", "copy"})
    blocks, expected = {}, {}
    for tensor in moved:
        (name,) = tensor.sources
        weights = ckpt.read(name) * np.float32(1.5)
        weights = np.ascontiguousarray(weights.T if tensor.transform == "transpose" else weights)
        rows = weights.reshape(-1, weights.shape[-1])
        data = np.empty((*weights.shape[:-1], ggml.row_bytes("Q8_0", rows.shape[1])), np.uint8)
        ggml.encode("Q8_0", rows, data.reshape(-1))
        blocks[name] = ("Q8_0", data.tobytes())
        part = data[:, slice(*tensor.span)] if tensor.transform == "slice" else data
        expected[tensor.name] = part.tobytes()
    write_sidecar(root, Sidecar(packed=write_packed(root, blocks)))
    given = {t.name: "Q8_0" for t in tensors if not t.keep_f32}
    choice = choose_types(metadata, tensors, TypeRequest(type="MIXED", given=given))
    (written,) = write_files(open_checkpoint(root), tensors, [(tmp_path / "out.gguf", metadata, choice)])
    stored = Reader(written.path).tensors
    assert {name: stored[name].data for name in expected} == expected
