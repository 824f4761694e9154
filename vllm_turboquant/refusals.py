"""What a model, a platform or another option of vLLM can rule out, checked once, before any process is started."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from . import connectors
from .checkpoint import declared_cache
from .config import (
    AUTO,
    CALIBRATE,
    CALIBRATION,
    FLAG,
    OFF,
    SERVE_PLAIN,
    TurboQuantSettings,
    check_dtype_name,
    is_ours,
    refuse,
    refuse_backend,
    refuse_calibration_file,
)
from .kernels.format import HEAD_SIZE_STEP, MAX_HEAD_SIZE, MIN_HEAD_SIZE

logger = logging.getLogger("vllm.turboquant")
SKIP_LAYERS = "--kv-cache-dtype-skip-layers"
SLIDING = "sliding_window"  # vLLM's word for all layers with one
STATES = ("linear", "mamba", "conv", "recurrent")  # kinds of layers without keys, in configurations
NON_CAUSAL = ("dflash", "dspark")
MIN_CAPABILITY = (8, 0)
# Of FlashAttention: 2 and 3, and 4, which vLLM takes for larger heads on Hopper.
MAX_GPU_HEAD_SIZE, MAX_HOPPER_HEAD_SIZE = 256, 512
ALIBI_ARCHITECTURES = ("Step1ForCausalLM",)  # what vLLM's own `uses_alibi` does not know


def has_page_format(head_size: int) -> bool:
    return head_size % HEAD_SIZE_STEP == 0 and MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE


def check_platform(dtype: str, platform: Any) -> None:
    if platform.is_cpu():
        return
    if not platform.is_cuda():
        raise refuse(FLAG, dtype, f"runs on CPU and NVIDIA GPUs, not on {platform.device_name}", "use --kv-cache-dtype auto")
    capability = platform.get_device_capability()
    if capability is not None and tuple(capability) < MIN_CAPABILITY:
        found = f"{capability[0]}.{capability[1]}"
        raise refuse(FLAG, dtype, f"needs compute capability 8.0 or higher, this GPU has {found}", "use --kv-cache-dtype auto")


def _check_options(dtype: str, args: Any) -> None:
    for flag, value in (
        ("--decode-context-parallel-size", args.decode_context_parallel_size),
        ("--prefill-context-parallel-size", args.prefill_context_parallel_size),
    ):
        if value is not None and value > 1:
            raise refuse(
                FLAG,
                dtype,
                f"cannot be combined with {flag} {value}; allowed is 1",
                f"drop {flag} or use --kv-cache-dtype auto",
            )
    attention = args.attention_config
    for backend in (args.attention_backend, attention.backend, *attention.backend_per_kind.values()):
        if backend is not None:
            raise refuse_backend(dtype, backend)
    connectors.check(dtype, args)


def _check_calibration(settings: TurboQuantSettings, args: Any, model: Any) -> None:
    if settings.calibration == OFF:
        return
    if settings.calibration == AUTO and connectors.names(args.kv_transfer_config):
        # Calibrations of two servers differ by rounding at least, and each reads pages only under its own.
        reason = "cannot be combined with --kv-transfer-config, whose pages another server may read under another calibration"
        remedy = f'make a file with "{CALIBRATE}" and name it on every server, or set "{OFF}"'
        raise refuse(CALIBRATION, f"{AUTO!r}, the default", reason, remedy)
    path = settings.calibration_file
    if path is not None and args.pipeline_parallel_size > 1:
        # Files have the layers of a whole model.
        reason = (
            f"a calibration file cannot be combined with --pipeline-parallel-size {args.pipeline_parallel_size}; allowed is 1"
        )
        raise refuse(CALIBRATION, path, reason, f'set "{OFF}"')
    if path is not None:
        from .calibration_file import CalibrationFileError, configured_identity, mismatch, read_identity

        try:
            problem = mismatch(read_identity(path), configured_identity(model, args.tensor_parallel_size))
        except CalibrationFileError as error:
            problem = str(error)
        if problem is not None:
            raise refuse_calibration_file(path, problem)


def _check_skip_layers(dtype: str, args: Any, model: Any) -> None:
    """Every entry names layers of the model, and not all of them."""
    skipped = list(args.kv_cache_dtype_skip_layers or ())
    if not skipped:
        return
    count = model.get_total_num_hidden_layers()
    # A drafter's layers are counted on from the model's.
    known = None if _drafter(args) else {str(index) for index in range(count)}
    for entry in skipped:
        if entry == SLIDING or (entry.isdecimal() and (known is None or entry in known)):
            continue
        allowed = f"allowed are indices from 0 to {count - 1} and {SLIDING}"
        raise refuse(SKIP_LAYERS, entry, f"names no layer of {model.model}; {allowed}", "correct or drop it")
    kinds = getattr(model.hf_text_config, "layer_types", None) or [SLIDING if model.get_sliding_window() else ""] * count
    windows = {index for index, kind in enumerate(kinds) if SLIDING in skipped and str(kind).startswith("sliding")}
    attention = [index for index, kind in enumerate(kinds) if not str(kind).startswith(STATES)]
    left = {index for index in attention if index in windows or str(index) in skipped}
    _check_sharing(left, kinds, model)
    if len(left) == len(attention):
        reason = f"leaves out every layer of {model.model}, so that {FLAG} {dtype} would compress nothing"
        raise refuse(SKIP_LAYERS, " ".join(skipped), reason, f"name fewer layers or use {FLAG} auto")


def _check_sharing(left: set[int], kinds: Sequence[str], model: Any) -> None:
    """Layers that read one cache are left out together. Those at the end share that of the last layer of their kind before."""
    first = len(kinds) - (getattr(model.hf_text_config, "num_kv_shared_layers", None) or 0)
    owners = {kinds[index]: index for index in range(first)}
    for index in range(first, len(kinds)):
        owner = owners.get(kinds[index])
        if owner is not None and (index in left) != (owner in left):
            alone, other = (index, owner) if index in left else (owner, index)
            reason = f"leaves out layer {alone} of {model.model} and not layer {other}, and both read the cache of layer {owner}"
            raise refuse(SKIP_LAYERS, str(alone), reason, f"name {other} too or drop {alone}")


def _check_model(dtype: str, model: Any, platform: Any) -> None:
    if model.is_attention_free:
        raise refuse(FLAG, dtype, f"model {model.model} has no attention layers to compress", SERVE_PLAIN)
    if model.is_encoder_decoder:
        raise refuse(
            FLAG, dtype, f"model {model.model} is an encoder-decoder model; allowed are decoder-only models", SERVE_PLAIN
        )
    if model.use_mla:
        reason = f"model {model.model} uses multi-head latent attention (MLA), whose cache has no TurboQuant format"
        raise refuse(FLAG, dtype, f"{reason}; allowed are models with plain multi-head or grouped-query attention", SERVE_PLAIN)
    if model.runner_type == "pooling" and getattr(model, "attn_type", "decoder") != "decoder":
        raise refuse(FLAG, dtype, f"model {model.model} is encoder-only and keeps no KV cache", SERVE_PLAIN)
    if model.is_mm_prefix_lm:
        reason = f"model {model.model} attends to images bidirectionally (multimodal prefix), which is not computed"
        raise refuse(FLAG, dtype, reason, f"serve it for text alone with --language-model-only, or with {FLAG} auto")
    if model.is_diffusion:
        reason = f"model {model.model} is a diffusion model, which attends without causal mask; that is not computed"
        raise refuse(FLAG, dtype, reason, SERVE_PLAIN)
    if model.uses_alibi or model.architecture in ALIBI_ARCHITECTURES:
        raise refuse(FLAG, dtype, f"model {model.model} uses ALiBi position biases, which are not computed", SERVE_PLAIN)
    size = model.get_head_size()
    if not has_page_format(size):
        allowed = f"multiples of {HEAD_SIZE_STEP} from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
        raise refuse(FLAG, dtype, f"model {model.model} has head size {size}; allowed are {allowed}", SERVE_PLAIN)
    if platform.is_cuda():
        check_gpu_model(dtype, model)
        _check_flash_attention(dtype, model)


def check_gpu_model(dtype: str, model: Any) -> None:
    """What FlashAttention, which attends to a prompt's own tokens, has on no GPU. Raises TurboQuantError."""
    size = largest_head(model)
    if size > MAX_HOPPER_HEAD_SIZE:
        reason = f"model {model.model} has head size {size}; allowed on a GPU, where FlashAttention prefills, are up to 512"
        raise refuse(FLAG, dtype, reason, SERVE_PLAIN)
    if model.dtype.itemsize != 2:
        given = str(model.dtype).removeprefix("torch.")
        reason = f"cannot be combined with --dtype {given} on a GPU, where FlashAttention prefills"
        raise refuse(FLAG, dtype, f"{reason}; allowed are bfloat16 and float16", "use --dtype bfloat16")


