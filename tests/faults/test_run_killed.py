"""A run that is killed anywhere is finished by the next one, with the same bytes, and nothing is left behind."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.killing import kill_and_rerun, moments, undisturbed
from tests.pico import TEXT, write_llama


@pytest.fixture
def recipe(tmp_path):
    """Four steps that are kept (a pass, a matrix, a file, its certificate), and bench."""
    write_llama(tmp_path / "pico", layers=3, dtype="BF16")
    (tmp_path / "text.txt").write_text(TEXT * 4)
    text = {"text": str(tmp_path / "text.txt"), "ctx_size": 64}
    values = {
        "version": 1,
        "model": str(tmp_path / "pico"),
        "passes": [{"method": "skip-layers.last", "remove": 1}],
        "calibration": text,
        "exports": [{"type": "Q4_0", "imatrix": "auto"}],
        "certificate": text,
        "bench": {"n_prompt": 8, "n_gen": 4, "patience": 0.0, "starts": False, "threads": 1},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_killed_at_twenty_moments(recipe, tmp_path):
    whole = undisturbed(recipe, tmp_path / "undisturbed")
    assert not [name for name in whole.leaves if "efficli" in name]
    found = [
        kill_and_rerun(recipe, tmp_path / str(number), moment)
        for number, moment in enumerate(moments(whole.lines, 20, whole.seconds))
    ]
    assert len(found) == 20
    assert [one for one in found if one.rerun or one.sums != whole.sums or set(one.strays) - whole.leaves] == []
    assert sum(one.was_killed for one in found) >= 18
    # dead before the first result, and after each of the four
    assert {one.kept for one in found} == {0, 1, 2, 3, 4}
