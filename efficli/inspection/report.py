"""What an inspection found: figures, checks and findings, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from efficli.errors import EffiError

Status = Literal["ok", "finding", "skipped", "info"]
"""`ok`: looked at and right. `skipped`: could not be looked at, or was not asked for. `info`: nothing to judge."""

_SHOWN = 120
_LINE = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that a user should act on; `code` is the exit code it stands for: 1, or 6 for integrity."""

    check: str
    """Which check found it, as in the table: `hashes`, `chat template`, ..."""
    message: str
    where: str | None = None
    hint: str | None = None
    code: int = 1

    @staticmethod
    def of(error: EffiError, check: str) -> Finding:
        """An error that would have ended another command, as one finding of this one."""
        is_refusal = error.exit_code == 6
        hint = error.hint or ("take it from a source that you trust" if is_refusal else "copy or fetch it again")
        return Finding(check=check, message=error.message, where=error.where, hint=hint, code=6 if is_refusal else 1)

    @property
    def line(self) -> str:
        """`where: message`, as a terminal may show it whatever the file is called and holds."""
        return printable(f"{self.where}: {self.message}" if self.where else self.message, _LINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at, and what was seen, in a few words."""

    name: str
    status: Status
    seen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Tensors that do the same work: how many, their weights and bytes, and the weights of each type."""

    name: str
    count: int
    weights: int
    nbytes: int
    types: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight; 0 without weights."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor whose type is not the one that its file type stands for."""

    tensor: str
    wanted: str
    got: str
    why: str


@dataclass(slots=True, kw_only=True)
class ModelReport:
    """One model: a checkpoint, a GGUF file or an ONNX file."""

    path: str
    kind: Literal["checkpoint", "gguf", "onnx"]
    nbytes: int
    """Of the file; of a checkpoint, of its weights."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it is, in the order in which a person asks: name, architecture, type, layers, ..."""
    groups: tuple[Group, ...] = ()
    fallbacks: tuple[Difference, ...] = ()
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """For programs only: metadata, operators, inputs and outputs."""

    @property
    def num_weights(self) -> int:
        """Weights of all tensors."""
        return sum(group.weights for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors for each weight."""
        weights = self.num_weights
        return 8 * sum(group.nbytes for group in self.groups) / weights if weights else 0.0

    def saw(self, name: str, seen: str, status: Status = "ok") -> None:
        """Note a check that found nothing to act on."""
        self.checks.append(Check(name=name, status=status, seen=seen))

    def judge(self, name: str, findings: Iterable[Finding], seen: str, status: Status = "ok") -> None:
        """Note a check and what it found: `seen` where that is nothing."""
        found = list(findings)
        self.findings += found
        told = found[0].message if len(found) == 1 else f"{len(found)} findings"
        self.checks.append(Check(name=name, status="finding" if found else status, seen=told if found else seen))

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "path": self.path,
            "kind": self.kind,
            "bytes": self.nbytes,
            "num_weights": self.num_weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "facts": plain(self.facts),
            "groups": [asdict(group) | {"bits_per_weight": round(group.bits_per_weight, 4)} for group in self.groups],
            "fallbacks": [asdict(difference) for difference in self.fallbacks],
            "checks": [asdict(check) for check in self.checks],
            "findings": [asdict(finding) for finding in self.findings],
            "details": plain(self.details),
        }


@dataclass(slots=True, kw_only=True)
class Inspection:
    """What `inspect` found at a path: its models, and what concerns the folder."""

    path: str
    kind: Literal["checkpoint", "artifact", "folder", "gguf", "onnx"]
    models: list[ModelReport] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    """Of the folder; `all_findings` has those of the models too."""

    @property
    def all_findings(self) -> list[Finding]:
        """Every finding, the folder's last."""
        return [*(finding for model in self.models for finding in model.findings), *self.findings]

    @property
    def exit_code(self) -> int:
        """0 clean, 1 findings, 6 integrity."""
        return max((finding.code for finding in self.all_findings), default=0)

    def to_json(self) -> dict[str, Any]:
        """All of it, as `--json` prints it."""
        return {
            "schema_version": 1,
            "command": "inspect",
            "path": self.path,
            "kind": self.kind,
            "exit_code": self.exit_code,
            "models": [model.to_json() for model in self.models],
            "checks": [asdict(check) for check in self.checks],
            "findings": [asdict(finding) for finding in self.all_findings],
        }


def plain(value: Any) -> Any:
    """JSON-able: numbers that JSON lacks as text, long texts cut."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str) and len(value) > 1 << 16:
        return value[: 1 << 16] + "…"
    return value


def printable(text: object, most: int = _SHOWN) -> str:
    """Text of a file as a terminal may show it: control characters as escapes, cut after `most`."""
    words = str(text)
    words = words if len(words) <= most else words[: most - 1] + "…"
    return words if words.isprintable() else words.encode("unicode_escape").decode("ascii")
