"""What a choice of types was made from, for those who want to know: numbers as JSON, the frontier as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficli.checkpoint.tensor_types import ALLOCATION, FRONTIER
from efficli.ops.storage import sync_file, write_file
from efficli.precision.choice import Decision
from efficli.precision.frontier import Mark, draw, frontier
from efficli.precision.work import Workshop


def write(folder: Path, shop: Workshop, decision: Decision, losses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Write `allocation.json` and `frontier.png` into the folder; rows for the report."""
    sizes = shop.choices.nbytes
    fixed = decision.nbytes - sum(sizes[name][kind] for name, kind in decision.types.items())
    line = frontier(sizes, losses, fixed)
    presets = [
        Mark(name, shop.view.nbytes(types), sum(losses[tensor][kind] for tensor, kind in types.items()))
        for name, types in shop.presets().items()
    ]
    chosen = Mark("", decision.nbytes, decision.loss)
    found = shop.found
    told: dict[str, Any] = {
        "schema_version": 1,
        "loss_model": decision.model,
        "nbytes": decision.nbytes,
        "limit": decision.limit,
        "predicted_loss": decision.loss,
        "gap_to_bound": decision.gap,
        "measured": found and dict(found.measured),
        "divergence": found and found.divergence,
        "start": found and found.start,
        "trials": found and found.trials,
        "tensors": {
            name: {"type": kind, "nbytes": sizes[name][kind], "loss": losses[name][kind]}
            for name, kind in decision.types.items()
        },
        "frontier": [[mark.nbytes, mark.loss] for mark in line],
        "presets": {mark.name: [mark.nbytes, mark.loss] for mark in presets},
    }
    write_file(folder / ALLOCATION, json.dumps(told, indent=1, sort_keys=True) + "\n")
    sync_file(folder / ALLOCATION)
    try:
        draw(folder / FRONTIER, line, presets, chosen, decision.model)
    except ModuleNotFoundError:
        return [f"no {FRONTIER}: matplotlib is not installed (pip install 'efficli[plot]')"]
    sync_file(folder / FRONTIER)
    return []
