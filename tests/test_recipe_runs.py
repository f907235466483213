"""Every shipped recipe runs as it stands, on the reference, and its gates hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from efficli.cli import main
from efficli.recipe import load, load_with, parse_recipe

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = {"pi5-chat", "pi-zero-code", "phone-q4", "ci-gate", "reference-demo", "byte-budget"}


def test_there_is_one_for_each_of_them_and_it_says_how_to_take_ones_own_model():
    assert {path.stem for path in SHIPPED} == NAMES
    for path in SHIPPED:
        assert load(path).model == "reference"
        (command,) = re.findall(r"^#   (efficli run .*)", path.read_text(), re.MULTILINE)
        assert command.startswith(f"efficli run recipes/{path.name} --set model=org/name")
        assert load_with(path, ["model=org/name"]).recipe.model == "org/name"


def test_the_demonstration_has_every_step():
    recipe = load(ROOT / "recipes" / "reference-demo.yaml")
    assert recipe.passes
    assert len(recipe.exports) == 2
    assert any(export.imatrix == "auto" for export in recipe.exports)
    assert recipe.certificate.enabled
    assert recipe.bench is not None
    assert recipe.gates.max_kld is not None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_plan_of_a_shipped_recipe_fits_its_targets(path, tmp_path, capsys):
    assert main(["run", str(path), "-o", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    fits = json.loads(capsys.readouterr().out)["targets"]
    assert {fit["verdict"] for fit in fits} <= {"FIT", "TIGHT"}
    assert len(fits) >= len(load(path).target)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_runs_on_the_reference_and_its_gates_hold(path, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["run", str(path), "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    recipe = load(path)
    assert parse_recipe((out / "recipe.yaml").read_text()) == recipe
    assert len(told["gates"]) >= sum(value is not None for _, value in recipe.gates)
    assert all(gate["met"] for gate in told["gates"])
    assert {file["type"] for file in told["files"]} == {kind for export in recipe.exports for kind in export.type}
    assert all(file["certificate"]["status"] == "measured" for file in told["files"])
