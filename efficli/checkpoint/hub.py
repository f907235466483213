"""Models of the Hugging Face hub: fetched into, or found in, its cache. HF_HOME, HF_HUB_OFFLINE, HF_TOKEN ... hold."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from efficli.checkpoint.shards import INDEX, SINGLE, read_index
from efficli.errors import CheckpointError

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w.][\w./-]*))?")
"""`org/name`, or `name` for the oldest models, and a branch, tag or commit."""

SMALL_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
ELSEWHERE = ("original/*", "onnx/*", "openvino/*", "coreml/*", "gguf/*", "*.gguf", "checkpoint-*/*", "runs/*")
"""Folders in which repositories keep other forms of the same model."""


def fetch(repository: str, revision: str | None) -> Path:
    """The snapshot folder of a model, complete with its weights; what is cached is not fetched again.

    Configuration and tokenizer come first: they name the weight files, and nothing else is fetched.
    """
    folder = fetch_small(repository, revision)
    # from here on the commit, so that both steps see the same state
    commit = folder.name
    single, index = folder / SINGLE, folder / INDEX
    if not single.exists() and index.exists():
        _snapshot(repository, commit, [glob.escape(name) for name in sorted(set(read_index(folder).values()))])
    elif not single.exists():
        # config.json is there: huggingface_hub prints a warning if a pattern matches nothing at all
        _snapshot(repository, commit, ["config.json", SINGLE])
    return folder


def fetch_small(repository: str, revision: str | None) -> Path:
    """The snapshot folder of a model with its small files; weights are in it only if they were cached before."""
    return _snapshot(repository, revision, SMALL_FILES, ELSEWHERE)


def cached(repository: str) -> bool:
    """Whether the cache holds anything of a model."""
    return (cache_folder() / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir()


def cached_models() -> list[str]:
    """Ids of the models in the cache."""
    try:
        names = sorted(path.name for path in cache_folder().iterdir() if path.name.startswith("models--"))
    except OSError:
        return []
    return [name.removeprefix("models--").replace("--", "/", 1) for name in names]


def cache_folder() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _snapshot(
    repository: str, revision: str | None, patterns: Sequence[str], ignore: Sequence[str] | None = None
) -> Path:
    """huggingface_hub's snapshot folder; its exceptions become lines that a user can act on.

    Without `ignore` these are the weights of a model whose small files are here.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        with _bars_on_terminals_only():
            found = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=None if ignore is None else list(ignore),
            )
    except errors.GatedRepoError:
        hint = f"accept its terms at https://huggingface.co/{repository}, then set HF_TOKEN"
        raise CheckpointError("access to this model is restricted", where=repository, hint=hint) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"revision {revision!r} does not exist", where=repository) from None
    except errors.RepositoryNotFoundError:
        raise NotOnHubError(repository) from None
    except errors.LocalEntryNotFoundError as error:
        partial = getattr(error, "snapshot_path", None)  # IncompleteSnapshotError, since huggingface_hub 2
        if partial and ignore is not None:
            # another program fetched less than we would: whoever needs what is missing says so
            return Path(partial)
        raise _not_reached(repository, revision, weights=ignore is None) from None
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the hub answered: {_first_line(error)}", where=repository) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be fetched ({_first_line(error)})", where=repository) from None
    return Path(found)


class NotOnHubError(CheckpointError):
    """The hub has no such model, or does not show it to this user."""

    def __init__(self, repository: str) -> None:
        super().__init__(f"no such checkpoint: {repository}", hint="if it is private, set HF_TOKEN")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """huggingface_hub draws its progress bars on anything: keep them out of log files."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _not_reached(repository: str, revision: str | None, weights: bool) -> CheckpointError:
    """The line for a model that is not cached, or whose `weights` are not, and cannot be fetched."""
    from huggingface_hub import constants

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no network"
    if weights:
        return CheckpointError(f"only in part in the Hugging Face cache, and {offline}", where=repository)
    word = repository if revision is None else f"{repository}@{revision}"
    first = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "connect"
    advice = f"{first}, or fetch it elsewhere (hf download {repository}) and give its folder"
    return NotCachedError(f"{word} is neither a folder here nor in the Hugging Face cache, and {offline}", hint=advice)


class NotCachedError(CheckpointError):
    """The model is neither here nor in the cache, and nothing can be fetched."""


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
