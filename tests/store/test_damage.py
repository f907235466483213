"""Damage in the store: discarded and computed anew, and nothing outside is ever touched (row 59)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from efficli.store import Store
from efficli.store import entry as entry_module
from tests.lost_nothing import fingerprint
from tests.store.results import KEY, assert_whole, fill, got


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache" / "steps")


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir()}


def damage(words: str, kind: str = " of step export") -> str:
    return f"cache entry {KEY[:8]}{kind} is damaged ({words}) and is computed anew"


def flip(path: Path, at: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def relink(path: Path, target: Path) -> None:
    (shutil.rmtree if path.is_dir() else os.remove)(path)
    path.symlink_to(target)


def edit(place: Path, **changed: object) -> None:
    """Other values in entry.json, in its form, with the old hash."""
    path = place / "entry.json"
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def sealed(place: Path, **changed: object) -> None:
    """Other values in entry.json, and the hash that covers them."""
    path = place / "entry.json"
    values = {**json.loads(path.read_text()), **changed}
    del values["sha256"]
    path.write_bytes(entry_module._sealed(values))


ROW = {"name": "empty", "nbytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a bit of a file": (lambda at: flip(at / "files/model.gguf"), "sha256 differs in model.gguf", " of step export"),
    "a file cut": (
        lambda at: os.truncate(at / "files/model.gguf", 39999),
        "model.gguf has 39999 bytes, 40000 were",
        "",
    ),
    "a file longer": (lambda at: os.truncate(at / "files/empty", 1), "empty has 1 bytes, 0 were written", ""),
    "a file gone": (lambda at: (at / "files/empty").unlink(), "empty is missing", ""),
    "a folder gone": (lambda at: shutil.rmtree(at / "files/tokenizer"), "tokenizer/tokenizer.json is missing", ""),
    "all files gone": (lambda at: shutil.rmtree(at / "files"), "files: No such file or directory", ""),
    "a file more": (lambda at: (at / "files/more").write_text(""), "more does not belong to it", ""),
    "a pipe more": (lambda at: os.mkfifo(at / "files/more"), "more is not a regular file", ""),
    "a bit of entry.json": (lambda at: flip(at / "entry.json", 30), "sha256 differs in entry.json", ""),
    "a space in entry.json": (lambda at: append(at / "entry.json", " "), "sha256 differs in entry.json", ""),
    "entry.json empty": (lambda at: os.truncate(at / "entry.json", 0), "entry.json is not whole", ""),
    "entry.json cut": (lambda at: os.truncate(at / "entry.json", 99), "entry.json is not whole", ""),
    "entry.json no text": (lambda at: (at / "entry.json").write_bytes(b"\xff"), "entry.json is not text", ""),
    "entry.json gone": (lambda at: (at / "entry.json").unlink(), "entry.json: No such file or directory", ""),
    "entry.json a pipe": (
        lambda at: ((at / "entry.json").unlink(), os.mkfifo(at / "entry.json")),
        "entry.json is not a regular file",
        "",
    ),
    "another label": (lambda at: edit(at, label="x"), "sha256 differs in entry.json", ""),
    "other ingredients": (lambda at: sealed(at, ingredients={"a": 1}), "entry.json is that of another entry", ""),
    "a name that leads out": (
        lambda at: sealed(at, files=[ROW | {"name": "../entry.json"}]),
        "entry.json is not of this layout",
        "",
    ),
    "an absolute name": (lambda at: sealed(at, files=[ROW | {"name": "/a"}]), "entry.json is not of this layout", ""),
    "a size that is none": (
        lambda at: sealed(at, files=[ROW | {"nbytes": -1}]),
        "entry.json is not of this layout",
        "",
    ),
    "files that are none": (lambda at: sealed(at, files=[3]), "entry.json is not of this layout", ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_discarded_and_computed_anew(store, name):
    harm, words, kind = DAMAGES[name]
    place = fill(store).path.parent
    harm(place)
    found, (note,) = got(store.root)
    assert found is None
    assert note.startswith(damage(words, kind).partition(")")[0]), note
    assert names(store) == {"lock"}
    assert_whole(fill(store))
    assert got(store.root)[1] == []


def test_values_nested_without_end_are_damage(store):
    for depth in (100, 500, *range(940, 1000, 15), 100_000):
        path = fill(store).path.parent / "entry.json"
        path.write_text(path.read_text().replace('"label": ""', '"label": ' + "[" * depth + "]" * depth))
        found, (note,) = got(store.root)
        assert found is None and "is damaged (" in note


@pytest.mark.parametrize("part", ["", "files", "entry.json", "files/model.gguf", "files/tokenizer"])
def test_links_are_not_followed_out_of_the_store(store, tmp_path, part):
    place = fill(store).path.parent
    outside = tmp_path / "outside"
    shutil.copytree(place, outside)
    before = fingerprint(outside)
    relink(place / part, outside / part)
    assert len(store.damaged()) == 1
    assert got(store.root)[0] is None
    assert names(store) == {"lock"}
    assert fingerprint(outside) == before


def test_damage_that_happens_during_a_run_is_found(store):
    with store.using():
        entry = fill(store)
        flip(entry.file("model.gguf"))
        assert store.get(KEY) is None


def test_a_damaged_entry_that_could_not_be_removed_is_replaced(store, monkeypatch):
    flip(fill(store).file("model.gguf"))
    with store.using():
        with monkeypatch.context() as faulty:
            faulty.setattr(Path, "rename", _input_output_error)
            assert store.get(KEY) is None
        assert store.look(KEY) is not None
        assert_whole(fill(store))
    assert_whole(got(store.root)[0])


def test_what_another_run_has_put_there_meanwhile_is_not_discarded(store, monkeypatch):
    flip(fill(store).file("model.gguf"))
    other, real = Store(store.root), store._check

    def meanwhile(entry):
        try:
            real(entry)
        finally:
            with other.using():
                assert other.get(KEY) is None
                fill(other)

    monkeypatch.setattr(store, "_check", meanwhile)
    with store.using():
        assert store.get(KEY) is None
    assert_whole(got(store.root)[0])


def _input_output_error(*arguments: object) -> None:
    raise OSError(5, os.strerror(5))
