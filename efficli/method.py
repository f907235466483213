"""What every method is made of: its configuration, what it is handed, what it answers; `catalog` finds the methods.

A method is one module of `quantize`, `lowrank`, `skip_layers` or `distill`. It has a docstring whose first line says
what it does, a class `Config`, a constant `KIND`, and the function of its kind:

whole-model   run(ckpt, folder, config, context) -> Outcome: writes the new checkpoint into the empty `folder`.
tensor        solve(weight, statistics, config, context) -> weight, and, where some matrices are not for it,
              leave(rows, columns, config) -> why one of this shape stays as it is, or None. `tensorwise` walks them.

A module may have rehearsal(config, layers) -> config too, if its keys depend on the size of the model; USES, names of
what it wants of its context ("file", "calibration"); and inputs(config) -> Inputs, what it reads beside the checkpoint.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.sidecar import Allocation, Packed
from efficli.precision.view import Calibration, FileView
from efficli.progress import Progress, Silent
from efficli.strict_schema import Part

Kind = Literal["whole-model", "tensor"]


def _words(value: Any) -> Any:
    """One pattern where a list of patterns is meant."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _compiles(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression ({error})") from None
    return patterns


Patterns = Annotated[
    tuple[str, ...], BeforeValidator(_words, json_schema_input_type=str | list[str]), AfterValidator(_compiles)
]
"""Regular expressions; one matches a name if it is found anywhere in it."""


class MethodConfig(Part):
    """The keys of a method in a recipe; each field has a docstring, which `efficli methods NAME` shows."""


class TensorConfig(MethodConfig):
    """The keys of a method that works matrix by matrix."""

    include: Patterns = ()
    """Regular expressions on tensor names; without one, the linear layers of all blocks."""
    exclude: Patterns = ()
    """Regular expressions on names of tensors that stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a method is handed beside the weights and its configuration."""

    seed: int = 0
    """Of everything that is drawn."""
    threads: int | None = None
    """How many to compute with; None: all cores."""
    progress: Progress = field(default_factory=Silent)
    evaluate: Callable[[Path], float] | None = None
    """The loss of the checkpoint in a folder, for methods that choose by measuring; lower is better."""
    headers_only: bool = False
    """Write sizes, not values: the folder is planned with, and then thrown away."""
    file: FileView | None = None
    """The file that the checkpoint becomes; for methods that use "file"."""
    calibration: Callable[[], Calibration] | None = None
    """Tokens to look at the model with; for methods that use "calibration"."""
    keep: Keep | None = None
    """Results of parts of the method that are worth keeping; for methods that use "calibration"."""

    @property
    def num_threads(self) -> int:
        """How many to compute with."""
        return self.threads or len(os.sched_getaffinity(0))

    def need_file(self) -> FileView:
        """`file`, of a method that uses it."""
        if self.file is None:
            raise ValueError("the method does not say that it uses the file")
        return self.file

    def need_calibration(self) -> Calibration:
        """`calibration`, of a method that uses it."""
        if self.calibration is None:
            raise ValueError("the method does not say that it uses the calibration text")
        return self.calibration()

    def need_keep(self) -> Keep:
        """`keep`, of a method that uses the calibration text."""
        if self.keep is None:
            raise ValueError("the method does not say that it uses the calibration text")
        return self.keep


class Keep(Protocol):
    """Makes a part of a method's work, or finds it where it was made before."""

    def __call__(
        self, kind: str, what: str, module: str, ingredients: Mapping[str, Any], fill: Callable[[Path], None]
    ) -> Path:
        """The folder that `fill` wrote, now or earlier, from the same checkpoint, ingredients and source code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a method reads beside its checkpoint."""

    files: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a method says of its work."""

    report: tuple[str, ...] = ()
    """Rows for a reader: what was changed, and what was not although it was asked for."""
    packed: Mapping[str, Packed] = field(default_factory=dict)
    """Exact codes that are kept beside the new weights."""
    allocation: Allocation | None = None
    """The types of a file's tensors, where the method chose them; its imatrix is written beside the new weights."""


class WholeModel(Protocol):
    """The function of a pass over the whole model."""

    def __call__(self, ckpt: Checkpoint, folder: Path, config: Any, context: Context) -> Outcome:
        """Write the new checkpoint into the empty `folder`."""


class TensorSolver(Protocol):
    """The function of a method that works matrix by matrix."""

    def __call__(
        self, weight: NDArray[np.float32], statistics: None, config: Any, context: Context
    ) -> NDArray[np.float32]:
        """The new matrix (out, in) for `weight` (out, in), whose values are finite."""


Leave = Callable[[int, int, Any], str | None]
"""Rows, columns, configuration -> why such a matrix stays as it is, or None."""

InputsOf = Callable[[Any], Inputs]
"""Configuration -> what is read beside the checkpoint."""

Rehearsal = Callable[[Any, int], Any]
"""Configuration, number of layers -> the configuration with which a clone of so few layers can be gone through."""
