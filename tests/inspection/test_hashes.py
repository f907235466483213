"""SHA256SUMS and manifests that somebody changed: an error of ours, a finding, or what they said before."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efficli.artifact import read_artifact
from efficli.errors import EffiError
from efficli.inspection.hashes import check_files, read_expected
from tests.artifact.toy import publish


@pytest.fixture
def made(tmp_path) -> Path:
    publish(tmp_path / "out")
    return tmp_path / "out"


def test_both_sources_are_read_and_agree(made):
    expected = read_expected(made)
    assert expected.sources == ["efficli.json", "SHA256SUMS"]
    assert expected.findings == []
    assert expected.files["README.md"] == hashlib.sha256((made / "README.md").read_bytes()).hexdigest()
    assert "efficli.json" in expected.files
    assert check_files(made, expected, (), large=True) == []


def test_sums_as_sha256sum_writes_them(tmp_path):
    sha = hashlib.sha256(b"x").hexdigest()
    (tmp_path / "a b").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "c").write_bytes(b"x")
    (tmp_path / "SHA256SUMS").write_text(f"# a comment\n{sha}  a b\n\n{sha.upper()} *./folder/c\n")
    expected = read_expected(tmp_path)
    assert expected.files == {"a b": sha, "folder/c": sha}
    assert check_files(tmp_path, expected, (), large=True) == []
    (tmp_path / "folder" / "c").unlink()
    (finding,) = check_files(tmp_path, expected, (), large=True)
    assert (finding.line, finding.code) == (f"{tmp_path.name}: folder/c is missing", 1)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_names_that_lead_elsewhere(name, tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
    (finding,) = read_expected(tmp_path).findings
    assert finding.code == 6


def test_tensors_of_a_manifest_that_are_no_tensors(made):
    manifest = json.loads((made / "efficli.json").read_text())
    tensors = {"a": 5, "b": {"t": 5, "u": {"sha256": 5}, "v": {"sha256": "x"}}}
    (made / "efficli.json").write_text(json.dumps(manifest | {"tensors": tensors}))
    assert read_expected(made).tensors == {"b": {"v": "x"}}
    (made / "efficli.json").write_text(json.dumps(manifest | {"tensors": [1]}))
    assert read_expected(made).tensors == {}


def look(folder: Path) -> None:
    """Findings or files, and the strict reader an EffiError or an artifact: soon."""
    for left in (1, 0):
        began = time.process_time()
        expected = read_expected(folder)
        check_files(folder, expected, (), large=True)
        try:
            read_artifact(folder)
        except EffiError as error:
            assert error.line
        if time.process_time() - began < 1 or not left:
            break
    assert time.process_time() - began < 1


def fuzz(made: Path, examples: int) -> None:
    names = ("efficli.json", "SHA256SUMS")
    whole = {name: (made / name).read_bytes() for name in names}
    folder = made.parent / "copy"
    shutil.copytree(made, folder)
    changes = st.lists(st.tuples(st.integers(0, 1 << 12), st.integers(0, 255)), min_size=1, max_size=6)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(name=st.sampled_from(names), changes=changes, cut=st.sampled_from([0, 0, 1, 40]))
    def run(name, changes, cut):
        for other in names:
            (folder / other).write_bytes(whole[other])
        data = bytearray(whole[name])
        for at, byte in changes:
            data[at % len(data)] = byte
        (folder / name).write_bytes(data[: len(data) - cut])
        look(folder)

    run()


def test_changed_bytes(made):
    fuzz(made, 80)


@pytest.mark.slow
def test_changed_bytes_at_length(made):
    fuzz(made, 10_000)
