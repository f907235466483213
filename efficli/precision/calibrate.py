"""Statistics of a checkpoint's matrices on the calibration text, made in a child process and kept as files.

squares.npz      sums of x² and counts, by the checkpoint's names
grams.json       tensor name -> N.npy, mean(x xᵀ) (matrices, columns, columns), one file for each input
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError
from efficli.network.model import Network
from efficli.network.statistics import Statistic, in_passes
from efficli.ops.child import run_child
from efficli.precision.view import Calibration, FileTensor
from efficli.progress import Progress

SQUARES, GRAMS = "squares.npz", "grams.json"
MEMORY_BYTES = 2 << 30
"""Of sums x xᵀ that are held at once; more of them take another run over the text."""
_SUM, _COUNT = ".in_sum2", ".counts"

Sums = dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]


def calibrate(
    root: Path, calibration: Calibration, folder: Path, *, grams: bool, threads: int, progress: Progress
) -> None:
    """Run the network of the checkpoint in `root` over the calibration text; writes the files into `folder`."""
    argument = {
        "root": str(root.absolute()),
        "chunks": [list(chunk) for chunk in calibration.chunks],
        "grams": grams,
        "threads": threads,
        "out": str(folder.absolute()),
    }
    run_child("efficli.precision.calibrate:collect", argument, what="calibrating", progress=progress)


def collect(argument: Mapping[str, Any], progress: Progress) -> None:
    """The child's part of `calibrate`."""
    # what its configuration says of code was judged by the parent; none is run
    network = Network(open_checkpoint(argument["root"], trust_remote_code=True), threads=argument["threads"])
    folder, files = Path(argument["out"]), dict[str, str]()
    stored: dict[str, NDArray[Any]] = {}
    written: dict[int, str] = {}
    wanted = [name for name in network.matrices if name not in network.unwatched] if argument["grams"] else []
    for found in in_passes(network, argument["chunks"], hessians=wanted, memory_bytes=MEMORY_BYTES, progress=progress):
        written.clear()  # arrays of another run may have the address of one that is gone
        for name, one in found.items():
            stored[name + _SUM], stored[name + _COUNT] = one.squares, one.counts
            if one.gram is not None:
                if id(one.gram) not in written:
                    written[id(one.gram)] = f"gram-{len(set(files.values()))}.npy"
                    np.save(folder / written[id(one.gram)], _mean_gram(one))
                files[name] = written[id(one.gram)]
    np.savez(folder / SQUARES, allow_pickle=False, **stored)
    (folder / GRAMS).write_text(json.dumps(files, indent=1, sort_keys=True))


def read_sums(folder: Path, tensors: Sequence[FileTensor]) -> Sums:
    """Sums of x² (matrices, columns) and counts (matrices,) of tensors of the file; those not watched are left out."""
    found: Sums = {}
    with np.load(folder / SQUARES) as stored:
        for tensor in tensors:
            if not tensor.parts or any(part.name + _SUM not in stored for part in tensor.parts):
                continue
            squares = np.stack([stored[part.name + _SUM][part.index] for part in tensor.parts])
            counts = np.array([stored[part.name + _COUNT][part.index] for part in tensor.parts])
            found[tensor.name] = (squares, counts)
    return found


def gram_files(folder: Path, tensors: Sequence[FileTensor]) -> dict[str, list[tuple[Path, int]]]:
    """For each tensor of the file the (file, index) of mean(x xᵀ) of each of its matrices."""
    files: dict[str, str] = json.loads((folder / GRAMS).read_text())
    return {
        tensor.name: [(folder / files[part.name], part.index) for part in tensor.parts]
        for tensor in tensors
        if tensor.parts and all(part.name in files for part in tensor.parts)
    }


def unseen(sums: Sums) -> list[str]:
    """A row for each tensor with experts or channels that the calibration text never reached."""
    rows = []
    for name, (squares, counts) in sums.items():
        if experts := int((counts == 0).sum()):
            of = f"{experts} of {len(counts)} experts" if len(counts) > 1 else "it"
            rows.append(f"{name}: the calibration text never reaches {of}; columns count the same there")
        if channels := int((squares[counts > 0] == 0).sum()):
            rows.append(f"{name}: {channels} of {squares[counts > 0].size} channels are zero on the calibration text")
    return rows


def _mean_gram(one: Statistic) -> NDArray[np.float32]:
    """mean(x xᵀ) of each matrix; zeros where nothing was seen."""
    assert one.gram is not None
    if not np.isfinite(one.gram).all():
        raise CheckpointError("inputs of a matrix are not finite on the calibration text")
    counts = np.maximum(one.counts, 1).astype(np.float32)
    mean: NDArray[np.float32] = one.gram / counts[:, None, None]
    return mean
