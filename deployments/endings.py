"""How a call ends: recorded once, whoever comes first, and shown to the client as an error."""

from __future__ import annotations

import logging
from collections.abc import Callable

from starlette.responses import Response

from calm_serve.errors import CalmError, CapacityError, SLMUnavailableError
from deployments import dispatch

log = logging.getLogger("ray.serve")


class Finish:
    """Records a call once: at the answer's end, at an error, or when the client has gone."""

    def __init__(self, call: dispatch.Call, record: Callable[[], None]) -> None:
        self._call, self._record = call, record
        self._done = False

    def __call__(self, response: Response | None = None) -> Response:
        """Record the call, unless that was done, and pass the response through."""
        if not self._done:
            self._done = True
            try:
                self._record()
            except Exception:  # whatever it is: the client gets the answer that is there
                log.exception("call %s not written down", self._call.decision.decision_id)
        return response or Response()

    def __del__(self) -> None:
        # A client may leave before its stream was begun; then nobody else comes.
        if not self._done:
            cancelled(self._call)
            self()


def cancelled(call: dispatch.Call) -> None:
    """The client has gone."""
    call.status, call.http_status = "cancelled", 499


def refused(call: dispatch.Call, error: CalmError) -> CalmError:
    """Nobody took the call. Being full or asleep says nothing against the SLM."""
    call.http_status = error.http_status
    call.status = "rejected" if isinstance(error, CapacityError) else "error"
    return error


def gone(call: dispatch.Call, error: BaseException) -> CalmError:
    """What the client hears of an SLM that failed while answering, or took too long."""
    call.status = "error"
    if isinstance(error, TimeoutError):
        failure = SLMUnavailableError(f"SLM {call.slm_id!r} did not finish in time")
        failure.http_status = 504
    else:
        failure = SLMUnavailableError(f"SLM {call.slm_id!r} failed while answering")
    call.http_status = failure.http_status
    return failure
