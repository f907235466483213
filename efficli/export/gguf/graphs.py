"""What llama.cpp's graphs compute: the facts that decide whether a model can be written, and what must be said of it.

Read from llama.cpp's src/models/*.cpp as vendored by llama-cpp-python 0.3.36. A graph ignores silently what it does not
know, so that everything a config.json can say is compared with this table before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from efficli.errors import UnsupportedError
from efficli.families import ModelShape, Rope

_SILU = frozenset({"silu", "swish"})
_TANH_GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """One architecture of llama.cpp."""

    interleaved: bool = False
    """Rotates neighbouring values, so that rows of q and k are permuted."""
    activations: frozenset[str] = _SILU
    qkv_bias: bool = True
    out_bias: bool = False
    mlp_bias: bool = False
    free_head_dim: bool = True
    """heads x head_dim may differ from the hidden size."""
    windows: bool = False
    rope_factors: Literal["none", "long", "all"] = "none"
    """Reads a factor for each rotated pair: of LongRoPE only, or of any scaling."""
    head: Literal["any", "tied", "written"] = "any"
    """The output matrix: may be the embedding; always is; must be in the file."""


GRAPHS: Mapping[str, Graph] = MappingProxyType(
    {
        "llama": Graph(interleaved=True, out_bias=True, mlp_bias=True, rope_factors="all"),
        "granite": Graph(interleaved=True, out_bias=True, mlp_bias=True, rope_factors="all"),
        "smollm3": Graph(interleaved=True),
        "qwen2": Graph(free_head_dim=False),
        "qwen3": Graph(),
        "qwen3moe": Graph(),
        "gemma2": Graph(activations=_TANH_GELU, windows=True, head="tied"),
        "gemma3": Graph(activations=_TANH_GELU, windows=True),
        "phi3": Graph(free_head_dim=False, rope_factors="long"),
        "olmo2": Graph(free_head_dim=False, head="written"),
        "bitnet": Graph(qkv_bias=False, free_head_dim=False, head="tied"),
        "gpt2": Graph(activations=_TANH_GELU | {"gelu"}, out_bias=True, mlp_bias=True, free_head_dim=False),
        "bert": Graph(activations=_TANH_GELU | {"gelu"}, out_bias=True, mlp_bias=True, free_head_dim=False),
    }
)
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers; these scale scores by hidden size / heads, not by head_dim
_NOPE_STEP = 4  # smollm3: every fourth layer without rotary embedding, whatever the file says


def check_graph(shape: ModelShape) -> list[str]:
    """Rows for the report: what llama.cpp does otherwise; UnsupportedError where it would compute another model."""
    arch = shape.facts.gguf_arch
    graph = GRAPHS[arch]
    if shape.activation not in graph.activations:
        raise _refused(
            f"activation '{shape.activation}': llama.cpp's {arch} graph computes {sorted(graph.activations)[0]}",
            "train or fine-tune the model with silu first" if arch == "bitnet" else None,
        )
    for wanted, known, what in (
        (shape.qkv_bias, graph.qkv_bias, "biases of q, k, v"),
        (shape.out_bias, graph.out_bias, "a bias of the attention's output"),
        (shape.mlp_bias, graph.mlp_bias, "biases of the feed-forward"),
    ):
        if wanted and not known:
            raise _refused(f"{what}: llama.cpp's {arch} graph has none")
    if not graph.free_head_dim and shape.head_dim * shape.num_heads != shape.hidden_size:
        raise _refused(
            f"head_dim {shape.head_dim}: llama.cpp's {arch} graph needs hidden_size / heads, "
            f"{shape.hidden_size} / {shape.num_heads}"
        )
    if graph.head == "tied" and not shape.tied:
        raise _refused(f"an output matrix of its own: llama.cpp's {arch} graph uses the embedding")
    _check_scale(shape, arch)
    if shape.num_experts and not shape.normalise_experts:
        raise _refused(f"norm_topk_prob is false: llama.cpp's {arch} graph normalises the experts' weights")
    if arch == "smollm3" and shape.rotary != tuple((i + 1) % _NOPE_STEP != 0 for i in range(shape.num_layers)):
        raise _refused("no_rope_layers: llama.cpp's smollm3 graph leaves out every fourth layer's")
    return [*_window_rows(shape, graph), *_rope_rows(shape, graph), *_gelu_rows(shape)]


def context_length(shape: ModelShape) -> int:
    """The context that llama.cpp computes right: the window's length where its graph has no window."""
    if shape.window_active and not GRAPHS[shape.facts.gguf_arch].windows and shape.sliding_window is not None:
        return shape.sliding_window
    return shape.max_positions


