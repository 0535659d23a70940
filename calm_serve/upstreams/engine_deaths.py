"""Engine deaths: which requests were alone in engines that died, so that none kills many.

What was beside others is not kept: any of them may have killed the engine, or none.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

# As long as clients repeat a request, and much longer than two kills from outside (out of memory)
# of engines that happen to run equal requests.
LIFETIME_S = 600.0
MAX_REQUESTS = 1024
POISON_DEATHS = 2  # one may be a kill from outside; that is rare enough not to happen twice
# Fields that do not change what an engine computes.
_IRRELEVANT = frozenset(("model", "stream", "stream_options", "user", "metadata"))


class EngineDeaths:
    """Deaths of engines by the one request that they worked on. Bounded.

    `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deaths: OrderedDict[bytes, deque[float]] = OrderedDict()  # times, oldest first

    def add(self, path: str, body: Mapping[str, Any]) -> None:
        """Count an engine that died while it worked on this request alone."""
        key = _key(path, body)
        times = self._deaths.setdefault(key, deque(maxlen=POISON_DEATHS))
        times.append(self._clock())
        self._deaths.move_to_end(key)
        while len(self._deaths) > MAX_REQUESTS:
            self._deaths.popitem(last=False)

    def count(self, path: str, body: Mapping[str, Any]) -> int:
        """Return the deaths with this request in the last LIFETIME_S, POISON_DEATHS at most."""
        self._expire()
        if not self._deaths:  # nearly always; the body is not even hashed
            return 0
        since = self._clock() - LIFETIME_S
        return sum(at > since for at in self._deaths.get(_key(path, body), ()))

    def _expire(self) -> None:
        since = self._clock() - LIFETIME_S
        while self._deaths and next(iter(self._deaths.values()))[-1] <= since:
            self._deaths.popitem(last=False)


def _key(path: str, body: Mapping[str, Any]) -> bytes:
    relevant = {name: value for name, value in body.items() if name not in _IRRELEVANT}
    text = json.dumps([path, relevant], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
