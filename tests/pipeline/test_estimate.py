"""Predicted times: of the steps that will run, more for more work, and said to be predictions."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficli.cli import main
from efficli.pipeline.estimate import NANOSECONDS, predicted_steps
from efficli.pipeline.result import ExportedFile, ExportResult
from efficli.recipe import Recipe, parse_recipe
from tests.pico import write_llama

EVERYTHING = """version: 1
model: m
passes: [{method: skip-layers.last, remove: 1}]
exports:
- {type: [Q8_0, Q4_K_M]}
- {type: IQ3_S, imatrix: auto}
bench: {}
"""


def recipe(text: str = EVERYTHING, **values) -> Recipe:
    return parse_recipe(text).model_copy(update=values)


def planned(weights: int = 10**9) -> ExportResult:
    """Three files of a model."""
    types = {"Q8_0": "Q8_0", "Q4_K_M": "Q4_K", "IQ3_S": "IQ3_S"}
    files = tuple(
        ExportedFile(
            name=f"m-{name}.gguf", type=name, nbytes=weights, bits_per_weight=8.0, fallbacks=(), weights={kind: weights}
        )
        for name, kind in types.items()
    )
    return ExportResult(
        output=Path("out"), model="m", num_weights=weights, files=files, report=(), dry_run=True,
        passes=("skip-layers.last",),
    )  # fmt: skip


def seconds(recipe: Recipe, weights: int = 10**9, threads: int = 2) -> dict[str, float]:
    found: dict[str, float] = {}
    for step in predicted_steps(recipe, planned(weights), threads):
        found[step.kind] = found.get(step.kind, 0.0) + step.seconds
    return found


def test_every_step_has_a_time_that_grows_with_the_model_and_falls_with_the_cores():
    once, larger, slower = seconds(recipe()), seconds(recipe(), 10**10), seconds(recipe(), threads=1)
    assert list(once) == ["pass", "imatrix", "write", "load", "certificate", "bench"]
    for kind, time in once.items():
        assert 0 < time < larger[kind] <= 10 * time
        assert time <= slower[kind] <= 2 * time
    assert slower["certificate"] > 1.9 * once["certificate"] and slower["write"] > 1.9 * once["write"]


def test_bench_takes_what_its_options_say():
    plain = seconds(recipe())["bench"]
    for smaller in ("n_gen: 16", "n_prompt: 16", "patience: 0", "starts: false"):
        assert seconds(recipe(EVERYTHING.replace("bench: {}", f"bench: {{{smaller}}}")))["bench"] < plain
    for larger in ("depth: [0, 1024]", "repetitions: 9", "threads: [1, 2]"):
        assert seconds(recipe(EVERYTHING.replace("bench: {}", f"bench: {{{larger}}}")))["bench"] > plain


def test_steps_that_will_not_run_have_no_time():
    assert set(seconds(recipe("version: 1\nmodel: m\nexports: {type: Q8_0}\ncertificate: {enabled: false}\n"))) == {
        "pass", "write", "load",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["IQ2_XS", "Q4_K", "Q8_0"])
def test_a_matrix_is_counted(kind):
    plain, weighed = NANOSECONDS[kind]
    assert 0 < plain <= weighed


def test_they_are_called_predicted(tmp_path, capsys):
    model = write_llama(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(f"version: 1\nmodel: {model}\nexports: {{type: Q8_0}}\n")
    assert main(["run", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    assert "Steps (predicted)" in capsys.readouterr().err
