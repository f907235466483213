"""Weights that llama.cpp copies into anonymous memory when it loads a file: repacked for the processor's instructions.

Source: `ggml_repack_get_optimal_repack_type` and `extra_buffer_type::supports_op` of ggml/src/ggml-cpu/repack.cpp,
`select_weight_buft` and `create_tensor` of src/llama-model-loader.cpp and LLM_TENSOR_INFOS of src/llama-arch.cpp, as
vendored by llama-cpp-python 0.3.36. It happens by default, whether files are mapped or not; `--no-repack` of its
tools and `use_extra_bufts` of its API turn it off.

A mapped file's pages of a repacked tensor are read once, while it is copied, and never again, so that the kernel can
drop them. What must stay is therefore: the copies, and the pages of the file that are not repacked. What is resident
while memory is plentiful: the whole file (evictable) and the copies (anonymous, not evictable), up to twice the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_ALIGNMENT = 32  # of a tensor in a CPU buffer, bytes
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_NOT_MULTIPLIED = re.compile(
    r"^(token_embd|token_types|position_embd|per_layer_token_embd|rope_\w+|masked_embd\w*)\."
    r"|\.(ssm_conv1d|shortconv\.conv|ssm_a|ssm_d|ffn_gate_tid2eid|nextn\.embed_tokens|attn_rel_b|attn_sinks)\b"
    r"|norm(_\d+)?\.weight$|\.bias$"
)
"""Tensors of two axes and more whose operation is another than a product with a matrix (LLM_TENSOR_INFOS)."""
_EXPERTS = re.compile(r"_(ch)?exps\.weight$")


@dataclass(frozen=True, slots=True)
class _Rule:
    """Repacked where the processor has all these instructions and the tensor's rows are a multiple of `rows`."""

    needs: frozenset[str]
    rows: int


_AVX2, _AVX512 = frozenset({"avx2"}), frozenset({"avx512f"})
_I8MM, _DOTPROD, _VXE = frozenset({"neon", "i8mm"}), frozenset({"neon", "dotprod"}), frozenset({"vxe"})
_ARM_BY_4 = (_Rule(_I8MM, 4), _Rule(_DOTPROD, 4))
_ARM_BY_8 = (_Rule(_I8MM, 8), _Rule(_DOTPROD, 8))
_RULES: Mapping[str, tuple[_Rule, ...]] = {
    "Q4_0": (_Rule(_AVX2, 8), *_ARM_BY_4, _Rule(_VXE, 4)),
    "Q4_K": (_Rule(_AVX2, 8), *_ARM_BY_8),
    "Q2_K": (_Rule(_AVX512, 8),),
    "Q5_K": _ARM_BY_8,
    "Q6_K": _ARM_BY_8,
    "IQ4_NL": (_Rule(_AVX2, 8), _Rule(_DOTPROD, 4)),
    "MXFP4": (_Rule(_AVX2, 8), _Rule(_DOTPROD, 4)),
    "Q8_0": _ARM_BY_4,
    "Q1_0": _ARM_BY_4,
}
"""By type. SVE of 256 bits only chooses another order of what i8mm repacks anyway. Left out: RISC-V, whose kernels want
vectors of 256 bits; AMX and KleidiAI, which have buffers of their own and no profile names."""


def repacked_bytes(
    tensors: Mapping[str, tuple[str, int, tuple[int, ...]]], isa: Iterable[str], *, reads_only: bool = False
) -> int:
    """Bytes that are copied into anonymous memory on a processor with the instructions `isa`.

    `tensors`: name -> (ggml type, bytes, shape in numpy order: rows before columns). `isa` as target profiles have it:
    neon, dotprod, i8mm; avx2, avx512f. Repacked are matrices that a graph multiplies with (two axes, or three for the
    experts of a mixture). The embedding is looked up in the file; where it is the output matrix too, it is repacked for
    that, beside the file's. `reads_only`: a model without an output matrix (BERT).
    """
    has = frozenset(isa)
    total = 0
    for name, (kind, nbytes, shape) in tensors.items():
        tied = name == _EMBEDDING and _OUTPUT not in tensors and not reads_only
        axes = 3 if _EXPERTS.search(name) else 2
        if len(_without_ones(shape)) != axes or (_NOT_MULTIPLIED.search(name) and not tied):
            continue
        if any(rule.needs <= has and shape[-2] % rule.rows == 0 for rule in _RULES.get(kind.upper(), ())):
            total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
    return total


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """As `ggml_n_dims` counts: outer axes of length one are none."""
    first = next((i for i, length in enumerate(shape) if length > 1), len(shape))
    return shape[first:]
