"""Run as a script in a process of its own, where no plugin was loaded: ``fresh.py PICKLE``; prints one JSON object.

Each stage leaves vLLM untouched but the last, so one process (ten seconds of imports) is enough for all.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, get_args

_KEPT: list[object] = []  # what was compared by identity: a freed object's id would be used again


def _identity(thing: object) -> str:
    _KEPT.append(thing)
    return str(id(thing))


def fingerprint() -> dict[str, str]:
    """Everything that the plugin could have patched, by identity or content."""
    import vllm.config.cache as cache
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return {
        "dtypes": repr(get_args(cache.CacheDType)),
        "handlers": repr(getattr(cache, "KV_CACHE_DTYPES", None)),
        "torch dtypes": repr(sorted(STR_DTYPE_TO_TORCH_DTYPE)),
        "schema": _identity(cache.CacheConfig.__pydantic_validator__),
        "backends": repr(sorted(AttentionBackendEnum.__members__)),
        "selection": _identity(type(current_platform).get_attn_backend_cls.__func__),
        "model config": _identity(EngineArgs.create_model_config),
        "metrics": _identity(cache.CacheConfig.metrics_info),
        "argparse": _identity(FlexibleArgumentParser._check_value),
        "excepthook": _identity(sys.excepthook),
    }


def call_register(lines: list[str]) -> dict[str, Any]:
    """What one call changed and logged; an exception ends the script and with it the test."""
    import vllm_turboquant

    before = fingerprint()
    lines.clear()
    vllm_turboquant.register()
    after = fingerprint()
    return {"changed": sorted(key for key in before if before[key] != after[key]), "log": list(lines)}


def parse(*arguments: str) -> str:
    """The dtype that vLLM's own argument parser takes, or its error."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(list(arguments))
    except SystemExit:
        return errors.getvalue().strip().splitlines()[-1]
    return str(parsed.kv_cache_dtype)


def main(pickled: str) -> dict[str, Any]:
    config = pickle.loads(Path(pickled).read_bytes())
    result: dict[str, Any] = {
        "plugin imported by unpickling": "vllm_turboquant" in sys.modules,
        "unpickled dtype": config.cache_config.cache_dtype,
        "unpickled settings": config.additional_config,
    }
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backend import AttentionBackend

    result["version"] = real = vllm.__version__
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)

    result["unsupported"] = {}
    for version in ("0.31.2", "0.34.0", "1.0", "0.320.0", "dev", "0.3"):
        vllm.__version__ = version
        result["unsupported"][version] = call_register(lines)
    vllm.__version__ = real

    result["lacking"] = {}
    for owner, name in ((AttentionBackend, "customize_spec"), (EngineArgs, "create_model_config")):
        kept = owner.__dict__[name]
        delattr(owner, name)
        import vllm_turboquant

        lines.clear()
        before = get_args(vllm.config.cache.CacheDType)
        vllm_turboquant.register()
        untouched = before == get_args(vllm.config.cache.CacheDType) and not hasattr(owner, name)
        setattr(owner, name, kept)
        result["lacking"][name] = {"untouched": untouched, "log": list(lines)}

    os.environ["TURBOQUANT_DEBUG"] = "1"
    result["first"] = call_register(lines)
    result["second"] = call_register(lines)
    names = ("turboquant", "turboquant-k8v4", "turboquant-debug-lossless", "auto", "fp8", "turboquant_4bit_nc", "turboquant-k9v9")
    result["parsed"] = {name: parse("--kv-cache-dtype", name) for name in names}
    return result


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
