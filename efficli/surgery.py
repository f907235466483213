"""Find the matrices of a checkpoint, and leave out layers of it: by names, shapes and config.json, without weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError
from efficli.families import check_tensors, read_shape
from efficli.families.table import Family
from efficli.families.values import Values
from efficli.progress import Silent

BLOCK_LINEARS = frozenset({
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_out", "ffn_gate", "ffn_up", "ffn_gate_up", "ffn_down",
    "expert_gate", "expert_up", "expert_gate_up", "expert_down",
})  # fmt: skip
"""Roles of the matrices inside blocks: what a method works on where nothing else is asked for. A router is not one: it
is tiny, and decides which experts run."""

LAYER_INDICES = ("mlp_only_layers",)
"""Keys of config.json that list the numbers of layers."""
LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Keys of config.json that list something for each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A weight that multiplies: (out, in), or a stack of such matrices, one for each expert."""

    name: str
    role: str
    """As in `families.weights`; "embedding" and "output" among them."""
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    count: int = 1
    """How many are stacked in the tensor."""
    stacked: bool = False
    """The tensor has three axes: (count, out, in)."""
    transposed: bool = False
    """The tensor is stored (in, out)."""
    layer: int | None = None


def matrices(ckpt: Checkpoint) -> dict[str, Matrix]:
    """Every matrix of a checkpoint of a known family by its tensor's name, in the order of the network.

    Tensors that the family does not know are passed over. UnsupportedError: no known family. CheckpointError: tensors
    and config.json contradict each other.
    """
    shape = read_shape(ckpt.config)
    found = {}
    for name, spec in check_tensors(ckpt.tensors, shape, strict=False, progress=Silent()).items():
        if len(spec.shape) < 2:
            continue
        transposed = shape.facts.transposed and spec.layer is not None
        rows, columns = spec.shape[:-3:-1] if transposed else spec.shape[-2:]
        stacked = len(spec.shape) == 3
        found[name] = Matrix(
            name=name,
            role=spec.role,
            rows=rows,
            columns=columns,
            count=spec.shape[0] if stacked else 1,
            stacked=stacked,
            transposed=transposed,
            layer=spec.layer,
        )
    return found


def layer_number(family: Family) -> re.Pattern[str]:
    """A pattern that matches the names of tensors inside layers of a family; its group 1 is the number of the layer."""
    stem = next(weight.name.partition("{i}")[0] for weight in family.weights if "{i}" in weight.name)
    prefixes = "|".join(map(re.escape, family.prefixes))
    return re.compile(rf"(?:{prefixes}){re.escape(stem)}(\d+)\.")


def config_of_first_layers(config: Mapping[str, Any], family: Family, keep: int) -> dict[str, Any]:
    """config.json of the model that has the first `keep` layers only; a nested `text_config` is rewritten too.

    What is counted from the first layer on (max_window_layers, sliding_window_pattern, no_rope_layer_interval) holds.
    """
    new = copy.deepcopy(dict(config))
    text = new.get("text_config")
    parts = [new, text] if isinstance(text, dict) else [new]
    keys = family.keys.get("num_hidden_layers", ("num_hidden_layers",))
    before = Values({**new, **text} if isinstance(text, dict) else new, names=family.keys, defaults=family.defaults)
    layers = before.whole("num_hidden_layers")
    present = [(part, key) for part in parts for key in keys if key in part]
    for part, key in present or [(parts[-1], keys[0])]:
        part[key] = keep
    for part in parts:
        for key, value in part.items():
            if not isinstance(value, list):
                continue
            if key in LAYER_INDICES:
                part[key] = [i for i in value if i < keep]
            elif key in LAYER_LISTS or ("layer" in key and len(value) == layers):
                part[key] = value[:keep]
            if key in LAYER_LISTS and 0 < len(value) < layers:
                raise CheckpointError(f"{len(value)} {key} for {layers} layers", where="config.json")
    return new
