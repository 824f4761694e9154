"""Decode on a GPU: one of two kernels over the pages, and exact tokens beside them where a recent window has some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .kernels import decode as portable
from .kernels.combine import plan_decode
from .kernels.cuda import launch
from .kernels.recent_attend import attend_recent
from .kernels.recent_claim import RecentUnits
from .workspace import decode_scratch

if TYPE_CHECKING:
    from .impl import TurboQuantImpl


def attend_decode(
    layer: TurboQuantImpl,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    max_query_len: int,
    recent: RecentUnits | None = None,
) -> None:
    """Attention of at most ``max_query_len`` tokens a request, tensors as of ``kernels.decode``.

    recent: which of the newest tokens the layer's pools have, for this batch; the others are read from the pages, as all are
    without, and in layers without pools.
    """
    heads, kv_heads, d = layer.num_heads, layer.num_kv_heads, layer.head_size
    if kv_cache.shape[2] in layer.cuda_decode_pages:
        kernel = launch.decode
        turned = 0 if layer.basis is None else len(query) * heads
        floats = launch.scratch_floats(heads // kv_heads, d, max_query_len, query.device, turned)
    else:
        kernel = portable.decode
        floats = plan_decode(len(seq_lens), len(query), heads, kv_heads, d, max_query_len).floats
    scratch, lse = decode_scratch(floats, (len(query), heads))
    batch = block_table, seq_lens, query_start_loc
    options: dict[str, Any] = {"window": layer.sliding_window, "soft_cap": layer.logits_soft_cap, "sinks": layer.sinks}
    pools = None if recent is None else layer.recent
    before: dict[str, Any] = {} if recent is None or pools is None else {"ends": recent.ends, "lse": lse}
    reading = {**options, "basis": layer.basis, **before}
    kernel(query, kv_cache, *batch, out, scratch, layer.format, layer.scale, max_query_len, **reading)
    if recent is not None and pools is not None:
        exact = pools.key, pools.value, recent.frame_of
        attend_recent(query, out, lse, *exact, *batch, recent.ends, layer.scale, kv_cache.shape[2], max_query_len, **options)
