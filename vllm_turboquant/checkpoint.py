"""What a checkpoint says of its own KV cache."""

from __future__ import annotations

from typing import Any


def declared_cache(model: Any) -> str | None:
    """How a checkpoint quantises keys and values, as its configuration has it: ``"kv_cache_scheme fp8"``; None where it does not.

    model: vLLM's ModelConfig.
    """
    described: Any = getattr(model.hf_config, "quantization_config", None)
    if not isinstance(described, dict):
        return None
    inner = described.get("quantization")  # ModelOpt's place
    for part in (described, inner if isinstance(inner, dict) else {}):
        for key, value in part.items():
            if "kv_cache" in key and value:
                return f"{key} {_words(value)}"
    return None


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('type', '')}{value.get('num_bits', '')}" or "of its own"
    return str(value)
