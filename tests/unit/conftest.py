"""The unit tier: no Ray, no network, no sleeps."""

from tests.guards import no_outside_world

__all__ = ["no_outside_world"]
