"""The spine: a checkpoint becomes an artifact that loads, with its certificate, whole, and the same every time."""

from __future__ import annotations

import hashlib
import json
import subprocess

import pytest
from gguf import GGUFReader

import efficli
from efficli.artifact import read_artifact
from efficli.checkpoint import open_checkpoint
from efficli.checkpoint.sidecar import Origin, Sidecar, write_sidecar
from efficli.errors import CheckpointError, GateError, OutputError, SecurityError, UnsupportedError, UsageError
from efficli.export.gguf.verify import NUM_TOKENS
from efficli.progress import Silent
from tests.light import light_site, run_light
from tests.lost_nothing import fingerprint as tree_hash
from tests.pico import TEXT, write_llama

TYPES = ("Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("in") / "pico", dtype="BF16")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4)
    return file


@pytest.fixture(scope="module")
def exported(checkpoint, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "artifact"
    return efficli.export(checkpoint, out, types=TYPES, text=text, ctx=64, threads=2)


def test_artifact_is_complete_and_its_sums_hold(exported):
    artifact = read_artifact(exported.output)
    artifact.verify()
    names = {record.name for record in artifact.files}
    assert {"README.md", "recipe.yaml", *(f.name for f in exported.files)} <= names
    told = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=exported.output, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert "run.json" not in (exported.output / "SHA256SUMS").read_text()


def test_manifest_names_origin_recipe_tensors_and_certificate(exported, checkpoint):
    manifest = read_artifact(exported.output).manifest
    assert manifest["source"]["fingerprint"] == open_checkpoint(checkpoint).fingerprint()
    assert manifest["origin"]["fingerprint"] == manifest["source"]["fingerprint"]
    assert manifest["recipe"]["exports"][0]["type"] == list(TYPES)
    for file in exported.files:
        certificate = next(a["certificate"] for a in manifest["artifacts"] if a["path"] == file.name)
        assert certificate["status"] == "measured" and certificate["rows"][0]["n"] > 0
        for tensor in GGUFReader(exported.output / file.name).tensors:
            told = manifest["tensors"][file.name][tensor.name]
            assert told["type"] == tensor.tensor_type.name
            assert told["sha256"] == hashlib.sha256(tensor.data.tobytes()).hexdigest()
    run = json.loads((exported.output / "run.json").read_text())
    assert all(
        run["loaded"][f.name]["loaded"] and len(run["loaded"][f.name]["tokens"]) == NUM_TOKENS for f in exported.files
    )


def test_more_bits_are_nearer_to_the_origin(exported):
    q8, q4 = (file.certificate["kld_mean"] for file in exported.files)
    assert 0 <= q8 < q4


def test_same_bytes_whatever_the_threads_and_the_hash_seed(exported, checkpoint, text, tmp_path):
    again = efficli.export(checkpoint, tmp_path / "artifact", types=TYPES, text=text, ctx=64, threads=1)
    sums = [(result.output / "SHA256SUMS").read_text() for result in (exported, again)]
    assert sums[0] == sums[1]


def test_without_torch_the_origin_runs_in_llama(exported, checkpoint, text, tmp_path):
    packages = light_site(tmp_path / "site")
    out = tmp_path / "artifact"
    arguments = ["export", str(checkpoint), "-o", str(out), "--type", "Q8_0,Q4_0", "--text", str(text), "-c", "64"]
    told = run_light(packages, [*arguments, "--json"])
    assert told.returncode == 0, told.stderr
    files = json.loads(told.stdout)["files"]
    for file, with_torch in zip(files, exported.files, strict=True):
        assert file["sha256"] == with_torch.sha256
        assert "F32 file" in file["certificate"]["base_runtime"]
        here = next(row for row in file["certificate"]["rows"])
        assert here["kld_mean"] == pytest.approx(with_torch.certificate["kld_mean"], rel=0.02, abs=1e-6)
    assert not list(out.glob("*f32*")), "the origin's F32 file does not ship"


def test_gates_publish_nothing(checkpoint, text, tmp_path):
    before = tree_hash(checkpoint)
    with pytest.raises(GateError, match=r"mean KL divergence is .* expected at most 0"):
        efficli.export(checkpoint, tmp_path / "out", types=("Q4_0",), text=text, ctx=64, max_kld=0.0)
    assert list(tmp_path.iterdir()) == []
    assert tree_hash(checkpoint) == before


def test_a_gate_without_a_certificate_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"^--max-kld needs the certificate$"):
        efficli.export(checkpoint, tmp_path / "out", max_kld=0.1, certificate=False)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_force(exported, checkpoint):
    before = tree_hash(exported.output)
    with pytest.raises(OutputError, match="exists"):
        efficli.export(checkpoint, exported.output, types=("Q8_0",), certificate=False)
    assert tree_hash(exported.output) == before


def test_dry_run_tells_the_exact_size_and_writes_nothing(exported, checkpoint, tmp_path):
    planned = efficli.export(checkpoint, tmp_path / "out", types=TYPES, dry_run=True)
    assert [f.nbytes for f in planned.files] == [f.nbytes for f in exported.files]
    assert [f.nbytes for f in planned.files] == [(exported.output / f.name).stat().st_size for f in exported.files]
    assert list(tmp_path.iterdir()) == []


def test_fallbacks_are_rows_and_errors_under_strict(checkpoint, tmp_path):
    planned = efficli.export(checkpoint, tmp_path / "out", types=("Q4_K_M",), dry_run=True)
    assert planned.files[0].fallbacks
    assert any("rows of 64" in row for row in planned.report)
    with pytest.raises(UnsupportedError, match="cannot take Q4_K_M"):
        efficli.export(checkpoint, tmp_path / "out", types=("Q4_K_M",), strict=True, dry_run=True)


def test_importance_matrix_computed_on_the_way(checkpoint, tmp_path):
    progress = Silent()
    result = efficli.export(
        checkpoint, tmp_path / "out", types=("IQ4_NL",), imatrix="auto", certificate=False, progress=progress
    )
    plain = efficli.export(checkpoint, tmp_path / "plain", types=("IQ4_NL",), certificate=False)
    assert result.files[0].sha256 != plain.files[0].sha256
    assert result.files[0].nbytes == pytest.approx(plain.files[0].nbytes, rel=0.02)


@pytest.mark.slow
def test_types_that_need_an_importance_matrix_get_the_computed_one(tmp_path):
    checkpoint = write_llama(tmp_path / "wide", hidden=256, ffn=256, heads=4, layers=1)
    planned = efficli.export(checkpoint, tmp_path / "out", types=("IQ3_XXS",), imatrix="auto", dry_run=True)
    result = efficli.export(checkpoint, tmp_path / "out", types=("IQ3_XXS",), imatrix="auto", certificate=False)
    assert result.files[0].nbytes == planned.files[0].nbytes == (result.output / result.files[0].name).stat().st_size
    types = {tensor.tensor_type.name for tensor in GGUFReader(result.output / result.files[0].name).tensors}
    assert "IQ3_XXS" in types
    with pytest.raises(UsageError, match="needs an importance matrix"):
        efficli.export(checkpoint, tmp_path / "plain", types=("IQ3_XXS",), certificate=False)


def test_absent_origin_is_said_and_an_error_under_strict(checkpoint, tmp_path):
    compressed = write_llama(tmp_path / "compressed", dtype="BF16")
    gone = Origin(fingerprint="sha256:" + "0" * 64, model=str(tmp_path / "gone"))
    write_sidecar(compressed, Sidecar(origin=gone))
    progress = Silent()
    result = efficli.export(compressed, tmp_path / "out", types=("Q8_0",), progress=progress)
    assert result.files[0].certificate.status == "origin absent"
    assert any("origin absent" in note for note in progress.notes)
    with pytest.raises(CheckpointError, match="origin absent"):
        efficli.export(compressed, tmp_path / "out2", types=("Q8_0",), strict=True)
    measured = efficli.export(compressed, tmp_path / "out3", types=("Q8_0",), base=str(checkpoint), ctx=64)
    assert measured.files[0].certificate.status == "measured"


def test_a_type_twice_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="Q8_0 is asked for twice"):
        efficli.export(checkpoint, tmp_path / "out", types=("Q8_0", "q8_0"))


def test_a_chat_template_that_never_ends_is_refused(tmp_path):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    checkpoint = write_llama(tmp_path / "pico", chat_template=endless)
    with pytest.raises(SecurityError, match="did not render"):
        efficli.export(checkpoint, tmp_path / "out", types=("Q8_0",), certificate=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pico"]


def test_wishes_about_a_certificate_that_is_not_made_are_refused(checkpoint, text, tmp_path):
    for wish in ({"base": str(checkpoint)}, {"text": text}, {"max_kld": 1.0}, {"min_top1": 0.5}):
        with pytest.raises(UsageError, match="needs the certificate"):
            efficli.export(checkpoint, tmp_path / "out", types=("Q8_0",), certificate=False, **wish)
