"""Loss models: from error curves to items that an allocator can choose among. One function, four ways.

mse, hess   the error of each tensor's own output, added up as if all outputs counted the same
higgs       sensitivity_l × error: Malinovskii et al. 2024 (arXiv:2411.17525), theorem 1: for small errors the loss
            is sum_l a_l t_l², and a_l does not depend on the quantizer, so noise measures it
kld         measured with only that tensor quantized; a type that was not measured lies between its neighbours,
            linear in log(error)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Literal, get_args

import numpy as np

from efficli.ops.allocate import Choice, Item
from efficli.precision.curves import Curve

Loss = Literal["mse", "hess", "higgs", "kld"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

FLOOR = 1e-12
"""Below it a loss is nothing, whatever a logarithm says."""


def losses(curve: Curve, model: Loss) -> dict[str, float]:
    """The loss of each type of one tensor; ValueError where the curve was not made for this model."""
    if model == "mse":
        return {kind: point.mse for kind, point in curve.points.items()}
    if model == "hess":
        return {kind: point.error for kind, point in curve.points.items()}
    if model == "higgs":
        if curve.sensitivity is None:
            raise ValueError("the network was not probed with noise")
        return {kind: curve.sensitivity * point.error for kind, point in curve.points.items()}
    return _interpolated(curve)


def items(
    curves: Mapping[str, Curve], model: Loss, *, allowed: Mapping[str, Collection[str]] | None = None
) -> list[Item]:
    """An item for each tensor: its types with their bytes and losses; `allowed` leaves some out."""
    found = []
    for name, curve in curves.items():
        told = losses(curve, model)
        choices = [
            Choice(kind, point.nbytes, max(0.0, told[kind]))
            for kind, point in curve.points.items()
            if allowed is None or kind in allowed[name]
        ]
        found.append(Item(name, tuple(choices)))
    return found


def _interpolated(curve: Curve) -> dict[str, float]:
    """Measured losses, and between them log(loss) linear in log(error); beyond them proportional to the error."""
    known = sorted(
        (point.error, point.kld) for point in curve.points.values() if point.kld is not None and point.error > 0
    )
    if not known:
        raise ValueError("nothing was measured of this tensor")
    x = np.log([max(error, FLOOR) for error, _ in known])
    y = np.log([max(loss, FLOOR) for _, loss in known])
    found = {}
    for kind, point in curve.points.items():
        if point.kld is not None:
            found[kind] = max(0.0, point.kld)
        elif point.error <= 0:
            found[kind] = 0.0
        else:
            at = math.log(max(point.error, FLOOR))
            beyond = min(0.0, at - x[0]) + max(0.0, at - x[-1])
            found[kind] = math.exp(float(np.interp(at, x, y)) + beyond)
    return found
