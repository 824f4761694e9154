"""Codebooks: the tables are what the derivation gives, and Lloyd-Max meets its published error."""

import pytest

from vllm_turboquant.kernels.codebook import LEVELS, LEVELS_PER_SIGMA, distortion, e4m3_levels, lloyd_max, round_to_e4m3

# Mean squared error of the Lloyd-Max quantiser of N(0, 1), Max 1960 / arXiv 2504.19874 (untruncated).
LLOYD_MAX_ERROR = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


@pytest.mark.parametrize("bits", LLOYD_MAX_ERROR)
def test_lloyd_max_reaches_the_known_error(bits):
    assert distortion(lloyd_max(bits)) == pytest.approx(LLOYD_MAX_ERROR[bits], abs=6e-6)  # figures have 5 digits


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_tables_are_what_the_derivation_gives(bits):
    """Up to a common factor, which the stored scale absorbs."""
    derived = e4m3_levels(bits)
    ratios = [a / b for a, b in zip(derived, LEVELS[bits], strict=True)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-12)


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_are_exact_in_e4m3(bits):
    assert all(round_to_e4m3(level) == level and 2**-6 <= level <= 448 for level in LEVELS[bits])
    assert list(LEVELS[bits]) == sorted(set(LEVELS[bits]))


@pytest.mark.parametrize("bits", LEVELS)
def test_levels_per_sigma_is_the_projection_on_lloyd_max(bits):
    optimal = lloyd_max(bits)
    projection = sum(a * b for a, b in zip(LEVELS[bits], optimal, strict=True)) / sum(b * b for b in optimal)
    assert LEVELS_PER_SIGMA[bits] == pytest.approx(projection, rel=1e-6)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_e4m3_costs_less_than_one_percent(bits):
    scaled = [level / LEVELS_PER_SIGMA[bits] for level in LEVELS[bits]]
    assert distortion(scaled) < 1.01 * LLOYD_MAX_ERROR[bits]
