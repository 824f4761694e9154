"""Plain torch for `recent_keep` and for reading what it kept; also the CPU path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .basis import KeyBasis, by_head, rotate
from .format import UNIT_TOKENS, PageFormat


def keep(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    recent_key: torch.Tensor,
    recent_value: torch.Tensor,
    frame_of: torch.Tensor,
    mean: torch.Tensor | None = None,
) -> None:
    """As `kernels.recent_keep.keep`, with any dtype of key and value."""
    frame = frame_of[slot_mapping.clamp(min=-1) // UNIT_TOKENS]
    live = ((frame >= 0) & (slot_mapping >= 0)).nonzero()[:, 0]
    frame, place = frame[live].to(torch.int64), slot_mapping[live] % UNIT_TOKENS
    exact = key[live] if mean is None else key[live].to(mean.dtype) - mean
    recent_key[frame, place] = exact.to(recent_key.dtype)
    recent_value[frame, place] = value[live].to(recent_value.dtype)


@dataclass(frozen=True)
class Recent:
    """Tokens of each request from position ``ends[r]`` on, exactly.

    key, value: pools that `keep` filled, ``[F, 16, Hk, d]``. frame_of, ends: of `RecentUnits`.
    """

    key: torch.Tensor
    value: torch.Tensor
    frame_of: torch.Tensor
    ends: torch.Tensor

    def overlay(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        blocks: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        fmt: PageFormat,
        basis: KeyBasis | None,
        seed: int,
    ) -> None:
        """Writes them over what `load` gave of the same blocks. ends: int ``[n]``, of each block's request."""
        within = torch.arange(len(keys) // len(blocks), device=keys.device)
        slots = (blocks[:, None] * len(within) + within).flatten()
        newest = (starts[:, None] + within >= ends[:, None]).flatten()
        # Behind a request's length frames may hold anything, or be missing; nobody looks there.
        newest &= self.frame_of[slots // UNIT_TOKENS] >= 0
        frame, place = self.frame_of[slots[newest] // UNIT_TOKENS].to(torch.int64), slots[newest] % UNIT_TOKENS
        key, value = (pool[frame, place].to(keys.dtype) for pool in (self.key, self.value))
        basis = None if fmt.preset.key.bits == 32 else basis
        keys[newest] = rotate(key, fmt, fmt.preset.key, seed) if basis is None else by_head(key, basis.forward.mT)
        values[newest] = rotate(value, fmt, fmt.preset.value, seed)
