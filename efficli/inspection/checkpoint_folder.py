"""Inspect a checkpoint: configuration against tensors, values, tokenizer against embedding, template, licence."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.refuse import quantization_scheme
from efficli.errors import CheckpointError, EffiError, UnsupportedError
from efficli.export.gguf.general import model_card
from efficli.export.gguf.vocab_source import Source, read_source
from efficli.export.gguf.vocab_special import NAMES, read_chat_templates, read_specials
from efficli.families import ModelShape, check_tensors, read_shape
from efficli.inspection.groups import Stored, group, group_of
from efficli.inspection.hashes import CHECK as HASHES
from efficli.inspection.hashes import Expected, check_files
from efficli.inspection.report import Finding, ModelReport, printable
from efficli.inspection.templates import CHECK as TEMPLATE
from efficli.inspection.templates import Chat, check_chat
from efficli.inspection.weights import FLOATS, Seen, look, value_findings
from efficli.progress import Progress, Silent

_SHOWN = 3


def inspect_checkpoint(ckpt: Checkpoint, expected: Expected, *, scan: bool, progress: Progress) -> ModelReport:
    """Everything about one checkpoint that its files tell; what cannot be read at all is an error."""
    report = ModelReport(path=str(ckpt.root), kind="checkpoint", nbytes=ckpt.nbytes)
    report.groups = group(Stored(t.name, t.dtype, prod(t.shape), t.nbytes) for t in ckpt.tensors.values())
    report.details["config"] = dict(ckpt.config)
    report.details["tensors"] = [[t.name, t.dtype, list(t.shape), t.nbytes] for t in ckpt.tensors.values()]
    _check_hashes(report, ckpt, expected, scan)
    if scan:
        _check_values(report, ckpt, progress)
    else:
        report.saw("values", "weights not read (--no-scan)", "skipped")
    shape = _check_config(report, ckpt)
    _check_code(report, ckpt)
    _check_tied(report, ckpt, scan)
    source = _check_vocabulary(report, ckpt)
    report.facts = _facts(ckpt, shape, source)
    if source is not None:
        _check_chat(report, ckpt, source)
    _check_missing(report, ckpt, source)
    return report


def _facts(ckpt: Checkpoint, shape: ModelShape | None, source: Source | None) -> dict[str, Any]:
    config = {**ckpt.config, **_part(ckpt.config, "text_config")}
    architectures = ckpt.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    dtypes: dict[str, int] = {}
    for tensor in ckpt.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    facts: dict[str, Any] = {
        "name": ckpt.name,
        "revision": ckpt.revision,
        "architecture": named,
        "family": shape.family if shape else "none that efficli exports",
        "type": quantization_scheme(ckpt.config) or ", ".join(sorted(dtypes, key=lambda d: -dtypes[d])),
        "layers": shape.num_layers if shape else config.get("num_hidden_layers"),
        "width": shape.hidden_size if shape else config.get("hidden_size"),
        "context": shape.max_positions if shape else config.get("max_position_embeddings"),
        "vocabulary": shape.vocab_size if shape else config.get("vocab_size"),
        "experts": (shape.num_experts if shape else config.get("num_experts")) or None,
        "experts used": (shape.experts_per_token if shape else config.get("num_experts_per_tok")) or None,
        "tokenizer": _kind(source),
        "licence": _licence(ckpt),
    }
    known = {name: value for name, value in facts.items() if isinstance(value, str | int) and value != ""}
    return {name: printable(value) if isinstance(value, str) else value for name, value in known.items()}


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, Mapping) else {}


def _kind(source: Source | None) -> str | None:
    try:
        return None if source is None else source.kind
    except EffiError:
        return str(source.model.get("type")) if source else None


def _licence(ckpt: Checkpoint) -> str | None:
    values = model_card(ckpt).values
    found = values.get("license_name") or values.get("license")
    return found if isinstance(found, str) else next((one for one in found or () if isinstance(one, str)), None)


def _check_hashes(report: ModelReport, ckpt: Checkpoint, expected: Expected, scan: bool) -> None:
    found = list(expected.findings)
    packed = ckpt.sidecar.packed if ckpt.sidecar else {}
    for name in packed if scan else ():
        try:
            ckpt.packed_blocks(name)
        except EffiError as error:
            found.append(Finding.of(error, HASHES))
    if expected.files:
        found += check_files(ckpt.root, expected, (), large=scan)
    said = f"{len(expected.files)} files as in {' and '.join(expected.sources)}" if expected.files else ""
    if packed:
        said += ("; " if said else "") + f"{len(packed)} packed tensors as in efficli.json"
    if not scan:
        report.judge(HASHES, found, "weights not read (--no-scan)", "skipped")
    else:
        report.judge(HASHES, found, said or "no SHA256SUMS beside it", "ok" if said else "info")


def _check_values(report: ModelReport, ckpt: Checkpoint, progress: Progress) -> None:
    progress.start(f"reading {ckpt.name}", ckpt.nbytes, "B")
    seen: dict[str, Seen] = {}
    skipped: set[str] = set()
    for tensor in sorted(ckpt.tensors.values(), key=lambda t: (t.file, t.offset)):
        if tensor.dtype in FLOATS:

            def read(start: int, part: memoryview, name: str = tensor.name) -> None:
                ckpt.read_into(name, start, part)
                progress.advance(len(part))

            one = look(read, tensor.dtype, tensor.nbytes)
            if one.is_wrong or one.zeros:
                seen[tensor.name] = one
        else:
            skipped.add(tensor.dtype)
            progress.advance(tensor.nbytes)
    progress.finish()
    shapes = {name: tensor.shape for name, tensor in ckpt.tensors.items()}
    said = "no NaN, no Inf" + (f"; not looked at: {', '.join(sorted(skipped))}" if skipped else "")
    report.judge("values", value_findings(seen, shapes, ckpt.name), said)


def _check_config(report: ModelReport, ckpt: Checkpoint) -> ModelShape | None:
    """config.json against the tensors, as far as the family is known."""
    scheme = quantization_scheme(ckpt.config)
    notes = Silent()
    try:
        shape = read_shape(ckpt.config)
        if scheme is None:
            check_tensors(ckpt.tensors, shape, strict=False, progress=notes)
    except UnsupportedError as error:
        report.saw("config", f"not compared with the tensors: {error.message}", "info")
        return None
    except CheckpointError as error:
        report.judge("config", [Finding.of(error, "config")], "")
        return None
    if scheme:
        report.saw("config", f"weights are codes of {printable(scheme, 30)}: not compared", "info")
    elif notes.notes:
        report.saw("config", f"agrees with the tensors; {printable(notes.notes[0])}", "info")
    else:
        report.saw("config", f"agrees with {len(ckpt.tensors)} tensors")
    return shape


def _check_code(report: ModelReport, ckpt: Checkpoint) -> None:
    named = [note.partition(":")[0] for note in ckpt.notes if "auto_map" in note]
    found = [
        Finding(
            check="remote code",
            message="names code of its own (auto_map); none was run",
            where=file,
            hint="a plain member of its family is exported with --trust-remote-code, which runs none either",
        )
        for file in named
    ]
    if found:
        report.judge("remote code", found, "")


def _check_tied(report: ModelReport, ckpt: Checkpoint, scan: bool) -> None:
    """What config.json says of the output matrix, and whether there is one."""
    name = "tied embeddings"
    config = _part(ckpt.config, "text_config") or ckpt.config
    said = ckpt.config.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    outputs = [t for t in ckpt.tensors.values() if group_of(t.name) == "output" and t.name.endswith("weight")]
    tables = [
        t for t in ckpt.tensors.values() if group_of(t.name) == "embedding" and outputs and t.shape == outputs[0].shape
    ]
    if not outputs:
        report.saw(name, "tied: there is no output matrix beside the embedding" if said is not False else "no head")
    elif not tables or not scan:
        report.saw(name, f"config says {said}; {printable(outputs[0].name, 40)} is there, not compared", "info")
    elif tables[0].dtype == outputs[0].dtype and ckpt.hash(tables[0].name) == ckpt.hash(outputs[0].name):
        report.saw(name, f"the same matrix is stored twice; config says {said}", "info")
    elif said is True:
        message = f"config.json says they are tied, and {printable(outputs[0].name)} is another matrix"
        hint = "loaders then ignore that matrix: set tie_word_embeddings to false if it was trained, or remove it"
        report.judge(name, [Finding(check=name, message=message, hint=hint)], "")
    else:
        report.saw(name, f"not tied: {printable(outputs[0].name, 40)} is a matrix of its own")


def _check_vocabulary(report: ModelReport, ckpt: Checkpoint) -> Source | None:
    """The tokenizer's ids against the embedding's rows."""
    name = "vocabulary"
    try:
        source = read_source(ckpt)
        count = max(source.pieces, default=-1) + 1
    except EffiError as error:
        report.judge(name, [Finding.of(error, name)], "")
        return None
    rows = _rows(ckpt)
    if rows is None:
        report.saw(name, f"{count} ids; no embedding that config.json's vocab_size fits", "info")
    elif count > rows:
        hint = "model.resize_token_embeddings(len(tokenizer)) of transformers adds the rows; or remove added tokens"
        message = f"tokenizer has {count} ids, embedding {rows} rows"
        report.judge(name, [Finding(check=name, message=message, hint=hint)], "")
    else:
        spare = f", {rows - count} rows without a token" if rows > count else ""
        report.saw(name, f"{count} ids, {rows} rows of the embedding{spare}")
    return source


def _rows(ckpt: Checkpoint) -> int | None:
    """Rows of the token embedding: of the embeddings, the one with most."""
    tables = [t.shape[0] for t in ckpt.tensors.values() if group_of(t.name) == "embedding" and len(t.shape) == 2]
    return max(tables, default=None)


def _check_chat(report: ModelReport, ckpt: Checkpoint, source: Source) -> None:
    try:
        named = read_chat_templates(ckpt, source)
    except EffiError as error:
        report.judge(TEMPLATE, [Finding.of(error, TEMPLATE)], "")
        return
    texts = {f"{name}_token": source.special_text(name) for name in NAMES}
    adds: dict[str, bool] = {}
    try:
        adds = read_specials(ckpt, source, _rows(ckpt) or 1 << 31).add
    except EffiError as error:
        report.saw("special tokens", error.message, "skipped")
    check_chat(
        report,
        Chat(
            templates=named,
            specials={name: text for name, text in texts.items() if text is not None},
            add_bos=adds.get("bos"),
            add_eos=adds.get("eos"),
        ),
    )


def _check_missing(report: ModelReport, ckpt: Checkpoint, source: Source | None) -> None:
    """What a runtime or a person needs and nobody wrote down."""
    config = {**ckpt.config, **_part(ckpt.config, "text_config")}
    found = []
    missing = [key for key in ("architectures", "model_type") if not config.get(key)]
    generates = "ForCausalLM" in str(config.get("architectures")) or "ForConditionalGeneration" in str(
        config.get("architectures")
    )
    ends = [holder.get("eos_token_id") for holder in (ckpt.json("generation_config.json") or {}, config)]
    if generates and all(end in (None, []) for end in ends) and (source is None or not source.special_text("eos")):
        missing.append("eos_token_id")
    if missing:
        hint = "save_pretrained() of transformers writes them"
        found.append(Finding(check="metadata", message=f"config.json lacks {', '.join(missing)}", hint=hint))
    if _licence(ckpt) is None:
        hint = "`license: ...` between the --- lines at the top of README.md says what the weights may be used for"
        found.append(Finding(check="metadata", message="people need the licence: README.md names none", hint=hint))
    report.judge("metadata", found, "what runtimes and people need is there")