def _check_flash_attention(dtype: str, model: Any) -> None:
    missing = missing_flash_attention()
    if missing is not None:
        reason = f"needs FlashAttention 2 or 3 on a GPU, which this installation of vLLM lacks ({missing})"
        raise refuse(FLAG, dtype, reason, "install vLLM's CUDA wheel or use --kv-cache-dtype auto")
    check_prefill(dtype, largest_head(model))


def largest_head(model: Any) -> int:
    """Head size of the layers that have the largest heads: those without window in Gemma 4."""
    return max(int(model.get_head_size()), getattr(model.hf_text_config, "global_head_dim", None) or 0)


def check_prefill(dtype: str, size: int) -> None:
    """That vLLM's FlashAttention has heads of ``size`` dims on this GPU. Raises TurboQuantError."""
    if size <= MAX_GPU_HEAD_SIZE:
        return
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    if get_flash_attn_version(head_size=size) != 4:
        reason = f"heads of {size} dims are prefilled by FlashAttention 4 on Hopper GPUs alone; allowed on others are up to 256"
        raise refuse(FLAG, dtype, reason, "use --kv-cache-dtype auto")


def missing_flash_attention() -> str | None:
    """Why vLLM's FlashAttention cannot run here; None where it can."""
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import fa_version_unsupported_reason
    except ImportError as error:
        return str(error)
    reasons = [fa_version_unsupported_reason(version) for version in (3, 2)]
    return None if None in reasons else reasons[-1]


