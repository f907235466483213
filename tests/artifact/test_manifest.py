"""Reading artifacts: strict manifests, and files checked against them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from efficli.artifact import draft, read_artifact
from efficli.errors import CheckpointError, SecurityError, UnsupportedError
from tests.artifact.toy import publish


@pytest.fixture
def made(tmp_path) -> Path:
    publish(tmp_path / "out")
    return tmp_path / "out"


def edit(out: Path, **changes) -> None:
    content = json.loads((out / "efficli.json").read_text())
    (out / "efficli.json").write_text(json.dumps({**content, **changes}))


def entry(**changes) -> list[dict[str, object]]:
    return [{"name": "README.md", "nbytes": 3, "sha256": hashlib.sha256(b"one").hexdigest(), **changes}]


def test_no_artifact_there(tmp_path, made):
    with pytest.raises(CheckpointError, match="no such artifact directory"):
        read_artifact(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"efficli.json not found: not made by efficli"):
        read_artifact(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"not valid JSON"),
        ("[]", "a JSON array, expected an object"),
        ("{}", "kind is None, expected 'artifact'"),
        ('{"kind": "checkpoint", "version": 1}', "kind is 'checkpoint', expected 'artifact'"),
        ('{"kind": "artifact", "schema_version": 1}', "no list of files"),
        ('{"kind": "artifact",\n "schema_version": 1,\n "schema_version": 1}', "duplicate key 'schema_version'"),
        ('{"kind": "artifact", "schema_version": 1, "files": [], "loss": NaN}', "NaN is not a JSON number"),
        ('{"kind": "artifact", "schema_version": 1, "files": [{"name": "x"}]}', "needs name, nbytes and sha256"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_manifest_is_refused(made, text, words):
    (made / "efficli.json").write_text(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_artifact(made)
    assert caught.value.where.startswith(str(made / "efficli.json"))


def test_a_record_that_makes_no_sense_is_refused(made):
    for changes, words in (({"nbytes": -1}, "nbytes is -1"), ({"nbytes": True}, "is True"), ({"sha256": "A"}, "'A'")):
        edit(made, files=entry(**changes))
        with pytest.raises(CheckpointError, match=words):
            read_artifact(made)


def test_a_newer_manifest_is_unsupported(made):
    for version in (2, True, None):
        edit(made, schema_version=version)
        with pytest.raises(UnsupportedError, match=f"schema_version is {version}, expected 1"):
            read_artifact(made)


def test_a_manifest_that_is_a_link_is_refused(made, tmp_path):
    (made / "efficli.json").rename(tmp_path / "elsewhere")
    (made / "efficli.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecurityError, match="is a link"):
        read_artifact(made)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", ".", "..", "a/b", "a\\b", "a\0b", "efficli.json", 5])
def test_a_path_in_the_manifest_is_refused(made, name):
    edit(made, files=entry(name=name))
    with pytest.raises(SecurityError, match="not a plain name") as caught:
        read_artifact(made)
    assert caught.value.exit_code == 6


def test_files_that_are_missing_doubled_or_of_another_size(made):
    edit(made, files=entry() * 2)
    with pytest.raises(CheckpointError, match="names a file twice"):
        read_artifact(made)
    edit(made, files=entry(name="gone.bin"))
    with pytest.raises(CheckpointError, match=r"gone.bin is missing"):
        read_artifact(made)
    edit(made, files=entry(nbytes=4))
    with pytest.raises(SecurityError, match="3 bytes, the manifest says 4"):
        read_artifact(made)
    (made / "README.md").unlink()
    (made / "README.md").symlink_to("model.gguf")
    with pytest.raises(SecurityError, match="not a regular file"):
        read_artifact(made)


@pytest.mark.parametrize("name", ["model.gguf", "efficli.json", "SHA256SUMS"])
def test_one_flipped_bit_is_found(made, name):
    data = bytearray((made / name).read_bytes())
    at = data.index(b"one") if name != "SHA256SUMS" else 10
    data[at] ^= 1
    (made / name).write_bytes(data)
    with pytest.raises(SecurityError):
        read_artifact(made).verify()


def test_any_name_and_text_survives_the_manifest(tmp_path):
    out = tmp_path / os.fsdecode(b"o\xff t \xc3\xa4")
    with draft(out, inputs=[], needs_bytes=0, force=False) as drafted:
        (drafted.path / "mödel \udcfe.gguf").write_bytes(b"x")
        drafted.commit({"template": "häh \u2028 \U0001f600 \ud800"}, {"output": str(out)})
    artifact = read_artifact(out)
    artifact.verify()
    assert artifact.manifest["template"] == "häh \u2028 \U0001f600 \ud800"
    assert artifact.files[0].name == "mödel \udcfe.gguf"
    assert json.loads((out / "run.json").read_bytes())["output"] == str(out)
