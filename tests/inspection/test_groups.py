"""Tensors by group: every role of every family, under both of its names."""

from __future__ import annotations

import pytest

from efficli.export.gguf.model import _TENSORS, _name
from efficli.families.table import FAMILIES
from efficli.families.weights import FUSED_EXPERTS
from efficli.inspection.groups import ORDER, Stored, group, group_of

_EXACT = {
    "embedding": "embedding", "positions": "embedding", "token_types": "embedding", "output": "output",
    "router": "router",
}  # fmt: skip


def expected(role: str) -> str:
    if role in _EXACT:
        return _EXACT[role]
    if role.endswith("norm"):
        return "norms"
    return {"attn": "attention", "ffn": "feed-forward", "expert": "experts"}[role.partition("_")[0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_names(family):
    facts = FAMILIES[family]
    for weight in (*facts.weights, *FUSED_EXPERTS):
        assert group_of(facts.prefixes[0] + weight.name.format(i=3, e=1)) == expected(weight.role)
    if facts.head:
        assert group_of(facts.head) == "output"


@pytest.mark.parametrize("role", _TENSORS)
def test_gguf_names(role):
    assert group_of(_name(role, 2)) == expected(role)


def test_groups_are_sums():
    rows = [Stored("a.mlp.x", "F16", 10, 20), Stored("b.mlp.y", "Q8_0", 30, 34), Stored("strange", "F32", 1, 4)]
    first, other = group(rows)
    assert (first.name, first.count, first.weights, first.nbytes, other.name) == ("feed-forward", 2, 40, 54, "other")
    assert list(first.types.items()) == [("Q8_0", 30), ("F16", 10)]
    assert first.bits_per_weight == 8 * 54 / 40
    assert {group_of(name) for name in ("", "x", "../..")} == {"other"}
    assert set(ORDER) >= {"embedding", "other"}
