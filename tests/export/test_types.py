"""File types by name, and llama.cpp's choice of a type per tensor."""

import numpy as np
import pytest

from efficli.errors import UnsupportedError, UsageError
from efficli.export.gguf.layout import OutTensor, f32, string, u32
from efficli.export.gguf.types import TypeRequest, _write_header, choose_each, choose_types
from efficli.ops import dry_run
from efficli.ops.ggml_types import FILE_TYPES, file_type

LAYERS = 8


def model(hidden: int = 256, ffn: int = 512, vocab: int = 300, tied: bool = True):
    """Metadata and tensors of a Llama; no weights exist."""
    heads = 4
    metadata = {
        "general.architecture": string("llama"),
        "llama.block_count": u32(LAYERS),
        "llama.context_length": u32(128),
        "llama.embedding_length": u32(hidden),
        "llama.feed_forward_length": u32(ffn),
        "llama.attention.head_count": u32(heads),
        "llama.attention.head_count_kv": u32(2),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": u32(hidden // heads),
    }
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)} | ({} if tied else {"output": (vocab, hidden)})
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{n}.{name}": (hidden, hidden) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{n}.{name}": (hidden // 2, hidden) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{n}.{name}": (ffn, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{n}.ffn_down": (hidden, ffn)}
    tensors = [
        OutTensor(name=f"{name}.weight", shape=shape, sources=(name,), keep_f32=len(shape) == 1)
        for name, shape in shapes.items()
    ]
    return metadata, tensors


def choose(kind: str, shape: dict | None = None, **request):
    return choose_types(*model(**(shape or {})), TypeRequest(type=kind, **request))


@pytest.mark.parametrize(
    ("word", "name"),
    [("Q4_K_M", "Q4_K_M"), ("q4_k", "Q4_K_M"), (" iq2_xs ", "IQ2_XS"), ("Q3_K", "Q3_K_M"), ("f16", "F16")],
)
def test_names_in_any_case_and_aliases(word, name):
    assert file_type(word) == name


def test_a_misspelt_type_suggests_near_ones():
    with pytest.raises(UsageError, match="unknown type 'Q4KM'") as raised:
        file_type("Q4KM")
    assert "'Q4_K_M'" in raised.value.hint
    assert raised.value.exit_code == 2


def test_numbers_are_those_of_the_binding():
    import llama_cpp

    for name, number in FILE_TYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(llama_cpp, constant) == number


def test_layout_of_the_parameters_is_the_bindings():
    import ctypes

    import llama_cpp

    theirs = llama_cpp.llama_model_quantize_params
    assert ctypes.sizeof(dry_run.QuantizeParams) == ctypes.sizeof(theirs)
    for field, *_ in dry_run.QuantizeParams._fields_:
        assert getattr(dry_run.QuantizeParams, field).offset == getattr(theirs, field).offset, field
    assert llama_cpp.llama_model_quantize_default_params().output_tensor_type == dry_run.TYPE_COUNT


def test_the_mixture_of_q4_k_m():
    """What llama.cpp's rule says: tied embeddings Q6_K; v and down Q6_K in the first, last and every third layer."""
    choice = choose("q4_k_m")
    assert choice.file_type == 15
    more = {n for n in range(LAYERS) if n < LAYERS // 8 or n >= 7 * LAYERS // 8 or (n - LAYERS // 8) % 3 == 2}
    for n in range(LAYERS):
        for name in ("attn_v", "ffn_down"):
            assert choice.types[f"blk.{n}.{name}.weight"] == ("Q6_K" if n in more else "Q4_K")
        assert choice.types[f"blk.{n}.attn_q.weight"] == "Q4_K"
        assert choice.types[f"blk.{n}.attn_norm.weight"] == "F32"
    assert choice.types["token_embd.weight"] == "Q6_K"
    assert not choice.fallbacks


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types_leave_vectors_f32(kind):
    choice = choose(kind)
    assert {t for name, t in choice.types.items() if "norm" not in name} == {kind}
    assert {t for name, t in choice.types.items() if "norm" in name} == {"F32"}


def test_pure_makes_every_matrix_the_same():
    kinds = {t for name, t in choose("Q4_K_M", pure=True).types.items() if "norm" not in name}
    assert kinds == {"Q4_K"}


def test_ends_can_be_chosen():
    shape = {"tied": False}
    choice = choose("Q4_0", shape, output_tensor_type="f16", token_embedding_type="q8_0")
    assert choice.types["output.weight"] == "F16"
    assert choice.types["token_embd.weight"] == "Q8_0"
    assert choose("Q4_0", shape).types["output.weight"] == "Q6_K"


def test_the_first_override_that_matches_wins():
    overrides = ((r"blk\.1\.ffn", "iq4_xs"), (r"ffn_down", "Q8_0"), (r"attn_q", "MXFP4"))
    choice = choose("Q4_K_M", overrides=overrides)
    for n in range(LAYERS):
        assert choice.types[f"blk.{n}.ffn_down.weight"] == ("IQ4_XS" if n == 1 else "Q8_0")
        assert choice.types[f"blk.{n}.attn_q.weight"] == "MXFP4"
    assert choice.types["blk.2.ffn_up.weight"] == "Q4_K"


def test_overrides_hold_for_plain_types_too():
    """llama.cpp ignores them there without a word."""
    choice = choose("F16", overrides=(("ffn_down", "Q8_0"),))
    assert choice.types["blk.0.ffn_down.weight"] == "Q8_0"
    assert choice.types["blk.0.ffn_up.weight"] == choice.types["token_embd.weight"] == "F16"
    assert choice.types["output_norm.weight"] == "F32"
    assert choice.file_type == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((("ffn_dwn", "Q8_0"),), "'ffn_dwn' matches no weight of this model"),
        ((("attn_norm", "Q8_0"),), "'attn_norm' matches no weight"),
        ((("ffn_(", "Q8_0"),), "not a regular expression"),
        ((("ffn_down", "Q4_K_M"),), "'Q4_K_M' of a tensor: a mixture for whole files"),
        ((("ffn_down", "Q9"),), "'Q9' of a tensor: unknown"),
    ],
)
def test_overrides_that_would_be_dropped_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        choose("Q4_K_M", overrides=overrides)


