"""The byte layout: permutations, contracts, and the published k4v4 order written out a second time by hand."""

import itertools
from pathlib import Path

import pytest
import torch

from vllm_turboquant.kernels import format as fmt_module
from vllm_turboquant.kernels.codebook import LEVELS
from vllm_turboquant.kernels.format import DEBUG_PRESETS, PRESETS, page_format, scale_group
from vllm_turboquant.kernels.reference import load

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256, 512, 576)
ALL_PRESETS = (*PRESETS, *DEBUG_PRESETS)


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_byte_of_a_unit_belongs_to_exactly_one_token(preset, head_size):
    fmt = page_format(preset, head_size)
    owned = list(itertools.chain.from_iterable(fmt.token_bytes_table))
    assert sorted(owned) == list(range(fmt.unit_bytes))
    assert all(len(row) == fmt.slot_bytes for row in fmt.token_bytes_table)
    assert fmt.unit_bytes % 16 == 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_bit_of_a_word_belongs_to_exactly_one_dim(preset, head_size):
    for plane in page_format(preset, head_size).planes:
        for parity in (0, 1) if plane.fields else ():
            bits = [
                shift + bit for field in plane.fields for shift in field.shifts[parity] for bit in range(field.mask.bit_length())
            ]
            assert sorted(bits) == list(range(8 * plane.word_bytes)), (plane, parity)


def test_bytes_per_token_of_every_preset():
    at_128 = {name: page_format(name, 128).slot_bytes for name in PRESETS}
    assert at_128 == {
        "turboquant": 132,
        "turboquant-k8v4": 194,
        "turboquant-k4v3": 116,
        "turboquant-k3v3": 100,
        "turboquant-k2v2": 68,
        "turboquant-k4v4-qjl": 134,
    }
    assert page_format("turboquant", 64).slot_bytes == 68


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("sizes", [(256, 512), (64, 128), (96, 192), (64, 128, 256), (128, 192), (80, 160, 576)])
def test_bytes_are_proportional_to_head_size_within_a_model(preset, sizes):
    group = scale_group(*sizes)
    ratios = {page_format(preset, size, group).slot_bytes / size for size in sizes}
    assert len(ratios) == 1


@pytest.mark.parametrize("head_size", (0, 8, 72, 100, 592, 1024))
def test_head_sizes_without_format_are_named(head_size):
    with pytest.raises(ValueError, match=rf"head size {head_size} .*multiples of 16"):
        page_format("turboquant", head_size)


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match=r"'turboquant-k5v5'.*allowed are turboquant, turboquant-k8v4"):
        page_format("turboquant-k5v5", 128)


@pytest.mark.parametrize("group", (24, 96, 256, 0))
def test_groups_that_do_not_divide_are_refused(group):
    with pytest.raises((ValueError, ZeroDivisionError)):
        page_format("turboquant", 128, group)


def test_zero_pages_decode_to_zeros():
    for preset in ALL_PRESETS:
        fmt = page_format(preset, 96)
        cache = torch.zeros(2, 3, 32, fmt.slot_bytes, dtype=torch.uint8)
        keys, values = load(cache, torch.arange(2), fmt)
        assert not keys.any() and not values.any()


def _published_key(unit: bytes, token: int, dim: int) -> float:
    """K of k4v4 at d = 128: plain 64-byte rows, words of 8 dims, magnitude in bits 4j..4j+2, signs apart."""
    word = int.from_bytes(unit[64 * token + 4 * (dim // 8) :][:4], "little")
    j = dim % 8
    sign_bit = (7, 15, 23, 31)[j] if j < 4 else (3, 11, 19, 27)[j - 4]
    magnitude = LEVELS[4][(word >> (4 * j)) & 7]
    return -magnitude if (word >> sign_bit) & 1 else magnitude


def _published_value(unit: bytes, token: int, dim: int) -> float:
    """V: 16-byte piece at 1024 + 512 h + 16 (4 g + t): 8 bytes of token 8h+2t, then of 8h+2t+1; dims 16g..16g+15."""
    h, t, odd, g = token // 8, token % 8 // 2, token % 2, dim // 16
    start = 1024 + 512 * h + 16 * (4 * g + t) + 8 * odd + 4 * (dim % 16 // 8)
    word = int.from_bytes(unit[start:][:4], "little")
    n = dim % 8
    sign_bit = ((7, 11, 23, 27, 3, 31, 19, 15), (11, 15, 27, 31, 7, 3, 23, 19))[odd][n]
    magnitude = LEVELS[4][(word >> (4 * n)) & 7]
    return -magnitude if (word >> sign_bit) & 1 else magnitude


def test_the_default_format_is_the_published_one(seed):
    """Random pages, decoded once by the tables and once by the published byte order, written out above."""
    fmt = page_format("turboquant", 128)
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randint(0, 256, (1, 1, 16, 132), dtype=torch.uint8, generator=generator)
    unit_scales = torch.rand(32, generator=generator).half()
    cache.view(-1)[2048:] = unit_scales.view(torch.uint8)
    unit = bytes(cache.flatten().tolist())
    keys, values = load(cache, torch.zeros(1, dtype=torch.int64), fmt)
    for token in range(16):
        key_scale = unit_scales[4 * (token % 8) + token // 8].double()
        value_scale = unit_scales[4 * (token % 8) + 2 + token // 8].double()
        for dim in range(128):
            assert keys[token, 0, dim] == _published_key(unit, token, dim) * key_scale
            assert values[token, 0, dim] == _published_value(unit, token, dim) * value_scale


def test_format_imports_no_torch():
    source = Path(fmt_module.__file__).read_text()
    assert "import torch" not in source
