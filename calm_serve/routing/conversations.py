"""Which SLM answered a conversation, and what it would cost to go on with another one."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from calm_serve.config import SLMSpec
from calm_serve.prediction import cached_prefill_s
from calm_serve.types import Prediction, RoutingContext, SLMState

# Keys remembered, about 5 MB: at 50 requests a second, those of ten minutes.
MAX_CONVERSATIONS = 32_768


class ConversationMemory:
    """Bounded memory of one router. Single-threaded; every operation takes constant time.

    A conversation that is forgotten, or that another router answered, is decided anew.

    A conversation is found by a hash of its messages up to the last answer, which every next turn
    repeats, else by the session that the client names. Neither needs the other.
    """

    def __init__(self, size: int = MAX_CONVERSATIONS) -> None:
        """Remember `size` keys; a conversation in a session has two."""
        self._size = size
        self._slms: OrderedDict[int | str, str] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys remembered."""
        return len(self._slms)

    def find(self, parent_key: int, session_key: str) -> str:
        """Return the SLM of the last answer, "" when it is not known."""
        found = self._slms.get(parent_key)
        if found is None and session_key:
            found = self._slms.get(session_key)
        return found or ""

    def note(self, context: RoutingContext, slm_id: str) -> None:
        """Note the SLM that answers a request, or that has answered it after a failover."""
        for key in (context.conversation_key, context.session_key):
            if key:
                self._slms[key] = slm_id
                self._slms.move_to_end(key)
        while len(self._slms) > self._size:
            self._slms.popitem(last=False)


def with_cached_history(
    prediction: Prediction, context: RoutingContext, spec: SLMSpec, state: SLMState
) -> Prediction:
    """Return the prediction for the SLM that has the conversation's prefix in its cache.

    The others would compute the prefix anew, so they win only by gaining more than that costs.
    Predictions expect the mean share of cached tokens; only what exceeds it is saved.
    """
    if spec.id != context.previous_slm:
        return prediction
    expected_tokens = state.cached_prefix_ratio * context.prompt_tokens
    cached_tokens = min(context.history_tokens, context.prompt_tokens) - expected_tokens
    if cached_tokens <= 0.0:
        return prediction
    saved_s = cached_prefill_s(spec, state, cached_tokens)
    return replace(prediction, ttft_s=max(prediction.ttft_s - saved_s, 0.0))
