"""Which versions of vLLM the patches of ``compat`` are for, and whether the one at hand has what they need."""

from __future__ import annotations

import inspect
import re
from typing import get_args

SUPPORTED = ("0.32", "0.33")


def supported_version(version: str) -> str | None:
    """``"0.32"`` or ``"0.33"`` for a version of that series (local and dev parts allowed), else None."""
    match = re.match(r"(\d+\.\d+)(\D|$)", version)
    return match.group(1) if match and match.group(1) in SUPPORTED else None


def structural_problems(series: str) -> list[str]:
    """What the patches of ``series`` need of vLLM and do not find; empty means that all can be applied."""
    import vllm.config.cache as cache
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils import argparse_utils, torch_utils
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.backends import registry
    from vllm.v1.kv_cache_interface import AttentionSpec

    selection = getattr(type(current_platform), "get_attn_backend_cls", None)
    parameters = list(inspect.signature(selection).parameters) if selection else []
    needed: dict[str, bool] = {
        "Platform.get_attn_backend_cls(selected_backend, attn_selector_config)": parameters[:2]
        == ["selected_backend", "attn_selector_config"],
        "EngineArgs.create_model_config": hasattr(EngineArgs, "create_model_config"),
        "AttentionBackend.customize_spec": hasattr(AttentionBackend, "customize_spec"),
        "AttentionSpec.state_content_bytes": "state_content_bytes" in getattr(AttentionSpec, "__dataclass_fields__", {}),
        "register_backend": hasattr(registry, "register_backend"),
        "STR_DTYPE_TO_TORCH_DTYPE": hasattr(torch_utils, "STR_DTYPE_TO_TORCH_DTYPE"),
        "CacheConfig.metrics_info": hasattr(cache.CacheConfig, "metrics_info"),
        "CacheDType": "auto" in get_args(getattr(cache, "CacheDType", None)),
    }
    if series == "0.32":
        needed["FlexibleArgumentParser"] = hasattr(argparse_utils, "FlexibleArgumentParser")
    else:
        needed["register_kv_cache_dtype"] = hasattr(cache, "register_kv_cache_dtype")
    return [name for name, found in needed.items() if not found]
