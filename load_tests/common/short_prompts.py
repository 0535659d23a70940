"""Chat requests of a known length, all different, with answers of a fixed length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count, cycle
from random import Random
from typing import Any

from deployments.reference_fleet.grading.rows import load
from load_tests.common.load import Request, post

OUTPUT_TOKENS = 64
SEED = 11
DEFAULT_TEXTS = 400
SHORT_QUESTIONS = 2  # about 60 tokens of tokenizer B
LONG_QUESTIONS = 28  # about 800


def texts(count: int, seed: int = SEED, questions: int = SHORT_QUESTIONS) -> list[str]:
    """`count` texts of several held-out questions each, the same for the same seed."""
    rows = [row.prompt for row in load("sql") if row.side == "workload"]
    rng = Random(seed)
    return [" ".join(rng.sample(rows, questions)) for _ in range(count)]


class ShortPrompts:
    """Makes requests of the texts in turn, each after a new number, so that no prefix is reused."""

    def __init__(self, use: Sequence[str] = (), output_tokens: int = OUTPUT_TOKENS) -> None:
        self._texts = cycle(use or texts(DEFAULT_TEXTS))
        self._count = count(1)
        self._output_tokens = output_tokens

    def body(self, model: str, *, stream: bool) -> dict[str, Any]:
        """The body of the next request."""
        number = next(self._count)
        text = f"No. {number}: {next(self._texts)}"
        found: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self._output_tokens,
            "ignore_eos": True,
            "temperature": 1,
            "seed": number,
        }
        if stream:
            found |= {"stream": True, "stream_options": {"include_usage": True}}
        return found

    def request(
        self, url: str, model: str, *, slm: str = "", stream: bool = True, key: str = ""
    ) -> Request:
        """The next request to an endpoint; `slm` is the SLM it is for, if `model` is not its id."""
        body = json.dumps(self.body(model, stream=stream)).encode()
        return post(url, "/v1/chat/completions", body, slm or model, key)
