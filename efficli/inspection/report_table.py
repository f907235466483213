"""An inspection as a person reads it: what each model is, its tensors by group, checks, findings last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from efficli.inspection.report import Check, Finding, Group, Inspection, ModelReport, printable
from efficli.ops.byte_size import binary_bytes

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

_MARKS: Mapping[str, str] = {"ok": "ok", "finding": "!!", "skipped": "--", "info": "  "}


def headline(report: ModelReport) -> str:
    """Which model, how large, how many weights."""
    name = printable(report.path.rstrip("/").rpartition("/")[2] or report.path, 60)
    size = f"{binary_bytes(report.nbytes)}, {counted(report.num_weights)} weights"
    bits = f", {report.bits_per_weight:.2f} bits each" if report.num_weights else ""
    return f"{report.facts.get('name', name) if report.kind == 'checkpoint' else name}: {size}{bits}"


def facts_line(report: ModelReport) -> str:
    """What it is, in one sentence."""
    facts = {name: value for name, value in report.facts.items() if name != "name" or report.kind != "checkpoint"}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def group_table(report: ModelReport) -> Table:
    """The tensors by group, with the types that each has."""
    rows = [
        [
            group.name,
            str(group.count),
            counted(group.weights),
            binary_bytes(group.nbytes),
            f"{group.bits_per_weight:.2f}" if group.weights else "",
            _types(group),
        ]
        for group in report.groups
    ]
    return headline(report), ("group", "tensors", "weights", "size", "bits", "types"), rows


def fallback_table(report: ModelReport) -> Table | None:
    """Tensors whose type is not that of the file type, alike ones together; None where there are none."""
    if not report.fallbacks:
        return None
    alike = Counter((one.wanted, one.got, one.why) for one in report.fallbacks)
    rows = [[why, wanted, got, str(count)] for (wanted, got, why), count in alike.most_common(12)]
    if len(alike) > 12:
        rows.append([f"and {len(alike) - 12} more kinds, with --json", "", "", ""])
    title = f"Tensors with another type than {report.facts.get('type', 'its type')} has"
    return title, ("why", "should be", "is", "tensors"), rows


def check_lines(checks: Iterable[Check]) -> Iterator[str]:
    """One line for each check: a mark, its name, what was seen."""
    for check in checks:
        yield f"{_MARKS[check.status]:2}  {check.name:20}  {printable(check.seen, 300)}"


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The findings with their hints, numbered."""
    for number, finding in enumerate(findings, 1):
        yield f"{number:2}. {finding.line}"
        if finding.hint:
            yield f"    hint: {finding.hint}"


def verdict(inspection: Inspection) -> str:
    """The last line."""
    findings = inspection.all_findings
    if not findings:
        return "No findings."
    refused = sum(finding.code == 6 for finding in findings)
    about = f", {refused} of integrity or security" if refused else ""
    return f"{len(findings)} finding{'s' * (len(findings) > 1)}{about}:"


def counted(weights: int) -> str:
    """8917248 -> "8.92 M"."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if weights >= unit:
            return f"{weights / unit:.3g} {letter}"
    return str(weights)


def _types(group: Group) -> str:
    """The shares by weights, as in: Q4_K 83 %, Q6_K 17 %."""
    total = group.weights
    if len(group.types) < 2 or not total:
        return ", ".join(group.types)
    shown = [f"{name} {100 * n / total:.0f} %" if n else name for name, n in list(group.types.items())[:3]]
    return ", ".join(shown) + (", ..." if len(group.types) > 3 else "")
