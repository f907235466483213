"""Inspect an ONNX file: operators, weights by group and type, external data, values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from efficli.checkpoint.files import changed, open_regular, read_exactly
from efficli.inspection.groups import Stored, group
from efficli.inspection.hashes import CHECK as HASHES
from efficli.inspection.hashes import Expected, check_files
from efficli.inspection.onnx_external import Placed, check_external
from efficli.inspection.onnx_reader import OnnxModel, OnnxTensor, read_onnx
from efficli.inspection.report import Finding, ModelReport, printable
from efficli.inspection.weights import Seen, look, value_findings
from efficli.progress import Progress

_FLOATS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "DOUBLE": "F64"}
_NO_WEIGHTS = frozenset({"INT64", "INT32", "BOOL", "STRING", "UINT64", "UINT32"})
"""Types of shapes, indices and masks: they take bytes and are no weights."""
_KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft",
     "com.microsoft.nchwc", "com.microsoft.experimental", "pkg.onnxscript.torch_lib"}
)  # fmt: skip
_QUANTIZED = (
    "MatMulNBits", "GatherBlockQuantized", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear",
    "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "ConvInteger", "QLinearMatMul", "QLinearConv",
    "QMoE", "QAttention", "MatMulBnb4", "MatMulFpQ4", "QGemm", "EmbedLayerNormalization",
)  # fmt: skip


def inspect_onnx(path: Path, expected: Expected, *, scan: bool, progress: Progress) -> ModelReport:
    """Everything about one file; CheckpointError where it is no ONNX model or is damaged."""
    model = read_onnx(path)
    placed, external, beside = check_external(path, model.tensors)
    nbytes = model.nbytes + sum(file.nbytes for file in beside)
    report = ModelReport(path=str(path), kind="onnx", nbytes=nbytes, facts=_facts(model, len(beside)))
    report.groups = group(_stored(model, {id(one.tensor): one.nbytes for one in placed}))
    report.details |= _details(model)
    names = {path.name, *(file.path.name for file in beside)}
    _check_hashes(report, path, expected, names, scan)
    if scan:
        _check_values(report, path, model, placed, progress)
    else:
        report.saw("values", "weights not read (--no-scan)", "skipped")
    said = f"{len(beside)} file{'s' * (len(beside) != 1)} beside the model" if beside else "none: all in one file"
    report.judge("external data", external, said)
    report.judge("tensors", _sizes(path, model), f"{len(model.tensors)}, each as large as its shape")
    report.judge("operators", _operators(model), _said_operators(model))
    return report


def _facts(model: OnnxModel, files: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "made by": model.producer or None,
        "ir version": model.ir_version,
        "opset": ", ".join(f"{printable(domain, 30) or 'ai.onnx'} {n}" for domain, n in sorted(model.opsets.items())),
        "nodes": model.operators.total(),
        "subgraphs": model.num_subgraphs or None,
        "functions": model.num_functions or None,
        "inputs": _interface(model.inputs),
        "outputs": _interface(model.outputs),
        "external files": files or None,
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _interface(values: Mapping[str, str]) -> str:
    shown = ", ".join(printable(f"{name} {told}", 50) for name, told in list(values.items())[:3])
    return f"{len(values)}: {shown}" + (", ..." if len(values) > 3 else "") if values else "none"


def _details(model: OnnxModel) -> dict[str, Any]:
    operators = {
        f"{domain}.{name}" if domain else name: count for (domain, name), count in model.operators.most_common()
    }
    return {
        "opsets": model.opsets,
        "operators": operators,
        "inputs": model.inputs,
        "outputs": model.outputs,
        "metadata": model.metadata,
        "initializers": [[t.name, t.type, list(t.shape)] for t in model.tensors],
    }


def _stored(model: OnnxModel, beside: Mapping[int, int]) -> Iterable[Stored]:
    """Tensors as groups count them: packed weights each, shapes and indices none."""
    packed = {use.tensor: use for use in model.packed}
    for tensor in model.tensors:
        no_weights = tensor.type in _NO_WEIGHTS or tensor.name in model.scales
        kind, weights = tensor.type, 0 if no_weights else tensor.num_elements
        use = packed.get(tensor.name)
        bits = use.numbers.get("bits", 4) if use else 0
        if use and tensor.type == "UINT8" and bits in (2, 4, 8):
            k, n = use.numbers.get("K", 0), use.numbers.get("N", 0)
            whole = k * n if use.operator == "MatMulNBits" else 0
            most = tensor.num_elements * 8 // bits
            weights = whole if 0 < whole <= most else most
            kind = f"int{bits}/{use.numbers.get('block_size', 0)}"
        yield Stored(tensor.name, kind, weights, beside.get(id(tensor), tensor.nbytes))


def _check_hashes(report: ModelReport, path: Path, expected: Expected, names: set[str], scan: bool) -> None:
    told = names & expected.files.keys()
    if not scan:
        report.judge(HASHES, [], "weights not read (--no-scan)", "skipped")
    elif not told:
        report.saw(HASHES, "nothing beside it to compare with", "info")
    else:
        passed = expected.files.keys() - told
        found = check_files(path.parent, expected, passed, large=True)
        report.judge(HASHES, found, f"sha256 as in {' and '.join(expected.sources)}")


def _check_values(
    report: ModelReport, path: Path, model: OnnxModel, placed: Iterable[Placed], progress: Progress
) -> None:
    regions = [
        (tensor, path, tensor.offset, tensor.nbytes)
        for tensor in model.tensors
        if tensor.external is None and tensor.is_flat and tensor.nbytes == tensor.needs
    ]
    regions += [(one.tensor, one.path, one.offset, one.nbytes) for one in placed]
    regions = [one for one in regions if one[0].type in _FLOATS and one[3]]
    seen: dict[str, Seen] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    progress.start(f"reading {path.name}", sum(one[3] for one in regions), "B")
    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for tensor, file, offset, nbytes in sorted(regions, key=lambda one: (one[1], one[2])):
            if file not in descriptors:
                descriptors[file] = stack.enter_context(open_regular(file, file.name))[0]

            def read(start: int, part: memoryview, at: tuple[int, int] = (descriptors[file], offset)) -> None:
                if read_exactly(at[0], part, at[1] + start) < len(part):
                    raise changed(path.name)
                progress.advance(len(part))

            one = look(read, _FLOATS[tensor.type], nbytes)
            if one.is_wrong or one.zeros:
                seen[tensor.name] = one
                shapes[tensor.name] = tensor.shape
    progress.finish()
    report.judge("values", value_findings(seen, shapes, path.name), f"no NaN, no Inf in {len(regions)} float tensors")


def _sizes(path: Path, model: OnnxModel) -> list[Finding]:
    """Tensors whose data and shape do not agree; names that two tensors have."""

    def wrong(tensor: OnnxTensor) -> bool:
        return tensor.external is None and tensor.is_flat and tensor.nbytes != tensor.needs

    again = "copy or make the model again"
    found = [
        Finding(
            check="tensors",
            message=f"tensor {printable(t.name, 60)!r}: shape needs {t.needs} bytes, has {t.nbytes}",
            where=path.name,
            hint=again,
        )
        for t in [t for t in model.tensors if wrong(t)][:5]
    ]
    if model.duplicates:
        message = f"{len(model.duplicates)} initializers have a name twice, the first is {model.duplicates[0]!r}"
        found.append(Finding(check="tensors", message=printable(message, 200), where=path.name, hint=again))
    return found


def _operators(model: OnnxModel) -> list[Finding]:
    found = []
    if not model.opsets:
        hint = "opset_import says what the operators mean: make the model again"
        found.append(Finding(check="operators", message="the model imports no set of operators", hint=hint))
    used = {domain for domain, _ in model.operators}
    foreign = sorted(used - _KNOWN_DOMAINS - model.function_domains)
    if foreign:
        names = ", ".join(printable(domain, 40) for domain in foreign[:4])
        hint = "onnxruntime runs it only with the library that registers them"
        found.append(Finding(check="operators", message=f"operators of the domain {names}", hint=hint))
    imported = {_domain(domain) for domain in model.opsets}
    missing = sorted({_domain(domain) for domain in used - model.function_domains} - imported)
    if missing and model.opsets:
        names = ", ".join(printable(domain or "ai.onnx", 40) for domain in missing[:4])
        hint = "runtimes refuse it: make the model again"
        found.append(Finding(check="operators", message=f"operators of {names}, which it does not import", hint=hint))
    if not model.outputs:
        found.append(Finding(check="operators", message="the graph has no outputs", hint="make the model again"))
    return found


def _domain(name: str) -> str:
    """The standard's own domain has two names."""
    return "" if name == "ai.onnx" else name


def _said_operators(model: OnnxModel) -> str:
    by_name = {name: 0 for _, name in model.operators}
    for (_, name), count in model.operators.items():
        by_name[name] += count
    quantized = [f"{by_name[name]} {name}" for name in _QUANTIZED if name in by_name]
    often = sorted(by_name.items(), key=lambda item: (-item[1], item[0]))[:4]
    told = ", ".join(f"{count} {printable(name, 30)}" for name, count in often)
    return f"{len(by_name)} kinds: {told}" + (f"; quantized: {', '.join(quantized)}" if quantized else "")
