"""What an SLM replica tells the router of one answer, beside the answer's own bytes."""

from __future__ import annotations

from dataclasses import dataclass

from calm_serve.protocol.formats import RecordFormat
from calm_serve.types import EngineFacts, QualitySignal


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """What the router tells the replica of a request, beside the client's body."""

    decision_id: str = ""
    adapter: str = ""
    validate: str = ""  # name of the check that the client requested
    labels: tuple[str, ...] = ()
    residency_revision: int | None = None  # of the router; None without a memory budget
    # What the replica tells all routers of the prompt, as `PromptEnd`; () when unknown.
    prefix_end: tuple[int, ...] = ()
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """Facts of a finished answer. `failure` is an error message when it broke off."""

    facts: EngineFacts
    signals: tuple[QualitySignal, ...] = ()
    ongoing: int = 0  # requests in the replica, this one not included
    failure: str = ""
    engine_dead: bool = False


ANSWER_REQUEST: RecordFormat[AnswerRequest] = RecordFormat("answer_request", 1, AnswerRequest)
ANSWER_END: RecordFormat[AnswerEnd] = RecordFormat("answer_end", 1, AnswerEnd)
