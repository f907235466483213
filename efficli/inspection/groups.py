"""Which work a tensor does, told from its name: Hugging Face's, GGUF's and ONNX exporters' names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from efficli.inspection.report import Group

ORDER = ("embedding", "attention", "feed-forward", "experts", "router", "state space", "norms", "output", "other")
"""The groups, in the order of tables."""

# the first that matches wins: "attn_norm" is a norm, "ffn_gate_inp" a router
_RULES = tuple(
    (group, re.compile(pattern, re.IGNORECASE))
    for group, pattern in (
        ("norms", r"norm|(^|[./_])ln(_?\d+|_f|_attn|_mlp|[./])|layernorm"),
        ("state space", r"(^|[./_])(ssm|mamba|conv1d|shortconv|time_mix|time_decay|rwkv|linear_attn|deltanet)"),
        ("router", r"ffn_gate_inp|exp_probs|router|mlp[./]gate[./]|block_sparse_moe[./]gate[./]|e_score_correction"),
        ("experts", r"experts?[./_]|_exps|_shexp|_chexps"),
        ("output", r"^output\.|(^|[./])lm_head|(^|[./])embed_out|(^|[./])cls([./]|$)|score\.weight"),
        (
            "embedding",
            r"token_embd|position_embd|token_types|per_layer_(token_embd|model_proj)|embed_(tokens|in|positions)"
            r"|embeddings?[./_]|(^|[./])(wte|wpe)([./]|$)|tok_embeddings|embed_tokens_per_layer",
        ),
        ("attention", r"attn|attention|[./_](q|k|v|o|qkv)_proj"),
        ("feed-forward", r"ffn|mlp|feed_forward|(gate|up|down)(_up)?_proj|intermediate|(^|[./_])fc\d?([./_]|$)|dense"),
    )
)
# BERT: encoder.layer.N.output.dense is the feed-forward's second matrix
_NOT_OUTPUT = re.compile(r"layers?[./]\d+[./]output[./]")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a group counts it."""

    name: str
    type: str
    weights: int
    nbytes: int


def group_of(name: str) -> str:
    """The group of a tensor's name; "other" where nothing tells."""
    for group, rule in _RULES:
        if rule.search(name) and not (group == "output" and _NOT_OUTPUT.search(name)):
            return group
    return "other"


def group(tensors: Iterable[Stored]) -> tuple[Group, ...]:
    """The groups that there are, in the order of `ORDER`; the types of each with the most weights first."""
    found: dict[str, list[Stored]] = {}
    for tensor in tensors:
        found.setdefault(group_of(tensor.name), []).append(tensor)
    groups = []
    for name in ORDER:
        members = found.get(name, [])
        types: dict[str, int] = {}
        for tensor in members:
            types[tensor.type] = types.get(tensor.type, 0) + tensor.weights
        if members:
            groups.append(
                Group(
                    name=name,
                    count=len(members),
                    weights=sum(tensor.weights for tensor in members),
                    nbytes=sum(tensor.nbytes for tensor in members),
                    types=dict(sorted(types.items(), key=lambda item: (-item[1], item[0]))),
                )
            )
    return tuple(groups)
