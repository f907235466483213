"""The schema of recipes as JSON Schema (draft 2020-12), made from the models: what editors complete and check with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficli import catalog
from efficli.errors import OutputError
from efficli.ops.ggml_types import ALIASES, FILE_TYPES, MIXED, TYPE_IDS
from efficli.ops.storage import replace_file
from efficli.recipe.checks import scenario_names
from efficli.recipe.model import Recipe
from efficli.target import target_names

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """Keys, types, ranges and names of methods and types.

    What depends on several keys, or on files, is found by `load` alone; what this refuses, `load` refuses too.
    """
    schema = Recipe.model_json_schema()
    parts: dict[str, Any] = schema["$defs"]
    methods = {name: _pass(name, parts) for name in catalog.method_names()}
    parts["Pass"] = {"description": parts["Pass"]["description"], "oneOf": list(methods.values())}
    targets, scenarios = target_names(), (*scenario_names(), "all")
    parts["Target"] = {"anyOf": [{"enum": list(targets)}, {"type": "string"}]}
    parts["Scenario"] = {"anyOf": [{"enum": list(scenarios)}, {"type": "string"}]}
    parts["FileType"] = {
        "anyOf": [
            {"enum": [*FILE_TYPES, MIXED]},
            {"type": "string", "pattern": _any_case((*FILE_TYPES, *ALIASES, MIXED))},
        ]
    }
    parts["TensorType"] = {"anyOf": [{"enum": list(TYPE_IDS)}, {"type": "string", "pattern": _any_case(TYPE_IDS)}]}
    parts["TypeOfSome"] = {"type": "string", "pattern": _any_case(TYPE_IDS, before=".+=")}
    _refer(schema["properties"], {"target": "Target"})
    _refer(parts["Bench"]["properties"], {"scenario": "Scenario"})
    _refer(
        parts["Export"]["properties"],
        {
            "type": "FileType",
            "tensor_type": "TypeOfSome",
            "output_tensor_type": "TensorType",
            "token_embedding_type": "TensorType",
        },
    )
    bench = schema["properties"]["bench"]  # absent or a mapping: `bench:` with nothing behind it may mean either
    choices = [{"$ref": "#/$defs/Bench"}, {"const": False}]
    schema["properties"]["bench"] = {"anyOf": choices, "description": bench["description"]}
    return {"$schema": DIALECT, "title": "efficli recipe", **{k: v for k, v in schema.items() if k != "title"}}


def _pass(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """A pass with one method: the method's own keys beside its name."""
    own = catalog.config_of(name).model_json_schema()
    parts |= own.pop("$defs", {})
    spellings = dict.fromkeys((name, name.replace("-", "_")))
    return {
        "title": name,
        "description": catalog.about(name),
        "type": "object",
        "properties": {"method": {"enum": list(spellings), "description": catalog.about(name)}, **own["properties"]},
        "required": ["method", *own.get("required", ())],
        "additionalProperties": False,
    }


def _refer(keys: Mapping[str, Any], part_of: Mapping[str, str]) -> None:
    """Put the part of a key where its schema says "string": alone, in a list, or beside null."""
    for key, part in part_of.items():
        for choice in keys[key].get("anyOf", [keys[key]]):
            inner = choice.get("items", choice)
            if inner.get("type") == "string":
                inner.clear()
                inner["$ref"] = f"#/$defs/{part}"


def _any_case(names: Iterable[str], before: str = "") -> str:
    """A pattern for these names, as `file_type` reads them."""
    each = ("".join(f"[{c}{c.lower()}]" if c.isalpha() else c for c in name) for name in names)
    return f"^{before}\\s*({'|'.join(each)})\\s*$"


def write_schema(path: Path, *, force: bool = False) -> None:
    """Write the schema; OutputError where something else is there already, unless `force`."""
    text = json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
    if path.is_dir():
        raise OutputError("is a folder, expected the name of a file", where=str(path))
    if not path.parent.is_dir():
        raise OutputError("no such directory", where=str(path.parent))
    if path.exists() and not force and not (path.is_file() and path.read_bytes() == text.encode()):
        raise OutputError("exists", where=str(path), hint="--force replaces it")
    replace_file(path, text)
