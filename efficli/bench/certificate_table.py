"""A certificate as a table of words: one line a figure, one column a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FIGURES: Mapping[str, str] = {
    "kld_mean": "mean KL divergence",
    "kld_p99": "99th percentile KL divergence",
    "kld_max": "largest KL divergence",
    "top1_agreement": "top-1 agreement",
    "ppl_base": "perplexity of the base",
    "ppl": "perplexity",
    "ppl_ratio": "ratio of perplexities",
    "rms_dp": "RMS change of p(next token)",
    "bits_per_byte_base": "bits per byte of the base",
    "bits_per_byte": "bits per byte",
    "cosine_mean": "mean cosine",
    "cosine_min": "smallest cosine",
}
"""Every figure a certificate can have, and its words. KL divergence in nats."""


def table(rows: Sequence[tuple[str, int, Mapping[str, float | None]]]) -> tuple[list[str], list[list[str]]]:
    """Heading and lines, from (text, n, figures) of each text."""
    heading = ["", *(name for name, _, _ in rows)]
    embeddings = any("cosine_mean" in figures for _, _, figures in rows)
    lines = [["texts" if embeddings else "positions", *(str(n) for _, n, _ in rows)]]
    for key, label in FIGURES.items():
        if any(figures.get(key) is not None for _, _, figures in rows):
            lines.append([label, *(_cell(figures.get(key), figures.get(f"{key}_stderr")) for _, _, figures in rows)])
    return heading, lines


def _cell(value: float | None, error: float | None) -> str:
    """`0.0123 ± 0.0004`: the error to two digits, the value to the same place."""
    if value is None:
        return ""
    if not error or not math.isfinite(error):
        return f"{value:.4g}"
    places = 1 - math.floor(math.log10(error))
    if not 1e-3 <= abs(value) < 1e6:
        digits = max(0, places + math.floor(math.log10(abs(value)))) if value else 1
        return f"{value:.{digits}e} ± {error:.1e}"
    return f"{value:.{max(0, places)}f} ± {error:.{max(0, places)}f}"
