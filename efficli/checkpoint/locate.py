"""From the user's word for a model to a folder: a directory, a hub id, or a checkpoint that efficli carries."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from efficli.checkpoint import hub
from efficli.errors import CheckpointError, UsageError

EMBEDDED = {"reference": "checkpoint", "reference-twin": "twin"}
"""Words for the embedded checkpoints, and their folders in efficli/reference."""


@dataclass(frozen=True, slots=True)
class Place:
    """A checkpoint's folder, what to call it, and its commit if it came from the hub."""

    root: Path
    name: str
    revision: str | None = None


def locate(model: str | Path, revision: str | None = None, *, weights: bool = True) -> Place:
    """The folder that `model` means: an existing directory, `reference`, or a hub id `org/name[@revision]`.

    Of a model of the hub everything is fetched, without `weights` the small files alone.
    """
    word = os.fspath(model)
    if word in EMBEDDED and not isinstance(model, Path):
        root = Path(__file__).parent.parent / "reference" / EMBEDDED[word]
        if not root.is_dir():
            raise CheckpointError(f"{word!r} is not part of this installation", hint="reinstall efficli")
        return Place(root, word)
    if not word:  # Path("") would be the current directory
        raise CheckpointError("no such checkpoint: ''", hint=suggest(word))
    path = Path(word).expanduser()
    if _is_directory(path):
        if revision is not None:
            raise UsageError(f"{word}: a directory has no revision {revision!r}")
        return _directory(path)
    if path.is_file():
        raise CheckpointError("is a file, expected a checkpoint directory", where=word, hint=_hint_for_file(path))
    match = hub.HUB_ID.fullmatch(word)
    if isinstance(model, Path) or match is None:
        raise CheckpointError(f"no such checkpoint: {word}", hint=suggest(word))
    return _on_hub(word, match["id"], _one_revision(match["revision"], revision), weights)


def suggest(word: str) -> str:
    """A hint with the nearest names: directories beside the one that was meant, cached models, `reference`."""
    known = [*_neighbours(Path(word).expanduser()), *hub.cached_models(), *EMBEDDED]
    wanted = word.partition("@")[0].rstrip("/").lower()
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(wanted, by_lower, n=3, cutoff=0.6)
    if not near:
        tails = {name.rpartition("/")[2]: name for name in by_lower}
        near = [tails[tail] for tail in difflib.get_close_matches(wanted.rpartition("/")[2], tails, n=3, cutoff=0.7)]
    if near:
        return f"did you mean {' or '.join(repr(by_lower[name]) for name in near)}?"
    return "give a directory, a hub id such as org/name, or 'reference'"


def _on_hub(word: str, repository: str, revision: str | None, weights: bool) -> Place:
    # a bare word is a model of the hub only if it is cached: a misspelt folder is not sent to anybody
    if "/" not in repository and not hub.cached(repository):
        raise CheckpointError(f"no such checkpoint: {word}", hint=suggest(word))
    try:
        root = hub.fetch(repository, revision) if weights else hub.fetch_small(repository, revision)
    except hub.NotOnHubError as error:
        hint = suggest(word)
        raise CheckpointError(error.message, hint=hint if "did you mean" in hint else error.hint) from None
    except hub.NotCachedError as error:
        hint = suggest(word)
        raise CheckpointError(error.message, hint=hint if "did you mean" in hint else error.hint) from None
    return Place(root, repository, root.name)


def _one_revision(in_word: str | None, given: str | None) -> str | None:
    if in_word and given and in_word != given:
        raise UsageError(f"two revisions: {in_word!r} in the name and {given!r}")
    return in_word or given


def _directory(path: Path) -> Place:
    """A directory; a snapshot of the hub's cache keeps its hub id and commit."""
    real = path.resolve()
    repository = real.parent.parent.name
    if real.parent.name == "snapshots" and repository.startswith("models--"):
        return Place(path, repository.removeprefix("models--").replace("--", "/", 1), real.name)
    # the name goes into files: bytes of it that are no text are replaced
    return Place(path, os.fsencode(real.name or str(real)).decode("utf-8", "replace"))


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file system can hold
        return False


def _neighbours(path: Path) -> list[str]:
    """Directories beside `path`, written as the user wrote it."""
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir() and not entry.name.startswith(".")]
    except (OSError, ValueError):
        return []
    prefix = "" if path.parent == Path() else f"{path.parent}/"
    return [prefix + name for name in sorted(names)[:2000]]


def _hint_for_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "a GGUF file is already an artifact; give the checkpoint that it was made from"
    return f"give the directory: {path.parent}"
