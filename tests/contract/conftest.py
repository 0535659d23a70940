"""The contract tier keeps to the unit tier's limits."""

from tests.guards import no_outside_world

__all__ = ["no_outside_world"]
