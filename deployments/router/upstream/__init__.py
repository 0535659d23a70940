"""Upstream: how a router's requests reach SLMs over HTTP. Owner: router replica. Never blocks.

One path for all: a replica of the fleet, whose bytes pass unchanged, and a remote SLM, whose bytes
are read first. Judgements (what failed, what follows) are those of `calm_serve.upstreams`.
"""

from deployments.router.upstream.connections import Upstream

__all__ = ["Upstream"]
