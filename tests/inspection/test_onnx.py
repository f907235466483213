"""ONNX files: what our reader sees is what the onnx package sees, and what is hostile or damaged is said."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from efficli.errors import CheckpointError, EffiError
from efficli.inspection.onnx_reader import MAX_DEPTH, TYPES, read_onnx
from efficli.pipeline import inspect
from tests.inspection.onnx_models import EMBEDDING, UP, make, point, write, write_external


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs, by the onnx package."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += all_nodes(attribute.g)
    return found


def test_the_reader_sees_what_the_package_sees(tmp_path):
    theirs = make()
    onnx.checker.check_model(theirs)
    ours = read_onnx(write(tmp_path / "m.onnx", theirs))
    assert (ours.ir_version, ours.producer) == (theirs.ir_version, "a test")
    assert ours.opsets == {opset.domain: opset.version for opset in theirs.opset_import}
    assert ours.operators == Counter((node.domain, node.op_type) for node in all_nodes(theirs.graph))
    assert ours.num_subgraphs == 2
    assert ours.inputs == {"input_ids": "INT64[batch, 16]"}
    assert ours.outputs == {"logits": "FLOAT[batch, 16, 32]"}
    for mine, initializer in zip(ours.tensors, theirs.graph.initializer, strict=True):
        values = numpy_helper.to_array(initializer)
        assert (mine.name, mine.shape, mine.nbytes) == (initializer.name, values.shape, values.nbytes)
        assert mine.type == TensorProto.DataType.Name(initializer.data_type)
        data = (tmp_path / "m.onnx").read_bytes()[mine.offset : mine.offset + mine.nbytes]
        assert data == values.tobytes()


def test_types_are_those_of_the_package():
    known = {number: name for name, number in TensorProto.DataType.items() if number}
    assert {number: name for number, (name, _) in TYPES.items()} == known
    for number, (name, bits) in TYPES.items():
        if bits >= 8 and name not in ("STRING",) and "FLOAT8" not in name:
            assert helper.tensor_dtype_to_np_dtype(number).itemsize * 8 == bits


def test_a_good_model_is_clean_and_its_weights_are_counted(tmp_path):
    found = inspect(write(tmp_path / "m.onnx"))
    (report,) = found.models
    assert found.exit_code == 0, found.all_findings
    groups = {group.name: group for group in report.groups}
    assert groups["embedding"].types == {"FLOAT16": 6400}
    assert groups["feed-forward"].types == {"int4/32": 64 * 96}
    assert report.num_weights == 6400 + 64 * 96 + 96 * 32  # scales and conditions are none
    assert sum(group.nbytes for group in report.groups) == sum(
        numpy_helper.to_array(one).nbytes for one in make().graph.initializer
    )
    assert report.details["operators"]["com.microsoft.MatMulNBits"] == 1
    (operators,) = [check.seen for check in report.checks if check.name == "operators"]
    assert "quantized: 1 MatMulNBits, 1 DequantizeLinear" in operators


def test_data_beside_the_model_are_read_too(tmp_path):
    write_external(tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert found.exit_code == 0, found.all_findings
    assert found.models[0].nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    data = tmp_path / "weights.data"
    values = np.frombuffer(bytearray(data.read_bytes()), np.float16)
    values[3] = np.nan
    data.write_bytes(values.tobytes())
    (finding,) = inspect(tmp_path / "m.onnx").all_findings
    assert finding.message == f"1 NaN in {EMBEDDING} (first at [0,3])"
    assert inspect(tmp_path / "m.onnx", scan=False).exit_code == 0


def link_out(path: Path) -> None:
    data = path.parent / "weights.data"
    data.rename(path.parent.parent / "outside")
    data.symlink_to(path.parent.parent / "outside")


def link_inside(path: Path) -> None:
    data = path.parent / "weights.data"
    data.rename(path.parent / "other.data")
    data.symlink_to("other.data")


def through_a_linked_folder(path: Path) -> None:
    (path.parent / "weights.data").rename(path.parent.parent / "weights.data")
    (path.parent / "folder").symlink_to(path.parent.parent)
    point(path, "location", "folder/weights.data")


EXTERNAL: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "..": (lambda p: point(p, "location", "../secret"), "external data '../secret' leaves the folder of the model", 6),
    "a/..": (lambda p: point(p, "location", "a/../../secret"), "leaves the folder", 6),
    "absolute": (lambda p: point(p, "location", "/etc/passwd"), "'/etc/passwd' is not a place beside the model", 6),
    "drive": (lambda p: point(p, "location", "C:\\x"), "is not a place beside the model", 6),
    "link out": (link_out, "external data 'weights.data' is a link that leaves the folder", 6),
    "linked folder": (through_a_linked_folder, "is a link that leaves the folder", 6),
    "link inside": (link_inside, "is a link, which onnx and onnxruntime refuse", 1),
    "2 links": (lambda p: os.link(p.parent / "weights.data", p.parent / "other"), "has 2 links", 6),
    "missing": (lambda p: (p.parent / "weights.data").unlink(), "external data 'weights.data' is missing", 1),
    "short": (lambda p: os.truncate(p.parent / "weights.data", 100), "before its tensors do (tensor", 1),
    "negative": (lambda p: point(p, "offset", "-1"), "has a negative offset or length (-1", 1),
    "no number": (lambda p: point(p, "offset", "x"), "has the offset 'x'", 1),
    "length": (lambda p: point(p, "length", "7"), "has 7 bytes for a tensor of 12800", 1),
    "past": (lambda p: point(p, "offset", "9" * 18), "before its tensors do", 1),
    "folder": (lambda p: point(p, "location", "."), "weights", 6),
    "pipe": (lambda p: ((p.parent / "weights.data").unlink(), os.mkfifo(p.parent / "weights.data")), "no", 1),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(name, tmp_path):
    """Rows 22 and 42."""
    damage, message, code = EXTERNAL[name]
    (tmp_path / "model").mkdir()
    path = write_external(tmp_path / "model" / "m.onnx")
    damage(path)
    found = inspect(path)
    assert found.exit_code == code
    if name not in ("folder", "pipe"):
        assert any(message in finding.line for finding in found.all_findings), found.all_findings
    assert all(finding.hint for finding in found.all_findings)


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = make()
    change(model)
    return model


def set_value(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].raw_data = b"\0\0\x80\x7f" + model.graph.initializer[2].raw_data[4:]


FINDINGS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "Inf": (set_value, "1 Inf in up.scales (first at [0])"),
    "zeros": (
        lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(12800)),
        f"1 matrix is all zero: {EMBEDDING}",
    ),
    "size": (lambda m: setattr(m.graph.initializer[1], "raw_data", b"abc"), "shape needs 3072 bytes, has 3"),
    "twice": (lambda m: setattr(m.graph.initializer[1], "name", EMBEDDING), "1 initializers have a name twice"),
    "domain": (lambda m: setattr(m.graph.node[1], "domain", "evil.corp"), "operators of the domain evil.corp"),
    "not imported": (lambda m: m.opset_import.pop(), "operators of com.microsoft, which it does not import"),
    "no opset": (lambda m: m.ClearField("opset_import"), "the model imports no set of operators"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "the graph has no outputs"),
}


@pytest.mark.parametrize("name", FINDINGS)
def test_findings(name, tmp_path):
    change, message = FINDINGS[name]
    found = inspect(write(tmp_path / "m.onnx", changed(change)))
    assert found.exit_code == 1
    assert any(message in finding.message for finding in found.all_findings), found.all_findings
    assert all(finding.hint for finding in found.all_findings)


def nested(depth: int) -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    for _ in range(depth):
        graph = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=graph)], "g", [], [])
    return helper.make_model(graph)


def test_graphs_in_graphs(tmp_path):
    assert read_onnx(write(tmp_path / "m.onnx", nested(MAX_DEPTH))).num_subgraphs == MAX_DEPTH
    with pytest.raises(CheckpointError, match=f"graphs nested more than {MAX_DEPTH} deep"):
        read_onnx(write(tmp_path / "m.onnx", nested(MAX_DEPTH + 1)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no ir_version, or no graph"),
        (b"\x08\x0a", "it has no ir_version, or no graph"),
        (b"not a model at all", "not an ONNX model, or damaged"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a field of 18446744073709551615 bytes, 0 are left"),
        (b"\x08" + b"\xff" * 11, "a number that does not end"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x00\x00", "field number 0"),
    ],
)
def test_what_is_no_model(data, message, tmp_path):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        read_onnx(tmp_path / "m.onnx")


def test_more_than_protobuf_can_read(tmp_path):
    """Row 43's limit: a file of 2 GiB, nothing of which is read."""
    with (tmp_path / "m.onnx").open("wb") as out:
        out.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="less than 2 GiB"):
        read_onnx(tmp_path / "m.onnx")


