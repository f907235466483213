"""Speed of memory and of llama.cpp: what is repeated, and that what is timed is what is meant."""

from __future__ import annotations

import itertools
import math

import gguf
import pytest

from efficli.errors import CheckpointError
from efficli.export.gguf.stand_in import LAYERS, Shape, write_stand_in
from efficli.ops.child import run_child
from efficli.ops.probe import copy_gb_per_s, read_gb_per_s, repeated

SMALL = Shape(layers=2, hidden=256, ffn=512)
MIB = 1 << 20


def test_a_figure_that_is_known_is_not_measured_on():
    calls = itertools.count()
    assert repeated(lambda: float(next(calls) > 0)) == (1.0,) * 7  # the first does not count
    assert next(calls) == 8


def test_one_that_varies_is_measured_until_patience_ends():
    values = itertools.cycle([1.0, 2.0, 3.0])
    assert len(repeated(lambda: next(values))) == 25
    assert len(repeated(lambda: next(values), patience_s=0)) == 7


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_and_copied(threads):
    for samples in (read_gb_per_s(MIB + 17, threads), copy_gb_per_s(MIB + 17)):
        assert len(samples) >= 7
        assert all(0 < one < math.inf for one in samples)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "F16"])
def test_a_stand_in_is_a_file_as_another_reader_sees_it(tmp_path, kind):
    tensors = write_stand_in(tmp_path / "a.gguf", SMALL, kind)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert list(read) == list(tensors)
    for name, (type_name, nbytes, shape) in tensors.items():
        assert (read[name].tensor_type.name, read[name].n_bytes) == (type_name, nbytes)
        assert tuple(map(int, read[name].shape))[::-1] == shape
    assert sum(nbytes for _, nbytes, _ in tensors.values()) == SMALL.nbytes(kind)


def test_a_stand_in_is_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_stand_in(tmp_path / name, SMALL, "Q4_K")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("nbytes", [1, 60_000_000, 200_000_000, 1_000_000_000, 2 << 30])
def test_a_stand_in_has_about_the_bytes_that_were_asked_for(nbytes):
    shape = Shape.of_bytes(nbytes, "Q4_K")
    assert 1 <= shape.layers <= LAYERS
    assert shape.layers == 1 or shape.nbytes("Q4_K") == pytest.approx(nbytes, rel=0.07)
    assert shape.narrow.layers == shape.layers
    assert shape.narrow.nbytes("Q4_K") < max(0.05 * shape.nbytes("Q4_K"), 1_000_000)


def test_llama_cpp_decodes_it_with_each_number_of_threads(tmp_path):
    write_stand_in(tmp_path / "a.gguf", SMALL, "Q4_K")
    request = {"path": str(tmp_path / "a.gguf"), "threads": [2, 1], "tokens": 4}
    found = run_child("efficli.ops.probe:decode", request, what="decoding")
    assert list(found) == ["2", "1"]
    for samples in found.values():
        assert len(samples) >= 7
        assert all(1e-6 < one < 10 for one in samples)


def test_a_file_that_is_none_is_an_error_of_the_child(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"no")
    request = {"path": str(tmp_path / "a.gguf"), "threads": [1], "tokens": 4}
    with pytest.raises(CheckpointError):
        run_child("efficli.ops.probe:decode", request, what="decoding")
