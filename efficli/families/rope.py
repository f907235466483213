"""Rotary position embeddings: what config.json says of them, and the frequencies that follow.

Scalings as in transformers' modeling_rope_utils: linear (Chen et al. 2023, arXiv:2306.15595), dynamic NTK, YaRN
(Peng et al. 2023, arXiv:2309.00071), LongRoPE (Ding et al. 2024, arXiv:2402.13753), Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError, UnsupportedError
from efficli.families.table import Family
from efficli.families.values import Values

Scaling = Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
SCALINGS: tuple[Scaling, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The rotary embedding of one kind of layer; half-split order, as every checkpoint stores it."""

    theta: float
    dim: int
    """Rotated values of each head, counted from the first."""
    scaling: Scaling = "default"
    factor: float = 1.0
    original_positions: int = 0
    """Context length before scaling."""
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it (YaRN, LongRoPE)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """YaRN: the ramp's ends are rounded outwards to whole dimensions."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def read_rope(config: Mapping[str, Any], family: Family, layer_type: str, *, head_dim: int, max_positions: int) -> Rope:
    """The rotary embedding of `layer_type` layers, from a config.json of transformers 4 or 5.

    transformers 5 writes `rope_parameters`, nested by layer type where these differ; transformers 4 `rope_theta`,
    `rope_scaling` (global layers only) and Gemma 3's `rope_local_base_freq`.
    """
    parameters = _parameters(config, family, layer_type)
    outer = Values(config, defaults=family.defaults)
    scaling = parameters.word("rope_type", parameters.word("type", "default")).lower()
    if scaling == "su" or (scaling == "yarn" and family.name == "phi3"):
        scaling = "longrope"
    if scaling not in SCALINGS:
        raise UnsupportedError(
            f"rope type '{scaling}' is not supported", where="config.json", hint=f"known: {', '.join(SCALINGS)}"
        )
    inner = parameters.whole("original_max_position_embeddings", max_positions)
    original = outer.whole("original_max_position_embeddings", inner)
    partial = parameters.positive("partial_rotary_factor", outer.positive("partial_rotary_factor", 1.0))
    if partial > 1.0:
        raise parameters.wrong("partial_rotary_factor", partial, "at most 1")
    factor = _factor(parameters, scaling, max_positions / original)
    rope = Rope(
        theta=parameters.positive("rope_theta"),
        dim=int(head_dim * partial),
        scaling=scaling,
        factor=factor,
        original_positions=original,
        beta_fast=parameters.positive("beta_fast", 32.0),
        beta_slow=parameters.positive("beta_slow", 1.0),
        truncate=parameters.flag("truncate", True),
        low_freq_factor=parameters.positive("low_freq_factor", 1.0),
        high_freq_factor=parameters.positive("high_freq_factor", 4.0),
        short_factors=parameters.reals("short_factor"),
        long_factors=parameters.reals("long_factor"),
        attention_factor=_attention_factor(parameters, scaling, factor, original),
    )
    _check(rope)
    return rope


def _parameters(config: Mapping[str, Any], family: Family, layer_type: str) -> Values:
    """What describes the rotary embedding of such layers, theta among it."""
    outer = Values(config, defaults=family.defaults)
    theta, local = outer.positive("rope_theta", 10_000.0), family.defaults.get("rope_local_base_freq")
    is_local = layer_type == SLIDING and local is not None
    parameters = outer.get("rope_parameters")
    if parameters is None:  # transformers 4
        scaling = outer.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise outer.wrong("rope_scaling", scaling, "an object")
        if is_local:
            return Values({}, defaults={"rope_theta": outer.positive("rope_local_base_freq", local)})
        return Values(scaling, defaults={"rope_theta": theta})
    if not isinstance(parameters, Mapping):
        raise outer.wrong("rope_parameters", parameters, "an object")
    if any(isinstance(parameters.get(kind), Mapping) for kind in (FULL, SLIDING)):
        theta = float(family.defaults["rope_local_base_freq"]) if is_local else theta
        parameters = parameters.get(layer_type) or {}
        if not isinstance(parameters, Mapping):
            raise outer.wrong("rope_parameters", parameters, f"an object for {layer_type}")
    return Values(parameters, defaults={"rope_theta": theta})


def _factor(parameters: Values, scaling: str, ratio: float) -> float:
    """The scaling factor; the ratio of contexts where YaRN and LongRoPE leave it out."""
    if parameters.get("factor") is None and scaling in ("linear", "dynamic", "llama3"):
        raise CheckpointError(f"rope type '{scaling}' has no 'factor'", where="config.json")
    return parameters.positive("factor", 1.0 if scaling == "default" else ratio)


def _attention_factor(parameters: Values, scaling: str, factor: float, original: int) -> float:
    """What cosines and sines are multiplied by."""
    if scaling not in ("yarn", "longrope"):
        return 1.0
    if parameters.get("attention_factor") is not None:
        return parameters.positive("attention_factor")
    if factor <= 1.0:
        return 1.0
    if scaling == "longrope":
        return math.sqrt(1.0 + math.log(factor) / math.log(max(original, 2)))
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        numerator, denominator = parameters.positive("mscale"), parameters.positive("mscale_all_dim")
        return (0.1 * numerator * math.log(factor) + 1.0) / (0.1 * denominator * math.log(factor) + 1.0)
    return 0.1 * math.log(factor) + 1.0


def _check(rope: Rope) -> None:
    """Refuse what contradicts itself."""
    if rope.dim % 2 or rope.dim <= 0:
        raise CheckpointError(f"{rope.dim} rotary dimensions, expected an even number", where="config.json")
    if rope.scaling == "longrope":
        for name, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if len(factors) != rope.dim // 2:
                raise CheckpointError(
                    f"rope {name} has {len(factors)} values, expected {rope.dim // 2}", where="config.json"
                )
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        raise CheckpointError("rope high_freq_factor is not above low_freq_factor", where="config.json")
    if rope.scaling == "yarn" and rope.theta == 1.0:
        raise CheckpointError("'rope_theta' is 1, expected more", where="config.json")


def inverse_frequencies(rope: Rope, *, long: bool = False) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, (dim / 2,); `long`: LongRoPE beyond `original_positions`.

    Dynamic NTK is the unscaled embedding up to the model's context, which is what this returns.
    """
    exponent = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    plain = rope.theta**-exponent
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "longrope":
        return plain / np.asarray(rope.long_factors if long else rope.short_factors, dtype=np.float64)
    if rope.scaling == "yarn":
        interpolated = _yarn_ramp(rope)
        return plain / rope.factor * interpolated + plain * (1.0 - interpolated)
    if rope.scaling == "llama3":
        turns = rope.original_positions * plain / (2.0 * np.pi)
        smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1.0 - smooth) * plain / rope.factor + smooth * plain
    return plain


def _yarn_ramp(rope: Rope) -> NDArray[np.float64]:
    """Share of interpolation of each pair: 0 for fast ones, 1 for slow ones."""

    def pair_of(turns: float) -> float:
        return rope.dim * math.log(rope.original_positions / (turns * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    ramp: NDArray[np.float64] = np.clip((np.arange(rope.dim // 2) - low) / span, 0.0, 1.0)
    return ramp
