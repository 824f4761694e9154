"""What the documents promise, written down a second time so that a wrong formula in the code cannot confirm itself."""

from __future__ import annotations

# Preset: bits of a key and a value coordinate together, fp16 scalars per token and scale group.
PROMISED = {
    "turboquant": (8, 2),
    "turboquant-k8v4": (12, 1),
    "turboquant-k4v3": (7, 2),
    "turboquant-k3v3": (6, 2),
    "turboquant-k2v2": (4, 2),
    "turboquant-k4v4-qjl": (8, 3),
}
PRESETS = tuple(PROMISED)
LOSSLESS = "turboquant-debug-lossless"

# Head size: scale groups of a model with this size only (the widest of at most 128 dims, in steps of 16).
GROUPS = {64: 1, 80: 1, 96: 1, 112: 1, 128: 1, 160: 2, 192: 2, 256: 2, 512: 4, 576: 6}
HEAD_SIZES = tuple(GROUPS)
KV_HEADS = (1, 2, 4, 8)


def slot_bytes(preset: str, head_size: int, groups: int | None = None) -> int:
    """Bytes per token and KV head, keys and values together."""
    if preset == LOSSLESS:
        return 2 * head_size * 4
    bits, scalars = PROMISED[preset]
    return head_size * bits // 8 + 2 * scalars * (GROUPS[head_size] if groups is None else groups)
