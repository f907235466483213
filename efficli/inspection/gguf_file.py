"""Inspect a GGUF file: everything its header says, its weights in one pass, and what llama.cpp makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from efficli.errors import EffiError
from efficli.export.gguf.parse import GgufHeader, read_gguf
from efficli.inspection import gguf_types, llama_view, templates
from efficli.inspection.gguf_metadata import check_layers, check_missing, check_vocabulary
from efficli.inspection.groups import Stored, group
from efficli.inspection.hashes import CHECK as HASHES
from efficli.inspection.hashes import differs
from efficli.inspection.report import Finding, ModelReport, printable
from efficli.inspection.templates import Chat, check_chat
from efficli.inspection.weights import FileRead, Region, read_file, value_findings, weights_of
from efficli.progress import Progress

_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_ENDS = ("token_embd.weight", "output.weight")
_LONG = 256
_ORDER = (
    "name", "architecture", "type", "size", "layers", "width", "context", "vocabulary", "experts", "experts used",
    "tokenizer", "pre-tokenizer", "licence", "made by",
)  # fmt: skip
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashes:
    """What a file should be: its SHA-256 and those of its tensors, as far as something beside it tells them."""

    file: str | None = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


def inspect_gguf(path: Path, *, scan: bool, hashes: Hashes | None = None, progress: Progress) -> ModelReport:
    """Everything about one file; CheckpointError where it is no GGUF file or is damaged."""
    header = read_gguf(path)
    hashes = hashes or Hashes()
    report = ModelReport(path=str(path), kind="gguf", nbytes=header.nbytes, facts=_facts(header))
    report.groups = group(
        Stored(name, tensor.type, weights_of(tensor.shape), tensor.nbytes) for name, tensor in header.tensors.items()
    )
    report.details["metadata"] = {key: _brief(value) for key, value in header.metadata.items()}
    report.details["tensors"] = [[name, t.type, list(t.shape), t.nbytes] for name, t in header.tensors.items()]
    report.details["gguf_version"] = header.version
    if scan:
        read = _read(path, header, progress)
        _check_hash(report, path, header, hashes, read, progress)
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        said = "no NaN, no Inf" + (f"; not looked at: {', '.join(read.skipped)}" if read.skipped else "")
        report.judge("values", value_findings(read.seen, shapes, path.name), said)
    else:
        read = None
        report.saw(HASHES, "weights not read (--no-scan)", "skipped")
        report.saw("values", "weights not read (--no-scan)", "skipped")
    _check_end(report, header)
    if _is_part(header):
        number, parts = header.metadata.get("split.no"), header.metadata["split.count"]
        report.saw("layers", f"part {number} of {parts}: layers, vocabulary and metadata not judged", "info")
        return report
    if header.metadata.get("general.type", "model") != "model":
        kind = printable(header.metadata["general.type"], 20)
        report.saw("layers", f"general.type is {kind}: not judged as a whole model", "info")
        return report
    gguf_types.check_types(report, header)
    check_layers(report, header)
    _check_tied(report, header, read)
    check_vocabulary(report, header)
    view = _check_llama(report, path)
    check_chat(report, _chat(header.metadata, view))
    check_missing(report, header)
    return report


def _facts(header: GgufHeader) -> dict[str, Any]:
    """What a person asks first."""
    metadata = header.metadata
    arch = metadata.get("general.architecture")
    keys = {
        "name": "general.name",
        "architecture": "general.architecture",
        "size": "general.size_label",
        "layers": f"{arch}.block_count",
        "width": f"{arch}.embedding_length",
        "context": f"{arch}.context_length",
        "experts": f"{arch}.expert_count",
        "experts used": f"{arch}.expert_used_count",
        "tokenizer": "tokenizer.ggml.model",
        "pre-tokenizer": "tokenizer.ggml.pre",
        "licence": "general.license",
        "made by": "general.quantized_by",
    }
    facts: dict[str, Any] = {"type": gguf_types.file_type_of(metadata)}
    tokens = metadata.get("tokenizer.ggml.tokens")
    facts["vocabulary"] = len(tokens) if isinstance(tokens, list) else metadata.get(f"{arch}.vocab_size")
    for name, key in keys.items():
        value = metadata.get(key)
        if isinstance(value, list):
            value = f"{min(value)} to {max(value)}" if value and all(type(n) is int for n in value) else None
        facts[name] = printable(value) if isinstance(value, str) else value
    return {name: facts[name] for name in _ORDER if facts[name] is not None}


def _brief(value: Any) -> Any:
    """A vocabulary by its length."""
    return f"{len(value)} items" if isinstance(value, list) and len(value) > _LONG else value


def _is_part(header: GgufHeader) -> bool:
    count = header.metadata.get("split.count")
    return type(count) is int and count > 1


def _regions(header: GgufHeader) -> list[Region]:
    return [
        Region(name=name, type=tensor.type, shape=tensor.shape, offset=tensor.offset, nbytes=tensor.nbytes)
        for name, tensor in header.tensors.items()
    ]


def _read(path: Path, header: GgufHeader, progress: Progress) -> FileRead:
    ends = [header.tensors.get(name) for name in _ENDS]
    alike = all(ends) and len({(tensor.type, tensor.shape) for tensor in ends if tensor}) == 1
    return read_file(path, _regions(header), hashed=_ENDS if alike else (), progress=progress)


def _check_hash(
    report: ModelReport, path: Path, header: GgufHeader, hashes: Hashes, read: FileRead, progress: Progress
) -> None:
    report.details["sha256"] = read.sha256
    if hashes.file is None:
        report.saw(HASHES, f"sha256 {read.sha256[:16]}…; nothing beside it to compare with", "info")
        return
    found: list[Finding] = []
    if read.sha256 != hashes.file:
        # only now each tensor's own: a file that is as it should be is hashed once
        whole = read_file(path, _regions(header), hashed=header.tensors, scanned=False, progress=progress)
        wrong = [name for name, sha in hashes.tensors.items() if name in whole.hashes and whole.hashes[name] != sha]
        for name in wrong[:5]:
            found.append(differs(path.name, f"sha256 differs in tensor {printable(name)}"))
        if len(wrong) > 5:
            found.append(differs(path.name, f"sha256 differs in {len(wrong) - 5} more tensors"))
        if not wrong:
            where = " outside its tensors: in the header or between them" if hashes.tensors else ""
            found.append(differs(path.name, f"sha256 differs{where}"))
    report.judge(HASHES, found, f"sha256 as in {' and '.join(hashes.sources)}")


def _check_end(report: ModelReport, header: GgufHeader) -> None:
    """Bytes behind the last tensor: no runtime reads them, so that anything may be there."""
    padded = -(-header.data_end // header.alignment) * header.alignment
    more = header.nbytes - padded
    if more > 0:
        message = f"{more} bytes behind the last tensor: no runtime reads them"
        hint = "no converter writes such bytes: take the file from a source that you trust"
        report.judge("end of file", [Finding(check="end of file", message=message, hint=hint, code=6)], "")


def _check_tied(report: ModelReport, header: GgufHeader, read: FileRead | None) -> None:
    embedding, output = (header.tensors.get(name) for name in _ENDS)
    if embedding is None:
        report.saw("tied embeddings", "no token_embd.weight", "info")
    elif output is None:
        report.saw("tied embeddings", "tied: the output matrix is the embedding")
    elif read is not None and len(read.hashes) == 2 and len(set(read.hashes.values())) == 1:
        report.saw("tied embeddings", f"stored twice: output.weight repeats {output.nbytes} bytes", "info")
    else:
        report.saw("tied embeddings", "not tied: output.weight is a matrix of its own")


def _check_llama(report: ModelReport, path: Path) -> llama_view.VocabularyView | None:
    """What llama.cpp says when it loads the vocabulary."""
    name = "llama.cpp"
    if not llama_view.is_installed():
        report.saw(name, "llama-cpp-python is not installed", "skipped")
        return None
    try:
        view = llama_view.open_vocabulary(path)
    except EffiError as error:
        hint = error.hint or "a newer llama.cpp may know it: pip install -U 'efficli[gguf]'"
        message = f"llama.cpp refuses it: {error.message}"
        report.judge(name, [Finding(check=name, message=message, hint=hint)], "")
        return None
    warned = [
        Finding(check=name, message=f"llama.cpp warns: {printable(line, 160)}", hint="convert the model again")
        for line in view.warnings
        if "GENERATION QUALITY" in line or "missing pre-tokenizer" in line
    ]
    report.details["llama_warnings"] = list(view.warnings)
    report.judge(name, warned, "loads its header and vocabulary")
    return view


def _chat(metadata: Mapping[str, Any], view: llama_view.VocabularyView | None) -> Chat:
    """The templates of the metadata, with the texts of the special tokens."""
    named: dict[str, str] = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")):
            named[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = value
    tokens = metadata.get("tokenizer.ggml.tokens")
    specials = {}
    for name, key in _SPECIALS.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(tokens, list) and type(number) is int and 0 <= number < len(tokens):
            specials[name] = str(tokens[number])
    add_bos, add_eos = (metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos"))
    if view is not None and view.has_tokenizer:
        add_bos, add_eos = view.add_bos, view.add_eos
    return templates.Chat(
        templates=named,
        specials=specials,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        add_eos=add_eos if isinstance(add_eos, bool) else None,
    )
