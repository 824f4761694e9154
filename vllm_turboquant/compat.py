"""Every place where vLLM is touched. Nothing outside this module and ``compat_workers`` patches anything.

| id | target | 0.32 | 0.33 | why | gone when |
|---|---|---|---|---|---|
| A | dtype names | extend the ``CacheDType`` Literal, rebuild ``CacheConfig`` and ``SpeculativeConfig`` | official `register_kv_cache_dtype` | accept ``--kv-cache-dtype turboquant`` | 0.32 is dropped |
| C | ``AttentionBackendEnum`` | official `register_backend` | same | a layer looks its backend up by name | never: official |
| D | ``Platform.get_attn_backend_cls`` | wrap | wrap | no hook selects a backend by KV-cache dtype | vLLM has one |
| E | ``EngineArgs.create_model_config`` | wrap | wrap | refuse what cannot be served before processes start | vLLM validates custom dtypes |
| F | ``FlexibleArgumentParser._check_value`` | extend | - | argparse's own line offers names that are refused, and no remedy | 0.32 is dropped |
| G | ``WorkerWrapperBase.get_kv_cache_spec`` | add | add | calibrate when weights are loaded, before the KV cache is sized; pages of one size beside skipped layers | vLLM has a hook there |
| G | ``WorkerWrapperBase.turboquant_*`` | add | add | what ``collective_rpc`` asks workers for | a plugin can add such methods |
| I | ``WorkerWrapperBase.initialize_from_config`` | wrap | wrap | say after start-up what is compressed | vLLM has a hook there |
| K | NIXL's ``compute_nixl_compatibility_hash`` | wrap | wrap | servers of other calibrations shall not read each other's pages | vLLM lets a backend add to it |
| J | ``CacheConfig.metrics_info`` | wrap | wrap | the same as a label of ``vllm:cache_config_info`` | vLLM has a hook there |
| H | ``sys.excepthook`` | chain | chain | a refusal ends in its sentence, not in a traceback | vLLM prints config errors so |

All are applied together or not at all: first every structural check, then every patch; only G, I and K wait until a layer
of ours is built, as they need modules that no other process loads (``compat_workers``). G also puts stand-ins into layers
while it runs the model (``calibration_run``), and vLLM's own backend into layers whose keys no code can carry (``key_noise``).
The dtype name is the only switch: other dtypes go through the wrapped functions unchanged (E also refuses vLLM's own
TurboQuant names on a CPU).
Never dispatch on ``KVQuantMode``: upstream, CUSTOM and OCTAVE_K3V4 share the value 12.
"""  # noqa: E501 - a table

from __future__ import annotations

import argparse
import atexit
import functools
import logging
import sys
from types import TracebackType
from typing import Any

from . import __version__, status
from .config import BACKEND_NAME, FLAG, TurboQuantError, check_dtype_name, dtype_names, is_ours, refuse
from .supported import SUPPORTED, structural_problems, supported_version

logger = logging.getLogger("vllm.turboquant")  # below "vllm": formatted and filtered as vLLM's own lines
_active = False


def activate() -> None:
    """Applies the patches once a process; logs one line and changes nothing for a vLLM that is not supported."""
    global _active
    if _active:
        return
    import vllm

    series = supported_version(vllm.__version__)
    if series is None:
        _log_inactive(f"vLLM {vllm.__version__} is not supported")
        return
    problems = structural_problems(series)
    if problems:
        _log_inactive(f"vLLM {vllm.__version__} lacks {', '.join(problems)}")
        return
    _active = True
    if series == "0.32":
        _extend_literal(dtype_names())
        _check_dtype_argument()
    else:
        _register_dtypes(dtype_names())
    _register_backend()
    _wrap_backend_selection()
    _wrap_model_config()
    _wrap_metrics_info()
    _chain_excepthook()


def active() -> bool:
    """Whether the patches are applied in this process."""
    return _active


def _log_inactive(reason: str) -> None:
    sentence = (
        f"vllm-turboquant {__version__} is inactive: {reason}; {FLAG} turboquant is not available; supported are vLLM "
        f"{' and '.join(SUPPORTED)}: install one of them, for example with pip install 'vllm==0.33.*'."
    )
    logger.error(sentence)
    if any(is_ours(argument.rpartition("=")[2]) for argument in sys.argv):
        # vLLM is about to stop at the unknown name, by a traceback in 0.33; what to do about it shall come last.
        atexit.register(print, f"vllm: error: {sentence}", file=sys.stderr)


