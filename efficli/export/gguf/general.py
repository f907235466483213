"""`general.*`: what a model is called, where it comes from and under which licence; and the name of its file.

From the front matter of README.md, config.json and the name of the checkpoint, by the rules of gguf.Metadata, which
llama.cpp's converter uses (read here strictly and within bounds, given to its heuristics; it reads no file itself).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter, Keys

from efficli.checkpoint import Checkpoint
from efficli.errors import UsageError
from efficli.export.gguf.layout import Field, Metadata
from efficli.strict_yaml import parse

MAX_FRONT_MATTER = 1 << 16
"""Bytes of README.md that are looked at for its front matter."""

_NAMES = (
    "name", "author", "version", "organization", "description", "finetune", "basename", "size_label", "url", "doi",
    "uuid", "repo_url", "source_url", "source_doi", "source_uuid", "source_repo_url",
)  # fmt: skip
_TEXTS = (
    *_NAMES, *(f"model_{name}" for name in _NAMES), "model_creator", "model_type", "license", "license_name",
    "license_link", "pipeline_tag",
)  # fmt: skip
_LISTS = ("tags", "languages", "language", "base_model", "base_models", "datasets", "dataset", "license")
_SAMPLING = {
    "sequence": "sequence", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "temperature": "temp",
    "xtc_probability": "xtc_probability", "xtc_threshold": "xtc_threshold", "penalty_last_n": "penalty_last_n",
    "penalty_repeat": "penalty_repeat", "mirostat": "mirostat", "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
}  # fmt: skip
"""generation_config.json's names -> GGUF's `general.sampling.*`."""
_PHI3 = re.compile(r"phi-?3", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Card:
    """The front matter of README.md, as far as it is text and lists of text, and what was wrong with it."""

    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def model_card(ckpt: Checkpoint) -> Card:
    """Read the front matter of README.md; what is not plain YAML is left out with a note, and stops nothing."""
    path = ckpt.file("README.md")
    if path is None:
        return Card({})
    with path.open("rb") as file:
        text = file.read(MAX_FRONT_MATTER).decode("utf-8", errors="replace")
    lines = text.splitlines()
    if not lines or lines[0].rstrip() != "---":
        return Card({})
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), None)
    if end is None:
        return Card({}, ("README.md: its front matter has no end, and was left out",))
    try:
        values = parse("\n".join(lines[1:end]) + "\n", "README.md").values
    except UsageError as error:
        return Card({}, (f"README.md: front matter left out: {error.message}",))
    if not isinstance(values, dict):
        return Card({})
    return Card(_clean(values))


def _clean(values: Mapping[str, Any]) -> dict[str, Any]:
    """Texts and lists of texts (or of tables of texts, for base models and data sets) of the keys that GGUF has."""
    out: dict[str, Any] = {}
    for key in _TEXTS:
        if isinstance(value := values.get(key), str | int | float) and not isinstance(value, bool):
            out[key] = str(value)
    for key in _LISTS:
        value = values.get(key)
        if isinstance(value, str):
            out[key] = value
        elif isinstance(value, list):
            tables = [_texts(item) for item in value] if key not in ("tags", "license") else []
            out[key] = [item for item in value if isinstance(item, str)] + [table for table in tables if table]
    return out


def _texts(table: Any) -> dict[str, str]:
    return {k: v for k, v in table.items() if isinstance(v, str)} if isinstance(table, Mapping) else {}


def general_metadata(
    ckpt: Checkpoint,
    *,
    num_weights: int,
    expert_weights: int = 0,
    num_experts: int = 0,
    strips_like_phi3: bool = False,
    quantized_by: str | None = None,
) -> Metadata:
    """The `general.*` fields but `architecture`, `file_type` and `quantization_version`.

    `expert_weights`: weights of all experts together. `strips_like_phi3`: see `Vocab.strips_like_phi3`.
    """
    meta = gguf.Metadata(**_sampling(ckpt))
    hub_id = {"_name_or_path": ckpt.name} if "/" in ckpt.name else {}
    folder = Path(ckpt.name)
    meta = gguf.Metadata.apply_metadata_heuristic(
        meta, dict(model_card(ckpt).values), {**_name_or_path(ckpt), **hub_id}, folder, num_weights
    )
    meta.name = _safe_name(meta.name or folder.name or "model", strips_like_phi3)
    if meta.size_label is None and num_weights:
        each = expert_weights // num_experts if num_experts else 0
        meta.size_label = gguf.size_label(num_weights, num_weights - expert_weights, each, num_experts)
    meta.quantized_by = quantized_by
    writer = GGUFWriter(path=None, arch="unknown")  # a list of typed values: nothing is written
    writer.add_type(gguf.GGUFType.MODEL)
    meta.set_gguf_meta_model(writer)
    fields = {key: Field(v.value, v.type, v.sub_type) for key, v in writer.kv_data[0].items()}
    fields.pop(Keys.General.ARCHITECTURE, None)
    return {key: _typed(field) for key, field in fields.items()}


def _typed(field: Field) -> Field:
    """Arrays of text: gguf leaves their item type to its writer."""
    if field.type == gguf.GGUFValueType.ARRAY and field.item is None:
        return Field(list(field.value), field.type, gguf.GGUFValueType.STRING)
    return field


def _name_or_path(ckpt: Checkpoint) -> dict[str, str]:
    value = ckpt.config.get("_name_or_path")
    return {"_name_or_path": value} if isinstance(value, str) and value.strip("./") else {}


def _sampling(ckpt: Checkpoint) -> dict[str, Any]:
    """The sampling that generation_config.json recommends."""
    found = ckpt.json("generation_config.json") or {}
    found = {"penalty_repeat": found.get("repetition_penalty")} | found
    out: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value = found.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            out[f"sampling_{name}"] = int(value) if name in ("top_k", "penalty_last_n", "mirostat") else float(value)
        elif key == "sequence" and isinstance(value, str):
            out["sampling_sequence"] = value
    return out


def _safe_name(name: str, strips_like_phi3: bool) -> str:
    """A name that llama.cpp does not take for Phi-3's where it is not, and takes where it is.

    Where `general.name` contains "phi-3" or "phi3" it drops white space after special tokens, and dies if four of
    Phi-3's tokens are missing.
    """
    if not strips_like_phi3:
        return _PHI3.sub("Phi 3", name)
    if _PHI3.search(name):
        return name
    spaced = re.compile(r"phi 3", re.IGNORECASE)
    return spaced.sub("Phi-3", name) if spaced.search(name) else f"{name} (Phi-3)"


def file_name(metadata: Metadata, encoding: str) -> str:
    """The file's name by GGUF's naming convention: name-size-finetune-version-ENCODING.gguf."""

    def value(key: str) -> str | None:
        field = metadata.get(key)
        return None if field is None else _path_safe(str(field.value))

    stem = gguf.naming_convention(
        value(Keys.General.NAME),
        value(Keys.General.BASENAME),
        value(Keys.General.FINETUNE),
        value(Keys.General.VERSION),
        value(Keys.General.SIZE_LABEL),
        encoding,
    )
    return f"{stem}.gguf"


def _path_safe(text: str) -> str:
    """Letters, digits, `.`, `_`, `+` and `-` only; at most 80 characters, none of them a dot at the start."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:80] or "model"
