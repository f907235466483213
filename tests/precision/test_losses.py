"""Loss models: measured points as they are, what lies between, and the sensitivity of a toy whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from efficli.precision.curves import Curve, Point
from efficli.precision.losses import LOSSES, losses

ERRORS = {"Q2_K": 8.0, "Q3_K": 2.0, "Q4_K": 0.5, "Q5_K": 0.12, "Q6_K": 0.03, "Q8_0": 0.002, "F16": 1e-7}
MEASURED = {"Q2_K": 0.9, "Q4_K": 0.03, "Q6_K": 0.001}


@pytest.fixture
def curve() -> Curve:
    points = {
        kind: Point(nbytes=100 - n, mse=2 * error, hess=error, kld=MEASURED.get(kind))
        for n, (kind, error) in enumerate(ERRORS.items())
    }
    return Curve(points=points, sensitivity=3.0)


def test_each_model_reads_its_own_column(curve: Curve) -> None:
    assert losses(curve, "mse") == {kind: 2 * error for kind, error in ERRORS.items()}
    assert losses(curve, "hess") == ERRORS
    assert losses(curve, "higgs") == pytest.approx({kind: 3 * error for kind, error in ERRORS.items()})
    found = losses(curve, "kld")
    assert {kind: found[kind] for kind in MEASURED} == MEASURED
    without = replace(curve, points={k: replace(point, hess=None) for k, point in curve.points.items()})
    assert losses(without, "hess") == losses(curve, "mse")
    assert set(LOSSES) == {"mse", "hess", "higgs", "kld"}


def test_between_measured_points_it_is_linear_in_logarithms_and_beyond_them_proportional(curve: Curve) -> None:
    found = losses(curve, "kld")
    share = math.log(2.0 / 0.5) / math.log(8.0 / 0.5)
    assert found["Q3_K"] == pytest.approx(math.exp(math.log(0.03) + share * math.log(0.9 / 0.03)))
    assert found["Q8_0"] == pytest.approx(0.001 * 0.002 / 0.03)
    assert found["F16"] == pytest.approx(0.001 * 1e-7 / 0.03)
    values = list(found.values())
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


def test_nothing_lost_where_there_is_no_error_and_no_number_below_nothing(curve: Curve) -> None:
    points = {k: replace(point, kld=None if k in ("F16", "Q8_0") else -1e-9) for k, point in curve.points.items()}
    points["F16"] = replace(points["F16"], hess=0.0)
    found = losses(Curve(points=points), "kld")
    assert found["F16"] == 0.0 and all(0 <= value < 1e-11 for value in found.values())
    assert np.isfinite(list(found.values())).all()


def test_what_was_not_measured_is_no_loss(curve: Curve) -> None:
    with pytest.raises(ValueError, match="not probed"):
        losses(replace(curve, sensitivity=None), "higgs")
    bare = replace(curve, points={k: replace(point, kld=None) for k, point in curve.points.items()})
    with pytest.raises(ValueError, match="nothing was measured"):
        losses(bare, "kld")
