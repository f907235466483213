"""Read what an ONNX file consists of, without the onnx package and without its weights: nodes, tensors, interfaces.

Source: onnx.proto of onnx 1.23 (field numbers below). Subgraphs are read to a depth, and every number that a file
claims is held against what it has; tensors keep where their data is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from types import MappingProxyType

from efficli.checkpoint.files import open_regular
from efficli.errors import CheckpointError
from efficli.inspection.protobuf import BYTES, VARINT, Wire, signed
from efficli.inspection.report import printable

MAX_BYTES = (1 << 31) - 1
"""Readers of protocol buffers refuse messages from 2 GiB on."""
MAX_DEPTH = 16
MAX_TENSORS = 1 << 17
MAX_AXES = 32
MAX_OPERATORS = 1 << 12
"""Different ones."""
MAX_VALUES = 1 << 14
"""Inputs and outputs of a graph, and other short lists."""

TYPES: Mapping[int, tuple[str, int]] = MappingProxyType(
    {
        1: ("FLOAT", 32), 2: ("UINT8", 8), 3: ("INT8", 8), 4: ("UINT16", 16), 5: ("INT16", 16), 6: ("INT32", 32),
        7: ("INT64", 64), 8: ("STRING", 0), 9: ("BOOL", 8), 10: ("FLOAT16", 16), 11: ("DOUBLE", 64),
        12: ("UINT32", 32), 13: ("UINT64", 64), 14: ("COMPLEX64", 64), 15: ("COMPLEX128", 128), 16: ("BFLOAT16", 16),
        17: ("FLOAT8E4M3FN", 8), 18: ("FLOAT8E4M3FNUZ", 8), 19: ("FLOAT8E5M2", 8), 20: ("FLOAT8E5M2FNUZ", 8),
        21: ("UINT4", 4), 22: ("INT4", 4), 23: ("FLOAT4E2M1", 4), 24: ("FLOAT8E8M0", 8), 25: ("UINT2", 2),
        26: ("INT2", 2), 27: ("FLOAT6E2M3", 6), 28: ("FLOAT6E3M2", 6),
    }
)  # fmt: skip
"""Number of a data type -> its name, and the bits of an element (0: no fixed size)."""
PACKED = frozenset({"MatMulNBits", "GatherBlockQuantized"})
"""Operators whose weights are several to a byte of their second input (the first of GatherBlockQuantized)."""

_DATA = {4, 5, 6, 7, 9, 10, 11}  # TensorProto: float, int32, string, int64, raw, double, uint64
_FLAT = {4: 32, 10: 64}  # float_data and double_data are little-endian floats where they are packed


@dataclass(frozen=True, slots=True, kw_only=True)
class External:
    """Data beside the model, as the file claims it: nothing of it is checked here."""

    location: str
    offset: str | None
    length: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxTensor:
    """An initializer or the tensor of an attribute: where its data is, `offset` in the model's file."""

    name: str
    type: str
    bits: int
    shape: tuple[int, ...]
    offset: int = 0
    nbytes: int = 0
    """Stored in the model's file; 0 for external data."""
    is_flat: bool = False
    """The data are the elements one after the other (not numbers of varying length)."""
    external: External | None = None

    @property
    def num_elements(self) -> int:
        """How many elements the shape has."""
        return prod(self.shape)

    @property
    def needs(self) -> int | None:
        """Bytes that the shape takes; None where elements have no fixed size."""
        return (self.num_elements * self.bits + 7) // 8 if self.bits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedUse:
    """A node that unpacks weights: the tensor's name, and the node's numbers (`K`, `N`, `bits`, `block_size`)."""

    operator: str
    tensor: str
    numbers: Mapping[str, int]


@dataclass(slots=True, kw_only=True)
class OnnxModel:
    """What a model consists of."""

    nbytes: int
    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Name -> type and shape, as "FLOAT[batch, 16]"; inputs that initializers fill are left out."""
    outputs: dict[str, str] = field(default_factory=dict)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(domain, operator) -> nodes, those of subgraphs and functions among them."""
    tensors: list[OnnxTensor] = field(default_factory=list)
    packed: list[PackedUse] = field(default_factory=list)
    scales: set[str] = field(default_factory=set)
    """Tensors that scale or shift quantized weights: they take bytes and are no weights of their own."""
    num_subgraphs: int = 0
    num_functions: int = 0
    function_domains: set[str] = field(default_factory=set)
    duplicates: list[str] = field(default_factory=list)
    """Initializers of the main graph that have the name of another."""


