"""The affine map under which a layer's keys are stored, and the closed form that fits it to a model.

Softmax does not see a constant added to all keys of a head, nor an invertible matrix applied to keys and inversely to
queries. Both are therefore free at decode: they take the place of the plain rotation of ``kernels.rotation``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .rotation import ROTATION_SEED, rotation

# Of every second moment, this share is replaced by its isotropic part: directions that the statistics never saw keep a
# place in the codes.
SHRINKAGE = 0.02


@dataclass(frozen=True, eq=False)
class KeyBasis:
    """One affine map a KV head. A key k is stored as ``y = forward (k - mean)`` and read as ``inverse y + mean``.

    forward, inverse: fp32 ``[Hk, d, d]``, contiguous, each other's inverse. mean: fp32 ``[Hk, d]``. A query q of the head
    attends to stored keys as ``inverse^T q``: ``<inverse^T q, y> = <q, k> - <q, mean>``, whose last term is the same for all
    keys of the head.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor

    def __post_init__(self) -> None:
        heads, d = self.mean.shape
        assert self.forward.shape == self.inverse.shape == (heads, d, d), (self.forward.shape, self.inverse.shape)
        assert all(x.dtype == torch.float32 and x.is_contiguous() for x in (self.forward, self.inverse, self.mean))

    def to(self, device: torch.device) -> KeyBasis:
        return KeyBasis(*(x.to(device) for x in (self.forward, self.inverse, self.mean)))


def key_basis(transform: torch.Tensor, mean: torch.Tensor, seed: int = ROTATION_SEED) -> KeyBasis:
    """The basis ``y = R A (k - mean)`` of symmetric positive definite transforms A.

    transform: floating ``[Hk, d, d]``. mean: floating ``[Hk, d]``. The rotation R is that of ``kernels.rotation``. Raises
    ValueError where a matrix or mean is not finite or A is not invertible in fp32.
    """
    a, mu = transform.to("cpu", torch.float64), mean.to("cpu", torch.float64)
    if not (a.isfinite().all() and mu.isfinite().all()):
        raise ValueError("a key transform or mean is not finite")
    values, vectors = torch.linalg.eigh(a)
    if (values <= values.amax(-1, keepdim=True) * 1e-6).any():
        raise ValueError("a key transform is not positive definite")
    inverse = vectors @ ((1 / values)[..., None] * vectors.mT)
    turn = rotation(a.shape[-1], seed)
    parts = (turn @ a, inverse @ turn.T, mu)
    return KeyBasis(*(x.to(torch.float32).contiguous() for x in parts))


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
