"""Serves the packaged models until standard input ends: `python -m tests.clients.service`.

It runs in the server's environment, its clients in another one. The first line of its output is
the endpoint's URL.
"""

from __future__ import annotations

import sys

from tests.integration.packaged_fleet import packaged_config
from tests.integration.served_fleet import ServedFleet


def main() -> None:
    """Serve until standard input ends, as it does when the tests end in any way."""
    with ServedFleet(packaged_config()).running() as fleet:
        sys.stdout.write(f"{fleet.url}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
