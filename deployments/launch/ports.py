"""Ports of a cluster's own processes, so that no two clusters on one machine share one.

Serve opens its routers' ports with SO_REUSEPORT. A second cluster with Ray's default ports would
therefore start without an error, and receive part of the first one's requests.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from calm_serve.errors import ConfigError

# Ray's defaults; cluster i gets the i-th port after each of the first three.
_SINGLE = {
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
}
_FIRST_INGRESS_PORT, _INGRESS_PORTS = 30_000, 512  # two per router replica, 256 replicas at most
_CLUSTERS = 5  # the blocks end below Linux's ephemeral ports (32768 and up)
_HOST = "127.0.0.1"


class PortClaim:
    """Exclusive use of a block of ports on this machine, until `close`."""

    def __init__(self) -> None:
        """Claim the first free block. Raises ConfigError when there is none."""
        for index in range(_CLUSTERS):
            first = _FIRST_INGRESS_PORT + index * _INGRESS_PORTS
            # Serve opens its ports seconds later. Until then a bound UDP port of the same number
            # marks the block as taken; the kernel releases it however this process ends.
            self._lock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            single = {name: port + index for name, port in _SINGLE.items()}
            if _bound(self._lock, first) and all(map(_free, (*single.values(), first, first + 1))):
                self.environment: Mapping[str, str] = {
                    **{name: str(port) for name, port in single.items()},
                    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
                    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _INGRESS_PORTS - 1),
                }
                return
            self._lock.close()
        raise ConfigError(f"the ports of {_CLUSTERS} Ray clusters are taken on this machine")

    def close(self) -> None:
        """Release the block."""
        self._lock.close()


def _bound(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind((_HOST, port))
    except OSError:
        return False
    return True


def _free(port: int) -> bool:
    with socket.socket() as probe:
        # So that connections in TIME_WAIT do not count as a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _bound(probe, port)
