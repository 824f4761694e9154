"""The affine map under which a layer's keys are stored, and the closed form that fits it to a model.

Softmax does not see a constant added to all keys of a head, nor an invertible matrix applied to keys and inversely to
queries. Both are therefore free at decode: they take the place of the plain rotation of ``kernels.rotation``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .format import PageFormat, VectorCodec
from .rotation import ROTATION_SEED, rotation

# Of every second moment, this share is replaced by its isotropic part: directions that the statistics never saw keep a
# place in the codes.
SHRINKAGE = 0.02
# Positions that share a mean, and how many such buckets a basis has at most.
BUCKET = 512
MAX_BUCKETS = 64


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """One affine map a KV head, with means. A key k is stored as ``y = forward (k - m)`` and read as ``inverse y + m``.

    forward, inverse: fp32 ``[Hk, d, d]``, contiguous, each other's inverse. means: fp32 ``[Hk, B, d]``, B at most `MAX_BUCKETS`:
    of tokens at positions ``b * bucket .. (b + 1) * bucket - 1``, from ``(B - 1) * bucket`` on the last one; ``bucket`` is a
    multiple of 16. Rotary embedding turns a head's mean with position, and a cached token's position is its index in its
    sequence, which costs no bits.

    sink_mean: fp32 ``[Hk, d]``. The first token of a sequence is what most heads attend to when they have nothing to attend to:
    its keys are nearly the same in all texts, far from all others, and no error costs more than theirs. In the first bucket m
    is this or means[0], whichever is nearer in the stored basis; the sign of the key's stored scales says which (negative:
    sink_mean). Keys without a stored scale (8 bits) know ``means`` alone.

    A query q of the head attends to stored keys as ``inverse^T q``: ``<inverse^T q, y + o> = <q, k> - <q, means[0]>``, whose last
    term is the same for all keys of the head; o is ``offsets`` of the token's bucket, ``offset`` where m is sink_mean.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    means: torch.Tensor
    sink_mean: torch.Tensor
    bucket: int = BUCKET

    def __post_init__(self) -> None:
        heads, buckets, d = self.means.shape
        assert self.forward.shape == self.inverse.shape == (heads, d, d), (self.forward.shape, self.inverse.shape)
        assert self.sink_mean.shape == (heads, d), self.sink_mean.shape
        assert 1 <= buckets <= MAX_BUCKETS and self.bucket > 0 and self.bucket % 16 == 0, (buckets, self.bucket)
        assert all(x.dtype == torch.float32 and x.is_contiguous() for x in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.forward, self.inverse, self.means, self.sink_mean

    @property
    def buckets(self) -> int:
        return self.means.shape[1]

    @cached_property
    def mean(self) -> torch.Tensor:
        """``means[0]``, to which all scores of the head are relative, fp32 ``[Hk, d]``."""
        return self.means[:, 0].contiguous()

    @cached_property
    def offsets(self) -> torch.Tensor:
        """``forward (means - means[0])``, fp32 ``[Hk, B, d]``."""
        return self._stored(self.means - self.means[:, :1])

    @cached_property
    def offset(self) -> torch.Tensor:
        """``forward (sink_mean - means[0])``, fp32 ``[Hk, d]``."""
        return self._stored((self.sink_mean - self.means[:, 0])[:, None])[:, 0].contiguous()

    @cached_property
    def normal(self) -> torch.Tensor:
        """``forward^T offset``, fp32 ``[Hk, d]``: keys beyond ``middle`` in this direction are nearer to sink_mean."""
        return torch.einsum("hij,hi->hj", self.forward.double(), self.offset.double()).float()

    @cached_property
    def middle(self) -> torch.Tensor:
        """Half way between the first bucket's mean and sink_mean, fp32 ``[Hk, d]``."""
        return (self.means[:, 0] + self.sink_mean) / 2

    def _stored(self, difference: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hij,hbj->hbi", self.forward.double(), difference.double()).float().contiguous()

    def bucket_of(self, positions: torch.Tensor | None, tokens: int) -> torch.Tensor:
        """The bucket of each of ``tokens`` tokens at int ``[T]`` positions: int64 ``[T]`` on their device.

        Raises ValueError where there are several buckets and not as many positions.
        """
        if self.buckets == 1:
            return torch.zeros(tokens, dtype=torch.int64, device=self.means.device if positions is None else positions.device)
        if positions is None or positions.shape != (tokens,):
            raise ValueError(f"a key basis of {self.buckets} buckets needs the positions of all {tokens} tokens")
        return (positions.to(torch.int64) // self.bucket).clamp(max=self.buckets - 1)

    def to(self, device: torch.device) -> KeyBasis:
        forward, inverse, means, sink_mean = (x.to(device) for x in self.tensors)
        return KeyBasis(forward, inverse, means, sink_mean, self.bucket)


def key_basis(
    transform: torch.Tensor,
    mean: torch.Tensor,
    sink_mean: torch.Tensor | None = None,
    seed: int = ROTATION_SEED,
    bucket: int = BUCKET,
) -> KeyBasis:
    """The basis ``y = R A (k - m)`` of symmetric positive definite transforms A.

    transform: floating ``[Hk, d, d]``. mean: floating ``[Hk, d]``, or ``[Hk, B, d]`` of buckets of ``bucket`` positions.
    sink_mean: floating ``[Hk, d]``; without it, the first bucket's mean is the only one of first tokens. The rotation R is that
    of ``kernels.rotation``. Raises ValueError where a matrix or mean is not finite or A is not invertible in fp32.
    """
    a, mu = transform.to("cpu", torch.float64), mean.to("cpu", torch.float64)
    mu = mu[:, None] if mu.ndim == 2 else mu
    sink = mu[:, 0] if sink_mean is None else sink_mean.to("cpu", torch.float64)
    if not (a.isfinite().all() and mu.isfinite().all() and sink.isfinite().all()):
        raise ValueError("a key transform or mean is not finite")
    values, vectors = torch.linalg.eigh(a)
    if (values <= values.amax(-1, keepdim=True) * 1e-6).any():
        raise ValueError("a key transform is not positive definite")
    inverse = vectors @ ((1 / values)[..., None] * vectors.mT)
    turn = rotation(a.shape[-1], seed)
    parts = (x.to(torch.float32).contiguous() for x in (turn @ a, inverse @ turn.T, mu, sink))
    forward, backward, means, sink = parts
    return KeyBasis(forward, backward, means, sink, bucket)


def rotate(x: torch.Tensor, fmt: PageFormat, codec: VectorCodec, seed: int, inverse: bool = False) -> torch.Tensor:
    if codec.bits == 32:  # the lossless debug codec keeps vectors as they are
        return x
    matrix = rotation(fmt.head_size, seed).to(device=x.device, dtype=x.dtype)
    return x @ (matrix if inverse else matrix.T)


def by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``[T, Hk, ..., d]`` times each head's matrix, as rows: ``x_h M_h``."""
    return torch.einsum("th...i,hij->th...j", x, matrices.to(device=x.device, dtype=x.dtype))


def of_bucket(parts: torch.Tensor, bucket: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each token's own of a basis's ``[Hk, B, d]``: ``[T, Hk, d]``, or ``[Hk, d]`` of one bucket, on the device and of the dtype
    of ``like``. bucket: int64 ``[T]``.
    """
    own = parts[:, 0] if parts.shape[1] == 1 else parts[:, bucket.to(parts.device)].transpose(0, 1)
    return own.to(device=like.device, dtype=like.dtype)


def turn_keys(
    key: torch.Tensor, fmt: PageFormat, seed: int, basis: KeyBasis | None, bucket: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys ``[T, Hk, d]`` as they are stored, and which of them are relative to sink_mean, bool ``[T, Hk]``.

    The latter is None where no stored scale can say so. bucket: `KeyBasis.bucket_of` the tokens under a basis.
    """
    codec = fmt.preset.key
    if basis is None or bucket is None:
        return rotate(key, fmt, codec, seed), None
    means = of_bucket(basis.means, bucket, key).expand_as(key)
    if not codec.scaled:
        return by_head(key - means, basis.forward.mT), None
    sink_mean, normal, middle = (x.to(device=key.device, dtype=key.dtype) for x in (basis.sink_mean, basis.normal, basis.middle))
    second = (((key - middle) * normal).sum(-1) > 0) & (bucket == 0).to(key.device)[:, None]
    return by_head(key - torch.where(second[..., None], sink_mean, means), basis.forward.mT), second


def turn_queries(query: torch.Tensor, fmt: PageFormat, seed: int, basis: KeyBasis | None) -> torch.Tensor:
    """Queries ``[T, Hk, G, d]`` as stored keys are read by them."""
    if basis is None or fmt.preset.key.bits == 32:
        return rotate(query, fmt, fmt.preset.key, seed)
    return by_head(query, basis.inverse)


def balanced_transform(key_moment: torch.Tensor, query_moment: torch.Tensor, shrinkage: float = SHRINKAGE) -> torch.Tensor:
    """A with ``A^2 = Ck^-1/2 (Ck^1/2 Cq Ck^1/2)^1/2 Ck^-1/2``, float64 ``[..., d, d]``, symmetric positive definite.

    key_moment: Ck, the covariance of a head's keys; query_moment: Cq, the second moment of the queries that read them; both
    floating ``[..., d, d]``. Codes of ``R A k`` read by ``R A^-1 q`` err by tr(A Ck A) tr(A^-1 Cq A^-1) / d times the codec's
    distortion; this A minimises that product (the idea of WUSH, arXiv 2512.00956, applied to keys and queries).
    """
    ck, cq = (_shrink(c.to(torch.float64), shrinkage) for c in (key_moment, query_moment))
    root, inverse_root = _power(ck, 0.5), _power(ck, -0.5)
    square = inverse_root @ _power(root @ cq @ root, 0.5) @ inverse_root
    return _power(square, 0.5)


def _shrink(c: torch.Tensor, share: float) -> torch.Tensor:
    d = c.shape[-1]
    size = c.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(d, dtype=c.dtype, device=c.device)
    return torch.where(size > 0, (1 - share) * c + share * size * eye, eye)


def _power(c: torch.Tensor, exponent: float) -> torch.Tensor:
    """Symmetric positive definite C to a power."""
    values, vectors = torch.linalg.eigh((c + c.mT) / 2)
    values = values.clamp(min=values.amax(-1, keepdim=True) * 1e-12)
    return vectors @ (values.pow(exponent)[..., None] * vectors.mT)