def needs_factors(rope: Rope, graph: Graph) -> bool:
    """Whether a scaling is written as one factor for each pair, as no metadata says it."""
    if rope.scaling == "llama3":
        return True
    return rope.scaling == "yarn" and not _plain_yarn(rope) and graph.rope_factors == "all"


def yarn_scale(rope: Rope) -> float:
    """What llama.cpp multiplies cosines and sines by under YaRN, before `rope.scaling.attn_factor`."""
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1.0 else 1.0


def _plain_yarn(rope: Rope) -> bool:
    """llama.cpp reads neither the ramp's ends nor its rounding from the file."""
    return rope.beta_fast == 32.0 and rope.beta_slow == 1.0 and rope.truncate


def _check_scale(shape: ModelShape, arch: str) -> None:
    """Gemma's graphs derive the scale of scores from the shape."""
    if arch not in _LARGEST_GEMMA:
        return
    largest = shape.num_layers == _LARGEST_GEMMA[arch]
    expected = shape.hidden_size // shape.num_heads if largest else shape.head_dim
    if not math.isclose(shape.attention_scale, 1.0 / math.sqrt(expected), rel_tol=1e-6):
        scalar = round(1.0 / shape.attention_scale**2, 3)
        raise _refused(f"query_pre_attn_scalar {scalar:g}: llama.cpp's {arch} graph computes {expected}")


def _window_rows(shape: ModelShape, graph: Graph) -> list[str]:
    """An active window that the graph does not have."""
    if not shape.window_active or graph.windows:
        return []
    return [
        f"sliding window: llama.cpp's {shape.facts.gguf_arch} graph has none, so context_length is capped at the "
        f"window, {shape.sliding_window} instead of {shape.max_positions}"
    ]


def _rope_rows(shape: ModelShape, graph: Graph) -> list[str]:
    """Scalings that the graph does not have, or has in another way."""
    rope, arch = shape.rope, shape.facts.gguf_arch
    if rope is None:
        return []
    if shape.local_rope is not None and shape.local_rope != rope and arch != "gemma3":
        raise _refused(f"another rotary embedding in layers with a window: llama.cpp's {arch} graph has one")
    if shape.local_rope is not None and shape.local_rope.scaling != "default" and arch == "gemma3":
        raise _refused(f"rope type '{shape.local_rope.scaling}' in layers with a window: llama.cpp has none there")
    if rope.dim != shape.head_dim and arch != "phi3":
        raise _refused(f"partial_rotary_factor: llama.cpp's {arch} graph rotates all of a head")
    if rope.scaling == "llama3" and graph.rope_factors != "all":
        raise _refused(f"rope type 'llama3': llama.cpp's {arch} graph reads no factors")
    if rope.scaling == "longrope" and graph.rope_factors == "none":
        raise _refused(f"rope type 'longrope': llama.cpp's {arch} graph reads no factors")
    if rope.scaling == "yarn" and not _plain_yarn(rope) and graph.rope_factors != "all":
        raise _refused(
            f"yarn with other beta_fast, beta_slow or truncate: llama.cpp's {arch} graph computes 32, 1, true"
        )
    if rope.scaling == "yarn" and arch == "gemma3" and not math.isclose(rope.attention_factor, yarn_scale(rope)):
        raise _refused("yarn with its own attention_factor: llama.cpp would apply it in layers with a window, too")
    if rope.scaling == "dynamic":
        return [
            f"rope type 'dynamic' changes nothing up to {shape.max_positions} positions and llama.cpp has none, "
            f"so the file ends there"
        ]
    if rope.scaling == "longrope" and rope.long_factors != rope.short_factors:
        return [
            f"longrope: llama.cpp takes the long factors where the context it was given exceeds "
            f"{rope.original_positions}, transformers where the text does"
        ]
    return []


def _gelu_rows(shape: ModelShape) -> list[str]:
    """The exact GELU, which the graphs approximate."""
    if shape.activation != "gelu":
        return []
    return ["activation 'gelu': llama.cpp computes its tanh approximation"]


def _refused(what: str, hint: str | None = None) -> UnsupportedError:
    return UnsupportedError(f"{what}, so the file would compute another model", where="gguf", hint=hint)
