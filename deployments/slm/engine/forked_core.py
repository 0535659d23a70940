"""The engine core as a fork of the replica, which has imported vLLM. Pinned to vLLM 0.32."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from multiprocessing.context import ForkContext, ForkProcess

from vllm.v1.engine import utils as engine_utils

_PR_SET_PDEATHSIG = 1


class _ForkedCore(ForkProcess):
    """An engine-core process that inherits the parent's imports and dies with the parent."""

    def run(self) -> None:
        # The replica may be killed before it can clean up; its engine must not outlive it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        super().run()


class _CoreContext(ForkContext):
    Process = _ForkedCore


def fork_cores() -> None:
    """Have vLLM fork its engine cores from this process.

    The core is a child process. Inside Ray actors vLLM spawns it, which imports vLLM a second time:
    6 to 7 s of CPU and 0.5 GB each. A fork saves both. It is safe here, because the child uses only
    what vLLM creates after the fork, and never Ray's client.
    """
    engine_utils.get_mp_context = lambda: _CoreContext()
    multiprocessing.current_process().daemon = False
