"""quantize.mixed on a few tokens, and the file that becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from gguf import GGUFReader

import efficli
from efficli.catalog import config_of, run_method
from efficli.checkpoint import open_checkpoint
from efficli.method import MethodConfig, Outcome
from efficli.ops import child
from efficli.ops.ggml_types import TYPE_IDS
from efficli.pipeline.file_view import GgufView
from efficli.precision import calibrate, measure, search
from tests.precision.here import context, drawn

TWIN = "reference-twin"
NAMES = {number: name for name, number in TYPE_IDS.items()}
QUICK = {"loss": "hess", "swaps": 0}


def configured(**keys: Any) -> MethodConfig:
    """Quick, unless the keys say otherwise."""
    return config_of("quantize.mixed").model_validate(QUICK | keys)


def mixed(folder: Path, kept: Path, model: str | Path = TWIN, **keys: Any) -> Outcome:
    """Run the method into the folder on a few drawn tokens."""
    ckpt = open_checkpoint(model)
    folder.mkdir(parents=True)
    return run_method("quantize.mixed", ckpt, folder, configured(**keys), context(kept, GgufView(ckpt), drawn(900, 8)))


def exported(folder: Path, out: Path, **more: Any) -> Path:
    """The file of a checkpoint."""
    done = efficli.export(folder, out, certificate=False, threads=1, **more)
    path: Path = done.output / done.files[0].name
    return path


def recipe(folder: Path, model: str | Path, **keys: Any) -> Path:
    """A recipe with one pass, which looks at few tokens."""
    calibration: dict[str, Any] = {"ctx_size": 64, "max_tokens": 512}
    values = {
        "version": 1,
        "model": str(model),
        "calibration": calibration,
        "passes": [{"method": "quantize.mixed", **QUICK, **keys}],
        "exports": {"type": "MIXED"},
        "certificate": {"enabled": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def types_in(path: Path) -> dict[str, str]:
    return {tensor.name: NAMES[tensor.tensor_type.value] for tensor in GGUFReader(path).tensors}


def told(outcome: Outcome, word: str) -> str:
    (row,) = [row for row in outcome.report if word in row]
    return row


def real_children(patch: pytest.MonkeyPatch) -> None:
    """Children of the method as they are, too."""
    for module in (calibrate, measure, search):
        patch.setattr(module, "run_child", child.run_child)


SMALL_TARGET = """
like: {like}
about: a board with little memory
version: 1
ram:
  total_mib: {{value: 64, source: drawn, confidence: published}}
  usable_mib: {{value: {usable}, low: {usable}, high: {usable}, source: drawn, confidence: estimate}}
{more}"""


def small_target(folder: Path, usable: float, *, like: str = "pi5-4gb", more: str = "") -> Path:
    path = folder / "board.yaml"
    path.write_text(SMALL_TARGET.format(usable=usable, like=like, more=more))
    return path
