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


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """One affine map a KV head, with two means. A key k is stored as ``y = forward (k - m)`` and read as ``inverse y + m``.

    forward, inverse: fp32 ``[Hk, d, d]``, contiguous, each other's inverse. mean, sink_mean: fp32 ``[Hk, d]``; m is the one that
    is nearer in the stored basis, and the sign of the key's stored scales says which (negative: sink_mean). The first token of
    a sequence is what most heads attend to when they have nothing to attend to: its keys are nearly the same in all texts, far
    from all others, and no error costs more than theirs. Keys without a stored scale (8 bits) know ``mean`` alone.

    A query q of the head attends to stored keys as ``inverse^T q``: ``<inverse^T q, y + offset> = <q, k> - <q, mean>``, whose
    last term is the same for all keys of the head; ``offset`` counts where m is sink_mean.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor
    sink_mean: torch.Tensor

    def __post_init__(self) -> None:
        heads, d = self.mean.shape
        assert self.forward.shape == self.inverse.shape == (heads, d, d), (self.forward.shape, self.inverse.shape)
        assert self.sink_mean.shape == self.mean.shape, self.sink_mean.shape
        assert all(x.dtype == torch.float32 and x.is_contiguous() for x in self.tensors)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.forward, self.inverse, self.mean, self.sink_mean

    @cached_property
    def offset(self) -> torch.Tensor:
        """``forward (sink_mean - mean)``, fp32 ``[Hk, d]``."""
        return torch.einsum("hij,hj->hi", self.forward.double(), (self.sink_mean - self.mean).double()).float()

    @cached_property
    def normal(self) -> torch.Tensor:
        """``forward^T offset``, fp32 ``[Hk, d]``: keys beyond ``middle`` in this direction are nearer to sink_mean."""
        return torch.einsum("hij,hi->hj", self.forward.double(), self.offset.double()).float()

    @cached_property
    def middle(self) -> torch.Tensor:
        """Half way between the means, fp32 ``[Hk, d]``."""
        return (self.mean + self.sink_mean) / 2

    def to(self, device: torch.device) -> KeyBasis:
        return KeyBasis(*(x.to(device) for x in self.tensors))


def key_basis(
    transform: torch.Tensor, mean: torch.Tensor, sink_mean: torch.Tensor | None = None, seed: int = ROTATION_SEED
) -> KeyBasis:
    """The basis ``y = R A (k - m)`` of symmetric positive definite transforms A.

    transform: floating ``[Hk, d, d]``. mean, sink_mean: floating ``[Hk, d]``; without the latter there is one mean. The rotation
    R is that of ``kernels.rotation``. Raises ValueError where a matrix or mean is not finite or A is not invertible in fp32.
    """
    a, mu = transform.to("cpu", torch.float64), mean.to("cpu", torch.float64)
    sink = mu if sink_mean is None else sink_mean.to("cpu", torch.float64)
    if not (a.isfinite().all() and mu.isfinite().all() and sink.isfinite().all()):
        raise ValueError("a key transform or mean is not finite")
    values, vectors = torch.linalg.eigh(a)
    if (values <= values.amax(-1, keepdim=True) * 1e-6).any():
        raise ValueError("a key transform is not positive definite")
    inverse = vectors @ ((1 / values)[..., None] * vectors.mT)
    turn = rotation(a.shape[-1], seed)
    parts = (turn @ a, inverse @ turn.T, mu, sink)
    return KeyBasis(*(x.to(torch.float32).contiguous() for x in parts))


def rotate(x: torch.Tensor, fmt: PageFormat, codec: VectorCodec, seed: int, inverse: bool = False) -> torch.Tensor:
    if codec.bits == 32:  # the lossless debug codec keeps vectors as they are
        return x
    matrix = rotation(fmt.head_size, seed).to(device=x.device, dtype=x.dtype)
    return x @ (matrix if inverse else matrix.T)


def by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """``[T, Hk, ..., d]`` times each head's matrix, as rows: ``x_h M_h``."""
    return torch.einsum("th...i,hij->th...j", x, matrices.to(device=x.device, dtype=x.dtype))


def turn_keys(key: torch.Tensor, fmt: PageFormat, seed: int, basis: KeyBasis | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Keys ``[T, Hk, d]`` as they are stored, and which of them are relative to the second mean, bool ``[T, Hk]``.

    The latter is None where no stored scale can say so.
    """
    codec = fmt.preset.key
    if basis is None or codec.bits == 32:
        return rotate(key, fmt, codec, seed), None
    mean, sink_mean, normal, middle = (
        x.to(device=key.device, dtype=key.dtype) for x in (basis.mean, basis.sink_mean, basis.normal, basis.middle)
    )
    if not codec.scaled:
        return by_head(key - mean, basis.forward.mT), None
    second = ((key - middle) * normal).sum(-1) > 0
    return by_head(key - torch.where(second[..., None], sink_mean, mean), basis.forward.mT), second


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
