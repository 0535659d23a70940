"""Rows of examples that share one prompt prefix, for models with a chat template of their own.

A chat template puts the same tokens in front of almost every request (role tokens, the default
system prompt). A row holds them once: each example attends to them and to itself, at the positions
that it has when it is alone. So the result is the same as one example per row, without the padding
and without computing the prefix again (about a third of the tokens).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from deployments.reference_fleet.corpora.examples import Example

ROW_TOKENS = 512
POOL = 1024  # examples encoded and packed together
LONGEST = 448  # tokens of an example without the prefix


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of an example after the prefix, and how many of them are the prompt's."""

    ids: list[int]
    prompt: int
    shares_prefix: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row of t tokens.

    `ids` [1, t], `positions` [1, t], `mask` [1, 1, t, t] (True: may attend), `targets` [t]: the
    next token where it belongs to an answer, else -100.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor


class ChatEncoder:
    """Renders examples with the chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        one, other = (self._prompt([{"role": "user", "content": text}]) for text in ("a", "b"))
        same = [a == b for a, b in zip(one, other, strict=True)]
        self.prefix = one[: same.index(False)]

    def encode(self, example: Example) -> Encoded:
        """Token ids of prompt and answer, the answer with the token that ends a turn."""
        prompt = self._prompt(example.messages)
        answer = self._tokenizer.encode(example.answer, add_special_tokens=False)
        end = self._tokenizer.eos_token_id
        shares = prompt[: len(self.prefix)] == self.prefix
        own = prompt[len(self.prefix) :] if shares else prompt
        return Encoded([*own, *answer, end], len(own), shares)

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def pack(prefix: list[int], examples: list[Encoded]) -> Row:
    """One row of the prefix and then every example."""
    ids, positions, owner = list(prefix), list(range(len(prefix))), [0] * len(prefix)
    targets = [-100] * len(prefix)
    for number, example in enumerate(examples, start=1):
        first = len(prefix) if example.shares_prefix else 0
        ids += example.ids
        positions += range(first, first + len(example.ids))
        owner += [number if example.shares_prefix else -number] * len(example.ids)
        answer = example.ids[example.prompt :]
        targets += [-100] * (example.prompt - 1) + answer + [-100]
    owners = torch.tensor(owner)
    same = owners[:, None] == owners[None, :]
    to_prefix = (owners[:, None] > 0) & (owners[None, :] == 0)
    mask = (same | to_prefix).tril()
    return Row(
        torch.tensor([ids]), torch.tensor([positions]), mask[None, None], torch.tensor(targets)
    )


def rows(encoder: ChatEncoder, examples: Iterable[Example], seed: int) -> Iterator[Row]:
    """Rows of at most `ROW_TOKENS` tokens, each with examples of all lengths."""
    rng, source = Random(seed), iter(examples)
    while pool := [encoder.encode(e) for e in islice(source, POOL)]:
        packed: list[list[Encoded]] = [[]]
        size = len(encoder.prefix)
        for example in pool:
            if len(example.ids) > LONGEST:
                continue
            if size + len(example.ids) > ROW_TOKENS:
                packed.append([])
                size = len(encoder.prefix)
            packed[-1].append(example)
            size += len(example.ids)
        rng.shuffle(packed)
        yield from (pack(encoder.prefix, group) for group in packed if group)