def test_cut_anywhere(tmp_path):
    """A cut file is refused, unless it is cut between fields of the model itself."""
    whole = write(tmp_path / "m.onnx").read_bytes()
    for size in range(0, len(whole), 501):
        (tmp_path / "m.onnx").write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_onnx(tmp_path / "m.onnx")


def look(path: Path) -> None:
    """An EffiError or a report, soon; CPU seconds, looked at again where another process disturbed them."""
    for left in (1, 0):
        began = time.process_time()
        try:
            inspect(path).to_json()
        except EffiError as error:
            assert error.line.isprintable()
        if time.process_time() - began < 1 or not left:
            break
    assert time.process_time() - began < 1


def fuzz(folder: Path, examples: int) -> None:
    external = write_external(folder / "external.onnx").read_bytes()
    whole = [write(folder / "whole.onnx").read_bytes(), external, external]
    changes = st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 255)), min_size=1, max_size=8)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(which=st.integers(0, 2), changes=changes, cut=st.sampled_from([0, 0, 0, 1, 50]))
    def run(which, changes, cut):
        data = bytearray(whole[which])
        for at, byte in changes:
            data[at % len(data)] = byte
        (folder / "x.onnx").write_bytes(data[: len(data) - cut])
        look(folder / "x.onnx")

    run()


def test_changed_bytes(tmp_path):
    fuzz(tmp_path, 80)


@pytest.mark.slow
def test_changed_bytes_at_length(tmp_path):
    fuzz(tmp_path, 10_000)


def test_hashes_beside_the_model(tmp_path):
    """SHA256SUMS names the model and its data; one changed byte is integrity."""
    import hashlib

    write_external(tmp_path / "m.onnx")
    names = ("m.onnx", "weights.data")
    sums = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (tmp_path / "SHA256SUMS").write_text("".join(sums))
    assert inspect(tmp_path / "m.onnx").exit_code == 0
    data = bytearray((tmp_path / "weights.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.data").write_bytes(data)
    for path in (tmp_path / "m.onnx", tmp_path):
        found = inspect(path)
        assert (found.exit_code, found.all_findings[0].line) == (6, "weights.data: verify: sha256 differs")


def test_packed_weights_of_other_widths(tmp_path):
    def eight(model: onnx.ModelProto) -> None:
        for attribute in model.graph.node[2].attribute:
            if attribute.name == "bits":
                attribute.i = 8

    (report,) = inspect(write(tmp_path / "m.onnx", changed(eight))).models
    (group,) = [group for group in report.groups if group.name == "feed-forward"]
    assert UP and group.types == {"int8/32": 96 * 2 * 16}  # what is there, not what K and N claim
