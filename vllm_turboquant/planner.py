"""How many tokens each KV cache dtype holds, from a model's configuration alone: no weights, no engine.

Nothing of vLLM's arithmetic is repeated here. vLLM's own class builds the model on torch's meta device, as one tensor-parallel
rank would; its layers say what they store, and its planner groups the layers, sizes the pages and divides the memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, ensure_model_parallel_initialized, init_distributed_environment
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.parallel_state import get_tp_group
from vllm.engine import arg_utils
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

from .budget import Budget, budget
from .checkpoint import declared_cache
from .config import dtype_names, is_ours
from .recent import pool_bytes
from .refusals import check_gpu_model, largest_head

GPU_BLOCK = 16  # tokens; what vLLM takes on a GPU where nobody says otherwise


@dataclass(frozen=True)
class Wanted:
    """What is to be served.

    engine: arguments of vLLM's EngineArgs. gpu_memory: bytes of one GPU, whose rules are applied wherever this runs; None plans
    for the machine at hand. kv_cache_memory: bytes of one GPU's KV cache, which are not estimated then.
    """

    engine: dict[str, Any]
    gpu_memory: int | None = None
    kv_cache_memory: int | None = None


@dataclass(frozen=True)
class Row:
    """One value of ``--kv-cache-dtype``.

    tokens, requests: what vLLM logs as KV cache size and maximum concurrency at the full length; None where not one full-length
    request fits. longest: tokens of the longest request that fits. block_size: tokens. bytes_per_token: of one GPU's pages.
    problem: why the dtype cannot be planned, in vLLM's words.
    """

    dtype: str
    tokens: int | None = None
    requests: float | None = None
    longest: int | None = None
    block_size: int | None = None
    bytes_per_token: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """architecture, layers, max_model_len, max_num_batched_tokens: as vLLM reads them. platform: whose rules were applied.

    head_size: of the layers with the largest heads.
    """

    model: str
    architecture: str
    layers: int
    tensor_parallel_size: int
    max_model_len: int
    max_num_batched_tokens: int
    platform: str
    budget: Budget
    rows: tuple[Row, ...]
    head_size: int


def plan(wanted: Wanted) -> Plan:
    """Plans dtype ``auto``, ``fp8`` and every preset. The plugin must be registered.

    Raises TurboQuantError where serving with a preset would, and ValueError where vLLM refuses the model or memory is not known.
    """
    foreign = wanted.gpu_memory is not None and not current_platform.is_cuda()
    preset = dtype_names()[0]
    with _one_rank(wanted.engine.get("tensor_parallel_size") or 1), _gpu_rules() if foreign else nullcontext():
        config = _config(wanted, preset, foreign)  # what serving refuses is refused first
        if foreign:
            check_gpu_model(preset, config.model_config)
        config = _config(wanted, "auto", foreign)
        exact = True
        try:
            model = _build(config)
        except (ValueError, NotImplementedError):
            if config.model_config.quantization is None or declared_cache(config.model_config):
                raise
            # This machine lacks kernels for such weights, on which the cache does not depend.
            exact = False
            wanted = replace(wanted, engine=wanted.engine | {"hf_overrides": {"quantization_config": None}})
            config = _config(wanted, "auto", foreign)
            model = _build(config)
        memory = budget(config, model, exact, wanted.gpu_memory, wanted.kv_cache_memory)
        names = ("auto", "fp8", *dtype_names())
        rows = tuple(_row(name, wanted, foreign, memory.kv_cache) for name in tqdm(names, "planning", leave=False, disable=None))
    facts = config.model_config
    return Plan(
        model=facts.model,
        architecture=facts.architecture,
        layers=facts.get_total_num_hidden_layers(),
        tensor_parallel_size=config.parallel_config.tensor_parallel_size,
        max_model_len=facts.max_model_len,
        max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
        platform="gpu" if foreign else current_platform.device_type,
        budget=memory,
        rows=rows,
        head_size=largest_head(facts),
    )


def _row(dtype: str, wanted: Wanted, foreign: bool, memory: int) -> Row:
    def attempt(auto_fit: bool) -> Row:
        config = _config(wanted, dtype, foreign)
        _build(config)
        if auto_fit:
            config.model_config.original_max_model_len = -1
        # Estimated memory is what weights and activations leave; exact newest tokens lie beside the cache.
        beside = pool_bytes(config) if wanted.kv_cache_memory is None else 0
        return _planned(config, dtype, memory - beside)

    try:
        try:
            return attempt(auto_fit=False)
        except ValueError:  # no request of the full length fits; vLLM finds the length that does
            return replace(attempt(auto_fit=True), tokens=None, requests=None)
    except (ValueError, NotImplementedError) as error:
        if is_ours(dtype):
            raise
        return Row(dtype, problem=words(error))


def words(error: Exception) -> str:
    """What an exception of vLLM says, in a line; pydantic wraps it in a report of its own."""
    reports: Any = getattr(error, "errors", None)
    said = str(error) if reports is None else str(reports()[0]["msg"])
    return " ".join(said.removeprefix("Value error, ").split())


def _planned(config: VllmConfig, dtype: str, memory: int) -> Row:
    """What vLLM's engine core does between loading weights and allocating the cache. Raises ValueError as it does."""
    current_platform.update_block_size_for_backend(config)
    register_all_kvcache_specs(config)
    specs = get_kv_cache_spec(config)
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
    resolve_kv_cache_layout(config, [layouts], list(specs.values()))
    planned = _kv_cache_config(config, specs, memory)
    tokens, requests = get_kv_cache_capacity(config, planned)
    block_size = min(group.kv_cache_spec.block_size for group in planned.kv_cache_groups)
    pool = planned.kv_cache_tensors[0].size  # of the allocation that all groups share
    return Row(dtype, tokens, requests, config.model_config.max_model_len, block_size, pool / tokens)


