"""vLLM's rotary modules as matrices: R(p), by which a position turns a key. Whatever the module computes is asked of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

# Modules keep cosines in the model's dtype. bfloat16 rounds each by up to 2^-8, and so it does the factor that is divided out:
# R R^T strays from 1 by up to 2^-6.
ORTHOGONAL = 2e-2
_CHUNK = 256  # positions at once: 16 MB of matrices at head size 128


def is_rotary(module: torch.nn.Module) -> bool:
    """Whether a module rotates queries and keys: vLLM's classes have no common base, but one home."""
    home = type(module).__module__.startswith("vllm.model_executor.layers.rotary_embedding")
    return home and hasattr(module, "rotary_dim") and hasattr(module, "head_size")


def turns(module: torch.nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """R(p) of each position without the factor that some types of scaling multiply keys by, float32 ``[P, d, d]``.

    positions: int64 ``[P]``. A key at position 0 turned by R(p) is that key at position p. Raises ValueError for a module whose
    R(p) is no rotation of single vectors.
    """
    positions = torch.cat([positions.new_zeros(1), positions])
    matrices = torch.cat([_apply(module, part) for part in positions.split(_CHUNK)])
    factor = matrices[0].diagonal()
    eye = torch.eye(len(factor), device=matrices.device)
    result = matrices[1:] / factor
    strayed = torch.cat([(matrices[0] - torch.diag(factor))[None], result @ result.mT - eye]).abs().max()
    if not (factor > 0).all() or not strayed < ORTHOGONAL:
        raise ValueError(f"{type(module).__name__} does more than rotate")
    return result


def mean_turn(module: torch.nn.Module, length: int, samples: int = 4096) -> torch.Tensor:
    """The average of R(p), the module's factor included, over positions ``0 .. length - 1``: float32 ``[d, d]``.

    Beyond ``samples`` positions one is drawn from each of as many equal parts: what should average to 0 errs by 1.6%.
    """
    if length > samples:
        generator = torch.Generator().manual_seed(0)
        edges = torch.arange(samples, dtype=torch.float64)
        drawn = (edges + torch.rand(samples, generator=generator, dtype=torch.float64)) * (length / samples)
        positions = drawn.long().clamp(max=length - 1)
    else:
        positions = torch.arange(length)
    parts = positions.to(_device(module)).split(_CHUNK)
    return torch.stack([_apply(module, part).sum(0) for part in parts]).sum(0) / len(positions)


def _apply(module: torch.nn.Module, positions: torch.Tensor) -> torch.Tensor:
    """What the module does to a key at each position, as matrices ``[P, d, d]``: unit vectors stand as heads of a token."""
    d: int = module.head_size  # type: ignore[assignment]
    # The module replaces its table when asked in another dtype; the served one must keep its own.
    own = copy.copy(module)
    own._buffers = dict(module._buffers)
    forward = getattr(own, "forward_native", own.forward)
    units = torch.eye(d, device=positions.device).flatten().expand(len(positions), -1)
    query, key = forward(positions, units.clone(), units.clone())
    if key.shape != units.shape or not torch.equal(query, key):
        raise ValueError(f"{type(module).__name__} rotates queries and keys differently")
    return key.view(-1, d, d).mT


def _device(module: torch.nn.Module) -> torch.device:
    buffers: Iterator[torch.Tensor] = module.buffers()
    return next(buffers).device
