"""What a device is, as data: every figure with its source and how far it can be trusted.

The profiles that come with efficli are `efficli/targets/NAME.yaml`. A profile of one's own is a file of the same form;
`like: pi5-8gb` takes every top-level key that it does not set itself from that profile.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from efficli.errors import UsageError
from efficli.ops.ggml_types import TYPE_IDS
from efficli.strict_schema import Part, read_text, validate
from efficli.strict_yaml import Document, parse

FOLDER = Path(__file__).resolve().parent.parent / "targets"
FEW, FEW_POINTS = 0.4, 3
"""Fewer points than FEW_POINTS say nothing of their spread: the range is then at least this share to either side.

0.38 is the largest error of one constant for a whole device where there are points enough to see it (Pi 5, n = 20).
"""
_MAX_LIKE = 5

Group = Literal["Raspberry Pi", "phone", "board", "satellite", "x86"]
GROUPS: tuple[Group, ...] = ("Raspberry Pi", "phone", "board", "satellite", "x86")

Confidence = Literal["measured", "published", "vendor", "estimate"]
"""Measured on the device by efficli; published by somebody who measured it; a maker's figure; a guess with reasons."""
ORDER: tuple[Confidence, ...] = ("measured", "published", "vendor", "estimate")


@dataclass(frozen=True, slots=True)
class Range:
    """A predicted quantity: the best single value, and what it may be."""

    value: float
    low: float
    high: float

    def over(self, other: Range) -> Range:
        """This range divided by another, both independent."""
        return Range(self.value / other.value, self.low / other.high, self.high / other.low)

    def text(self, unit: str = "") -> str:
        """ "9.9 tokens/s (8.3 - 12)"."""
        best = f"{_digits(self.value)} {unit}".rstrip()
        return best if self.low == self.high else f"{best} ({_digits(self.low)} - {_digits(self.high)})"

    def to_json(self) -> dict[str, float]:
        """Four significant digits."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


def _digits(value: float) -> str:
    """Two significant digits: more would pretend."""
    return f"{value:.2g}" if value < 99.5 else f"{float(f'{value:.2g}'):,.0f}"


class Figure(Part):
    """A number about a device."""

    value: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)] | None = None
    high: Annotated[float, Field(gt=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    """Points that it was fitted on, where it was."""
    source: Annotated[str, Field(min_length=1)]
    """Where it can be looked up, or what was reckoned."""
    confidence: Confidence

    @model_validator(mode="after")
    def _in_order(self) -> Figure:
        if not self.range_given <= {"low", "high"} or len(self.range_given) == 1:
            raise ValueError("has low or high alone, expected both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high:
            raise ValueError(f"{self.low:g} .. {self.high:g} does not hold {self.value:g}")
        if self.confidence == "estimate" and self.low is None:
            raise ValueError("an estimate needs low and high")
        return self

    @property
    def range_given(self) -> set[str]:
        """Which ends were written down."""
        return {name for name in ("low", "high") if getattr(self, name) is not None}

    @property
    def range(self) -> Range:
        """With its range; at least ±FEW where it was fitted on fewer than FEW_POINTS."""
        low, high = self.low or self.value, self.high or self.value
        if self.n is not None and self.n < FEW_POINTS:
            low, high = min(low, self.value * (1 - FEW)), max(high, self.value * (1 + FEW))
        return Range(self.value, low, high)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_tuple)]


class Cores(Part):
    """Cores of one kind."""

    count: Annotated[int, Field(ge=1)]
    name: str
    ghz: Annotated[float, Field(gt=0)] | None = None
    """Highest clock; None where it is not known."""


class Ram(Part):
    """Memory, in MiB."""

    total_mib: Figure
    """As the kernel shows it, or as sold."""
    usable_mib: Figure
    """What a model's process can have: after the system, or an app's budget."""
    ecc: bool | None = None
    """Whether errors are corrected; None where it is not known."""


class Bandwidth(Part):
    """Of the memory, GB/s; what a model sees is in Decode and is not a fixed share of these. At least one is there."""

    theoretical: Figure | None = None
    """Of the bus."""
    memcpy: Figure | None = None
    """One way, one thread (tinymembench): bytes copied, each read once and written once."""
    read: Figure | None = None
    """All cores reading at once."""

    @model_validator(mode="after")
    def _has_one(self) -> Bandwidth:
        if self.theoretical is None and self.memcpy is None and self.read is None:
            raise ValueError("is empty, expected theoretical, memcpy or read")
        return self


class Floor(Part):
    """How fast a runtime computes with weights of some types, where that is slower than it can read them."""

    types: Annotated[Words, Field(min_length=1)]
    """ggml's names: Q2_K."""
    gops_per_thread: Figure
    """10^9 operations a second, two a weight and token."""
    threads: Annotated[int, Field(ge=1)]
    """Up to which it was measured: with more threads the low end of a prediction does not grow."""


