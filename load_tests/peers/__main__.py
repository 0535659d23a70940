"""`python -m load_tests.peers install`."""

from __future__ import annotations

import sys

from load_tests.peers.gateways import main

if __name__ == "__main__":
    sys.exit(main())
