"""The certificate and the bench of the reference checkpoint: what a user sees first."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import efficli
from efficli.bench.quality import certify_all
from efficli.checkpoint import open_checkpoint
from tests.converted import convert

TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")


def test_order(tmp_path: Path) -> None:
    """Fewer bits, more divergence; Q8_0 below 0.002. By the F32 file, on a thousand positions."""
    base, *files = convert("reference", tmp_path, "F32", *TYPES)
    found = certify_all(files, base, max_positions=1020)
    means = [certificate["kld_mean"] for certificate in found]
    assert means[0] < 0.002
    assert all(less < more for less, more in pairwise(means))


@pytest.mark.slow
def test_order_by_pytorch(tmp_path: Path) -> None:
    """The same by PyTorch on 16 k positions: each step by more than five standard errors; F32 is the origin."""
    files = convert("reference", tmp_path, "F32", *TYPES)
    exact, *found = certify_all(files, open_checkpoint("reference"))
    assert exact["kld_mean"] < 1e-6 and exact["top1_agreement"] > 0.999
    assert exact.total.n > 16_000
    assert found[0]["kld_mean"] < 0.002
    for less, more in pairwise(found):
        assert less["kld_mean"] + 5 * more["kld_mean_stderr"] < more["kld_mean"]
        assert less["top1_agreement"] > more["top1_agreement"]


@pytest.mark.slow
def test_a_bench_at_defaults_takes_less_than_a_minute(tmp_path: Path) -> None:
    """However noisy the machine: repeats beyond the least have a limit of their own."""
    result = efficli.bench(convert("reference", tmp_path, "Q4_K_M"))
    [one] = result.artifacts
    assert [test.test.label for test in one.tests] == ["pp128", "pp512", "tg128"]
    assert len(one.starts) == 2
    assert result.seconds < 60
