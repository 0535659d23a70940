"""Decayed statistics: mean, rate, line, plane, and a bounded quantile window.

Mean and rate decay with time, not by count, so they cover the same recent past for an SLM that
answers once a minute and one that answers a thousand times a second. Every `now` is in seconds on
one monotonic clock of the caller; a `now` that runs backwards counts as no time passed.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# A number, or an array of them.
Number = TypeVar("Number", float, "npt.NDArray[np.float64]")

MIN_SPAN_S = 1.0  # of a rate
_LN2 = math.log(2.0)


def decay(age: Number, half_life: float) -> Number:
    """Weight of what is `age` old; both in one unit, which may be seconds or a count.

    >>> decay(16.0, 8.0)
    0.25
    """
    weight: Number = 0.5 ** (age / half_life)
    return weight


class Ewma:
    """Mean whose weights halve every `half_life_s` seconds."""

    __slots__ = ("_at", "_half_life_s", "_mean", "_weight")

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._mean = 0.0
        self._weight = 0.0
        self._at = -math.inf

    @property
    def mean(self) -> float | None:
        """The mean, in the unit of the values; None before the first value.

        Time without values does not change it, but gives the next value more weight.
        """
        return self._mean if self._weight > 0.0 else None

    def weight(self, now: float) -> float:
        """Remaining weight of the values so far; with weights of 1, their number."""
        if self._weight == 0.0:
            return 0.0
        return self._weight * _left(now - self._at, self._half_life_s)

    def add(self, value: float, now: float, weight: float = 1.0) -> None:
        """Count `value` with `weight` (above 0)."""
        self._weight = self.weight(now) + weight
        self._mean += (value - self._mean) * weight / self._weight
        self._at = max(now, self._at)


class DecayedRate:
    """Amount per second over roughly the last half-life."""

    __slots__ = ("_amount", "_at", "_half_life_s", "_since")

    def __init__(self, half_life_s: float, now: float) -> None:
        self._half_life_s = half_life_s
        self._amount = 0.0
        self._at = now
        self._since = now

    def add(self, amount: float, now: float) -> None:
        """Count `amount` at `now`."""
        self._amount = self._decayed(now) + amount
        self._at = max(now, self._at)

    def per_s(self, now: float) -> float:
        """Return the rate per second."""
        # Divided by the part of the exponential window since the start. It counts as MIN_SPAN_S at
        # least, so that the first event does not give an infinite rate.
        span_s = max(now - self._since, MIN_SPAN_S)
        share = 1.0 - _left(span_s, self._half_life_s)
        return self._decayed(now) * _LN2 / self._half_life_s / share

    def _decayed(self, now: float) -> float:
        return self._amount * _left(now - self._at, self._half_life_s)


class DecayedLine:
    """Least squares y = level + slope * x; weights halve after `half_life` newer values."""

    __slots__ = ("_keep", "_x", "_xx", "_xy", "_y", "weight")

    def __init__(self, half_life: float) -> None:
        self._keep = decay(1.0, half_life)
        self.weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float, weight: float = 1.0) -> None:
        """Count a value with `weight` (above 0)."""
        keep = self._keep
        self.weight = self.weight * keep + weight
        self._x = self._x * keep + weight * x
        self._y = self._y * keep + weight * y
        self._xx = self._xx * keep + weight * x * x
        self._xy = self._xy * keep + weight * x * y

    @property
    def means(self) -> tuple[float, float]:
        """Weighted means of x and y; ZeroDivisionError before the first value."""
        return self._x / self.weight, self._y / self.weight

    def slope(self, prior: float, ridge: float) -> float:
        """The slope; `prior` counts as if measured over a sum of squares of `ridge`."""
        x, y = self.means
        squares = max(self._xx - self.weight * x * x, 0.0)
        return (self._xy - self.weight * x * y + ridge * prior) / (squares + ridge)


class DecayedPlane:
    """Least squares z = level + a * x + b * y; weights halve after `half_life` newer values."""

    __slots__ = ("_keep", "_x", "_xx", "_xy", "_xz", "_y", "_yy", "_yz", "_z", "weight")

    def __init__(self, half_life: float) -> None:
        self._keep = decay(1.0, half_life)
        self.weight = self._x = self._y = self._z = 0.0
        self._xx = self._xy = self._yy = self._xz = self._yz = 0.0

    def add(self, x: float, y: float, z: float) -> None:
        """Count a value."""
        keep = self._keep
        self.weight = self.weight * keep + 1.0
        self._x = self._x * keep + x
        self._y = self._y * keep + y
        self._z = self._z * keep + z
        self._xx = self._xx * keep + x * x
        self._xy = self._xy * keep + x * y
        self._yy = self._yy * keep + y * y
        self._xz = self._xz * keep + x * z
        self._yz = self._yz * keep + y * z

    @property
    def means(self) -> tuple[float, float, float]:
        """Weighted means of x, y and z; ZeroDivisionError before the first value."""
        return self._x / self.weight, self._y / self.weight, self._z / self.weight

    def slopes(
        self, prior: tuple[float, float], ridges: tuple[float, float]
    ) -> tuple[float, float]:
        """Both slopes; each of `prior` counts as if measured over a sum of squares (above 0)."""
        w = self.weight
        x, y, z = self.means if w else (0.0, 0.0, 0.0)
        xx = max(self._xx - w * x * x, 0.0) + ridges[0]
        yy = max(self._yy - w * y * y, 0.0) + ridges[1]
        # By Cauchy and Schwarz it is at most the root of their product; rounding may exceed it.
        most = 0.999999 * math.sqrt(xx * yy)
        xy = min(max(self._xy - w * x * y, -most), most)
        xz = self._xz - w * x * z + ridges[0] * prior[0]
        yz = self._yz - w * y * z + ridges[1] * prior[1]
        determinant = xx * yy - xy * xy
        return (xz * yy - yz * xy) / determinant, (yz * xx - xz * xy) / determinant


class QuantileWindow:
    """The last `size` values, none older than `max_age_s`; exact quantiles over them."""

    __slots__ = ("_max_age_s", "_values")

    def __init__(self, size: int, max_age_s: float) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=size)
        self._max_age_s = max_age_s

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float, now: float) -> None:
        """Append `value`; the oldest is dropped when the window is full."""
        self._values.append((now, value))

    def quantiles(self, ratios: tuple[float, ...], now: float) -> tuple[float | None, ...]:
        """Return the nearest-rank quantile for each ratio in [0, 1]; None when empty.

        Drops values that are too old, then sorts: O(size log size), not for the hot path.
        """
        while self._values and self._values[0][0] < now - self._max_age_s:
            self._values.popleft()
        if not self._values:
            return tuple(None for _ in ratios)
        ordered = sorted(value for _, value in self._values)
        return tuple(ordered[max(math.ceil(r * len(ordered)) - 1, 0)] for r in ratios)


def _left(elapsed_s: float, half_life_s: float) -> float:
    return float(decay(max(elapsed_s, 0.0), half_life_s))