def _drafter(args: Any) -> dict[str, Any]:
    """--speculative-config as vLLM will read it: hyphens or underscores, and the flags that stand for one entry each."""
    given = args.speculative_config if isinstance(args.speculative_config, dict) else {}
    flags = {"method": args.spec_method, "model": args.spec_model, "num_speculative_tokens": args.spec_tokens}
    return {key.replace("-", "_"): value for key, value in given.items()} | {k: v for k, v in flags.items() if v is not None}


def _check_drafter(dtype: str, draft: dict[str, Any]) -> None:
    method = draft.get("method") or next((name for name in NON_CAUSAL if name in str(draft.get("model")).lower()), None)
    if is_ours(dtype) and method in NON_CAUSAL:
        reason = f"cannot be combined with --speculative-config's method {method}, whose drafter attends without causal mask"
        raise refuse(FLAG, dtype, reason, 'use another drafter or set "kv_cache_dtype": "auto" in --speculative-config')


def check_engine_args(args: Any, model: Any, platform: Any) -> None:
    """Raises TurboQuantError for what cannot be served.

    args: vLLM's EngineArgs. model: the ModelConfig made from it. platform: ``vllm.platforms.current_platform``. Other
    dtypes pass untouched, but for vLLM's own TurboQuant names on a CPU.
    """
    dtype = args.kv_cache_dtype
    check_dtype_name(dtype, on_cpu=platform.is_cpu())
    draft = _drafter(args)
    draft_dtype = draft.get("kv_cache_dtype") or dtype
    check_dtype_name(draft_dtype, on_cpu=platform.is_cpu())
    if is_ours(draft_dtype) and draft.get("attention_backend") is not None:
        raise refuse_backend(draft_dtype, draft["attention_backend"])
    _check_drafter(draft_dtype, draft)
    if not is_ours(dtype):
        return
    settings = TurboQuantSettings.from_additional_config(args.additional_config)
    check_platform(dtype, platform)
    _check_options(dtype, args)
    _check_model(dtype, model, platform)
    _check_skip_layers(dtype, args, model)
    _check_calibration(settings, args, model)
    connectors.claim_folders(dtype, args, model, settings)
    declared = declared_cache(model)
    if declared is not None:
        line = "TurboQuant: the checkpoint's own KV cache, %s, and its scales are ignored: %s %s was asked for."
        logger.warning(line, declared, FLAG, dtype)
