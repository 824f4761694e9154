"""Seeded randomised Hadamard rotations for any head size, and the Gaussian sketch of Algorithm 2.

Both are drawn from Python's Mersenne Twister, whose streams are fixed for good: pages written by one process, machine
or library version decode in another.
"""

from __future__ import annotations

import math
import random
from functools import cache

import torch

ROTATION_SEED = 0


def hadamard(n: int) -> torch.Tensor:
    """Sylvester's Hadamard matrix over sqrt(n), float64 ``[n, n]``; ``n`` a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)


def hartley(n: int) -> torch.Tensor:
    """The discrete Hartley transform, float64 ``[n, n]``: real, orthogonal, entries at most sqrt(2 / n), for any n."""
    index = torch.arange(n, dtype=torch.float64)
    angle = (2 * math.pi / n) * (torch.outer(index, index) % n)
    return (torch.cos(angle) + torch.sin(angle)) / math.sqrt(n)


def sign_stream(head_size: int, seed: int = ROTATION_SEED) -> list[float]:
    """s of :func:`rotation`, -1 or 1 a dim."""
    stream = random.Random(f"turboquant-rotation/{head_size}/{seed}")
    return [stream.choice((-1.0, 1.0)) for _ in range(head_size)]


@cache
def rotation(head_size: int, seed: int = ROTATION_SEED) -> torch.Tensor:
    """Orthogonal float64 ``[d, d]``: ``y = R x`` spreads every coordinate of x over all of y.

    ``R = (H_p kron T_m) diag(s)`` with d = p m, p the largest power of two, m odd, s random signs. For a power of two
    this is the randomised Hadamard transform, which stands in for the paper's Haar rotation at equal distortion.
    """
    power = head_size & -head_size
    signs = torch.tensor(sign_stream(head_size, seed), dtype=torch.float64)
    return torch.kron(hadamard(power), hartley(head_size // power)) * signs


@cache
def sketch_matrix(size: int, seed: int = ROTATION_SEED) -> torch.Tensor:
    """S of Algorithm 2: float64 ``[size, size]``, independent N(0, 1) entries."""
    stream = random.Random(f"turboquant-sketch/{size}/{seed}")
    entries = [stream.gauss(0.0, 1.0) for _ in range(size * size)]
    return torch.tensor(entries, dtype=torch.float64).view(size, size)