def read_onnx(path: Path) -> OnnxModel:
    """What a file consists of; CheckpointError for what is no ONNX model, is damaged, or is beyond the limits."""
    with open_regular(path, path.name) as (descriptor, stamp):
        if stamp.size > MAX_BYTES:
            hint = "save its weights as external data: onnx.save(model, path, save_as_external_data=True)"
            message = f"{stamp.size} bytes, readers of protocol buffers take less than 2 GiB"
            raise CheckpointError(message, where=path.name, hint=hint)
        wire = Wire(path, descriptor, stamp.size)
        model = _Reader(wire).model()
    if not model.ir_version or not (model.operators or model.tensors or model.outputs):
        raise CheckpointError("not an ONNX model: it has no ir_version, or no graph", where=path.name)
    return model


class _Reader:
    """The schema on top of the wire."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.out = OnnxModel(nbytes=wire.size)
        self.filled: set[str] = set()

    def model(self) -> OnnxModel:
        """ModelProto: 1 ir_version, 2 producer, 3 its version, 7 graph, 8 opsets, 14 metadata, 25 functions."""
        version, out = "", self.out
        for number, kind, a, b in self.wire.fields(0, self.wire.size):
            if number == 1 and kind == VARINT:
                out.ir_version = signed(a)
            elif kind != BYTES:
                continue
            elif number == 2:
                out.producer = printable(self.wire.text(a, b), 60)
            elif number == 3:
                version = printable(self.wire.text(a, b), 60)
            elif number == 7:
                self.graph(a, b, 0)
            elif number == 8:
                domain, opset = self.opset(a, b)
                out.opsets[domain] = opset
            elif number == 14 and len(out.metadata) < MAX_VALUES:
                key, value = self.pair(a, b)
                out.metadata[key] = value
            elif number == 25:
                self.function(a, b)
        out.producer = " ".join(filter(None, (out.producer, version)))
        out.inputs = {name: told for name, told in out.inputs.items() if name not in self.filled}
        return out

    def opset(self, start: int, stop: int) -> tuple[str, int]:
        """OperatorSetIdProto: 1 domain, 2 version."""
        domain, version = "", 0
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 1 and kind == BYTES:
                domain = self.wire.text(a, b)
            elif number == 2 and kind == VARINT:
                version = signed(a)
        return domain, version

    def pair(self, start: int, stop: int) -> tuple[str, str]:
        """StringStringEntryProto: 1 key, 2 value."""
        found = {1: "", 2: ""}
        for number, kind, a, b in self.wire.fields(start, stop):
            if number in found and kind == BYTES:
                found[number] = self.wire.text(a, min(b, a + (1 << 12)))
        return found[1], found[2]

    def function(self, start: int, stop: int) -> None:
        """FunctionProto: 7 nodes, 10 domain."""
        self.out.num_functions += 1
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 7 and kind == BYTES:
                self.node(a, b, 1)
            elif number == 10 and kind == BYTES and len(self.out.function_domains) < MAX_VALUES:
                self.out.function_domains.add(self.wire.text(a, b))

    def graph(self, start: int, stop: int, depth: int) -> None:
        """GraphProto: 1 nodes, 5 initializers, 11 inputs, 12 outputs, 15 sparse initializers."""
        if depth > MAX_DEPTH:
            raise self.wire.error(f"graphs nested more than {MAX_DEPTH} deep", start)
        self.out.num_subgraphs += depth > 0
        for number, kind, a, b in self.wire.fields(start, stop):
            if kind != BYTES:
                continue
            if number == 1:
                self.node(a, b, depth)
            elif number == 5:
                tensor = self.tensor(a, b)
                if depth == 0 and tensor.name in self.filled:
                    self.out.duplicates.append(tensor.name)
                elif depth == 0:
                    self.filled.add(tensor.name)
            elif number == 15:
                self.sparse(a, b)
            elif number in (11, 12) and depth == 0:
                values = self.out.inputs if number == 11 else self.out.outputs
                name, told = self.value(a, b)
                if len(values) < MAX_VALUES:
                    values[name] = told

    def node(self, start: int, stop: int, depth: int) -> None:
        """NodeProto: 1 inputs (the first four tell), 4 operator, 5 attributes, 7 domain."""
        inputs: list[str] = []
        operator, domain = "", ""
        numbers: dict[str, int] = {}
        for number, kind, a, b in self.wire.fields(start, stop):
            if kind != BYTES:
                continue
            if number == 1 and len(inputs) < 4:
                inputs.append(self.wire.text(a, b))
            elif number == 4:
                operator = self.wire.text(a, b)
            elif number == 5:
                self.attribute(a, b, depth, numbers)
            elif number == 7:
                domain = self.wire.text(a, b)
        self.out.operators[(domain, operator)] += 1
        if len(self.out.operators) > MAX_OPERATORS:
            raise self.wire.error(f"more than {MAX_OPERATORS} different operators", start)
        if operator == "DequantizeLinear":
            self.out.scales.update(inputs[1:3])
        elif operator in PACKED and len(inputs) > 1:
            self.out.scales.update(inputs[2:4])
            tensor = inputs[1] if operator == "MatMulNBits" else inputs[0]
            self.out.packed.append(PackedUse(operator=operator, tensor=tensor, numbers=numbers))

    def attribute(self, start: int, stop: int, depth: int, numbers: dict[str, int]) -> None:
        """AttributeProto: 1 name, 3 integer, 5 tensor, 6 graph, 10 tensors, 11 graphs, 22 and 23 sparse tensors."""
        name, value = "", None
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 3 and kind == VARINT:
                value = signed(a)
            elif kind != BYTES:
                continue
            elif number == 1:
                name = self.wire.text(a, b)
            elif number in (5, 10):
                self.tensor(a, b)
            elif number in (6, 11):
                self.graph(a, b, depth + 1)
            elif number in (22, 23):
                self.sparse(a, b)
        if value is not None and len(numbers) < MAX_VALUES:
            numbers[name] = value

    def sparse(self, start: int, stop: int) -> None:
        """SparseTensorProto: 1 values, 2 indices."""
        for number, kind, a, b in self.wire.fields(start, stop):
            if number in (1, 2) and kind == BYTES:
                self.tensor(a, b)

    def tensor(self, start: int, stop: int) -> OnnxTensor:
        """TensorProto: 1 shape, 2 type, 4-7 and 9-11 data, 8 name, 13 external data, 14 where the data is."""
        shape: list[int] = []
        name, type_number, is_external = "", 0, False
        pairs: dict[str, str] = {}
        data: list[tuple[int, int, int]] = []
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 1:
                shape += [signed(a)] if kind == VARINT else self.numbers(a, b)
            elif kind == VARINT:
                type_number = a if number == 2 else type_number
                is_external = is_external or (number == 14 and a == 1)
            elif number in _DATA and len(data) < 2:
                data.append((number, a, b))
            elif number == 8 and kind == BYTES:
                name = self.wire.text(a, b)
            elif number == 13 and kind == BYTES and len(pairs) < 16:
                key, value = self.pair(a, b)
                pairs[key] = value
        if len(shape) > MAX_AXES or any(not 0 <= n < 1 << 62 for n in shape) or prod(shape) >= 1 << 62:
            raise self.wire.error(f"a tensor of the shape {printable(shape, 60)}", start)
        kind_name, bits = TYPES.get(type_number, (f"type {type_number}", 0))
        number, a, b = data[0] if len(data) == 1 else (0, 0, sum(b - a for _, a, b in data))
        external = None
        if is_external:
            external = External(
                location=pairs.get("location", ""), offset=pairs.get("offset"), length=pairs.get("length")
            )
        told = OnnxTensor(
            name=name,
            type=kind_name,
            bits=bits,
            shape=tuple(shape),
            offset=a,
            nbytes=b - a,
            is_flat=number == 9 or _FLAT.get(number) == bits,
            external=external,
        )
        self.out.tensors.append(told)
        if len(self.out.tensors) > MAX_TENSORS:
            raise self.wire.error(f"more than {MAX_TENSORS} tensors", start)
        return told

    def numbers(self, start: int, stop: int) -> list[int]:
        """Packed integers, as shapes have them."""
        out, at = [], start
        while at < stop:
            value, at = self.wire.varint(at, stop)
            out.append(signed(value))
            if len(out) > MAX_AXES:
                raise self.wire.error(f"a shape of more than {MAX_AXES} axes", start)
        return out

    def value(self, start: int, stop: int) -> tuple[str, str]:
        """ValueInfoProto: 1 name, 2 type (1 tensor: 1 element, 2 shape: 1 dimensions: 1 value or 2 name)."""
        name, told = "", "not a tensor"
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 1 and kind == BYTES:
                name = self.wire.text(a, b)
            elif number == 2 and kind == BYTES:
                for inner, wire_type, c, d in self.wire.fields(a, b):
                    told = self.tensor_type(c, d) if inner == 1 and wire_type == BYTES else told
        return name, told

    def tensor_type(self, start: int, stop: int) -> str:
        element, axes = "?", ""
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 1 and kind == VARINT:
                element = TYPES.get(a, (f"type {a}", 0))[0]
            elif number == 2 and kind == BYTES:
                found = (self.axis(c, d) for n, w, c, d in self.wire.fields(a, b) if n == 1 and w == BYTES)
                axes = ", ".join(islice(found, MAX_AXES))
        return f"{element}[{printable(axes)}]"

    def axis(self, start: int, stop: int) -> str:
        said = "?"
        for number, kind, a, b in self.wire.fields(start, stop):
            if number == 1 and kind == VARINT:
                said = str(signed(a))
            elif number == 2 and kind == BYTES:
                said = self.wire.text(a, b)
        return said
