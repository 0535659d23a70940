"""Token batches from a stream of examples, bucketed by length, with a loss weight per token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from deployments.reference_fleet.corpora.examples import Example
from deployments.reference_fleet.training.tokens import END, TokenizerSpec, render

POOL = 2048  # examples sorted together
LONGEST = 384  # tokens
MULTIPLE = 8  # padded lengths are rounded up to this

Encoded = tuple[list[int], int]  # tokens of prompt and answer, length of the prompt
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids [b, t], loss weight of each id [b, t]


def encode(
    tokenizer: PreTrainedTokenizerFast, spec: TokenizerSpec, examples: list[Example]
) -> list[Encoded]:
    """Token ids of each example and the length of its prompt."""
    core = tokenizer.backend_tokenizer
    # A call of the tokenizer with padding leaves it switched on in the shared backend.
    core.no_padding()
    prompts = core.encode_batch(
        [render(spec, e.messages) for e in examples], add_special_tokens=False
    )
    answers = core.encode_batch([e.answer + END for e in examples], add_special_tokens=False)
    return [(p.ids + a.ids, len(p.ids)) for p, a in zip(prompts, answers, strict=True)]


def batches(
    tokenizer: PreTrainedTokenizerFast,
    spec: TokenizerSpec,
    examples: Iterator[Example],
    tokens: int,
    prompt_weight: float,
    seed: int,
) -> Iterator[Batch]:
    """Endless batches of at most about `tokens` tokens each, padding included."""
    rng = Random(seed)
    while True:
        pool = [
            e for e in encode(tokenizer, spec, list(islice(examples, POOL))) if len(e[0]) <= LONGEST
        ]
        pool.sort(key=lambda e: len(e[0]))
        groups: list[list[Encoded]] = [[]]
        for item in pool:
            if (len(groups[-1]) + 1) * len(item[0]) > tokens:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            yield _pad(group, tokenizer.pad_token_id, prompt_weight)


def _pad(group: list[Encoded], pad: int, prompt_weight: float) -> Batch:
    longest = max(len(ids) for ids, _ in group)
    width = -(-longest // MULTIPLE) * MULTIPLE
    ids = torch.full((len(group), width), pad)
    weights = torch.zeros(len(group), width)
    # Padding on the right needs no mask: attention is causal and its loss weight is 0.
    for row, (tokens, prompt) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, :prompt] = prompt_weight
        weights[row, prompt : len(tokens)] = 1.0
    return ids, weights