class Decode(Part):
    """How fast one runtime writes tokens."""

    runtime: str
    """As `predict(runtime=...)` names it: llama.cpp."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """With which `gb_per_s` was calibrated; None on a GPU."""
    gb_per_s: Figure
    """Active bytes per token times tokens/s, fitted: the calibration."""
    overhead_ms: Figure
    """Of a token, apart from its bytes: launches, graph, sampler."""
    scales_below_4_bits: bool = False
    """Whether fewer bits were seen to be faster in proportion (kernels with lookup tables)."""
    floors: Annotated[tuple[Floor, ...], BeforeValidator(_tuple)] = ()
    """Types that are computed more slowly than read."""


class Prefill(Part):
    """How fast a runtime reads a prompt of some hundred tokens: bound by arithmetic, so by instruction set and type."""

    runtime: str
    types: Annotated[Words, Field(min_length=1)]
    """ggml's names of the types that it holds for."""
    gops: Figure
    """10^9 operations a second of all cores, two a weight and token."""


class Storage(Part):
    """Where the file is read from."""

    kind: str
    """microSD, NVMe."""
    mb_per_s: Figure
    """Sequential read, 10^6 bytes."""


class Power(Part):
    """Of the whole device, at the wall where a board was measured; W."""

    idle_w: Figure | None = None
    load_w: Figure | None = None
    """All cores writing tokens, or under a stress test."""


class Fraction(Figure):
    """A figure of at most 1."""

    value: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(gt=0, le=1)] | None = None


class Link(Part):
    """The radio of a satellite that carries the device: what `--uplink` reckons with where nothing else is given."""

    about: str
    """Band, and whose it is."""
    uplink_kbit_s: Figure
    """To the satellite, 10^3 bits, as it is on the air."""
    pass_min: Figure
    """Minutes that a station sees the satellite each time."""
    passes_per_day: Figure
    """That can be used for this."""
    efficiency: Fraction
    """Of the bits on the air, those of the file: less framing, repeats and acquisition."""


class Target(Part):
    """A device profile."""

    version: Literal[1]
    """Version of this layout."""
    name: str
    """The name of its file."""
    about: str
    """One line: which device."""
    aliases: Words = ()
    """Other names, the best known first."""
    group: Group | None = None
    """Under which `efficli targets` lists it."""
    arch: Literal["aarch64", "armv7", "x86-64", "riscv64", "sparc", "vliw"]
    """Instruction set."""
    isa: Words = ()
    """Extensions that runtimes use: neon, fp16, dotprod, i8mm, sve, sme, avx2, rvv."""
    cores: Annotated[tuple[Cores, ...], BeforeValidator(_tuple)]
    """The fastest first."""
    accelerator: str | None = None
    """What else it has, and whether a stock runtime uses it."""
    runs: Annotated[tuple[Literal["gguf", "onnx"], ...], BeforeValidator(_tuple)]
    """Formats whose stock runtime exists for it."""
    why_not: str | None = None
    """Why a format is missing in `runs`."""
    lacks: Words = ()
    """GGUF types that the first runtime of `decode` has no kernels for, or cannot load: ggml's names."""
    lacks_source: str | None = None
    """Where that is said."""
    ram: Ram
    bandwidth: Bandwidth
    decode: Annotated[tuple[Decode, ...], BeforeValidator(_tuple)] = ()
    """Per runtime; the first is what predictions are for unless another is asked for."""
    prefill: Annotated[tuple[Prefill, ...], BeforeValidator(_tuple)] = ()
    """Only what was measured."""
    storage: Annotated[tuple[Storage, ...], BeforeValidator(_tuple)] = ()
    """The usual one first."""
    power: Power = Power()
    link: Link | None = None
    """Of what is flown, where one is known."""
    notes: Words = ()
    """What else to know before trusting a figure."""

    @model_validator(mode="after")
    def _says_why(self) -> Target:
        if len(self.runs) < 2 and not self.why_not:
            raise ValueError("key 'why_not' is missing, and 'runs' does not name both gguf and onnx")
        if self.decode and "gguf" not in self.runs:
            raise ValueError("key 'decode' is there, and 'runs' does not name gguf")
        if bool(self.lacks) != (self.lacks_source is not None):
            raise ValueError("has 'lacks' or 'lacks_source' alone, expected both or neither")
        unknown = [word for word in self.lacks if word not in TYPE_IDS]
        if unknown:
            raise ValueError(f"'lacks' names {unknown[0]!r}, expected types of ggml: {', '.join(TYPE_IDS)}")
        return self

    @property
    def num_cores(self) -> int:
        """Of all kinds."""
        return sum(kind.count for kind in self.cores)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return self.model_dump(mode="json", exclude_none=True)