def _kv_cache_config(config: VllmConfig, specs: dict[str, Any], memory: int) -> Any:
    try:
        from vllm.v1.core import kv_cache_planning as planning  # 0.33
    except ImportError:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(config, [specs], [memory])[0]
    groups = planning.get_global_kv_cache_groups(config, [specs])
    return planning.get_kv_cache_configs(config, [specs], [memory], groups)[0]


def _config(wanted: Wanted, dtype: str, foreign: bool) -> VllmConfig:
    """vLLM's configuration; ``foreign``: of a server on a GPU that this machine does not have."""
    arguments: dict[str, Any] = {
        "kv_cache_dtype": dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "load_format": "dummy",
        "distributed_executor_backend": "mp",  # else vLLM would look for that many GPUs
    }
    if foreign:
        arguments["block_size"] = GPU_BLOCK
    kind = _gpu_args(wanted.gpu_memory or 0) if foreign else EngineArgs
    return kind(**arguments | wanted.engine).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


@contextmanager
def _gpu_rules() -> Iterator[None]:
    """vLLM's CPU platform with what FlashAttention says of its blocks, and recurrent states in the dtype that a GPU keeps."""
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with (
        mock.patch.object(CPUAttentionBackend, "get_supported_kernel_block_sizes", lambda *_: [MultipleOf(GPU_BLOCK)]),
        mock.patch.object(CPUAttentionBackend, "supported_kv_cache_layouts", lambda: None),
        mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", lambda: False),
    ):
        yield


def _gpu_args(memory: int) -> type[EngineArgs]:
    """EngineArgs whose defaults of the scheduler are those on a GPU of ``memory`` bytes."""
    no = dict.fromkeys(("is_tpu", "is_cpu", "is_device_capability"), lambda *_: False)
    gpu = SimpleNamespace(get_device_total_memory=lambda: memory, get_device_name=lambda: "", **no)

    class GpuArgs(EngineArgs):
        @classmethod
        def get_batch_defaults(cls, world_size: int) -> Any:
            with mock.patch.object(arg_utils, "current_platform", gpu):
                return super().get_batch_defaults(world_size)

    return GpuArgs


def _build(config: VllmConfig) -> torch.nn.Module:
    """The first rank's model without storage; its attention layers are left in ``config``, as a worker leaves them."""
    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
        return initialize_model(config)


@contextmanager
def _one_rank(tensor_parallel_size: int) -> Iterator[None]:
    """vLLM's process groups of this process alone, of which the tensor-parallel one calls itself the first of so many.

    Layers ask it for their share when they are built; nothing is sent.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            with set_current_vllm_config(VllmConfig()):
                init_distributed_environment(1, 0, f"file://{folder}/store", local_rank=0, backend="gloo")
                ensure_model_parallel_initialized(1, 1)
            get_tp_group().world_size = tensor_parallel_size
            yield
        finally:
            cleanup_dist_env_and_memory()
