"""A recipe to an artifact: what is kept between runs, what is done anew, what an artifact says of its making."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import efficli
from efficli.artifact import read_artifact
from efficli.cli import main
from efficli.errors import FitError, GateError, UsageError
from efficli.pipeline import provenance
from efficli.progress import Silent
from tests.lost_nothing import fingerprint as tree_hash
from tests.pico import TEXT, write_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and a recipe of four steps that names them."""
    place = tmp_path_factory.mktemp("recipe")
    write_llama(place / "pico", layers=3, dtype="BF16")
    (place / "text.txt").write_text(TEXT * 4)
    recipe = {
        "version": 1,
        "model": str(place / "pico"),
        "passes": [{"method": "skip-layers.last", "remove": 1}],
        "calibration": {"text": str(place / "text.txt"), "ctx_size": 64, "max_tokens": 512},
        "exports": [{"type": "Q4_0", "imatrix": "auto"}],
        "certificate": {"text": str(place / "text.txt"), "ctx_size": 64},
        "gates": {"max_bytes": "1MiB"},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return place


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFICLI_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        # as where PyTorch is not installed: llama.cpp runs the origin from an F32 file, which starts faster
        patch.setattr("efficli.pipeline.quality.torch_is_installed", lambda: False)
        patch.setattr("efficli.pipeline.execution.torch_is_installed", lambda: False)
        yield


@pytest.fixture(scope="module")
def first(folder, _own_cache):
    return efficli.run(folder / "recipe.yaml", folder / "first", threads=1)


def again(folder, *settings, recipe="recipe.yaml", out="again", **options):
    return efficli.run(folder / recipe, folder / out, settings=settings, threads=1, force=True, **options)


def sums(result) -> str:
    return (result.output / "SHA256SUMS").read_text()


def cached(result) -> dict[str, bool]:
    """Of the steps that can be kept: whether each came from the cache."""
    kept = {step.kind: step.cached for step in result.steps if step.key is not None}
    assert set(kept) == {"pass", "imatrix", "write", "certificate"}
    return kept


def test_every_step_runs_and_the_artifact_is_whole(first):
    assert [step.kind for step in first.steps] == ["pass", "imatrix", "write", "load", "certificate"]
    assert not any(cached(first).values())
    artifact = read_artifact(first.output)
    artifact.verify()
    assert [step["method"] for step in artifact.manifest["steps"]] == ["skip-layers.last"]
    assert artifact.manifest["origin"]["fingerprint"] == artifact.manifest["source"]["fingerprint"]
    assert first.files[0].certificate.origin == "pico" and first.files[0].certificate["kld_mean"] > 0


def test_a_rerun_redoes_nothing_and_writes_the_same_bytes(folder, first):
    second = again(folder)
    assert all(cached(second).values())
    assert sums(second) == sums(first)


def test_without_the_cache_the_bytes_are_the_same_and_nothing_is_kept(folder, first):
    plain = again(folder, cache=False)
    assert {step.key for step in plain.steps} == {None}
    assert sums(plain) == sums(first)


def test_a_change_of_the_last_step_redoes_that_one_alone(folder, first):
    changed = again(folder, "certificate.ctx_size=48")
    assert cached(changed) == {"pass": True, "imatrix": True, "write": True, "certificate": False}


def test_gates_decide_no_bytes_of_the_file(folder, first):
    gated = again(folder, "gates.max_kld=100")
    assert all(cached(gated).values())
    assert gated.files[0].sha256 == first.files[0].sha256


def test_a_second_recipe_shares_the_prefix(folder, first):
    text = (folder / "recipe.yaml").read_text().replace("Q4_0", "Q8_0")
    (folder / "other.yaml").write_text(text)
    other = again(folder, recipe="other.yaml")
    assert cached(other) == {"pass": True, "imatrix": True, "write": False, "certificate": False}


def test_a_change_of_the_first_step_redoes_all_after_it(folder, first):
    assert not any(cached(again(folder, "passes.0.remove=2")).values())


def test_a_changed_weight_redoes_all(folder, first, tmp_path):
    write_llama(tmp_path / "pico", layers=3, dtype="BF16", seed=1)
    assert not any(cached(again(folder, f"model={tmp_path / 'pico'}")).values())


def test_a_changed_text_redoes_what_reads_it(folder, first, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 5)
    calibrated = again(folder, f"calibration.text={tmp_path / 'text.txt'}")
    assert cached(calibrated) == {"pass": True, "imatrix": False, "write": False, "certificate": False}


@pytest.mark.parametrize("kind", ["pass", "imatrix", "write", "certificate"])
def test_a_damaged_entry_is_found_by_hash_and_computed_anew(folder, first, kind):
    key = next(step.key for step in again(folder).steps if step.kind == kind)
    files = [path for path in (Path(cache_root()) / key / "files").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    progress = Silent()
    mended = again(folder, progress=progress)
    assert [step.kind for step in mended.steps if step.key and not step.cached] == [kind]
    assert any("is damaged" in note and kind in note for note in progress.notes)
    assert sums(mended) == sums(first)


def cache_root() -> str:
    from efficli.store import default_root

    return str(default_root())


def test_the_artifact_says_what_decided_it(folder, first):
    lock = json.loads((first.output / provenance.LOCK).read_text())
    assert lock["seed"] == 0 and lock["packages"]["efficli"] == efficli.__version__
    assert lock["packages"]["llama-cpp-python"] and set(lock["calibration"]) == {"text.txt"}
    assert lock["model"]["fingerprint"] == read_artifact(first.output).manifest["source"]["fingerprint"]
    assert set(lock["model"]["files"]) >= {"config.json", "tokenizer.json"}
    ran = json.loads((first.output / "run.json").read_text())
    assert [step["kind"] for step in ran["steps"]] == [step.kind for step in first.steps]
    assert "run.json" not in sums(first) and "efficli.lock" in sums(first)


def test_the_resolved_recipe_makes_the_same_artifact(folder, first):
    resolved = efficli.run(first.output / "recipe.yaml", folder / "resolved", threads=1, force=True)
    assert sums(resolved) == sums(first)


def test_a_command_line_is_a_recipe_and_is_saved_as_one(folder):
    options = {"text": folder / "text.txt", "ctx": 64, "threads": 1, "force": True}
    exported = efficli.export(folder / "pico", folder / "exported", types=("Q8_0",), **options)
    ran = efficli.run(exported.output / "recipe.yaml", folder / "ran", threads=1, force=True)
    assert sums(ran) == sums(exported)


def test_an_unmet_gate_leaves_nothing_and_is_in_the_reports(folder, first, tmp_path):
    before = tree_hash(first.output)
    with pytest.raises(GateError, match="mean KL divergence is"):
        efficli.run(
            folder / "recipe.yaml",
            first.output,
            settings=("gates.max_kld=0", "gates.min_top1=0"),
            threads=1,
            force=True,
            summary=tmp_path / "summary.md",
            junit=tmp_path / "gates.xml",
        )
    assert tree_hash(first.output) == before
    suite = ElementTree.parse(tmp_path / "gates.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "0")
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["max_kld"] and [case.get("name") for case in suite] == ["run", "max_bytes", "max_kld", "min_top1"]
    summary = (tmp_path / "summary.md").read_text()
    assert "| max_kld | Pico-" in summary and summary.count("**not met**") == 1 and summary.count("| met |") == 2
    assert "**error:** " in summary and "mean KL divergence" in summary


def test_a_file_that_is_too_large_is_told_before_anything_is_computed(folder, first):
    progress = Counter()

    class Tasks(Silent):
        def start(self, task, total, unit=""):
            progress[task] += 1

    with pytest.raises(FitError, match=r"KiB, at most 1\.00 KiB wanted"):
        again(folder, "gates.max_bytes=1024", "passes=[]", progress=Tasks())
    assert not [task for task in progress if "writing" in task or "certificate" in task]


def test_two_exports_that_write_one_file(folder):
    (folder / "twice.yaml").write_text(
        f"version: 1\nmodel: {folder / 'pico'}\nexports:\n- type: Q8_0\n- type: Q8_0\n  pure: true\n"
    )
    with pytest.raises(UsageError, match="Q8_0"):
        efficli.run(folder / "twice.yaml", folder / "twice")
    assert not (folder / "twice").exists()


def test_two_exports_and_bench_in_one_artifact(folder):
    (folder / "two.yaml").write_text(
        f"version: 1\nmodel: {folder / 'pico'}\nexports:\n- type: Q8_0\n- type: [Q4_0, F16]\n"
        "  token_embedding_type: Q8_0\n"
        "certificate: {enabled: false}\nbench: {n_prompt: 8, n_gen: 4, patience: 0, starts: false, threads: 1}\n"
        "gates: {min_decode: 0.001}\n"
    )
    both = efficli.run(folder / "two.yaml", folder / "two", threads=1)
    assert [file.type for file in both.files] == ["Q8_0", "Q4_0", "F16"]
    assert [gate.met for gate in both.gates] == [True] * 3
    ran = json.loads((both.output / "run.json").read_text())
    assert [artifact["path"] for artifact in ran["bench"]["artifacts"]] == [file.name for file in both.files]
    assert ".efficli-tmp" not in json.dumps(ran)
    slow = {"settings": ("gates.min_decode=1e12",), "threads": 1, "force": True}
    with pytest.raises(GateError, match=r"tokens/s, expected at least 1e\+12 tokens/s"):
        efficli.run(folder / "two.yaml", folder / "two", **slow)
    assert (folder / "two" / both.files[0].name).exists()


def test_a_dry_run_has_the_sizes_and_writes_nothing(folder, first, capsys):
    told = again(folder, out="dry", dry_run=True)
    assert [(file.name, file.nbytes) for file in told.files] == [(file.name, file.nbytes) for file in first.files]
    assert [step.kind for step in told.steps] == [step.kind for step in first.steps]
    assert all(step.seconds > 0 for step in told.steps) and not (folder / "dry").exists()


def test_a_rehearsal_goes_through_every_step_and_keeps_nothing(folder, first):
    before = tree_hash(folder)
    rehearsed = again(folder, out="rehearsed", rehearsal=True)
    assert [step.kind for step in rehearsed.steps] == [step.kind for step in first.steps]
    assert {step.key for step in rehearsed.steps} == {None}
    assert tree_hash(folder) == before


def test_the_command_line(folder, first, capsys):
    words = ["run", str(folder / "recipe.yaml"), "-o", str(folder / "cli"), "-t", "1", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["command"] == "run" and told["steps"][0]["cached"] and told["passes"] == ["skip-layers.last"]
    assert main(words) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*words, "--set", "gates.max_kdl=1"]) == 2
    assert "did you mean 'max_kld'" in capsys.readouterr().err
    assert main([*words, "--dry-run", "--rehearse"]) == 2
    assert main(["run", str(folder / "none.yaml")]) == 2
