"""Greedy answers of a model in memory, without a server, and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deployments.reference_fleet.corpora.examples import Example
from deployments.reference_fleet.grading.marks import marks
from deployments.reference_fleet.training.tokens import TokenizerSpec, render

NEW_TOKENS = {"intent": 28, "reason": 110, "sql": 280}
DEFAULT_NEW_TOKENS = 160


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """Greedy continuations of rendered prompts, in batches of 64, left padded."""
    answers: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    spec: TokenizerSpec,
    examples: list[Example],
) -> dict[str, dict[str, float]]:
    """Per task: `n`, and the mean of every measure of `grading.marks` over the n examples."""
    model.eval()
    table: dict[str, dict[str, float]] = {}
    for task in sorted({e.task for e in examples}):
        rows = [e for e in examples if e.task == task]
        prompts = [render(spec, e.messages) for e in rows]
        answers = greedy(model, tokenizer, prompts, NEW_TOKENS.get(task, DEFAULT_NEW_TOKENS))
        found = [marks(task, a, [e.answer]) for a, e in zip(answers, rows, strict=True)]
        names = dict.fromkeys(name for one in found for name in one)
        table[task] = {"n": len(rows)} | {
            name: round(sum(one.get(name, 0.0) for one in found) / len(rows), 4) for name in names
        }
    model.train()
    return table
