"""Recipes: every shipped one loads, YAML is read strictly, a command line round-trips."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficli.errors import UsageError
from efficli.recipe import Recipe, load, parse_recipe

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
HEAD = "version: 1\nmodel: m\n"


def error_of(text: str) -> tuple[str, str | None]:
    """The error line and the hint."""
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    assert caught.value.exit_code == 2
    return caught.value.line, caught.value.hint


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads_and_says_for_whom_it_is(path):
    recipe = load(path)
    assert path.read_text().startswith("# For ")
    assert parse_recipe(recipe.to_yaml()) == recipe


def test_there_are_shipped_recipes():
    assert SHIPPED


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        (HEAD + "exports:\n  tpye: Q4_0\n", "recipe.yaml:4: unknown key 'exports.tpye'", "did you mean 'type'?"),
        (HEAD + "gates:\n  max-kld: 1\n", "recipe.yaml:4: unknown key 'gates.max-kld'", "did you mean 'max_kld'?"),
        (HEAD + "model: n\n", "recipe.yaml:3: duplicate key 'model' (first on line 2)", None),
        (
            HEAD + "exports:\n  pure: no\n",
            "recipe.yaml:4: exports.pure: 'no' is a word, expected true or false",
            "pure: false",
        ),
        (HEAD + "gates: {max_kld: 1e999}\n", "recipe.yaml:3: '1e999' is not a finite number", None),
        (HEAD + "gates: {max_kld: .nan}\n", "recipe.yaml:3: '.nan' is not a finite number", None),
        (HEAD + "seed: 1.5\n", "recipe.yaml:3: seed: 1.5, expected integer", None),
        (HEAD + "seed: true\n", "recipe.yaml:3: seed: True, expected integer", None),
        (HEAD + "exports: {type: []}\n", "recipe.yaml:3: exports.type is empty, expected at least one", None),
        (HEAD + "<<: {a: 1}\n", "recipe.yaml:3: merge keys ('<<') are not read", "write the keys out"),
        (HEAD + "[a, b]: 1\n", "recipe.yaml:3: a key is a list or a mapping, expected a word", None),
        ("version: 2\nmodel: m\n", "recipe.yaml:1: version: 2, expected 1", None),
        ("version: 1\n", "recipe.yaml:1: key 'model' is missing", None),
        (
            "version: 1\nmodel: !!python/object/apply:os.system [touch canary]\n",
            "recipe.yaml:2: tag '!!python/object/apply:os.system' is not read",
            "plain values only are read",
        ),
        ("- a\n", "recipe.yaml:1: expected keys such as version and model", None),
        ("", "recipe.yaml:1: expected keys such as version and model", None),
        ("a: &a [*a]\n", "recipe.yaml:1: nested more than 20 deep", None),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(text, line, hint):
    assert error_of(text) == (line, hint)


def test_all_problems_are_told_in_the_order_of_their_lines():
    text = """version: 1
modle: m
seed: 1e999
exports:
  - tpye: Q4_0
    pure: no
  - type: Q8_0
    type: Q4_0
gates: {max_bytes: 4G, min_top1: 2}
seed: 3
trust_remote_code: !!bool yes
"""
    with pytest.raises(UsageError) as caught:
        parse_recipe(text)
    assert [(error.line, error.hint) for error in (caught.value, *caught.value.others)] == [
        ("recipe.yaml:2: unknown key 'modle'", "did you mean 'model'?"),
        ("recipe.yaml:3: '1e999' is not a finite number", None),
        ("recipe.yaml:5: unknown key 'exports.0.tpye'", "did you mean 'type'?"),
        ("recipe.yaml:6: exports.0.pure: 'no' is a word, expected true or false", "pure: false"),
        ("recipe.yaml:8: duplicate key 'type' (first on line 7)", None),
        (
            "recipe.yaml:9: gates.max_bytes: '4G' is not a number of bytes",
            "a number and B, kB, MB, GB, TB (1000s) or KiB, MiB, GiB, TiB (1024s), as in 350MiB",
        ),
        ("recipe.yaml:9: gates.min_top1: 2, expected less than or equal to 1", None),
        ("recipe.yaml:10: duplicate key 'seed' (first on line 3)", None),
        ("recipe.yaml:11: tag '!!bool' is not read", "plain values only are read"),
    ]


def test_an_alias_bomb_is_refused_at_once():
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    rows += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    begin = time.process_time()
    line, _ = error_of(HEAD + "\n".join(rows))
    assert "more than 10000 values once its aliases are expanded" in line
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: " * 300, "{" * 100_000, "a:\n" + " " * 10 + "- b\n c", "a: \x01", "a: *b", "%TAG"]
)
def test_malformed_yaml_is_one_usage_error(text):
    assert error_of(text)[0].startswith("recipe.yaml")


def test_a_large_file_is_refused_unread():
    assert error_of("# " + "x" * (1 << 21))[0] == f"recipe.yaml: {(1 << 21) + 2} characters, at most {1 << 20} are read"


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no such recipe: .*nothing\.yaml"):
        load(tmp_path / "nothing.yaml")


def test_words_that_yaml_1_1_reads_as_something_else_stay_words():
    recipe = parse_recipe("version: 1\nmodel: no\nrevision: '1e5'\nexports: {type: on, imatrix: 1:30}\n")
    assert (recipe.model, recipe.revision, recipe.exports[0].type, recipe.exports[0].imatrix) == (
        "no",
        "1e5",
        ("on",),
        "1:30",
    )


words = st.text(min_size=1, max_size=12).filter(lambda w: w.isprintable()) | st.sampled_from(
    ["no", "~", "null", "1e-3", "0x1F", "1_0", ".inf", "=", "<<", "true", "2026-01-01", " a", "a: b", "#", "é", "- x"]
)


@settings(deadline=None, max_examples=150)
@given(words, words, words, st.none() | words, st.none() | st.floats(0, 10), st.booleans())
def test_a_command_line_is_a_recipe_and_reads_back_equal(model, kind, pattern, base, kld, pure):
    recipe = Recipe.from_export(
        model=model, types=(kind, "Q8_0"), tensor_types=((pattern, kind),), base=base, max_kld=kld, pure=pure
    )
    again = parse_recipe(recipe.to_yaml())
    assert again == recipe
    assert again.sha256 == recipe.sha256


def test_a_command_line_out_of_range_is_a_usage_error():
    with pytest.raises(UsageError, match=r"^--min-top1: 1.5, expected less than or equal to 1$"):
        Recipe.from_export(model="m", types=("Q8_0",), min_top1=1.5)


def test_the_yaml_holds_only_what_differs():
    assert Recipe.from_export(model="m", types=("Q8_0",)).to_yaml() == (
        "version: 1\nmodel: m\nexports:\n- format: gguf\n  type:\n  - Q8_0\n"
    )
