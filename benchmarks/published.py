"""What others published (published.yaml), and what a token reads of each row's model by efficli's own code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from efficli.checkpoint import open_without_weights
from efficli.export.gguf.layout import string
from efficli.export.gguf.model import layout
from efficli.export.gguf.types import TypeRequest, choose_types
from efficli.families import read_shape
from efficli.ops.ggml import row_bytes
from efficli.planning.subject import with_stand_ins
from efficli.target import Share, Work, active_bytes

FILE = Path(__file__).resolve().parent / "published.yaml"
Types = Mapping[str, Share]
"""Bytes and weights that a token reads, by type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published speed."""

    device: str
    """Rows of one device share its constant."""
    board: str
    """The board or phone."""
    target: str
    model: str
    type: str
    tokens_per_s: float
    """The middle, where the source has a range."""
    ends: tuple[float, float]
    """The source's range, or what a rounded figure may be."""
    runtime: str
    year: int
    source: str
    note: str = ""
    threads: int | None = None
    kind: str = ""
    """The type of most weights, as ggml calls it, or "mixture"."""
    profile: str = "llama.cpp"
    """The runtime in the target's profile."""
    active_gb: float | None = None
    weights_e9: float | None = None
    bits_per_weight: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    counts: bool = True
    """Whether it is of llama.cpp's family on a CPU."""

    @property
    def basis(self) -> str:
        """What its bytes come from."""
        given = {"active_gb": self.active_gb, "weights": self.weights, "bits": self.bits_per_weight}
        return next((name for name, value in given.items() if value), "config")

    @property
    def subject(self) -> str:
        """What llama.cpp must be asked for: a model as a type of file, "" where it need not be."""
        if self.basis == "config":
            return f"{self.model}/{self.type}"
        return f"{self.model}/F16" if self.basis == "bits" else ""


def read_rows() -> list[Row]:
    """All rows, those that count first."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    rows = [_row(row, counts=True) for row in data["rows"]]
    return rows + [_row(row, counts=False) for row in data["others"]]


def _row(given: dict[str, Any], *, counts: bool) -> Row:
    speed = given.pop("tokens_per_s")
    low, high = speed if isinstance(speed, list) else (speed, speed)
    if given.pop("rounded", False):
        low, high = low - 0.5, high + 0.5
    kind = given.pop("kind", given["type"])
    runtimes = ("T-MAC", "llama.cpp CUDA", "llama.cpp Metal")
    profile = given.pop("profile", given["runtime"] if given["runtime"] in runtimes else "llama.cpp")
    middle = (low + high) / 2
    return Row(tokens_per_s=middle, ends=(low, high), kind=kind, profile=profile, counts=counts, **given)


def configs() -> dict[str, dict[str, Any]]:
    """config.json of every model whose shape is written down, as far as sizes go."""
    models = yaml.safe_load(FILE.read_text(encoding="utf-8"))["models"]
    return {name: _config(model) for name, model in models.items()}


def _config(model: dict[str, Any]) -> dict[str, Any]:
    hidden, wide, layers = model["sizes"]
    heads, kv_heads, head_dim = model["heads"]
    return {
        "architectures": [model["kind"][0]],
        "model_type": model["kind"][1],
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": model["vocab"],
        "tie_word_embeddings": model["tied"],
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    } | model.get("more", {})


def active_types(config: Mapping[str, Any], file_type: str) -> Types:
    """What a token reads of the file that an export would write: llama.cpp's types, `target.active_bytes`.

    The vocabulary is not there: only its size bears on the tensors.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        ckpt = with_stand_ins(*open_without_weights(folder))
        shape = read_shape(ckpt.config)
        described, tensors, _ = layout(shape, ckpt)
    metadata = {"general.architecture": string(shape.facts.gguf_arch)} | described
    choice = choose_types(metadata, tensors, TypeRequest(type=file_type))
    stored = {t.name: (choice.types[t.name], t.nbytes, t.shape) for t in choice.stored(tensors)}
    return active_bytes(stored, {key: value.value for key, value in metadata.items()}).types


def types_of(row: Row, asked: Mapping[str, Types]) -> Types:
    """The row's bytes and weights; `asked`: those of every subject."""
    if row.basis == "config":
        return asked[row.subject]
    if row.basis == "weights":
        return {kind: Share(count * 1e9 * _bytes_per_weight(kind), count * 1e9) for kind, count in row.weights.items()}
    if row.basis == "bits":
        assert row.bits_per_weight is not None
        count = sum(share.weights for share in asked[row.subject].values())
        return {row.kind: Share(count * row.bits_per_weight / 8, count)}
    assert row.active_gb is not None
    count = row.weights_e9 or row.active_gb / _bytes_per_weight(row.kind)
    return {row.kind: Share(row.active_gb * 1e9, count * 1e9)}


def work(row: Row, types: Types) -> Work:
    """As the predictor takes it."""
    return Work(file_bytes=int(sum(share.nbytes for share in types.values())), types=types, threads=row.threads)


def _bytes_per_weight(kind: str) -> float:
    return row_bytes(kind, 256) / 256
