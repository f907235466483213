"""The JSON schema of recipes says what loading says: never no where loading says yes, and no where it can."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from efficli import catalog
from efficli.cli import main
from efficli.errors import UsageError
from efficli.recipe import Recipe, load_with, parse_recipe
from efficli.recipe.json_schema import recipe_schema
from efficli.strict_schema import examine
from efficli.strict_yaml import Document, parse
from tests.test_imports import loaded_after

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
WHOLE = """
version: 1
model: reference
revision: null
target: [unibap-ix5, cp8180]
ctx_size: 512
seed: 3
trust_remote_code: true
strict: false
calibration: {text: null, ctx_size: 64, max_tokens: 1024}
passes:
  - {method: skip_layers.last, remove: 1}
  - {method: lowrank.svd, keep: 0.5, include: [q_proj], exclude: mlp}
exports:
  - {format: gguf, type: [q4_k, Q8_0], imatrix: auto, tensor_type: ["attn_v=q6_k"], output_tensor_type: Q6_K, pure: no}
  - {type: IQ4_NL, token_embedding_type: q8_0, tensor_type: a=F16, pre_tokenizer: gpt-2, allow_non_ternary: true}
certificate: {enabled: true, base: reference, text: null, ctx_size: 32}
bench: {n_prompt: 8, n_gen: [8, 16], depth: 0, threads: [1, 2], repetitions: 5, max_repetitions: 9, patience: 1,
        scenario: [chat, all], starts: false}
gates: {max_kld: 1, min_top1: 0.5, max_bytes: 1.5 GiB, min_decode: 1}
""".replace("pure: no", "pure: false")
ODD: tuple[Any, ...] = (None, True, -1, 2.5, "x", "Q8_0", [], [3], {}, [{}])


def says_yes(values: Any) -> bool:
    return VALIDATOR.is_valid(values)


def loads(values: Any, path: Path) -> bool:
    """Whether loading takes these values from a file; JSON is YAML."""
    if examine(Recipe, Document("", values, {}))[0] is None:  # the file is only looked at where its schema is met
        return False
    path.write_text(json.dumps(values))
    try:
        load_with(path)
    except UsageError:
        return False
    return True


def test_it_is_a_schema_and_names_every_key_with_a_sentence():
    Draft202012Validator.check_schema(SCHEMA)
    for part in (SCHEMA, *SCHEMA["$defs"].values(), *SCHEMA["$defs"]["Pass"]["oneOf"]):
        for key, about in part.get("properties", {}).items():
            assert about.get("description"), key
    methods = {one["title"]: one for one in SCHEMA["$defs"]["Pass"]["oneOf"]}
    assert set(methods) == set(catalog.method_names())
    for name, one in methods.items():
        assert set(one["properties"]) == {"method", *catalog.config_of(name).model_fields}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_are_right_by_both(path):
    assert list(VALIDATOR.iter_errors(parse(path.read_text(), path.name).values)) == []
    load_with(path)


def test_a_recipe_with_every_key_is_right_by_both(tmp_path):
    values = parse(WHOLE, "whole").values
    assert set(values) == set(SCHEMA["properties"])
    for name in ("Calibration", "Certificate", "Bench", "Gates"):
        assert set(values[name.lower()]) == set(SCHEMA["$defs"][name]["properties"])
    assert set().union(*values["exports"]) == set(SCHEMA["$defs"]["Export"]["properties"])
    assert list(VALIDATOR.iter_errors(values)) == []
    assert loads(values, tmp_path / "r.yaml")
    assert says_yes(parse_recipe(WHOLE).to_json())  # the same recipe, resolved
    assert says_yes(parse(parse_recipe(WHOLE).to_yaml(), "again").values)


def places(values: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of everything inside."""
    for key, inside in values.items() if isinstance(values, dict) else enumerate(values):
        yield (*at, key)
        if isinstance(inside, dict | list):
            yield from places(inside, (*at, key))