def test_rows_that_do_not_fill_blocks_fall_back_and_are_reported():
    """SmolLM's width: 576 is a multiple of 64, not of 256. llama.cpp keeps the output's fallback to itself."""
    choice = choose("Q4_K_M", {"hidden": 576, "ffn": 1536})
    told = {f.tensor: (f.wanted, f.got, f.columns) for f in choice.fallbacks}
    assert told["token_embd.weight"] == ("Q6_K", "Q8_0", 576)
    assert told["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0", 576)
    assert told["blk.7.attn_v.weight"] == ("Q6_K", "Q8_0", 576)
    assert "blk.0.ffn_down.weight" not in told
    assert all(choice.types[name] == got for name, (_, got, _) in told.items())
    assert str(choice.fallbacks[0]).startswith(
        "token_embd.weight is Q8_0: rows of 576 do not fill the blocks of 256 of Q6_K"
    )
    assert not choose("Q2_0", {"hidden": 576, "ffn": 1536}, token_embedding_type="Q8_0").fallbacks


def test_an_explicit_type_that_cannot_hold_the_rows_is_refused():
    """Here llama.cpp would abort, or write what cannot be loaded."""
    with pytest.raises(UsageError, match=r"token_embd\.weight: rows of 576, Q6_K needs a multiple of 256"):
        choose("Q4_0", {"hidden": 576}, token_embedding_type="Q6_K")


def test_very_low_bits_need_an_importance_matrix():
    with pytest.raises(UsageError, match=r"IQ2_XS needs an importance matrix: blk\.0.* becomes") as raised:
        choose("IQ2_XS")
    assert "--imatrix" in raised.value.hint
    _, tensors = model()
    matrix = {t.name: np.ones(t.shape[-1], np.float32) for t in tensors}
    assert choose("IQ2_XS", imatrix=matrix).types["blk.0.ffn_up.weight"] == "IQ2_XS"
    del matrix["blk.2.ffn_up.weight"]
    with pytest.raises(UsageError, match=r"nothing for blk\.2\.ffn_up\.weight"):
        choose("IQ2_XS", imatrix=matrix)
    with pytest.raises(UsageError, match="Q2_K_S needs an importance matrix"):
        choose("Q2_K_S")
    assert choose("Q2_K").types["blk.0.ffn_up.weight"] == "Q2_K"


def test_the_importance_matrix_of_another_model_is_refused():
    with pytest.raises(UsageError, match=r"255 columns for blk\.0\.attn_q\.weight, which has 256") as raised:
        choose("Q4_K_M", imatrix={"blk.0.attn_q.weight": np.ones(255, np.float32)})
    assert "another model" in raised.value.hint


def test_a_present_importance_matrix_changes_the_mixture():
    """As in llama.cpp: with a matrix, Q4_0 guards the first eighth of the ffn_down layers with Q4_1."""
    matrix = {"blk.0.attn_q.weight": np.ones(256, np.float32)}
    for kind, without, given in (("Q4_0", "Q4_0", "Q4_1"), ("IQ4_XS", "Q5_K", "IQ4_XS")):
        assert choose(kind).types["blk.0.ffn_down.weight"] == without
        types = choose(kind, imatrix=matrix).types
        assert (types["blk.0.ffn_down.weight"], types["blk.1.ffn_down.weight"]) == (given, kind)


def test_what_llama_cpp_refuses_is_one_line():
    metadata, tensors = model()
    del metadata["llama.block_count"]
    with pytest.raises(UnsupportedError, match=r"llama\.cpp cannot choose types: .*block_count"):
        choose_types(metadata, tensors, TypeRequest(type="Q4_K_M"))


def test_size_is_known_before_anything_is_read():
    metadata, tensors = model()
    choice = choose_types(metadata, tensors, TypeRequest(type="Q8_0"))
    weights = sum(t.num_elements for t in tensors if not t.keep_f32)
    vectors = sum(t.num_elements for t in tensors if t.keep_f32)
    assert choice.nbytes(tensors) == weights // 32 * 34 + vectors * 4


def test_a_header_that_llama_cpp_dies_of_is_refused_and_the_others_answered(tmp_path):
    metadata, tensors = model()
    header, deadly = tmp_path / "header.gguf", tmp_path / "deadly.gguf"
    _write_header(header, metadata, tensors)
    _write_header(deadly, metadata | {"llama.expert_count": u32(5000)}, tensors)
    files = (header, deadly, header)
    first, died, last = dry_run.ask([dry_run.Question(header=str(f), ftype=FILE_TYPES["Q8_0"]) for f in files])
    assert first == last
    assert first.types["blk.0.ffn_up.weight"] == "Q8_0"
    assert not died.types
    assert "llama.cpp crashed (signal 6) while choosing types" in died.refused


def test_several_files_cost_one_child_and_a_refusal_stands_in_its_place():
    metadata, tensors = model()
    kinds = ("Q4_K_M", "IQ2_XS", "F16")
    found = choose_each(metadata, tensors, [TypeRequest(type=kind) for kind in kinds])
    assert [found[0], found[2]] == [choose("Q4_K_M"), choose("F16")]
    assert isinstance(found[1], UsageError)
    assert "IQ2_XS needs an importance matrix" in found[1].message