def target_names() -> tuple[str, ...]:
    """The profiles that come with efficli, without their aliases."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_target(name_or_path: str | Path) -> Target:
    """A profile by its name, an alias, or the path of a YAML file; UsageError with the nearest name, or file:line."""
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in name or name.endswith((".yaml", ".yml")):
        return _load(Path(name))
    path = _shipped(name)
    if path is None:
        hint = _nearest(name) or "`efficli targets` lists them; or give the path of a YAML file"
        raise UsageError(f"unknown target {name!r}", hint=hint)
    return _load(path)


def parse_target(text: str, name: str) -> Target:
    """The profile in `text`, which `name`.yaml may hold one day; UsageError."""
    document = parse(text, f"{name}.yaml")
    return validate(Target, Document(document.name, {"name": name, **document.values}, document.lines))


def _load(path: Path) -> Target:
    document = _document(path, _MAX_LIKE)
    values = {"name": path.stem, **document.values}
    return validate(Target, Document(document.name, values, document.lines))


def _shipped(word: str) -> Path | None:
    """The file of a name or alias, in any case."""
    name = word.lower()
    name = name if name in target_names() else _aliases().get(name, "")
    return FOLDER / f"{name}.yaml" if name else None


@cache
def _aliases() -> Mapping[str, str]:
    """The name that each alias stands for."""
    return {alias: name for name in target_names() for alias in _load(FOLDER / f"{name}.yaml").aliases}


def _nearest(word: str) -> str | None:
    """A hint with the devices whose names or aliases are most like `word`, each once; None without any."""
    names = {name: name for name in target_names()} | dict(_aliases())
    near = difflib.get_close_matches(word.lower(), names, n=8, cutoff=0.6)
    found = list(dict.fromkeys(names[one] for one in near))[:3]
    return f"did you mean {' or '.join(map(repr, found))}?" if found else None


def _document(path: Path, depth: int) -> Document:
    """The file, with what it takes from the profile that it is `like`."""
    document = parse(read_text(path, "target"), path.name if path.parent == FOLDER else str(path))
    own = document.values
    if not isinstance(own, dict):
        raise UsageError("expected keys such as version, about, cores and ram", where=document.where(()))
    like = own.get("like")
    if like is None:
        return document
    where = document.where(("like",))
    if not isinstance(like, str):
        raise UsageError(f"like: {like!r}, expected the name of a target", where=where)
    parent = FOLDER / f"{like}.yaml" if like in target_names() else _shipped(like)
    if parent is None:
        raise UsageError(f"like: unknown target {like!r}", where=where, hint=_nearest(like))
    if not depth:
        raise UsageError(f"more than {_MAX_LIKE} profiles, each like the next", where=where)
    return Document(document.name, _merged(_document(parent, depth - 1).values, own), document.lines)


def _merged(parent: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Per top-level key; names are nobody's heritage."""
    return {key: value for key, value in (parent | own).items() if key != "like" and (key != "aliases" or key in own)}
