"""The layout of ``kernels.format`` and the levels of ``kernels.codebook`` as macros of the CUDA sources."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch

from ..codebook import LEVELS, LEVELS_PER_SIGMA, SCALE_CANDIDATES
from ..format import UNIT_TOKENS, PageFormat, Plane
from ..rotation import ROTATION_SEED, sign_stream
from ..tables import side_tables

PANEL = 128  # dims of K that share an MMA accumulator and a scale


def page_macros(fmt: PageFormat, block_size: int) -> dict[str, str]:
    """The layout of pages, the rotation's signs and the levels, which every kernel is compiled for."""
    values: dict[str, int | str] = {
        "D": fmt.head_size,
        "KEY_BITS": fmt.preset.key.bits,
        "VALUE_BITS": fmt.preset.value.bits,
        "SUB_SHIFT": (block_size // UNIT_TOKENS).bit_length() - 1,
        "UNIT_BYTES": fmt.unit_bytes,
        "SCALE_BASE": fmt.scalar_base,
        "SCALE_GROUP_BYTES": fmt.scalar_offset(0, 1, 0) - fmt.scalar_offset(0, 0, 0),
        "SIGNS": ",".join(sign_words(fmt.head_size)),
        "KEY_LEVELS": level_table(fmt.preset.key.bits),
        "VALUE_LEVELS": level_table(fmt.preset.value.bits),
    }
    for i, plane in enumerate(fmt.key_planes):
        values |= {f"KEY{i}_{name}": offset for name, offset in key_strides(plane).items()}
    for i, plane in enumerate(fmt.value_planes):
        values[f"VALUE{i}_BASE"] = plane.offset
    return {name: str(value) for name, value in values.items()}


def encode_macros(fmt: PageFormat) -> dict[str, str]:
    """What turns vectors into bytes: levels and scale candidates in fp32, and each plane's `PlaneLayout` and shifts."""
    values = {"CANDIDATES": _floats(SCALE_CANDIDATES)}
    for kind, (codec, planes) in fmt.sides.items():
        side = kind.upper()
        values |= {f"{side}_STEPS": _floats(LEVELS[codec.bits]), f"{side}_PER_SIGMA": f"{LEVELS_PER_SIGMA[codec.bits]}f"}
        for i, (plane, layout) in enumerate(zip(planes, side_tables(fmt, kind, torch.device("cpu")).planes, strict=False)):
            words, dims, word_bytes, offsets, _, mask0, place0, mask1, place1 = layout
            names = {"WORDS": words, "DIMS": dims, "BYTES": word_bytes, "OFFSETS": offsets}
            names |= {"MASK0": mask0, "PLACE0": place0, "MASK1": mask1, "PLACE1": place1}
            values |= {f"{side}{i}_{name}": str(value) for name, value in names.items()}
            values[f"{side}{i}_SHIFTS"] = ",".join(str(s) for f in plane.fields for row in f.shifts for s in row)
    return values


def _floats(values: tuple[float, ...]) -> str:
    return ",".join(f"{value}f" for value in values)


def key_strides(plane: Plane) -> dict[str, int]:
    """A K plane's base and its strides a token and a panel of 128 dims; inside a panel of a token dims are consecutive."""
    start = plane.byte_offset(0, 0)
    panel = plane.byte_offset(0, PANEL * plane.bits // 8) - start if plane.head_size > PANEL else 0
    return {"BASE": start, "TOKEN": plane.byte_offset(1, 0) - start, "PANEL": panel}


def half(level: float) -> int:
    """The bits of ``level`` in fp16."""
    return int.from_bytes(struct.pack("<e", level), "little")


def e4m3(level: float) -> int:
    """The bits of ``level`` in e4m3, where it is exact: those of fp16 with one bit less of exponent, whose bias is 8 less."""
    bits = half(level / 2**8)
    assert bits & 0x407F == 0, f"level {level} is not an e4m3 number"
    return (bits >> 8 & 0x80) | (bits >> 7 & 0x7F)


def level_table(bits: int) -> str:
    """The six words of ``struct Levels``: high bytes of codes 0..3 and 4..7, then their low bytes, then both codes' e4m3 bytes.

    4-bit codes look up magnitudes and merge their sign; codes of 2 and 3 bits look up signed levels.
    """
    levels = LEVELS[bits] if bits == 4 else (*LEVELS[bits], *(-level for level in LEVELS[bits]))
    words = [half(level) for level in levels]
    words += [0] * (8 - len(words))

    def word(part: list[int], shift: int) -> str:
        return f"0x{sum((x >> shift & 0xFF) << (8 * i) for i, x in enumerate(part)):08x}u"

    bytes_ = [e4m3(level) for level in levels]
    bytes_ += [0] * (8 - len(bytes_))
    halves = ((words[:4], 8), (words[4:], 8), (words[:4], 0), (words[4:], 0), (bytes_[:4], 0), (bytes_[4:], 0))
    return ",".join(word(*half) for half in halves)


def sign_words(head_size: int) -> Iterator[str]:
    """The rotation's sign flips, 32 a word."""
    signs = sign_stream(head_size, ROTATION_SEED)
    for start in range(0, head_size, 32):
        yield f"0x{sum((sign < 0) << i for i, sign in enumerate(signs[start : start + 32])):08x}u"