def _extend_literal(names: tuple[str, ...]) -> None:
    """Patch A, 0.32. The Literal is changed in place: modules that imported it by name see the new values too."""
    import torch
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig
    from vllm.config.cache import CacheDType
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    literal: Any = CacheDType
    literal.__args__ += tuple(name for name in names if name not in literal.__args__)
    for name in names:
        STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    for config in (CacheConfig, SpeculativeConfig):
        rebuild_dataclass(config, force=True)  # type: ignore[arg-type]
    arg_utils._compute_kwargs.cache_clear()


def _check_dtype_argument() -> None:
    """Patch F, 0.32, whose argparse rejects unknown names before patch E can."""
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    original: Any = FlexibleArgumentParser._check_value

    @functools.wraps(original)
    def _check_value(self: Any, action: argparse.Action, value: Any) -> None:
        if FLAG in action.option_strings and isinstance(value, str):
            try:
                check_dtype_name(value, on_cpu=current_platform.is_cpu())
            except TurboQuantError as error:
                raise argparse.ArgumentError(None, str(error)) from error
        original(self, action, value)

    FlexibleArgumentParser._check_value = _check_value  # type: ignore[method-assign]


def _register_dtypes(names: tuple[str, ...]) -> None:
    """Patch A, 0.33: vLLM's official hook."""
    import torch
    from vllm.config.cache import register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        name = ""

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.CUSTOM

    for name in names:
        register_kv_cache_dtype(name)(type("TurboQuantDTypeHandler", (Handler,), {"name": name}))


def _register_backend() -> None:
    """Patch C. The class-path form: the decorator form would store an empty value, which aliases another member."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    # Spelled out: importing .backend here would load the attention stack into processes that only parse arguments.
    path = "vllm_turboquant.backend.TurboQuantBackend"
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, path)


def _wrap_backend_selection() -> None:
    """Patch D: layers whose dtype is ours get our backend; every other layer, skipped ones included, is vLLM's business."""
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector

    platform = type(current_platform)
    original = platform.get_attn_backend_cls.__func__

    @functools.wraps(original)
    def get_attn_backend_cls(cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> str:
        dtype = attn_selector_config.kv_cache_dtype
        if not is_ours(dtype):
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        # A backend that the user named was refused at start-up (E). One that vLLM names itself, as for models of mixed head
        # sizes, is meant for layers in the model's own dtype.
        from .backend import backend_class
        from .compat_workers import follow_workers

        backend = backend_class(dtype)
        follow_workers()
        reasons = backend.validate_configuration(device_capability=cls.get_device_capability(), **attn_selector_config._asdict())
        if reasons:
            raise refuse(
                FLAG,
                dtype,
                f"an attention layer cannot be compressed ({', '.join(reasons)})",
                "use --kv-cache-dtype auto",
            )
        return f"{backend.__module__}.{backend.__name__}"

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    selector._cached_get_attn_backend.cache_clear()


def _wrap_model_config() -> None:
    """Patch E: the earliest point that knows both the arguments and the model, in the process that the user started."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from .refusals import check_engine_args

    original = EngineArgs.create_model_config

    @functools.wraps(original)
    def create_model_config(self: Any) -> Any:
        model_config = original(self)
        check_engine_args(self, model_config, current_platform)
        if is_ours(self.kv_cache_dtype):
            status.open_folder()
        return model_config

    EngineArgs.create_model_config = create_model_config


def _wrap_metrics_info() -> None:
    """Patch J, in the process that answers /metrics, once its engines are ready."""
    from vllm.config import CacheConfig

    original = CacheConfig.metrics_info

    @functools.wraps(original)
    def metrics_info(self: Any) -> dict[str, str]:
        labels: dict[str, str] = original(self)
        return labels | {status.LABEL: status.read()} if is_ours(self.cache_dtype) else labels

    CacheConfig.metrics_info = metrics_info  # type: ignore[method-assign]


def _chain_excepthook() -> None:
    """Patch H: an uncaught refusal prints its sentence; all other exceptions go to the hook that was there."""
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, TurboQuantError):
            print(f"vllm: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = excepthook
