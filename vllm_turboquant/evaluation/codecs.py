"""What a cache gives back of keys and values: our presets through real pages, vLLM 0.33's own low-bit dtypes as formulas.

The emulated dtypes do in float32 what vLLM's kernels do (``v1/attention/ops/triton_turboquant_store.py`` and
``..._decode.py``, ``int4_per_token_head.py``, ``csrc``'s e4m3 conversion with scale 1); `tests/evaluation` holds them to
those kernels. Where a card rounds further, it is left out, in the rival's favour: bf16 inputs, int4's rotation in bf16, fp8
queries and probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from ..kernels import reference
from ..kernels.basis import KeyBasis
from ..kernels.codec import to_e4m3
from ..kernels.format import PRESETS, UNIT_TOKENS, page_format
from ..kernels.rotation import hadamard

Pair = tuple[torch.Tensor, torch.Tensor]
Codec = Callable[[torch.Tensor, torch.Tensor, KeyBasis | None], Pair]

BF16_BYTES = 4  # of a key's and a value's coordinate together


@dataclass(frozen=True)
class Case:
    """One row of an evaluation: a cache dtype and how it is used.

    name: one of `NAMES`. calibrated: with the caller's key bases (our presets only). skipped: layers kept in bf16, half of
    them at each end. sinks, window: the first tokens of a sequence and the newest ones of each query, read exactly.
    """

    name: str
    calibrated: bool = False
    skipped: int = 0
    sinks: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"unknown cache dtype {self.name!r}; allowed are {', '.join(NAMES)}")
        if self.calibrated and self.name not in PRESETS:
            raise ValueError(f"{self.name} has no calibration")
        if self.skipped % 2 or min(self.skipped, self.sinks, self.window) < 0:
            raise ValueError(f"skipped layers come in pairs, and no count is negative: {self}")

    def skips(self, layer: int, layers: int) -> bool:
        return not self.skipped // 2 <= layer < layers - self.skipped // 2

    def bytes_d128(self, layers: int) -> float:
        """Bytes a token and KV head of 128 dims, keys and values together, averaged over a model's layers."""
        skipped = min(self.skipped, layers)
        return ((layers - skipped) * _bytes(self.name, 128) + skipped * 128 * BF16_BYTES) / layers


def decoded(case: Case, key: torch.Tensor, value: torch.Tensor, layer: int, layers: int, basis: KeyBasis | None) -> Pair:
    """Keys, after rotary embedding, and values as layer ``layer`` of ``layers`` reads them under ``case``.

    key, value: float32 ``[T, Hk, d]``; returned alike. basis: of this layer, under which our presets store keys. Exact
    tokens (sinks, window) are the reader's business. Raises ValueError where vLLM has no such dtype for the head size, or
    a calibrated case has no basis.
    """
    if case.name != "auto" and case.skips(layer, layers):
        return key.to(torch.bfloat16).to(key.dtype), value.to(torch.bfloat16).to(value.dtype)
    if case.calibrated and basis is None:
        raise ValueError(f"{case} without the bases of a calibration")
    return _CODECS[case.name](key, value, basis)


def _pages(name: str, key: torch.Tensor, value: torch.Tensor, basis: KeyBasis | None) -> Pair:
    """Through the bytes of `kernels.reference`'s pages."""
    tokens, heads, d = key.shape
    fmt = page_format(name, d)
    blocks = -(-tokens // UNIT_TOKENS)
    cache = torch.zeros(blocks, heads, UNIT_TOKENS, fmt.slot_bytes, dtype=torch.uint8, device=key.device)
    positions, numbers = torch.arange(tokens, device=key.device), torch.arange(blocks, device=key.device)
    reference.store(key, value, cache, positions, fmt, basis, positions)
    loaded = reference.load_vectors(cache, numbers, fmt, basis, numbers * UNIT_TOKENS)
    return loaded[0][:tokens].to(key.dtype), loaded[1][:tokens].to(value.dtype)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    """x after fp8 e4m3 with scale 1, saturating; float32, shape of x."""
    return to_e4m3(x).view(torch.float8_e4m3fn).to(torch.float32)


@cache
def vllm_centroids(d: int, bits: int) -> torch.Tensor:
    """vLLM's Lloyd-Max levels for N(0, 1/d), ascending float32 ``[2**bits]``.

    Its own solver's: from equidistant levels over 3.5 standard deviations, at most 200 rounds; cell moments by the
    trapezoidal rule with 200 steps, the outer cells up to 10.5 standard deviations. Coarse enough to differ from the
    optimum in the third digit.
    """
    sigma, levels = d**-0.5, 2**bits
    density = math.sqrt(d / (2 * math.pi))
    centroids = 7 * sigma * (torch.arange(levels, dtype=torch.float64) + 0.5) / levels - 3.5 * sigma
    outer = torch.tensor([10.5 * sigma], dtype=torch.float64)
    steps = torch.arange(201, dtype=torch.float64)
    weights = torch.ones(201, dtype=torch.float64)
    weights[0] = weights[-1] = 0.5
    for _ in range(200):
        edges = torch.cat([-outer, (centroids[1:] + centroids[:-1]) / 2, outer])
        x = edges[:-1, None] + steps * ((edges[1:] - edges[:-1]) / 200)[:, None]
        mass = density * torch.exp(-x * x * d / 2) * weights
        new = (x * mass).sum(-1) / mass.sum(-1)
        if (new - centroids).abs().max() < 1e-10:
            break
        centroids = new
    return centroids.to(torch.float32)


def vllm_keys(key: torch.Tensor, bits: int) -> torch.Tensor:
    """Keys of ``turboquant_4bit_nc`` and its like: unit vector, Hadamard transform, nearest centroid, fp16 norm.

    The decoded direction is brought back to length one ("nc"). float32 ``[T, Hk, d]`` to the same.
    """
    d = key.shape[-1]
    if d & (d - 1):
        raise ValueError(f"vLLM's TurboQuant has no rotation for head size {d}")
    turn = hadamard(d).to(key)
    norm = key.norm(dim=-1, keepdim=True)
    centroids = vllm_centroids(d, bits).to(key.device)
    # An equal value belongs to the upper level.
    index = torch.bucketize((key / (norm + 1e-8)) @ turn, (centroids[1:] + centroids[:-1]) / 2, right=True)
    y = centroids[index]
    y = y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-16)
    return norm.to(torch.float16).to(key.dtype) * y @ turn


