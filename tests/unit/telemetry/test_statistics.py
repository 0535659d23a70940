"""Least squares over two quantities that decays with newer values."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.telemetry import DecayedPlane

RIDGES = (1.0, 1.0)


def test_a_plane_is_found_and_an_old_one_forgotten() -> None:
    plane, rng = DecayedPlane(50.0), Random(1)
    for a, b in ((1.0, 1.0), (2.0, -3.0)):
        for _ in range(1000):
            x, y = rng.uniform(0, 10), rng.uniform(0, 10)
            plane.add(x, y, 5.0 + a * x + b * y)
    assert plane.slopes((0.0, 0.0), RIDGES) == pytest.approx((2.0, -3.0), abs=0.05)
    x, y, z = plane.means
    assert z == pytest.approx(5.0 + 2.0 * x - 3.0 * y, abs=0.01)


def test_without_values_or_spread_the_slopes_are_the_priors() -> None:
    plane = DecayedPlane(50.0)
    assert plane.slopes((0.5, 0.1), RIDGES) == pytest.approx((0.5, 0.1))
    for _ in range(100):
        plane.add(3.0, 4.0, 7.0)
    assert plane.slopes((0.5, 0.1), RIDGES) == pytest.approx((0.5, 0.1), abs=1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 1e5), st.floats(0, 1e3), st.floats(0, 1e3)), max_size=50),
    st.booleans(),
)
def test_slopes_are_finite_and_bounded_even_when_one_quantity_follows_the_other(
    values: list[tuple[float, float, float]], equal: bool
) -> None:
    plane = DecayedPlane(10.0)
    for x, y, z in values:
        plane.add(x, x if equal else y, z)
    assert all(abs(slope) < 1e12 for slope in plane.slopes((1.0, 1.0), RIDGES))
