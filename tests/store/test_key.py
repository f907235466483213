"""Keys: the same for the same ingredients however written, another for every difference, no path ever."""

from __future__ import annotations

import enum
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficli.store import differences, step_key
from efficli.store.key import plain

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


class Word(enum.StrEnum):
    """An option as code has it."""

    FAST = "fast"


def test_the_key_is_the_hash_of_the_text_that_json_writes():
    text = '{"form":1,"ingredients":{"a":[1,2.5],"\\u00e4":null},"kind":"export"}'
    assert step_key("export", {"ä": None, "a": (1, 2.5)}) == hashlib.sha256(text.encode()).hexdigest()


def test_order_tuples_and_enums_make_no_difference_but_types_do():
    one = step_key("pass", {"a": 1, "b": {"c": [1, "fast"], "d": None}})
    assert one == step_key("pass", {"b": {"d": None, "c": (1, Word.FAST)}, "a": 1})
    others = [
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": [1]},
        {"a": None},
        {},
        {"a": 1, "b": None},
        {"b": 1},
        {"a": -1},
    ]
    keys = {step_key("pass", other) for other in ({"a": 1}, *others)} | {step_key("export", {"a": 1})}
    assert len(keys) == len(others) + 2


@settings(max_examples=50)
@given(st.dictionaries(st.text(), DATA, max_size=4))
def test_a_key_survives_being_written_and_read(ingredients):
    kept = json.loads(json.dumps(plain(ingredients)))
    assert step_key("x", kept) == step_key("x", ingredients)
    assert differences(kept, ingredients) == ()


@settings(max_examples=50)
@given(st.dictionaries(st.text(), DATA, max_size=3), st.dictionaries(st.text(), DATA, max_size=3))
def test_keys_are_equal_only_where_nothing_differs(one, other):
    assert (step_key("x", one) == step_key("x", other)) == (differences(one, other) == ())


@pytest.mark.parametrize(
    ("ingredients", "error", "words"),
    [
        ({"at": Path("/home/me")}, TypeError, "ingredients.at is the path /home/me: a key says what something is"),
        ({"a": [{"at": PurePosixPath("x")}]}, TypeError, r"ingredients.a\[0\].at is the path x"),
        ({"a": math.nan}, ValueError, "ingredients.a is nan, expected a finite number"),
        ({"a": [1, -math.inf]}, ValueError, r"ingredients.a\[1\] is -inf"),
        ({"a": {1: 2}}, TypeError, "ingredients.a has the key 1, expected a string"),
        ({"a": b"x"}, TypeError, "ingredients.a is a bytes, expected plain data"),
        ({"a": {1, 2}}, TypeError, "ingredients.a is a set, expected plain data"),
    ],
)
def test_what_is_no_plain_data_has_no_key(ingredients, error, words):
    with pytest.raises(error, match=words):
        step_key("export", ingredients)


@pytest.mark.parametrize("kind", ["", "a\nb"])
def test_a_kind_is_a_word(kind):
    with pytest.raises(ValueError, match="a kind of step is a word"):
        step_key(kind, {})


def test_the_key_is_the_same_in_every_process():
    code = "from efficli.store import step_key; print(step_key('a', {'x': {'b': 1, 'a': [2.5e-7, 'é']}}))"
    keys = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        keys.add(done.stdout.strip())
    assert keys == {step_key("a", {"x": {"a": (2.5e-7, "é"), "b": 1}})}


def test_differences_have_dotted_names():
    one = {"source": "a", "config": {"types": ["Q4_0"], "seed": 1}, "only": None}
    other = {"source": "b", "config": {"types": ["Q4_0", "Q8_0"], "seed": 1}}
    assert differences(one, other) == ("config.types", "only", "source")
