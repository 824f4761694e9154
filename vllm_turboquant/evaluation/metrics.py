"""How far a model's next-token distributions lie from its own with an exact cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

SEGMENT = 512  # tokens whose mean counts as one observation: neighbours share context, so they are not independent


@dataclass
class Divergence:
    """Of one cache, over the positions that were added; one entry a position, in nats, on the CPU in float64."""

    kl: list[torch.Tensor] = field(default_factory=list)
    agree: list[torch.Tensor] = field(default_factory=list)
    loss: list[torch.Tensor] = field(default_factory=list)
    place: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, start: int) -> None:
        """reference, logits: float32 ``[n, V]``. targets: the true next tokens, int64 ``[n]``. start: position of the first."""
        p, q = reference.log_softmax(-1), logits.log_softmax(-1)
        self.kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64).cpu())
        self.agree.append((reference.argmax(-1) == logits.argmax(-1)).double().cpu())
        difference = p - q
        self.loss.append(difference.gather(-1, targets[:, None].to(p.device))[:, 0].double().cpu())
        self.place.append(torch.arange(start, start + len(p)))

    def figures(self) -> dict[str, float | int | list[list[float]] | None]:
        """tokens; kl, its standard error over segments of `SEGMENT` tokens; top1; ppl_delta (0.01: one percent more);
        kl_places: ``[first position, kl]`` of each power of two of positions from `SEGMENT` on.

        The error is None of fewer than two segments.
        """
        kl = torch.cat(self.kl)
        means = torch.stack([part.mean() for part in self._segments(kl)])
        error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None
        octave = torch.cat(self.place).clamp(min=SEGMENT // 2).log2().floor()
        places = [[0.0 if 2**o < SEGMENT else float(2**o), float(kl[octave == o].mean())] for o in octave.unique()]
        return {
            "tokens": len(kl),
            "kl": float(kl.mean()),
            "kl_se": error,
            "top1": float(torch.cat(self.agree).mean()),
            "ppl_delta": math.exp(float(torch.cat(self.loss).mean())) - 1,
            "kl_places": places,
        }

    def _segments(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Parts of one sequence and at most `SEGMENT` positions each; a rest below half a segment joins no mean."""
        place = torch.cat(self.place)
        cuts = ((place % SEGMENT == 0) | (place == 0)).nonzero()[1:, 0].tolist()
        parts = list(torch.tensor_split(values, cuts))
        return [part for part in parts if 2 * len(part) >= min(SEGMENT, max(len(p) for p in parts))]
