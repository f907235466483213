"""What is refused from the configuration and the headers alone, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from efficli.checkpoint.header import TensorRef
from efficli.errors import SecurityError, UnsupportedError

_FLOAT8 = ("F8_", "F6_", "F4")
_DEQUANTIZE = "take the checkpoint that it was quantized from, or dequantize it to bfloat16 first"


def check_remote_code(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> str | None:
    """Refuse a configuration that names code of its own; with `trust_remote_code`, return the note to print instead."""
    nested = [value for value in config.values() if isinstance(value, dict)]
    if not any("auto_map" in part for part in (config, *nested)):
        return None
    if not trust_remote_code:
        raise SecurityError(
            "refusing to run code from the checkpoint (auto_map)",
            where=where,
            hint="a plain member of its family is taken with --trust-remote-code; code of it is not run then either",
        )
    return f"{where}: auto_map ignored; no code from the checkpoint is run"


def check_quantized(config: Mapping[str, Any], tensors: Iterable[TensorRef]) -> None:
    """Refuse checkpoints whose weights are codes of another quantizer: config.json says so, or the tensors show it."""
    scheme = quantization_scheme(config)
    by_name = {tensor.name: tensor for tensor in tensors}
    for name, tensor in by_name.items():
        if not tensor.dtype.startswith(_FLOAT8):
            continue
        stem = name.removesuffix(".weight")
        scales = [f"{stem}.{suffix}" for suffix in ("weight_scale_inv", "weight_scale", "scale")]
        if not any(scale in by_name for scale in scales):
            message = f"dtype {tensor.dtype} needs its scales (weight_scale_inv)"
            raise UnsupportedError(message, where=name, hint=_DEQUANTIZE)
        scheme = scheme or tensor.dtype.lower()
    if scheme:
        message = f"the checkpoint is already quantized ({scheme}), expected F32, BF16 or F16 weights"
        raise UnsupportedError(message, where="config.json", hint=_DEQUANTIZE)


def quantization_scheme(config: Mapping[str, Any]) -> str | None:
    """The quantizer that config.json names (gptq, awq, bitsandbytes, fp8, bitnet, mlx, ...), or None."""
    for part in (config, config.get("text_config")):
        if not isinstance(part, Mapping):
            continue
        found = part.get("quantization_config")
        if isinstance(found, Mapping) and found:
            if _online_bitnet(found):
                continue
            return str(found.get("quant_method", found.get("quant_algo", "unknown method")))
        mlx = part.get("quantization")
        if isinstance(mlx, Mapping) and "bits" in mlx:
            return "mlx"
    return None


def _online_bitnet(found: Mapping[str, Any]) -> bool:
    """Whether it is BitNet's training form: plain float weights that the layer itself rounds, nothing packed."""
    return found.get("quant_method") == "bitnet" and found.get("quantization_mode") == "online"