def changed(values: Any, path: tuple[str | int, ...], new: Any) -> Any:
    out = copy.deepcopy(values)
    inside = out
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = new
    return out


@pytest.mark.slow
def test_what_the_schema_refuses_loading_refuses_too(tmp_path):
    """Every value of a recipe with all keys, replaced by values of every kind."""
    values = parse(WHOLE, "whole").values
    tried = [changed(values, path, odd) for path in places(values) for odd in ODD]
    assert len(tried) > 600
    both = [(says_yes(one), loads(one, tmp_path / "r.yaml"), one) for one in tried]
    assert [one for yes, loaded, one in both if loaded and not yes] == []
    # what only loading refuses is about names of devices and files, or about several keys
    assert sum(yes and not loaded for yes, loaded, _ in both) < 45 < sum(loaded for _, loaded, _ in both)


@pytest.mark.parametrize(
    "text",
    [
        "model: m\n",
        "version: 2\nmodel: m\n",
        "version: 1\nmodel: m\nexport: {type: Q8_0}\n",
        "version: 1\nmodel: m\nexports: []\n",
        "version: 1\nmodel: m\nexports: {type: Q9_K}\n",
        "version: 1\nmodel: m\nexports: {tensor_type: attn_v}\n",
        "version: 1\nmodel: m\nexports: {output_tensor_type: Q4_K_M}\n",
        "version: 1\nmodel: m\nexports: {pure: no}\n",
        "version: 1\nmodel: m\nbench:\n",
        "version: 1\nmodel: m\nbench: {repetitions: 4}\n",
        "version: 1\nmodel: m\ngates: {max_bytes: 4G}\n",
        "version: 1\nmodel: m\ngates: {min_top1: 1.5}\n",
        "version: 1\nmodel: m\npasses: [lowrank.svd]\n",
        "version: 1\nmodel: m\npasses: [{method: lowrank.svdd, rank: 4}]\n",
        "version: 1\nmodel: m\npasses: [{method: lowrank.svd, remove: 4}]\n",
        "version: 1\nmodel: m\npasses: [{method: skip-layers.last}]\n",
        "version: 1\nmodel: m\npasses: [{rank: 4}]\n",
    ],
)
def test_wrong_recipes_are_wrong_by_both(text, tmp_path):
    values = parse(text.replace("model: m", "model: reference"), "wrong").values
    assert not says_yes(values)
    assert not loads(values, tmp_path / "r.yaml")


def test_the_command_prints_it_and_writes_it(tmp_path, capsys):
    assert main(["recipe-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    path = tmp_path / "recipe.schema.json"
    for _ in range(2):  # the same again is no loss
        assert main(["recipe-schema", "-o", str(path)]) == 0
    assert json.loads(path.read_text()) == SCHEMA
    path.write_text("{}")
    capsys.readouterr()
    assert main(["recipe-schema", "-o", str(path)]) == 1
    assert capsys.readouterr().err == f"error: {path}: exists\nhint: --force replaces it\n"
    assert path.read_text() == "{}"
    for place, line in (
        (tmp_path, "is a folder, expected the name of a file"),
        (tmp_path / "no/x", "no such directory"),
    ):
        assert main(["recipe-schema", "-o", str(place), "--force"]) == 1
        assert capsys.readouterr().err.partition(": ")[2].endswith(f": {line}\n")
    assert main(["recipe-schema", "-o", str(path), "--force", "-q"]) == 0
    assert json.loads(path.read_text()) == SCHEMA


def test_neither_the_schema_nor_loading_needs_torch():
    code = (
        "from pathlib import Path; from efficli.cli import main; from efficli.recipe import load; "
        "main(['recipe-schema']); load(Path('recipes/reference-demo.yaml'))"
    )
    assert not loaded_after(code) & {"torch", "transformers", "llama_cpp", "huggingface_hub"}