def vllm_values(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Values of vLLM's ``turboquant_*``: an even grid between a vector's extremes, fp16 step and minimum, no rotation."""
    low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    top = 2**bits - 1
    step = ((high - low) / top).clamp(min=1e-8)
    codes = ((value - low) / step + 0.5).trunc().clamp(0, top)
    return codes * step.to(torch.float16).to(value.dtype) + low.to(torch.float16).to(value.dtype)


@cache
def int4_signs(block: int) -> torch.Tensor:
    """Signs of int4_per_token_head's randomised Hadamard transform, float32 ``[block]``: torch's CPU generator, fixed seed."""
    stream = torch.Generator().manual_seed(0x9E3779B9)
    return 2 * torch.bernoulli(torch.full((block,), 0.5), generator=stream) - 1


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the nearest integer, halves away from zero."""
    return torch.where(x >= 0, x + 0.5, x - 0.5).trunc()


def vllm_int4(x: torch.Tensor) -> torch.Tensor:
    """Keys or values of int4_per_token_head, float32 ``[T, Hk, d]`` to the same.

    A grid of 16 between the extremes of the rotated vector. The integer zero point lies in the low four bits of the
    float32 step, and what is left of the step is what the decoder sees.
    """
    d = x.shape[-1]
    block = d & -d
    signs, turn = int4_signs(block).to(x), hadamard(block).to(x) * math.sqrt(block)
    y = ((x.unflatten(-1, (-1, block)) * signs) @ turn).flatten(-2)
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-6)
    zero = _round(-low / step).clamp(0, 15)
    codes = _round(y * (1 / step) + zero).clamp(0, 15)
    kept = (step.contiguous().view(torch.int32) & -16).view(torch.float32)
    y = ((codes - zero) * kept).unflatten(-1, (-1, block))
    return ((y @ turn) / block * signs).flatten(-2)


_VLLM_BITS = {"turboquant_k8v4": (8, 4), "turboquant_4bit_nc": (4, 4), "turboquant_k3v4_nc": (3, 4), "turboquant_3bit_nc": (3, 3)}


def _vllm(bits: tuple[int, int], key: torch.Tensor, value: torch.Tensor, _: KeyBasis | None) -> Pair:
    return e4m3(key) if bits[0] == 8 else vllm_keys(key, bits[0]), vllm_values(value, bits[1])


_CODECS: dict[str, Codec] = {
    "auto": lambda key, value, _: (key, value),
    "fp8": lambda key, value, _: (e4m3(key), e4m3(value)),
    "int4_per_token_head": lambda key, value, _: (vllm_int4(key), vllm_int4(value)),
    **{name: partial(_vllm, bits) for name, bits in _VLLM_BITS.items()},
    **{name: partial(_pages, name) for name in PRESETS},
}
NAMES = tuple(_CODECS)


def _bytes(name: str, d: int) -> int:
    """Of one token and KV head, keys and values together; a scale or norm is fp16, int4's step fp32."""
    if name in _VLLM_BITS:
        key, value = _VLLM_BITS[name]
        return -(-d * key // 8) + (0 if key == 8 else 2) + -(-d * value // 8) + 4
    if name in PRESETS:
        return page_format(name, d).slot_bytes
    return {"auto": BF16_BYTES * d, "fp8": 2 * d, "int4_per_token_head": d + 8}[name]
