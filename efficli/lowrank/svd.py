"""Truncate the SVD of each matrix; its product is stored dense: shows what a rank costs.

The checkpoint keeps its size, as factors are not written: export it to see what fewer numbers would cost.

Eckart and Young 1936: of all matrices of rank r, W_r = U_r diag(s_r) V_r^T is nearest to W (out m, in n) in the
Frobenius norm, and the squared error is the sum of the squares of the singular values that are dropped. The factors
have r (m + n) numbers, W has m n, so a rank of m n / (m + n) or more would make a matrix larger; it stays as it is.

Computed as W_r = U_r U_r^T W, where U_r are the eigenvectors of W W^T (or of W^T W, whichever is smaller) with the
largest eigenvalues, in float64: the same matrix, in half the memory, and free of the signs that an SVD leaves open.
Weights are not close to low rank: at 20 % fewer numbers LLaMA-7B is useless by this method (WikiText-2 perplexity
5.7 -> 20061, Wang et al. 2024, arXiv:2403.07378, table 1). It is the baseline that weighted methods are compared with.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from efficli.method import Context, TensorConfig
from efficli.strict_schema import Refused

KIND = "tensor"


class Config(TensorConfig):
    """Which rank, for which matrices."""

    rank: Annotated[int, Field(ge=1)] | None = None
    """Singular values to keep of every matrix; either this or `keep`."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a matrix's numbers that its factors have, 0 to 1; either this or `rank`."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Config:
        if (self.rank is None) == (self.keep is None):
            found = "both 'rank' and 'keep'" if self.keep is not None else "neither 'rank' nor 'keep'"
            raise Refused(f"{found}, expected one of them", at=() if self.keep is None else ("keep",))
        return self


def rank_for(rows: int, columns: int, config: Config) -> int:
    """The rank of a matrix (rows, columns): the one asked for, or the largest whose factors are within `keep`."""
    if config.rank is not None:
        return config.rank
    assert config.keep is not None
    return int(config.keep * rows * columns / (rows + columns))


def leave(rows: int, columns: int, config: Config) -> str | None:
    """Why a matrix (rows, columns) stays as it is, or None."""
    rank = rank_for(rows, columns, config)
    if rank < 1:
        return f"{config.keep:g} of {rows}×{columns} numbers is less than rank 1"
    if rank * (rows + columns) >= rows * columns:
        return f"factors of rank {rank} are not smaller than {rows}×{columns} numbers"
    return None


def solve(weight: NDArray[np.float32], statistics: None, config: Config, context: Context) -> NDArray[np.float32]:
    """The nearest matrix of the configured rank to `weight` (out, in)."""
    return truncate(weight, rank_for(weight.shape[0], weight.shape[1], config))


def truncate(weight: NDArray[np.float32], rank: int) -> NDArray[np.float32]:
    """The matrix of rank `rank` that is nearest to `weight` (m, n) in the Frobenius norm."""
    tall = weight.shape[0] > weight.shape[1]
    wide = (weight.T if tall else weight).astype(np.float64)  # (k, l), k <= l
    _, vectors = np.linalg.eigh(wide @ wide.T)  # ascending eigenvalues, columns
    basis = vectors[:, -rank:]
    nearest = (basis @ (basis.T @ wide)).astype(np.float32)
    return nearest.T if tall else nearest


def rehearsal(config: Config, layers: int) -> Config:
    """A share instead of a rank, which smaller matrices may not have."""
    return config.model_copy(update={"rank": None, "keep": config.keep or 0.5})
