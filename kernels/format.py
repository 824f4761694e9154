"""Where every byte of a TurboQuant page lies. The one place that writes the layout; imports no torch.

A page of vLLM's ``[block, kv head, token, C]`` uint8 cache is, for one block and one KV head, ``N * C`` contiguous
bytes: ``N / 16`` units of 16 tokens, each ``16 * C`` bytes that hold all K codes, then all V codes, then the fp16
scalars. Inside a unit the codes stand in the order in which tensor cores want their operands:

* **K** is the A operand of ``S^T = K q^T``: plain token rows, cut into panels of 64 bytes so that the 16-byte loads of a
  warp never meet in a shared-memory bank.
* **V** is the A operand of ``O^T = V^T P^T``: lane ``(g, t)`` of a warp holds tokens ``2t, 2t+1, 2t+8, 2t+9`` and the
  ``g``-th eighth of the head. Head sizes that are not 64 times a power of two use K's order, which the portable
  kernels read.

Contracts: no byte is shared by two tokens; an all-zero page decodes to zeros; a unit is a multiple of 16 bytes; bytes
per token are proportional to the head size among the layers of one model (``scale_group``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from math import gcd

FORMAT_VERSION = 1
UNIT_TOKENS = 16
SCALE_BYTES = 2
MAX_SCALE_GROUP = 128
MIN_HEAD_SIZE, MAX_HEAD_SIZE, HEAD_SIZE_STEP = 16, 576, 16
DEFAULT_PRESET = "turboquant"


@dataclass(frozen=True)
class VectorCodec:
    """How one side (keys or values) is stored.

    ``bits``: 1 to 4 for Lloyd-Max codes with an fp16 scale per group, 8 for plain e4m3, 32 for raw fp32 (debugging).
    ``sketch``: Algorithm 2 of the paper; one more bit, ``sign(S r)``, and an fp16 ``||r||`` per group.
    """

    bits: int
    sketch: bool = False

    @property
    def scaled(self) -> bool:
        return self.bits <= 4


@dataclass(frozen=True)
class Preset:
    """One value of ``--kv-cache-dtype``. ``recent``: the newest tokens of a request that are kept exactly beside the pages."""

    name: str
    key: VectorCodec
    value: VectorCodec
    recent: int = 0


# A query attends mostly to what is near it: where codes are this coarse, these few tokens carry most of the error.
RECENT_TOKENS = 64


def _preset(name: str, key: VectorCodec, value: VectorCodec, recent: int = 0) -> tuple[str, Preset]:
    return name, Preset(name, key, value, recent)


PRESETS: dict[str, Preset] = dict(
    (
        _preset(DEFAULT_PRESET, VectorCodec(4), VectorCodec(4)),
        _preset("turboquant-k8v4", VectorCodec(8), VectorCodec(4)),
        _preset("turboquant-k4v3", VectorCodec(4), VectorCodec(3)),
        _preset("turboquant-k3v3", VectorCodec(3), VectorCodec(3), RECENT_TOKENS),
        _preset("turboquant-k2v2", VectorCodec(2), VectorCodec(2), RECENT_TOKENS),
        _preset("turboquant-k4v4-qjl", VectorCodec(3, sketch=True), VectorCodec(4)),
    )
)
# Same pages and tables, raw fp32 instead of codes: separates plumbing bugs from codec loss. Registered only on request.
LOSSLESS_PRESET = "turboquant-debug-lossless"
LOSSLESS_RECENT_PRESET = "turboquant-debug-recent"
DEBUG_PRESETS: dict[str, Preset] = dict(
    (
        _preset(LOSSLESS_PRESET, VectorCodec(32), VectorCodec(32)),
        _preset(LOSSLESS_RECENT_PRESET, VectorCodec(32), VectorCodec(32), RECENT_TOKENS),
    )
)

# Bit of the sign of each of the 8 dims of a 4-bit word; the magnitude of dim n is always in bits 4n..4n+2. The places
# make the sign land on the right bit of the decoded fp16 pair with one shift and one mask.
_KEY_SIGNS = (7, 15, 23, 31, 3, 11, 19, 27)
_VALUE_SIGNS = ((7, 11, 23, 27, 3, 31, 19, 15), (11, 15, 27, 31, 7, 3, 23, 19))


@dataclass(frozen=True)
class Field:
    """A run of code bits inside a word: ``((word >> shifts[token % 2][dim]) & mask) << place`` is its part of the code."""

    mask: int
    shifts: tuple[tuple[int, ...], tuple[int, ...]]
    place: int


@dataclass(frozen=True)
class Plane:
    """The words of one bit plane of one side, ``head_size / dims`` little-endian words a token.

    ``offset``: bytes from the unit's start. ``word_bytes``: 1, 2 or 4. ``dims``: dims a word holds.
    """

    offset: int
    head_size: int
    bits: int
    dims: int
    fragments: bool
    fields: tuple[Field, ...]

    @property
    def word_bytes(self) -> int:
        return self.dims * self.bits // 8

    @property
    def token_bytes(self) -> int:
        return self.head_size * self.bits // 8

    def byte_offset(self, token: int, byte: int) -> int:
        """Where byte ``byte`` (0..token_bytes-1, dims ascending) of ``token`` (0..15) lies in the unit."""
        if not self.fragments:
            panel = 64 if self.token_bytes % 64 == 0 else self.token_bytes
            return self.offset + (byte // panel) * UNIT_TOKENS * panel + token * panel + byte % panel
        eighth = self.token_bytes // 8
        half, pair, odd = token // 8, token % 8 // 2, token % 2
        lane, rest = 4 * (byte // eighth) + pair, byte % eighth
        if 2 * eighth <= 16:
            return self.offset + half * 64 * eighth + lane * 2 * eighth + odd * eighth + rest
        piece = (2 * half + odd) * (eighth // 16) + rest // 16
        return self.offset + piece * 512 + lane * 16 + rest % 16


def _interleaved(bits: int, dims: int) -> tuple[int, ...]:
    """Shifts that spread a word's dims one per nibble, so that one mask isolates ``nibbles`` codes at once."""
    nibbles = max(dims * bits // 4, 1)
    return tuple(4 * (n % nibbles) + bits * (n // nibbles) for n in range(dims))


def _fields(bits: int, dims: int, place: int, is_value: bool) -> tuple[Field, ...]:
    shifts = _interleaved(bits, dims)
    if bits >= 8:  # whole numbers, not codes
        return ()
    if bits == 4:
        signs = _VALUE_SIGNS if is_value else (_KEY_SIGNS, _KEY_SIGNS)
        return Field(7, (shifts, shifts), place), Field(1, signs, place + 3)
    return (Field((1 << bits) - 1, (shifts, shifts), place),)


def _has_fragments(head_size: int) -> bool:
    return head_size >= 64 and head_size & (head_size - 1) == 0


@dataclass(frozen=True)
class PageFormat:
    """Byte layout of one layer's pages: ``preset`` at ``head_size``, one scale per ``scale_group`` dims and side."""

    preset: Preset
    head_size: int
    scale_group: int

    @property
    def groups(self) -> int:
        return self.head_size // self.scale_group

    @cached_property
    def sides(self) -> dict[str, tuple[VectorCodec, tuple[Plane, ...]]]:
        """Codec and planes of "key" and "value"."""
        return {"key": (self.preset.key, self.key_planes), "value": (self.preset.value, self.value_planes)}

    @cached_property
    def scalars(self) -> tuple[str, ...]:
        """The fp16 scalars kept per token and group, in storage order."""
        kinds = [name for name in ("key", "value") if getattr(self.preset, name).scaled]
        return (*kinds, "sketch_norm") if self.preset.key.sketch else tuple(kinds)

    def _planes(self, codec: VectorCodec, offset: int, is_value: bool) -> tuple[Plane, ...]:
        widths: tuple[int, ...] = (2, 1) if codec.bits == 3 else (codec.bits,)
        if codec.sketch:
            widths = (*widths, 1)
        planes: list[Plane] = []
        place = 0
        fragments = is_value and _has_fragments(self.head_size)
        for bits in widths:
            dims = min(32 // bits, self.head_size // 8) if fragments else 32 // bits
            while self.scale_group % dims:  # no word holds dims of two groups
                dims //= 2
            fields = _fields(bits, dims, place, is_value)
            planes.append(Plane(offset, self.head_size, bits, dims, fragments, fields))
            offset += UNIT_TOKENS * planes[-1].token_bytes
            place += bits
        return tuple(planes)

    @cached_property
    def key_planes(self) -> tuple[Plane, ...]:
        return self._planes(self.preset.key, 0, is_value=False)

    @cached_property
    def value_planes(self) -> tuple[Plane, ...]:
        offset = sum(UNIT_TOKENS * plane.token_bytes for plane in self.key_planes)
        return self._planes(self.preset.value, offset, is_value=True)

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        return self.key_planes + self.value_planes

    @cached_property
    def scalar_base(self) -> int:
        return sum(UNIT_TOKENS * plane.token_bytes for plane in self.planes)

    def scalar_offset(self, token: int, group: int, kind: int) -> int:
        """Where the fp16 scalar ``scalars[kind]`` of ``token`` and ``group`` lies in the unit."""
        kinds = len(self.scalars)
        row = SCALE_BYTES * (token // 8 + 2 * kind) + 2 * SCALE_BYTES * kinds * (token % 8)
        return self.scalar_base + group * UNIT_TOKENS * SCALE_BYTES * kinds + row

    @cached_property
    def slot_bytes(self) -> int:
        """C: bytes per token and KV head, K and V together."""
        return sum(p.token_bytes for p in self.planes) + SCALE_BYTES * len(self.scalars) * self.groups

    @property
    def unit_bytes(self) -> int:
        return UNIT_TOKENS * self.slot_bytes

    @cached_property
    def token_bytes_table(self) -> tuple[tuple[int, ...], ...]:
        """``[16][C]``: offsets in the unit of the bytes that a token owns; planes first, then scalars ``[kind][group]``.

        Together the 16 rows are a permutation of the unit: the proof that tokens share no byte.
        """
        rows = []
        for token in range(UNIT_TOKENS):
            row = [p.byte_offset(token, byte) for p in self.planes for byte in range(p.token_bytes)]
            for kind in range(len(self.scalars)):
                for group in range(self.groups):
                    start = self.scalar_offset(token, group, kind)
                    row.extend(range(start, start + SCALE_BYTES))
            rows.append(tuple(row))
        return tuple(rows)


def scale_group(*head_sizes: int) -> int:
    """Dims that share a scale in a model with these head sizes.

    The largest multiple of 16 up to 128 that divides all of them: it keeps bytes per token proportional to the head
    size, so that vLLM never pads one layer's pages to another's, and holds the 4-bit error at its d = 128 value in
    larger heads. Raises ValueError for a head size that has no page format.
    """
    for size in head_sizes:
        if size % HEAD_SIZE_STEP or not MIN_HEAD_SIZE <= size <= MAX_HEAD_SIZE:
            raise ValueError(
                f"head size {size} has no TurboQuant page format; allowed are multiples of {HEAD_SIZE_STEP} "
                f"from {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
            )
    common = gcd(*head_sizes)
    return max(g for g in range(HEAD_SIZE_STEP, MAX_SCALE_GROUP + 1, HEAD_SIZE_STEP) if common % g == 0)


@cache
def page_format(preset: str, head_size: int, group: int | None = None) -> PageFormat:
    """The layout of ``preset`` (a dtype name) at ``head_size``; ``group`` defaults to that of a one-size model.

    Raises ValueError for an unknown preset, a head size without format or a group that does not divide it.
    """
    known = PRESETS | DEBUG_PRESETS
    if preset not in known:
        raise ValueError(f"unknown TurboQuant preset {preset!r}; allowed are {', '.join(PRESETS)}")
    default = scale_group(head_size)
    group = default if group is None else group
    if group <= 0 or group % HEAD_SIZE_STEP or head_size % group:
        raise ValueError(f"scale group {group} does not divide head size {head_size} in multiples of {HEAD_SIZE_STEP}")
    return PageFormat(known[preset], head_size, group)
