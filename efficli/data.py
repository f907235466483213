"""Text for calibration, training and evaluation: read as a stream, split into disjoint slices, packed under a seed.

A source is a committed slice (`evaluation-code`), a text file, JSON lines (`text` or `messages`), a folder of those, or
a data set of the Hugging Face hub. Documents are strings; a tokenizer is any callable text -> ids.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from efficli.chat import Message
from efficli.checkpoint import strict_json
from efficli.errors import CheckpointError, MissingExtra, SecurityError, UsageError

SliceName = Literal["train", "calibration", "evaluation"]
Encode = Callable[[str], Sequence[int]]
Render = Callable[[Sequence[Sequence[Message]]], list[str]]
"""Conversations -> texts (`efficli.chat.render` with a model's template)."""

COMMITTED = ("evaluation-code", "evaluation-prose", "calibration-code", "calibration-prose")
"""The held-out slices that come with efficli."""

PIECE_CHARACTERS = 1 << 24
"""Longer text files are read in pieces of this many characters, each cut at the end of a line."""

_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?")
_LINE_BYTES = 1 << 26
_RENDER_BATCH = 64
_PASSAGE_CHARACTERS = 200
_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson")


def committed(name: str) -> str:
    """The text of a committed slice; a SecurityError if it is not, byte for byte, the one that was committed."""
    folder = Path(__file__).parent / "reference" / "text"
    entry = strict_json.load(folder / "slices.json", "slices.json")["files"].get(f"{name}.txt")
    if entry is None:
        raise UsageError(f"no slice {name!r}, expected one of {', '.join(COMMITTED)}")
    data = (folder / f"{name}.txt").read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise SecurityError("sha256 differs from slices.json", where=f"{name}.txt", hint="reinstall efficli")
    return data.decode("utf-8")


def documents(
    source: str | Path, *, split: str = "train", column: str = "text", render: Render | None = None
) -> Iterator[str]:
    """The documents of a source, one at a time.

    `split` and `column` belong to data sets of the hub (`org/name` or `org/name:config`). `render` turns `messages`
    into text; without it they are an error. Errors name file and line.
    """
    if source in COMMITTED:
        yield committed(str(source))
        return
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        if found and not (path / "dataset_info.json").exists():
            for file in found:
                yield from _file(file, column, render)
            return
        yield from _texts(_data_set(path, split), str(source), column, render)
    elif path.is_file():
        yield from _file(path, column, render)
    elif isinstance(source, str) and _HUB.fullmatch(source) and not path.parent.is_dir():
        yield from _texts(_data_set(source, split), source, column, render)
    else:
        hint = f"give a file, a folder, org/name of a data set, or {', '.join(COMMITTED)}"
        raise CheckpointError(f"no such text: {source}", hint=hint)


def slice_of(document: str, *, seed: int = 0, held_out: float = 0.05) -> SliceName:
    """The slice that a document belongs to: `held_out` of all documents each for evaluation and calibration.

    Decided by the hash of its words, so that no order of reading matters and copies end up in the same slice.
    """
    digest = hashlib.sha256(f"{seed}\0".encode() + _words(document).encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "evaluation" if place < held_out else "calibration" if place < 2 * held_out else "train"


def in_slice(found: Iterable[str], name: SliceName, *, seed: int = 0, held_out: float = 0.05) -> Iterator[str]:
    """Those of the documents that belong to a slice."""
    return (document for document in found if slice_of(document, seed=seed, held_out=held_out) == name)


def check_disjoint(slices: Mapping[str, Iterable[str]], *, max_shared: float = 0.01) -> None:
    """Error if two slices share a document, or more than `max_shared` of the passages of the smaller one.

    Passages are paragraphs of at least 200 characters, compared by the hash of their words: a licence at the head of
    many files is a few of thousands, an article that stands in both slices is more.
    """
    seen: list[tuple[str, set[bytes], set[bytes]]] = []
    for name, texts in slices.items():
        whole: set[bytes] = set()
        passages: set[bytes] = set()
        for text in texts:
            whole.add(_hash(text))
            passages.update(_hash(p) for p in re.split(r"\n\s*\n", text) if len(p) >= _PASSAGE_CHARACTERS)
        for other, its_whole, its_passages in seen:
            shared = len(whole & its_whole)
            if shared:
                noun = "document" if shared == 1 else "documents"
                raise CheckpointError(f"{shared} {noun} in both {other} and {name}, expected none")
            smaller = min(len(passages), len(its_passages))
            both = len(passages & its_passages)
            if both > max_shared * smaller:
                raise CheckpointError(f"{both} of {smaller} passages in both {other} and {name}")
        seen.append((name, whole, passages))


def pack(
    found: Iterable[str],
    encode: Encode,
    seq_len: int,
    *,
    seed: int | None,
    num_samples: int | None = None,
    separator: int | None = None,
    buffer_documents: int = 1000,
) -> Iterator[NDArray[np.int32]]:
    """Token ids in samples of exactly `seq_len`, at most `num_samples`: documents end to end, cut without gaps.

    Documents pass through a shuffle buffer under `seed` (None: in order). `separator` (an end-of-text id) goes after
    each. The rest that fills no sample is left out. Memory: the buffer and one document's ids.
    """
    if seq_len < 1:
        raise UsageError(f"a sequence length of {seq_len}, expected 1 or more")
    ordered = found if seed is None else _shuffled(found, seed, buffer_documents)
    rest = np.empty(0, np.int32)
    made = 0
    for document in ordered:
        ids = list(encode(document))
        if separator is not None:
            ids.append(separator)
        rest = np.concatenate([rest, np.asarray(ids, np.int32)])
        start = 0
        while rest.size - start >= seq_len and (num_samples is None or made < num_samples):
            yield rest[start : start + seq_len].copy()
            start += seq_len
            made += 1
        rest = rest[start:]
        if made == num_samples:
            return


def _shuffled(found: Iterable[str], seed: int, size: int) -> Iterator[str]:
    """The documents in an order that depends on the seed: each leaves a buffer of `size` at random."""
    random = np.random.default_rng(seed)
    buffer: list[str] = []
    for document in found:
        if len(buffer) < size:
            buffer.append(document)
            continue
        i = int(random.integers(size))
        buffer[i], document = document, buffer[i]
        yield document
    for i in random.permutation(len(buffer)):
        yield buffer[i]


def _file(path: Path, column: str, render: Render | None) -> Iterator[str]:
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _texts(_json_lines(path), path.name, column, render)
        return
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"not UTF-8 (byte {error.start})", where=path.name, hint="convert it with iconv"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", where=str(path)) from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            if line.strip():
                yield strict_json.parse_object(line.rstrip(), path.name, first_line=number)


def _texts(rows: Iterable[Mapping[str, Any]], where: str, column: str, render: Render | None) -> Iterator[str]:
    """The text of each row; conversations are rendered some at a time, each batch in one child process."""
    waiting: list[Sequence[Message]] = []
    for number, row in enumerate(rows, start=1):
        text, messages = row.get(column), row.get("messages")
        if isinstance(text, str):
            if render and waiting:
                yield from render(waiting)
                waiting = []
            yield text
        elif isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages):
            if render is None:
                hint = "give a model that has a chat template"
                raise CheckpointError("'messages' without a chat template to render them", where=where, hint=hint)
            waiting.append(messages)
            if len(waiting) == _RENDER_BATCH:
                yield from render(waiting)
                waiting = []
        else:
            names = ", ".join(map(repr, row)) or "nothing"
            message = f"record {number} has {names}, expected {column!r} with text or 'messages' with conversations"
            raise CheckpointError(message, where=where)
    if render and waiting:
        yield from render(waiting)


def _data_set(source: str | Path, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a Hugging Face data set, streamed; a folder that `save_to_disk` wrote is mapped."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingExtra("datasets", "train") from None
    try:
        if isinstance(source, Path) and ((source / "state.json").exists() or (source / "dataset_dict.json").exists()):
            found = datasets.load_from_disk(str(source))
            rows: Iterable[Mapping[str, Any]] = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            name, _, config = (str(source), "", "") if isinstance(source, Path) else source.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except KeyError:
        raise CheckpointError(f"no split {split!r}", where=str(source)) from None
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"cannot be loaded ({reason})", where=str(source)) from None
    return rows


def _words(text: str) -> str:
    return " ".join(text.split())


def _hash(text: str) -> bytes:
    return hashlib.sha256(_words(text).encode("utf-8", "surrogatepass")).digest()[:16]
