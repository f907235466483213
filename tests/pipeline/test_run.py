"""A recipe to an artifact: what is kept between runs, what is done anew, what an artifact says of its making."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

import efficli
from efficli.artifact import read_artifact
from efficli.cli import main
from efficli.errors import CheckpointError, EffiError, FitError, GateError, UsageError
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

    with pytest.raises(FitError, match=r"KiB, expected at most 1\.00 KiB"):
        again(folder, "gates.max_bytes=1024", "passes=[]", progress=Tasks())
    assert not [task for task in progress if "writing" in task or "certificate" in task]


def test_the_size_that_is_held_against_a_gate_is_that_after_the_passes(folder, first):
    """The model itself would have a larger file."""
    limit = first.files[0].nbytes
    assert efficli.export(folder / "pico", folder / "none", types=("Q4_0",), dry_run=True).files[0].nbytes > limit
    assert again(folder, f"gates.max_bytes={limit}").gates[0].met
    with pytest.raises(FitError):
        again(folder, f"gates.max_bytes={limit - 1}", dry_run=False)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("certificate.text=short.txt", " tokens is too short, expected 32 or more"),
        ("certificate.text=bytes.txt", "bytes.txt: not UTF-8"),
        ("calibration.text=bytes.txt", "bytes.txt: not UTF-8"),
        ("certificate.base=empty", "empty: config.json not found"),
        ("certificate.ctx_size=4", "certificate.ctx_size: 4, expected greater than or equal to 8"),
        ("passes.0.remove=3", "remove: 3 of 3 layers, expected at least one to remain"),
        ("exports.0.tensor_type=nosuch=Q8_0", "'nosuch' matches no weight of this model"),
        ("bench.n_prompt=9000", "a prompt of 9000 tokens is longer than the context of 256"),
        ("bench.scenario=wrong.yaml", "wrong.yaml:1: "),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_would_end_a_long_run_is_said_before_it(folder, tmp_path, monkeypatch, setting, line, dry_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("hi there")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 200)
    (tmp_path / "wrong.yaml").write_text("nothing: true\n")
    (tmp_path / "empty").mkdir()
    started = []

    class Tasks(Silent):
        def start(self, task, total, unit=""):
            started.append(task)

    settings = (setting, "bench.patience=0") if setting.startswith("bench") else (setting,)
    with pytest.raises(EffiError) as caught:
        efficli.run(folder / "recipe.yaml", "out", settings=settings, dry_run=dry_run, progress=Tasks())
    assert line in caught.value.line
    key = setting.partition("=")[0]
    where = caught.value.line.partition(": ")[0]
    assert where == f"--set {key}" or where in ("--set passes.0", "--set exports.0", "--set bench") or ":" in where
    assert not [task for task in started if "hashing" in task or "loading" in task]
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_for_the_model_has_its_line(folder, tmp_path):
    text = (folder / "recipe.yaml").read_text().replace("remove: 1", "remove: 3")
    (tmp_path / "r.yaml").write_text(text)
    number = text.splitlines().index("- method: skip-layers.last") + 1
    with pytest.raises(UsageError, match="remove: 3 of 3 layers") as caught:
        efficli.run(tmp_path / "r.yaml", tmp_path / "out")
    assert caught.value.line.startswith(f"{tmp_path / 'r.yaml'}:{number}: remove: 3 of 3 layers")


def test_an_output_that_is_or_holds_what_the_recipe_reads(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").write_text((folder / "recipe.yaml").read_text())
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "text.txt").write_text(TEXT * 4)
    before = tree_hash(tmp_path)
    with pytest.raises(UsageError, match="output plain would overwrite the recipe"):
        efficli.run("plain", force=True)
    for key in ("certificate.text", "calibration.text"):
        with pytest.raises(UsageError, match=r"would overwrite the input old/text\.txt"):
            efficli.run("plain", "old", settings=(f"{key}=old/text.txt",), force=True)
    assert tree_hash(tmp_path) == before


def test_where_inputs_are_is_no_part_of_what_they_make(folder, first, tmp_path):
    """The same model and texts elsewhere: everything comes from the cache, and the file is the same."""
    shutil.copytree(folder / "pico", tmp_path / "pico")
    shutil.copy(folder / "text.txt", tmp_path / "text.txt")
    moved = {"model": "pico", "calibration.text": "text.txt", "certificate.text": "text.txt"}
    second = again(folder, *(f"{key}={tmp_path / name}" for key, name in moved.items()))
    assert all(cached(second).values())
    assert second.files[0].sha256 == first.files[0].sha256
    manifest = read_artifact(second.output).manifest
    assert manifest["origin"] == {"name": "pico", "fingerprint": manifest["source"]["fingerprint"]}


def test_weights_of_a_pooling_module_belong_to_the_model(folder, first, tmp_path):
    """A pass takes them over: another one of the same size is another model."""
    shutil.copytree(folder / "pico", tmp_path / "pico")
    (tmp_path / "pico" / "2_Dense").mkdir()
    keys = set()
    for seed in (b"a", b"b"):
        (tmp_path / "pico" / "2_Dense" / "model.safetensors").write_bytes(seed * 100)
        done = again(folder, f"model={tmp_path / 'pico'}", "certificate={enabled: false}")
        keys.add(next(step.key for step in done.steps if step.kind == "pass"))
    assert len(keys) == 2


def test_a_model_of_the_hub_is_kept_with_its_commit(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "a" * 40
    home = tmp_path / "hub" / "models--org--pico"
    shutil.copytree(folder / "pico", home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = again(folder, "model=org/pico@main", "certificate={enabled: false}", out="hub")
    kept = yaml.safe_load((done.output / "recipe.yaml").read_text())
    assert (kept["model"], kept["revision"]) == ("org/pico", commit)
    assert json.loads((done.output / provenance.LOCK).read_text())["model"]["revision"] == commit
    resolved = efficli.run(done.output / "recipe.yaml", folder / "hub2", threads=1)
    assert sums(resolved) == sums(done)
    steps = read_artifact(done.output).manifest["steps"]
    assert [step["method"] for step in steps] == ["skip-layers.last"]


def test_an_absent_origin_is_no_gate_met_and_is_said_first(folder, tmp_path):
    shutil.copytree(folder / "pico", tmp_path / "pico")
    origin = {"fingerprint": "sha256:" + "a" * 64, "model": str(tmp_path / "gone"), "revision": None}
    (tmp_path / "pico" / "efficli.json").write_text(
        json.dumps({"version": 1, "kind": "checkpoint", "steps": [], "origin": origin, "packed": {}})
    )
    settings = (f"model={tmp_path / 'pico'}", "gates.max_kld=1")
    progress = Silent()
    with pytest.raises(GateError, match="cannot be met: origin absent"):
        again(folder, *settings, progress=progress)
    assert not any("left out" in note for note in progress.notes)  # the pass has not run
    with pytest.raises(CheckpointError, match="origin absent") as caught:
        again(folder, settings[0], "strict=true", "exports.0.type=Q8_0")
    assert caught.value.hint == "name it with certificate.base"


def test_two_exports_share_one_importance_matrix_also_without_a_cache(folder):
    (folder / "shared.yaml").write_text(
        f"version: 1\nmodel: {folder / 'pico'}\ncalibration: {{text: {folder / 'text.txt'}, ctx_size: 64, "
        "max_tokens: 512}\nexports:\n- {type: Q4_0, imatrix: auto}\n- {type: Q4_1, imatrix: auto}\n"
        "certificate: {enabled: false}\n"
    )
    both = efficli.run(folder / "shared.yaml", folder / "shared", threads=1, cache=False)
    assert [step.kind for step in both.steps] == ["imatrix", "write", "write", "load"]


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
