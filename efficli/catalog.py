"""Methods by name: `lowrank.svd` is efficli/lowrank/svd.py, and nothing is registered anywhere.

Listing them and reading their one-liners imports none of them; a name is written with hyphens (`skip-layers.last`),
underscores are understood.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from efficli import tensorwise
from efficli.checkpoint import Checkpoint
from efficli.checkpoint.sidecar import ALLOCATION_DROPPED, Origin, Sidecar, Step, compress, sealed, write_sidecar
from efficli.errors import UsageError, did_you_mean
from efficli.method import (
    Context,
    InputsOf,
    Kind,
    Leave,
    MethodConfig,
    Outcome,
    Rehearsal,
    TensorConfig,
    TensorSolver,
    WholeModel,
)
from efficli.ops.storage import sync_directory, sync_file, writing

PACKAGES = ("quantize", "lowrank", "skip_layers", "distill")
"""Packages of methods, where they exist; every module in them is a method."""

_ROOT = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method that was imported. `run` is there for the kind whole-model, `solve` for the kind tensor."""

    name: str
    kind: Kind
    config: type[MethodConfig]
    run: WholeModel | None = None
    solve: TensorSolver | None = None
    leave: Leave | None = None
    rehearsal: Rehearsal | None = None
    uses: tuple[str, ...] = ()
    inputs: InputsOf | None = None


def method_names() -> tuple[str, ...]:
    """The names of all methods, package by package."""
    return tuple(
        f"{package}.{path.stem}".replace("_", "-")
        for package in PACKAGES
        for path in sorted((_ROOT / package).glob("[!_]*.py"))
    )


def canonical(name: str) -> str:
    """The name with hyphens, as it is written everywhere; UsageError if there is no such method."""
    word = name.replace("_", "-").lower()
    known = method_names()
    if word not in known:
        last = {other.partition(".")[2]: other for other in known}
        hint = did_you_mean(word, known) or (f"did you mean {last[word]!r}?" if word in last else None)
        raise UsageError(f"unknown method {name!r}", hint=hint or "efficli methods")
    return word


def about(name: str) -> str:
    """The first line of a method's docstring; it is not imported."""
    return description(name).partition("\n")[0]


def description(name: str) -> str:
    """A method's whole docstring: equations, papers, what it costs; it is not imported."""
    return ast.get_docstring(_tree(name)) or ""


def kind_of(name: str) -> Kind:
    """The kind of a method; it is not imported."""
    for node in _tree(name).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="KIND")], value=ast.Constant(value=str(kind))) if kind in get_args(
                Kind
            ):
                return cast(Kind, kind)
    raise ValueError(f"{module_of(name)} says no KIND")


def load_method(name: str) -> Method:
    """Import a method. UsageError "unknown method", with the nearest name."""
    module = importlib.import_module(module_of(name))
    return Method(
        name=canonical(name),
        kind=kind_of(name),
        config=module.Config,
        run=getattr(module, "run", None),
        solve=getattr(module, "solve", None),
        leave=getattr(module, "leave", None),
        rehearsal=getattr(module, "rehearsal", None),
        uses=getattr(module, "USES", ()),
        inputs=getattr(module, "inputs", None),
    )


def config_of(name: str) -> type[MethodConfig]:
    """The schema of a method's keys."""
    return load_method(name).config


def run_method(
    name: str,
    ckpt: Checkpoint,
    folder: Path,
    config: MethodConfig,
    context: Context,
    *,
    origin: Origin | None = None,
) -> Outcome:
    """Run a method from `ckpt` into the empty `folder`, which is then a checkpoint with its sidecar.

    An allocation of types that `ckpt` has is dropped, with a row in the report, where the method makes no other one.
    The origin stays that of `ckpt`. Where it has none it is `origin`, by default `ckpt` itself, whose fingerprint is
    then made from its weights. With `context.headers_only` no weight is read, and an origin that would have to be
    made is left out. Errors are the method's own, and OutputError.
    """
    method = load_method(name)
    if method.kind == "tensor":
        assert method.solve is not None
        assert isinstance(config, TensorConfig)
        outcome = tensorwise.run(method.solve, method.leave, ckpt, folder, config, context)
    else:
        assert method.run is not None
        outcome = method.run(ckpt, folder, config, context)
    step = Step(method=method.name, config=config.model_dump(mode="json"))
    parent = ckpt.sidecar or Sidecar()
    sidecar = parent.model_copy(update={"steps": [*parent.steps, step]})
    if parent.origin is not None or origin is not None or not context.headers_only:
        sidecar = compress(parent, step, parent.origin or origin or _origin(ckpt, context))
    allocation = None if outcome.allocation is None else sealed(outcome.allocation, folder)
    if parent.allocation is not None and allocation is None:
        outcome = replace(outcome, report=(*outcome.report, ALLOCATION_DROPPED))
    sidecar = sidecar.model_copy(update={"packed": dict(outcome.packed), "allocation": allocation})
    with writing(folder):
        path = write_sidecar(folder, sidecar)
        sync_file(path)
        sync_directory(folder)
    return outcome


def _origin(ckpt: Checkpoint, context: Context) -> Origin:
    return Origin(fingerprint=ckpt.fingerprint(context.progress), model=ckpt.model, revision=ckpt.revision)


def module_of(name: str) -> str:
    """The dotted name of a method's module."""
    return "efficli." + canonical(name).replace("-", "_")


def method_modules(name: str) -> tuple[str, ...]:
    """Modules whose source, with all that they import, decides what a method writes: its own, and what runs it."""
    return module_of(name), __name__


def _tree(name: str) -> ast.Module:
    """The syntax tree of a method's module."""
    path = _ROOT.joinpath(*module_of(name).split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))
