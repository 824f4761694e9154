"""Lloyd-Max codebooks for a standard normal, with levels that are exact in fp8 e4m3.

e4m3 levels cost at most 0.7% of the mean squared error and let a kernel decode a code with one byte permute; their
common factor is free, because it folds into the stored scale. Codes are sign-magnitude: ``code = sign << (bits - 1) |
index`` with ``LEVELS[bits][index]`` ascending, so every codebook is symmetric.
"""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

# Derived by `e4m3_levels`; a test holds table and derivation together.
LEVELS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (0.375, 1.25),
    3: (0.1875, 0.5625, 1.0, 1.625),
    4: (0.140625, 0.40625, 0.6875, 1.0, 1.375, 1.75, 2.25, 3.0),
}

# <LEVELS, Lloyd-Max> / <Lloyd-Max, Lloyd-Max>: how many level units one standard deviation spans.
LEVELS_PER_SIGMA: dict[int, float] = {1: 1.2533141, 2: 0.8276377, 3: 0.7514990, 4: 1.0889847}

# Factors tried on a vector's own scale at encode time; the one whose codes point closest to the vector wins. Found by
# coordinate search on Gaussian vectors of 128 dims; eight are within 1% of the error of thirty-two.
SCALE_CANDIDATES: tuple[float, ...] = (0.80, 0.86, 0.91, 0.95, 1.0, 1.05, 1.10, 1.16)

_NORMAL = NormalDist()


def _midpoints(levels: list[float]) -> list[float]:
    return [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]


def _mass(a: float, b: float) -> float:
    return (1.0 if b == math.inf else _NORMAL.cdf(b)) - _NORMAL.cdf(a)


def _first_moment(a: float, b: float) -> float:
    return _NORMAL.pdf(a) - (0.0 if b == math.inf else _NORMAL.pdf(b))


def lloyd_max(bits: int, iterations: int = 5000) -> list[float]:
    """Positive levels of the optimal ``2**bits``-level scalar quantiser of N(0, 1) (Lloyd 1982, Max 1960).

    Alternates the two optimality conditions: thresholds half-way between levels, levels at the centroids of their cells.
    """
    n = 2 ** (bits - 1)
    levels = [_NORMAL.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)]
    for _ in range(iterations):
        edges = _midpoints(levels)
        levels = [_first_moment(a, b) / _mass(a, b) for a, b in itertools.pairwise(edges)]
    return levels


def distortion(levels: list[float]) -> float:
    """Mean squared error of a symmetric quantiser with these positive levels on N(0, 1)."""
    edges = _midpoints(levels)
    cells = zip(levels, edges, edges[1:], strict=False)
    return 1.0 + 2.0 * sum(c * c * _mass(a, b) - 2.0 * c * _first_moment(a, b) for c, a, b in cells)


def round_to_e4m3(value: float) -> float:
    """Nearest number with a 3-bit mantissa, for values in e4m3's normal range (2**-6 to 448)."""
    step = 2.0 ** (math.floor(math.log2(value)) - 3)
    return round(value / step) * step


def e4m3_levels(bits: int, steps: int = 2000) -> list[float]:
    """The e4m3 levels nearest to Lloyd-Max under the best common factor, scaled to a mean near the table's.

    Searches the factor over one octave: a further factor of two moves every level exactly.
    """
    optimal = lloyd_max(bits)

    def candidate(step: int) -> tuple[float, list[float]]:
        factor = 2.0 ** (step / steps)
        rounded = [round_to_e4m3(level * factor) for level in optimal]
        return distortion([level / factor for level in rounded]), rounded

    return min(candidate(step) for step in range(steps))[1]
