"""Measured losses of types, in a child process: the divergence of the network with one tensor of another type, or with
noise in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from efficli.artifact.temporary import scratch_directory
from efficli.checkpoint import open_checkpoint
from efficli.network.divergence import Divergence
from efficli.network.model import Network
from efficli.ops.child import run_child
from efficli.precision.curves import Curve
from efficli.precision.encoder import Encoder, Rounding, Statistics
from efficli.precision.typed import TypedNetwork
from efficli.precision.view import FileTensor
from efficli.progress import Progress

NOISE = 0.1
"""Root mean square of the noise that a tensor is probed with, in units of its weights': about that of 4 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A network and what its tensors are tried with; plain data goes to the child, which builds it."""

    root: Path
    tensors: Sequence[FileTensor]
    statistics: Statistics
    rounding: Rounding
    chunks: Sequence[Sequence[int]]
    """What divergences are measured on."""
    threads: int
    seed: int

    def to_json(self, folder: Path) -> dict[str, Any]:
        """As plain data; importances go into a file in `folder`."""
        np.savez(folder / "imatrix.npz", allow_pickle=False, **dict(self.statistics.squares))
        grams = {name: [[str(path), i] for path, i in found] for name, found in self.statistics.grams.items()}
        return {
            "root": str(self.root.absolute()),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "imatrix": str((folder / "imatrix.npz").absolute()),
            "grams": grams,
            "rounding": self.rounding,
            "chunks": [list(chunk) for chunk in self.chunks],
            "threads": self.threads,
            "seed": self.seed,
        }


def build(argument: Mapping[str, Any]) -> tuple[TypedNetwork, Divergence]:
    """In the child: the network, all of whose tensors have the checkpoint's values, and its divergence from that."""
    with np.load(argument["imatrix"]) as stored:
        squares = {name: stored[name] for name in stored.files}
    grams = {name: [(Path(path), index) for path, index in found] for name, found in argument["grams"].items()}
    # what its configuration says of code was judged by the parent; none is run
    network = Network(open_checkpoint(argument["root"], trust_remote_code=True), threads=argument["threads"])
    encoder = Encoder(Statistics(squares, grams), rounding=argument["rounding"], threads=argument["threads"])
    tensors = [FileTensor.from_json(tensor) for tensor in argument["tensors"]]
    return TypedNetwork(network, tensors, encoder), Divergence(network, argument["chunks"])


def measured(
    bench: Bench, curves: Mapping[str, Curve], kinds: Mapping[str, Sequence[str]], progress: Progress
) -> dict[str, Curve]:
    """The curves with the divergence of `kinds`, each type alone in the network (`Point.kld`)."""
    found = _in_child(bench, {"kinds": {name: list(some) for name, some in kinds.items()}}, progress)
    return {
        name: replace(
            curve, points={k: replace(point, kld=found.get(name, {}).get(k)) for k, point in curve.points.items()}
        )
        for name, curve in curves.items()
    }


def probed(bench: Bench, curves: Mapping[str, Curve], progress: Progress) -> dict[str, Curve]:
    """The curves with the network's sensitivity to noise in each tensor (`Curve.sensitivity`)."""
    found = _in_child(bench, {"kinds": None}, progress)
    return {name: replace(curve, sensitivity=found.get(name)) for name, curve in curves.items()}


def _in_child(bench: Bench, more: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    with scratch_directory() as folder:
        argument = bench.to_json(folder) | dict(more) | {"out": str(folder / "found.json")}
        run_child("efficli.precision.measure:measure", argument, what="measuring losses", progress=progress)
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return found


def measure(argument: Mapping[str, Any], progress: Progress) -> None:
    """The child's part of `measured` and `probed`."""
    typed, divergence = build(argument)
    found: dict[str, Any] = {}
    reached = [name for name in typed.tensors if typed.reaches(name)]
    if argument["kinds"] is None:
        progress.start("noise in one tensor at a time", len(reached), "tensors")
        for name in reached:
            error = typed.noise(name, NOISE, argument["seed"])
            loss = max(0.0, divergence.mean(typed.first_layer(name)))
            typed.use(name, None)
            found[name] = loss / error if error > 0 else 0.0
            progress.advance(1)
    else:
        asked = {name: kinds for name, kinds in argument["kinds"].items() if name in reached}
        progress.start("one tensor at a time", sum(map(len, asked.values())), "trials")
        for name, kinds in asked.items():
            for kind in kinds:
                typed.use(name, kind)
                found.setdefault(name, {})[kind] = max(0.0, divergence.mean(typed.first_layer(name)))
                progress.advance(1)
            typed.use(name, None)
    progress.finish()
    Path(argument["out"]).write_text(json.dumps(found))
