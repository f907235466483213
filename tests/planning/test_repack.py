"""What is repacked is what llama.cpp allocates for it on this machine; other machines by the rules of its source."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from efficli.ops.libraries import library_path
from efficli.planning.repack import repacked_bytes
from tests.gguf_reader import Reader
from tests.planning.graphs import write_hybrid, write_mla
from tests.planning.sparse import allocated, exported, opened
from tests.planning.test_cache import config

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 104}
CONFIGS = {
    "tied": config("LlamaForCausalLM", "llama", **WIDE),
    "untied": config("LlamaForCausalLM", "llama", **WIDE | {"tie_word_embeddings": False}),
    "odd rows": config("LlamaForCausalLM", "llama", **WIDE | {"vocab_size": 100}),
    "fused": config("Phi3ForCausalLM", "phi3", **WIDE, original_max_position_embeddings=32768),
    "experts": config(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        **WIDE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        norm_topk_prob=True,
    ),
    "encoder": config("BertModel", "bert", **WIDE | {"hidden_act": "gelu", "max_position_embeddings": 512}),
}
Table = dict[str, tuple[str, int, tuple[int, ...]]]


def table(path: Path) -> Table:
    """The tensors of a file as `repacked_bytes` takes them."""
    return {name: (one.type, len(one.data), one.shape) for name, one in Reader(path).tensors.items()}


def build() -> set[str]:
    """The instructions that the installed ggml was built for, as profiles name them."""
    library = ctypes.CDLL(str(library_path("ggml-cpu")))
    names = {"avx2": "avx2", "avx512": "avx512f", "neon": "neon", "dotprod": "dotprod", "matmul_int8": "i8mm"}
    return {ours for theirs, ours in names.items() if library[f"ggml_cpu_has_{theirs}"]()}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q2_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "Q5_0", "F16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_repacked_is_what_llama_cpp_allocates(name: str, kind: str, tmp_path: Path) -> None:
    exported(tmp_path / "x.gguf", CONFIGS[name], kind=kind)
    with opened(tmp_path / "x.gguf") as model:
        found = allocated(model, 256).repacked
    assert repacked_bytes(table(tmp_path / "x.gguf"), build(), reads_only=name == "encoder") == found


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_repacked_of_other_graphs(kind: str, tmp_path: Path) -> None:
    write_mla(tmp_path / "mla.gguf", width=64, rank=32, rope=32, nope=32, value=32, ffn=96, expert=64, weights=kind)
    write_hybrid(tmp_path / "hybrid.gguf", weights=kind)
    for path in (tmp_path / "mla.gguf", tmp_path / "hybrid.gguf"):
        with opened(path) as model:
            assert repacked_bytes(table(path), build()) == allocated(model, 256).repacked


def test_nothing_is_repacked_where_it_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "x.gguf", CONFIGS["tied"], kind="Q4_0")
    with opened(tmp_path / "x.gguf", use_extra_bufts=False) as model:
        assert allocated(model, 256).repacked == 0


ALL = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0", "F16")


@pytest.mark.parametrize(
    ("isa", "by_4", "by_8"),
    [
        (["neon", "crc"], "", ""),  # Cortex-A53, A72
        (["neon", "fp16", "dotprod"], "Q4_0 Q8_0 IQ4_NL", "Q4_0 Q8_0 IQ4_NL Q4_K Q5_K Q6_K"),  # A76
        (["neon", "fp16", "dotprod", "i8mm"], "Q4_0 Q8_0 IQ4_NL", "Q4_0 Q8_0 IQ4_NL Q4_K Q5_K Q6_K"),
        (["sse4.2", "avx"], "", ""),
        (["avx", "avx2", "fma"], "", "Q4_0 Q4_K IQ4_NL"),
        (["avx2", "avx512f"], "", "Q4_0 Q4_K IQ4_NL Q2_K"),
    ],
)
def test_rules_of_other_processors(isa: list[str], by_4: str, by_8: str) -> None:
    """Of matrices whose rows are a multiple of 4 only, and of 8."""
    for rows, expected in ((12, by_4), (16, by_8), (10, "")):
        found = {kind for kind in ALL if repacked_bytes({"blk.0.attn_q.weight": (kind, 1000, (rows, 256))}, isa)}
        assert found == set(expected.split()), rows
    assert repacked_bytes({"blk.0.attn_q.weight": ("Q4_0", 1000, (16, 256))}, ["avx2"]) == 1024  # aligned to 32
