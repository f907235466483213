"""A checkpoint on its way to a choice of types, all of it in this process: the functions of the children themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.method import Context
from efficli.pipeline.file_view import GgufView
from efficli.precision import calibrate, measure, search
from efficli.precision.choice import choices
from efficli.precision.encoder import Rounding
from efficli.precision.view import Calibration
from efficli.precision.work import Workshop
from efficli.progress import Progress, Silent

CHUNK = 64


def run_here(function: str, argument: object, *, what: str, progress: Progress, **_more: object) -> Any:
    """What `run_child` does, without the child."""
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(argument, progress)


@pytest.fixture(scope="module")
def in_this_process() -> Any:
    """No child processes: each of them would import PyTorch anew."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (calibrate, measure, search):
            patch.setattr(module, "run_child", run_here)
        yield


def drawn(vocab: int, chunks: int, *, size: int = CHUNK, selection: int = 2) -> Calibration:
    """Calibration tokens that are drawn; of which the last chunks are for selection."""
    draw = np.random.default_rng(0)
    ids = tuple(tuple(row) for row in draw.integers(3, vocab, (chunks + selection, size)).tolist())
    sha256 = hashlib.sha256(str(ids).encode()).hexdigest()
    return Calibration(name="drawn", sha256=sha256, chunks=ids[:chunks], selection=ids[chunks:])


def context(folder: Path, view: GgufView, calibration: Calibration, **more: Any) -> Context:
    """A context whose kept results lie in `folder`, each made once."""

    def keep(kind: str, what: str, module: str, ingredients: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
        place = folder / f"{kind}-{hashlib.sha256(repr(sorted(ingredients.items())).encode()).hexdigest()[:16]}"
        if not place.exists():
            place.mkdir(parents=True)
            fill(place)
        return place

    return Context(threads=1, progress=Silent(), file=view, calibration=lambda: calibration, keep=keep, **more)


@dataclass(frozen=True)
class Shop:
    """A workshop whose statistics are there, and what it works on."""

    ckpt: Checkpoint
    view: GgufView
    shop: Workshop


def open_shop(model: str | Path, folder: Path, calibration: Calibration, *, rounding: Rounding = "nearest") -> Shop:
    """A calibrated workshop of a checkpoint; what it keeps is in `folder`."""
    ckpt = open_checkpoint(model)
    view = GgufView(ckpt)
    found = choices(view, (), weighed=view.multiplied, lacking=(), slow=())
    shop = Workshop(ckpt=ckpt, view=view, context=context(folder, view, calibration), choices=found, rounding=rounding)
    shop.calibrate(None)
    return Shop(ckpt, view, shop)
