"""From the values that calibration met to the range that is quantized.

A narrow range has small steps and cuts off large values, a wide one the other way around. NumPy
only: everything is a function of a histogram.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping

import numpy as np

BINS = 2048
"""Number of bins of a histogram, between the smallest and the largest value."""

STEPS = 256
"""Number of values of int8."""

_CANDIDATES = np.linspace(0.02, 1.0, 99)
"""Ranges that are tried, relative to the largest value."""


@dataclasses.dataclass(frozen=True)
class Histogram:
    """The values at one place of a network.

    Attributes:
      low: the smallest value, at most 0.
      high: the largest value, at least 0.
      counts: int64 (BINS,), values other than 0 in equal parts of that range.
      zeros: values that are exactly 0, as a ReLU makes them: they are never rounded.
    """

    low: float
    high: float
    counts: np.ndarray
    zeros: int = 0

    @property
    def centers(self) -> np.ndarray:
        """The middle of every bin, float64 (BINS,)."""
        bins = len(self.counts)
        return self.low + (np.arange(bins) + 0.5) * ((self.high - self.low) / bins)

    def magnitudes(self) -> "Histogram":
        """The histogram of absolute values."""
        high = max(-self.low, self.high)
        bins = len(self.counts)
        index = np.minimum((np.abs(self.centers) * (bins / high)).astype(int), bins - 1)
        return Histogram(0.0, high, np.bincount(index, self.counts, bins), self.zeros)

    @classmethod
    def of(cls, values: np.ndarray, bins: int = BINS) -> "Histogram":
        """The histogram of an array."""
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        used = values[values != 0]
        counts, _ = np.histogram(used, bins, (low, high) if high > low else (0.0, 1.0))
        return cls(low, high, counts.astype(np.int64), int(values.size - used.size))


def largest(histogram: Histogram, *, symmetric: bool, percentile: float) -> tuple[float, float]:
    """All values: nothing is cut off."""
    return histogram.low, histogram.high


def percentiles(histogram: Histogram, *, symmetric: bool, percentile: float) -> tuple[float, float]:
    """All but the largest and the smallest values, a share of each."""
    if symmetric:
        high = _quantile(histogram.magnitudes(), percentile / 100)
        return -high, high
    low = _quantile(histogram, 1 - percentile / 100)
    return min(low, 0.0), max(_quantile(histogram, percentile / 100), 0.0)


def _quantile(histogram: Histogram, share: float) -> float:
    """The value that this share of all values does not exceed, to half a bin."""
    values = np.append(histogram.centers, 0.0)
    counts = np.append(histogram.counts, histogram.zeros)
    order = np.argsort(values, kind="stable")
    below = np.cumsum(counts[order])
    place = int(np.searchsorted(below, share * below[-1]))
    if share > 0.5 and below[min(place, len(below) - 1)] == below[-1]:
        return histogram.high
    return float(values[order][min(place, len(values) - 1)])


def least_error(histogram: Histogram, *, symmetric: bool, percentile: float) -> tuple[float, float]:
    """The range of least mean squared error: that of rounding and that of cutting off.

    Rounding costs step^2 / 12 per value within the range.
    """
    if symmetric:
        histogram = histogram.magnitudes()
    highs = histogram.high * _CANDIDATES if histogram.high > 0 else np.zeros(1)
    lows = histogram.low * _CANDIDATES if histogram.low < 0 else np.zeros(1)
    centers, counts = histogram.centers, histogram.counts
    over = np.maximum(centers[None] - highs[:, None], 0)
    under = np.maximum(lows[:, None] - centers[None], 0)
    cut = (over**2 @ counts)[None, :] + (under**2 @ counts)[:, None]
    outside = ((over > 0) @ counts)[None, :] + ((under > 0) @ counts)[:, None]
    width = 2 * highs[None, :] if symmetric else highs[None, :] - lows[:, None]
    error = cut + (counts.sum() - outside) * (width / (STEPS - 1)) ** 2 / 12
    low, high = np.unravel_index(np.argmin(error), error.shape)
    return (-highs[high], highs[high]) if symmetric else (lows[low], highs[high])


def least_divergence(
    histogram: Histogram, *, symmetric: bool, percentile: float
) -> tuple[float, float]:
    """The range that keeps most of the distribution of magnitudes: least relative entropy.

    TensorRT's calibration (S. Migacz, 8-bit Inference with TensorRT, GTC 2017), without exact
    zeros.
    """
    magnitudes = histogram.magnitudes()
    counts = magnitudes.counts.astype(np.float64)
    levels = STEPS // 2 if symmetric or histogram.low < 0 else STEPS
    best, kept = np.inf, len(counts)
    for bins in range(levels, len(counts) + 1, 8):
        p = counts[:bins].copy()
        p[-1] += counts[bins:].sum()
        # Every level gets its share of the values in it, spread over the bins that have any.
        level = np.arange(bins) * levels // bins
        used = counts[:bins] > 0
        total = np.bincount(level, counts[:bins], levels)
        filled = np.bincount(level, used, levels)
        q = np.where(used, (total / np.maximum(filled, 1))[level], 0)
        found = _divergence(p, q)
        if found < best:
            best, kept = found, bins
    high = magnitudes.high * kept / len(counts)
    return max(histogram.low, -high), min(histogram.high, high)


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Relative entropy of two histograms; infinite if the second lacks what the first has."""
    some = p > 0
    if not p.sum() or not q.sum() or (q[some] == 0).any():
        return np.inf
    p, q = p[some] / p.sum(), q[some] / q.sum()
    return float(np.sum(p * np.log(p / q)))


CALIBRATORS: Mapping[str, Callable[..., tuple[float, float]]] = types.MappingProxyType(
    {
        "max": largest,
        "percentile": percentiles,
        "entropy": least_divergence,
        "mse": least_error,
    }
)
"""By name: histogram to (lowest, highest) value."""


def choose_range(
    where: str, histogram: Histogram, calibrator: str, *, symmetric: bool, percentile: float
) -> tuple[float, float]:
    """The range that a calibrator chooses for a place in the network.

    Raises:
      ValueError: values that are not finite, or a range that holds nothing but 0.
    """
    if not np.isfinite([histogram.low, histogram.high]).all():
        raise ValueError(
            f"activations at {where} range from {histogram.low:g} to {histogram.high:g} on the "
            "calibration images; a network whose activations are not finite cannot be quantized, "
            "look at its weights and at the normalization of the images"
        )
    if not histogram.counts.sum():
        raise ValueError(
            f"activations at {where} are 0 for all calibration images, which gives an empty range; "
            "calibrate with images like those the network was trained on, or leave the layer in "
            f"float: --float-layers={where.removesuffix('/output').removesuffix('/se')}"
        )
    low, high = CALIBRATORS[calibrator](histogram, symmetric=symmetric, percentile=percentile)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not (np.isfinite([low, high]).all() and high - low > 0):
        raise ValueError(
            f"the calibrator {calibrator} gives the range [{low:g}, {high:g}] at {where}, where "
            f"activations range from {histogram.low:g} to {histogram.high:g}; choose another "
            f"--calibrator, one of {', '.join(CALIBRATORS)}"
        )
    return low, high
