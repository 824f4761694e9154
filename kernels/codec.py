"""Algorithms 1 and 2 of TurboQuant (arXiv 2504.19874) on vectors that are already rotated; float64 unless told.

Algorithm 1: nearest Lloyd-Max level per coordinate. Algorithm 2: one bit less of that, plus ``sign(S r)`` and ``||r||``
of the residual r (QJL), which makes every inner product unbiased at five to six times the variance. The steps are
separate functions of matrices and codebooks that the caller gives, so the paper's small examples run through them too.
"""

from __future__ import annotations

import math

import torch

from .codebook import LEVELS, LEVELS_PER_SIGMA, SCALE_CANDIDATES
from .format import VectorCodec

FP16_MAX = 65504.0
E4M3_MAX = 448.0
SCALE_RULES = ("unbiased", "norm", "lsq")


def level_table(levels: tuple[float, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    """``[2 * len(levels)]``, the value of each sign-magnitude code."""
    positive = torch.tensor(levels, dtype=dtype, device=device)
    return torch.cat([positive, -positive])


def quantise(y: torch.Tensor, levels: tuple[float, ...]) -> torch.Tensor:
    """Nearest level of each coordinate: int32 sign-magnitude codes, shape of ``y``. Zero counts as positive."""
    positive = torch.tensor(levels, dtype=y.dtype, device=y.device)
    index = torch.bucketize(y.abs(), (positive[1:] + positive[:-1]) / 2, out_int32=True)
    return index + (y < 0).to(torch.int32) * len(levels)


def dequantise(codes: torch.Tensor, levels: tuple[float, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Level of each code, shape of ``codes``."""
    return level_table(levels, dtype, str(codes.device))[codes.long()]


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """Rounds to fp16; finite values beyond its range become its largest, NaN stays NaN."""
    return x.clamp(-FP16_MAX, FP16_MAX).to(torch.float16)


def encode(y: torch.Tensor, bits: int, scale: str = "unbiased") -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1 with one stored scale a vector, chosen by search.

    y: float ``[..., g]``. Returns codes int32 ``[..., g]`` and scale fp16 ``[...]``; ``scale * level(code)`` is what the
    cache gives back. Of `SCALE_CANDIDATES` times the vector's rms, the one whose codes c have the largest cosine with y
    wins. The stored scale is then ``|y|^2 / <y, c>`` ("unbiased": <y, y_hat> = |y|^2, as in EDEN, arXiv 2604.18555),
    ``|y| / |c|`` ("norm") or ``<y, c> / |c|^2`` ("lsq", the least squared error). A zero vector gets scale 0, a vector
    with a non-finite coordinate scale NaN.
    """
    if scale not in SCALE_RULES:
        raise ValueError(f"unknown scale rule {scale!r}; allowed are {', '.join(SCALE_RULES)}")
    positive = torch.tensor(LEVELS[bits], dtype=y.dtype, device=y.device)
    thresholds = (positive[1:] + positive[:-1]) / 2
    finite = torch.isfinite(y).all(-1)
    y = torch.where(finite[..., None], y, 0.0)
    energy = (y * y).sum(-1)
    unit = (energy / y.shape[-1]).sqrt() / LEVELS_PER_SIGMA[bits]
    nonzero = unit > 0
    magnitude = y.abs() / torch.where(nonzero, unit, 1.0)[..., None]

    def nearest(factor: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        index = torch.bucketize(magnitude / factor, thresholds, out_int32=True)
        level = positive[index]
        return index, (magnitude * level).sum(-1), (level * level).sum(-1)

    factors = torch.tensor(SCALE_CANDIDATES, dtype=y.dtype, device=y.device)
    trials = [nearest(factor)[1:] for factor in SCALE_CANDIDATES]
    # |y| is common to all candidates of a vector, so the largest <y, c> / |c| is the largest cosine.
    best = torch.stack([dot / norm.sqrt() for dot, norm in trials]).argmax(0)
    index, dot, norm = nearest(factors[best][..., None])
    if scale == "unbiased":
        stored = energy / torch.where(nonzero, dot * unit, 1.0)
    elif scale == "norm":
        stored = (energy / norm).sqrt()
    else:
        stored = dot * unit / norm
    codes = index + (y < 0).to(torch.int32) * len(positive)
    return codes, to_fp16(torch.where(finite, stored, math.nan))


def sketch(r: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 2's sketch of residuals r ``[..., g]``: bool ``[..., g]`` where ``S r`` is negative, and ``||r||``."""
    return r @ s.T < 0, r.norm(dim=-1)


def unsketch(negative: torch.Tensor, norm: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """``sqrt(pi / 2) / g * ||r|| * S^T sign(S r)``, whose inner product with any q estimates <q, r> without bias."""
    signs = 1.0 - 2.0 * negative.to(s.dtype)
    return (math.sqrt(math.pi / 2) / s.shape[0]) * norm[..., None].to(s.dtype) * (signs @ s)


def to_e4m3(y: torch.Tensor) -> torch.Tensor:
    """uint8 bytes of fp8 e4m3, saturating at 448; a vector with a non-finite coordinate becomes NaN throughout."""
    finite = torch.isfinite(y).all(-1, keepdim=True)
    clamped = torch.where(finite, y.clamp(-E4M3_MAX, E4M3_MAX), math.nan).to(torch.float32)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8)


def encode_vectors(
    y: torch.Tensor, codec: VectorCodec, group: int, s: torch.Tensor | None, scale: str = "unbiased"
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One side of the cache: rotated vectors y ``[..., d]`` to int32 codes ``[..., d]`` and its fp16 scalars ``[..., d/group]``.

    With a sketch (``s`` is Algorithm 2's S, ``[group, group]``) the code's top bit is the sketch's sign bit, and the
    residual is that of the scale as stored.
    """
    parts = y.unflatten(-1, (-1, group))
    codes, stored = encode(parts, codec.bits, scale)
    if not codec.sketch:
        return codes.flatten(-2), [stored]
    assert s is not None
    residual = parts - dequantise(codes, LEVELS[codec.bits], y.dtype) * stored[..., None].to(y.dtype)
    negative, norm = sketch(residual, s.to(y.dtype))
    return (codes | (negative.to(torch.int32) << codec.bits)).flatten(-2), [stored, to_fp16(norm)]


def decode_vectors(
    codes: torch.Tensor, scalars: list[torch.Tensor], codec: VectorCodec, s: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of :func:`encode_vectors`, up to its loss: ``[..., d]`` in the rotated basis, in ``dtype``."""
    group = codes.shape[-1] // scalars[0].shape[-1]
    parts = codes.unflatten(-1, (-1, group))
    mask = (1 << codec.bits) - 1
    y = dequantise(parts & mask, LEVELS[codec.bits], dtype) * scalars[0][..., None].to(dtype)
    if codec.sketch:
        assert s is not None
        y = y + unsketch(parts > mask, scalars[1], s.to(dtype))
    return y.flatten(-2)
