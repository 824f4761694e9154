"""The truth that every kernel is held to: store, load and attend over real pages, vectorised; also the CPU path.

Arithmetic is float64 unless a dtype is given. Keys and values are kept rotated (``y = R x``), so attention rotates the
queries once and the output once, and never a cached token.
"""

from __future__ import annotations

import functools

import torch

from .attention import attend_last
from .basis import KeyBasis, by_head, of_bucket, rotate, turn_keys, turn_queries
from .codec import decode_vectors, encode_vectors, to_e4m3
from .format import PageFormat, Preset, VectorCodec, page_format, scale_group
from .packing import pack_plane, read_tokens, unpack_plane, write_tokens
from .recent_reference import Recent
from .rotation import ROTATION_SEED, sketch_matrix


def _sketch(fmt: PageFormat, codec: VectorCodec, seed: int, device: torch.device) -> torch.Tensor | None:
    return sketch_matrix(fmt.scale_group, seed).to(device) if codec.sketch else None


def _encode_side(
    x: torch.Tensor,
    fmt: PageFormat,
    kind: str,
    odd: torch.Tensor,
    seed: int,
    scale: str,
    basis: KeyBasis | None,
    bucket: torch.Tensor | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Vectors ``[T, H, d]`` to the bytes of the side's planes and the side's fp16 scalars ``[T, H, groups]``."""
    codec, planes = fmt.sides[kind]
    if codec.bits == 32:
        return [x.to(torch.float32).contiguous().view(torch.uint8)], []
    x = x.to(torch.float64)
    y, second = turn_keys(x, fmt, seed, basis, bucket) if kind == "key" else (rotate(x, fmt, codec, seed), None)
    if codec.bits == 8:
        return [to_e4m3(y)], []
    codes, scalars = encode_vectors(y, codec, fmt.scale_group, _sketch(fmt, codec, seed, x.device), scale)
    if second is not None:
        scalars[0] = torch.where(second[..., None], -scalars[0], scalars[0])
    return [pack_plane(plane, codes, odd) for plane in planes], scalars


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
    positions: torch.Tensor | None = None,
    seed: int = ROTATION_SEED,
    scale: str = "unbiased",
) -> None:
    """Encodes tokens into their slots; writes exactly the bytes that those tokens own and reads no page.

    key, value: floating ``[T', H, d]`` with T' >= T. cache: uint8 ``[B, H, N, C]`` with ``[N, C]`` contiguous per (block,
    head). slot_mapping: int ``[T]``; negative slots are skipped. basis: of the keys, the plain rotation without. positions: int64
    ``[T]``, of the tokens in their sequences; ValueError where a basis of several buckets comes without.
    """
    live = (slot_mapping >= 0).nonzero().squeeze(-1)
    slots = slot_mapping[live].to(torch.int64)
    odd = (slots % 2)[:, None].expand(-1, cache.shape[1])
    basis = None if fmt.preset.key.bits == 32 else basis
    bucket = None if basis is None else basis.bucket_of(positions, len(slot_mapping))[live]
    parts: list[torch.Tensor] = []
    scalars: dict[str, torch.Tensor] = {}
    for kind, x in (("key", key), ("value", value)):
        raw, side = _encode_side(x[live], fmt, kind, odd, seed, scale, basis, bucket)
        parts += raw
        scalars |= zip((kind, "sketch_norm"), side, strict=False)
    parts += [scalars[kind].contiguous().view(torch.uint8) for kind in fmt.scalars]
    write_tokens(cache, slots, torch.cat(parts, dim=-1), fmt)


def load(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
    starts: torch.Tensor | None = None,
    seed: int = ROTATION_SEED,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks as the cache decodes them, **in the basis in which they are stored**.

    blocks: int64 ``[n]``. basis: that of `store`; keys come back relative to its first mean. starts: int64 ``[n]``, the position
    of each block's first token; ValueError where a basis of several buckets comes without. Returns two ``[n * N, H, d]`` in
    ``dtype``; float32 holds every level times scale exactly.
    """
    pieces = read_tokens(cache, blocks, fmt)
    tokens, heads = pieces[0].shape[:2]
    odd = (torch.arange(tokens, device=cache.device) % 2)[:, None].expand(-1, heads)
    scalars: dict[str, torch.Tensor] = {}
    if fmt.scalars:
        numbers = pieces.pop().contiguous().view(torch.float16).unflatten(-1, (-1, fmt.groups))
        scalars = dict(zip(fmt.scalars, numbers.unbind(-2), strict=True))
    sides = []
    basis = None if fmt.preset.key.bits == 32 else basis
    bucket = None
    if basis is not None:
        positions = None if starts is None else (starts[:, None] + torch.arange(cache.shape[2], device=starts.device)).flatten()
        bucket = basis.bucket_of(positions, tokens)
    for kind, (codec, planes) in fmt.sides.items():
        own = basis if kind == "key" else None
        raw, pieces = pieces[: len(planes)], pieces[len(planes) :]
        if not codec.scaled:
            number = torch.float32 if codec.bits == 32 else torch.float8_e4m3fn
            y = raw[0].contiguous().view(number).to(dtype)
            sides.append(y if own is None or bucket is None else y + of_bucket(own.offsets, bucket, y))
            continue
        codes = functools.reduce(torch.bitwise_or, [unpack_plane(p, x, odd) for p, x in zip(planes, raw, strict=True)])
        side = [scalars[kind] if own is None else scalars[kind].abs(), *([scalars["sketch_norm"]] if codec.sketch else [])]
        y = decode_vectors(codes, side, codec, _sketch(fmt, codec, seed, cache.device), dtype)
        if own is not None and bucket is not None:
            second = scalars[kind].signbit().repeat_interleave(fmt.scale_group, -1)
            y = y + torch.where(second, own.offset.to(device=y.device, dtype=dtype), of_bucket(own.offsets, bucket, y))
        sides.append(y)
    return sides[0], sides[1]


def load_vectors(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    fmt: PageFormat,
    basis: KeyBasis | None = None,
    starts: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks **in the model's own basis**: `load`, then the way back. basis: that of `store`."""
    keys, values = load(cache, blocks, fmt, basis, starts, dtype=dtype)
    if basis is None or fmt.preset.key.bits == 32:
        keys = rotate(keys, fmt, fmt.preset.key, ROTATION_SEED, inverse=True)
    else:
        keys = by_head(keys, basis.inverse.mT) + basis.means[:, 0].to(device=keys.device, dtype=dtype)
    return keys, rotate(values, fmt, fmt.preset.value, ROTATION_SEED, inverse=True)


def attend(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    fmt: PageFormat,
    scale: float,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    basis: KeyBasis | None = None,
    recent: Recent | None = None,
    seed: int = ROTATION_SEED,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention of each request's last tokens over its cached tokens, from the pages alone.

    query: floating ``[T', Hq, d]``. block_table: int ``[R, >= blocks]``. seq_lens: int ``[R]``, the query tokens included.
    query_start_loc: int ``[R + 1]``. ``window``: a token sees itself and the ``window - 1`` before it. ``sinks``: ``[Hq]``
    logits that take part in the softmax without a value. basis: that of `store`; one with a mean shifts all logits of a query
    alike, which soft cap and sinks would see. recent: where the newest tokens are
    read instead. Returns ``[T', Hq, d]`` in ``dtype``; rows of no request and of requests of length 0 are 0. Only blocks that a
    query token can see are read.
    """
    block_size, kv_heads = cache.shape[2], cache.shape[1]
    tokens, heads, head_size = query.shape
    out = torch.zeros(tokens, heads, head_size, dtype=dtype, device=query.device)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    requests: list[tuple[int, int, int, int]] = []
    rows_of: list[int] = []
    wanted: list[torch.Tensor] = []
    places: list[torch.Tensor] = []
    for row, length in enumerate(lengths):
        rows = starts[row + 1] - starts[row]
        if rows <= 0 or length <= 0:
            continue
        oldest = 0 if window is None else max(0, length - rows - window + 1)
        first, last = oldest // block_size, -(-length // block_size)
        requests.append((starts[row], rows, length - first * block_size, last - first))
        rows_of.append(row)
        wanted.append(block_table[row, first:last].to(torch.int64))
        places.append(torch.arange(first, last, device=cache.device) * block_size)
    if not requests:
        return out
    keys, values = load(cache, torch.cat(wanted), fmt, basis, torch.cat(places), seed, dtype)
    q = turn_queries(query.to(dtype).view(tokens, kv_heads, heads // kv_heads, head_size), fmt, seed, basis)
    if recent is not None:
        ends = [recent.ends[row].expand(len(blocks)) for row, blocks in zip(rows_of, wanted, strict=True)]
        recent.overlay(keys, values, torch.cat(wanted), torch.cat(places), torch.cat(ends), fmt, basis, seed)
    base = 0
    for start, rows, length, blocks in requests:
        k, v = keys[base : base + length], values[base : base + length]
        base += blocks * block_size
        part = attend_last(q[start : start + rows], k, v, scale, window, soft_cap, sinks)
        out[start : start + rows] = part.flatten(1, 2)
    return rotate(out, fmt, fmt.preset.value, seed, inverse=True)


def roundtrip(
    x: torch.Tensor, bits: int, algorithm: str = "mse", scale: str = "unbiased", seed: int = ROTATION_SEED
) -> torch.Tensor:
    """What a cache of ``bits`` bits a coordinate gives back for vectors ``x`` (floating ``[n, d]``); same shape and dtype.

    ``algorithm``: "mse" is Algorithm 1 (bits 1 to 4), "prod" Algorithm 2 (2 to 5, one of them the residual sketch). The
    vectors pass through real pages, fp16 scalars included. Raises ValueError for other bits, algorithms and scales, and
    for a d without page format.
    """
    allowed = {"mse": range(1, 5), "prod": range(2, 6)}
    if algorithm not in allowed:
        raise ValueError(f"unknown algorithm {algorithm!r}; allowed are 'mse' and 'prod'")
    if bits not in allowed[algorithm]:
        raise ValueError(f"algorithm {algorithm!r} takes {allowed[algorithm][0]} to {allowed[algorithm][-1]} bits, not {bits}")
    n, head_size = x.shape
    codec = VectorCodec(bits - 1, sketch=True) if algorithm == "prod" else VectorCodec(bits)
    fmt = PageFormat(Preset("roundtrip", codec, VectorCodec(1)), head_size, scale_group(head_size))
    blocks = -(-n // 16)
    cache = torch.zeros(blocks, 1, 16, fmt.slot_bytes, dtype=torch.uint8, device=x.device)
    vectors = x[:, None, :]
    store(vectors, vectors, cache, torch.arange(n, device=x.device), fmt, seed=seed, scale=scale)
    keys, _ = load(cache, torch.arange(blocks, device=x.device), fmt, seed=seed)
    return rotate(keys[:n, 0], fmt, codec, seed, inverse=True).to(x.dtype)


__all__ = ["attend", "load", "load_vectors", "page_format", "roundtrip", "store"]
